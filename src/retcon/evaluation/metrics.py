"""What is computed from scores and texts: pure functions, no model, no files.

The same column header means different things in different papers, so every value carries a `variant` beside its
metric:

- `cf.*` (CounterFact; ROME, arXiv:2202.05262): is the wanted answer more probable than its rival? `cf.prob_mean`
  compares mean token log-probabilities (all published tables), `cf.prob_sum` whole-answer ones, `cf.magnitude` is the
  difference of the geometric mean token probabilities, `cf.all_correct` says whether the whole answer is the greedy
  choice.
- `zsre.*` (MEND, arXiv:2110.11309; MEMIT, arXiv:2210.07229): is the answer the model's own choice, given the gold
  tokens before each token? `zsre.tok` is the share of tokens, `zsre.seq` all of them, `zsre.first` the first.
- `ee.loc.argmax` (EasyEdit, arXiv:2308.07269): do two models choose the same tokens, right or wrong?
- `gen.*`: does the text that the model writes give the answer? Nothing is handed to it, neither prefix nor length.
"""

import math
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from retcon.edits import Query
from retcon.evaluation.score import TokenScore

Answers = Sequence[Sequence[str]]
"""Outer: distinct answers; inner: aliases of one."""

_NAMES = {"rewrite": ("ES", "EM", "EA"), "paraphrase": ("GS", "PM", "PA"), "neighborhood": ("LS", "NM", "NA")}


@dataclass(frozen=True, slots=True)
class Measured:
    """One number from one query."""

    metric: str
    """`ES`, `GS`, `LS`, ..., or the axis where it has no name of its own."""
    variant: str
    value: float | None
    """0 to 1 (magnitudes: -1 to 1); None where a log-probability was NaN or infinite."""
    n: int
    """Target tokens behind the value (words, for generated text)."""
    tie: bool = False
    """The two answers were exactly as probable; neither wins."""


def metric_names(axis: str) -> tuple[str, str, str]:
    """Names of success, magnitude and accuracy on an axis; an axis without published names gives its own."""
    if axis in _NAMES:
        return _NAMES[axis]
    if is_locality(axis):
        return _NAMES["neighborhood"]
    return axis, axis, axis


def is_locality(axis: str) -> bool:
    """Whether the axis asks for what an edit must leave alone."""
    return axis == "neighborhood" or axis.startswith("locality.")


# --- teacher forcing ---------------------------------------------------------------------------------------------


def compare(axis: str, target: TokenScore, contrast: TokenScore) -> list[Measured]:
    """The CounterFact family for one query: the target must be more probable than its rival.

    On neighbours the target is the true answer, so the same comparison serves ES, GS and LS. Ties fail.
    """
    success, magnitude, accuracy = metric_names(axis)
    n = len(target.target)
    if not (target.finite and contrast.finite):
        pairs = [(success, "cf.prob_mean"), (success, "cf.prob_sum"), (magnitude, "cf.magnitude")]
        pairs += [(accuracy, "cf.all_correct"), (success, "zsre.tok")]
        return [Measured(metric, variant, None, n) for metric, variant in pairs]
    mean, rival_mean = target.nll_mean, contrast.nll_mean
    total, rival_total = target.nll_sum, contrast.nll_sum
    return [
        Measured(success, "cf.prob_mean", float(mean < rival_mean), n, mean == rival_mean),
        Measured(success, "cf.prob_sum", float(total < rival_total), n, total == rival_total),
        Measured(magnitude, "cf.magnitude", math.exp(-mean) - math.exp(-rival_mean), n),
        Measured(accuracy, "cf.all_correct", float(target.all_correct), n),
        Measured(success, "zsre.tok", target.tok_acc, n),
    ]


def accuracy(axis: str, target: TokenScore) -> list[Measured]:
    """The zsRE family for one query: how much of the target is the model's own choice."""
    success, n = metric_names(axis)[0], len(target.target)
    if not target.finite:
        return [Measured(success, variant, None, n) for variant in ("zsre.tok", "zsre.seq", "zsre.first")]
    return [
        Measured(success, "zsre.tok", target.tok_acc, n),
        Measured(success, "zsre.seq", float(target.all_correct), n),
        Measured(success, "zsre.first", float(target.first_correct), n),
    ]


def agreement(pre: Sequence[int], post: Sequence[int]) -> float:
    """Share of positions where two models choose the same token; 1 for a model and itself, whatever it says."""
    return sum(a == b for a, b in zip(pre, post, strict=True)) / len(pre)


# --- generated text ----------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """For comparing only: NFC, lower case, no ASCII punctuation, no articles (a, an, the), single spaces.

    Text that is nothing but articles and punctuation keeps them ("The The", "+").
    """
    lowered = " ".join(unicodedata.normalize("NFC", text).lower().split())
    bare = lowered.translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or lowered


def gen_em(text: str, answers: Answers, mode: Literal["any", "all"] = "any") -> bool:
    """The text is an answer, both normalised."""
    return _matches(text, answers, mode, lambda written, alias: written == alias)


def gen_prefix(text: str, answers: Answers, mode: Literal["any", "all"] = "any") -> bool:
    """The text starts with an answer, at a word boundary."""
    return _matches(text, answers, mode, lambda written, alias: f"{written} ".startswith(f"{alias} "))


def gen_contains(text: str, answers: Answers, mode: Literal["any", "all"] = "any") -> bool:
    """An answer occurs in the text as whole words. Rambling text that quotes many answers passes too easily."""
    return _matches(text, answers, mode, lambda written, alias: f" {alias} " in f" {written} ")


def matches(query: Query, text: str) -> list[Measured]:
    """All generation variants for one query. `text` is newly written text only, never the prompt."""
    success, n = metric_names(query.axis)[0], len(text.split())
    answers = accepted(query)
    tests = {"gen.em": gen_em, "gen.prefix": gen_prefix, "gen.contains": gen_contains}
    return [Measured(success, v, float(test(text, answers, query.answers_mode)), n) for v, test in tests.items()]


def accepted(query: Query) -> Answers:
    """What counts as right in generated text: the query's answers, or its target where it names none."""
    return query.answers or (((query.target,),) if query.target else ())


def _matches(text: str, answers: Answers, mode: str, test: Callable[[str, str], bool]) -> bool:
    written = normalise(text)
    found = [any(test(written, alias) for alias in map(normalise, aliases) if alias) for aliases in answers]
    return bool(found) and (all(found) if mode == "all" else any(found))


# --- over cases --------------------------------------------------------------------------------------------------


def macro(values: Mapping[str, Sequence[float]]) -> float | None:
    """Mean over cases of the mean inside each case; cases without a value are left out, never counted as 0."""
    cases = [math.fsum(v) / len(v) for v in values.values() if len(v)]
    return math.fsum(cases) / len(cases) if cases else None


def score_hm(parts: Sequence[float | None]) -> float | None:
    """Harmonic mean of dataset-level values (ROME, MEMIT, JEEP): 0 if any is 0, None if any was not measured."""
    known = [p for p in parts if p is not None]
    if not known or len(known) < len(parts):
        return None
    return 0.0 if min(known) <= 0 else len(known) / math.fsum(1 / p for p in known)


def score_am(es: float | None, gs: float | None, ls: float | None) -> float | None:
    """Arithmetic mean of the three; of the first two where locality was not measured."""
    if es is None or gs is None:
        return None
    return (es + gs) / 2 if ls is None else (es + gs + ls) / 3
