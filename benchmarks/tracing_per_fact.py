"""Does causal tracing say, fact by fact, where ROME will succeed?

    python -m benchmarks.tracing_per_fact --model demo:gptj
    python -m benchmarks.tracing_per_fact --model PATH --data counterfact-edit.json --corpus text.txt

Hase et al. 2023 (arXiv:2301.04213), table 2: every fact is traced, and edited alone at every layer with ROME's other
settings (the model's preset). A fact's effect at a layer is what restoring the state of its last subject token there
gains; an edit's score is (p - p₀) / (1 - p₀) of the new answer, on the edit's prompt ("rewrite") and averaged over its
paraphrases. Within a layer, Pearson's r between facts says whether the effect tells facts apart; over all layers, R² of
a linear model on the layer (a constant for each) and on the layer and the effect (one slope) says what tracing adds to
knowing the layer.
"""

import math
import warnings

import torch
from torch import Tensor

import retcon
from benchmarks.common import cases_of, command_line, machine, moments_of, print_row
from retcon.edits import Case
from retcon.errors import RetconWarning
from retcon.evaluation.score import score
from retcon.lm.model import LM
from retcon.locate import Tracing, causal_trace
from retcon.locate.tracing import RestoredKind, default_window

SCORES = ("rewrite", "paraphrase")
LEAST_FACTS = 4
"""Fisher's z has an interval from here on."""


def probabilities(lm: LM, case: Case) -> Tensor:
    """Return the new answer's geometric mean per token: on the edit's prompt, and averaged over its paraphrases."""
    (edit,) = case.edits
    prompts = [query.prompt for query in case.queries if query.axis == "paraphrase"]
    found = score(lm, [(prompt, edit.target_new) for prompt in (edit.text, *prompts)])
    rewrite, *others = (math.exp(-each.nll_mean) for each in found)
    return torch.tensor([rewrite, sum(others) / len(others) if others else math.nan])


def pearson(x: Tensor, y: Tensor) -> str:
    """Return r with a 95 % interval by Fisher's z; nothing where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    if not float(x.norm() * y.norm()):
        return ""
    r = float(x @ y / (x.norm() * y.norm()))
    half = 1.96 / (len(x) - 3) ** 0.5
    low, high = (math.tanh(math.atanh(r) + side * half) for side in (-1, 1))
    return f"{r:+.2f} [{low:+.2f}, {high:+.2f}]"


def explained(effects: Tensor, scores: Tensor) -> tuple[float, float]:
    """Return R² over (facts, layers) of the layer alone, and of layer and effect."""
    total = float((scores - scores.mean()).square().sum())
    within, x = scores - scores.mean(0), effects - effects.mean(0)
    slope = float((x * within).sum() / x.square().sum())
    alone, both = (1 - float(rest.square().sum()) / total for rest in (within, within - slope * x))
    return alone, both


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, dataset=True)
    parser.add_argument("--n", type=int, default=50)
    args = parser.parse_args()
    if args.n < LEAST_FACTS:
        parser.error(f"--n {args.n}: a correlation and its interval take {LEAST_FACTS} facts at least")

    lm = retcon.load(args.model)
    print(f"{args.model}, seed {args.seed}; {machine()}")
    cases = {case.edits[0].id: case for case in cases_of(args.data, args.start, args.n, args.seed)}
    kinds: tuple[RestoredKind, ...] = ("block", "mlp")
    settings = Tracing(kinds=kinds, window=default_window(lm.n_layers), seed=args.seed)
    traces = causal_trace(lm, [case.edits[0] for case in cases.values()], settings).traces
    effects = {kind: torch.stack([t.indirect(kind)[t.subject.stop - 1] for t in traces]) for kind in kinds}
    contexts, moments = retcon.sample_contexts(lm, seed=args.seed), moments_of(lm, args.corpus)
    moments.prepare(lm, [lm.site(layer, "down_proj") for layer in range(lm.n_layers)])
    before = torch.stack([probabilities(lm, cases[t.id]) for t in traces])
    by_layer = []
    for layer in range(lm.n_layers):
        rome = retcon.method("rome", for_model=lm, dataset=args.dataset, layer=layer)
        after = []
        for trace in traces:
            with warnings.catch_warnings(action="ignore", category=RetconWarning):  # some layers need large changes
                delta = rome.propose(lm, cases[trace.id].edits, contexts=contexts, moments=moments, seed=args.seed)
            with lm.edited(delta):
                after.append(probabilities(lm, cases[trace.id]))
        by_layer.append((torch.stack(after) - before) / (1 - before))
    scores = torch.stack(by_layer, 1).double()  # (facts, layers, scores)

    print(f"{len(traces)} facts\n")
    pairs = [(kind, name) for kind in kinds for name in SCORES]
    print_row("layer", *(f"effect, {kind}" for kind in kinds), *SCORES, *(f"r: {kind}, {name}" for kind, name in pairs))
    print("|---" * (1 + len(kinds) + len(SCORES) + len(pairs)) + "|")
    for layer in range(lm.n_layers):
        cells = [f"{float(effects[kind][:, layer].mean()):.3f}" for kind in kinds]
        cells += [f"{float(scores[:, layer, i].mean()):.2f}" for i in range(len(SCORES))]
        cells += [pearson(effects[kind][:, layer], scores[:, layer, SCORES.index(name)]) for kind, name in pairs]
        print_row(layer, *cells)
    print()
    print_row("score", "R² of the layer", *(f"and {kind}'s effect" for kind in kinds))
    print("|---|---|" + "---|" * len(kinds))
    for i, name in enumerate(SCORES):
        found = [explained(effects[kind], scores[:, :, i]) for kind in kinds]
        print_row(name, f"{found[0][0]:.3f}", *(f"{both:.3f}" for _, both in found))


if __name__ == "__main__":
    main()
