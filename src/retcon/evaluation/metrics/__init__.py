"""What is computed from scores and texts: pure functions, no model, no files.

The same column header means different things in different papers, so every value carries a `variant` beside its
metric:

- `cf.*` (CounterFact; ROME, arXiv:2202.05262): is the wanted answer more probable than its rival? `cf.prob_mean`
  compares mean token log-probabilities (all published tables), `cf.prob_sum` whole-answer ones, `cf.magnitude` is the
  difference of the geometric mean token probabilities, `cf.all_correct` says whether the whole answer is the greedy
  choice.
- `zsre.*` (MEND, arXiv:2110.11309; MEMIT, arXiv:2210.07229): is the answer the model's own choice, given the gold
  tokens before each token? `zsre.tok` is the share of tokens, `zsre.seq` all of them, `zsre.first` the first.
- `ee.*` (EasyEdit, arXiv:2308.07269): `ee.tok` is `zsre.tok` by that family's name; `ee.loc.argmax` and `ee.loc.gen`
  ask whether two models choose the same tokens, or write the same text, right or wrong.
- `gen.*`: does the text that the model writes give the answer? Nothing is handed to it, neither prefix nor length.
- `flu.*`, `cons.*`, `loc.kl`, `ppl.*`: how much of its language is left (fluency.py, consistency.py, drift).
- `mq.*`, `ripple.*`: what several queries of one case say together (several.py).
"""

from retcon.evaluation.metrics.forced import accuracy, agreement, compare, easyedit, unchanged
from retcon.evaluation.metrics.names import Measured, is_locality, metric_names, prompt_kind
from retcon.evaluation.metrics.scores import macro, micro, score_am, score_hm
from retcon.evaluation.metrics.written import (
    Answers,
    Judge,
    accepted,
    gen_contains,
    gen_em,
    gen_prefix,
    length,
    matches,
    normalise,
    same_text,
)

__all__ = [
    "Answers",
    "Judge",
    "Measured",
    "accepted",
    "accuracy",
    "agreement",
    "compare",
    "easyedit",
    "gen_contains",
    "gen_em",
    "gen_prefix",
    "is_locality",
    "length",
    "macro",
    "matches",
    "metric_names",
    "micro",
    "normalise",
    "prompt_kind",
    "same_text",
    "score_am",
    "score_hm",
    "unchanged",
]
