"""Localising facts over all layers: activations against weight gradients, same scores, one run.

    python -m benchmarks.attribution --model demo:gptj --n 5

Four ways to the row scores of every down-projection, path "layer":

- `separate`: per layer, m passes over one row with the matrix scaled and its weight gradient taken, as in the formula;
- `batched`: per layer, one pass over m copies of the row, with the output scaled and a weight gradient per copy;
- `activations`: per layer, one pass over m copies, activations and their gradients only, the whole model run;
- `replayed`: the same with only the blocks behind the matrix (what the library does), one fact at a time;
- `pooled`: the same for all facts together.

Forms are timed alternately, `--repeat` times, after a first round to warm up; the fastest is shown. Peak memory is what
tracemalloc cannot see, so it is the high-water mark of tensors alive, counted by a dispatch mode in a further round.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import retcon
from benchmarks.common import cases_of, command_line, machine, timed
from retcon.edits import Edit
from retcon.lm.forward import answer_log_probs, gold
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.lm.site import Site
from retcon.locate.attribution import Attribution, attribute
from retcon.locate.gradients import catch
from retcon.training.objective import answer_rows

Scores = list[Tensor]


def f(lm: LM, rows: Sequence[Row]) -> Tensor:
    """Return the sum of the answer tokens' probabilities, over rows."""
    return gold(answer_log_probs(lm, rows), rows).exp().sum()


def separate(lm: LM, facts: Sequence[Edit], sites: Sequence[Site], how: Attribution) -> Scores:
    """Compute Eq. 5 literally: for each fact, layer and point, a pass and a weight gradient."""
    rows = answer_rows(lm, facts)
    scores = []
    with lm.frozen_eval():
        for site in sites:
            weight = site.module.get_parameter("weight")
            trained, total = weight.detach().clone(), torch.zeros_like(weight)
            for row in rows:
                for alpha in how.points()[0].tolist():
                    weight.data = alpha * trained
                    weight.requires_grad_(True)
                    (g,) = torch.autograd.grad(f(lm, [row]), [weight])
                    total += g
                    weight.requires_grad_(False)
            weight.data = trained
            full = (total * trained).T if site.transposed else total * trained
            scores.append(full.sum(1) / (how.n_points * len(facts)))
    return scores


def batched(lm: LM, facts: Sequence[Edit], sites: Sequence[Site], how: Attribution) -> Scores:
    """Compute all points of a fact and layer in one pass, and a weight gradient for each."""
    alpha = how.points()[0].float()
    scores = [torch.zeros(len(site.weight)) for site in sites]
    with lm.frozen_eval():
        for row in answer_rows(lm, facts):
            for score, site in zip(scores, sites, strict=True):
                kept: list[Tensor] = []

                def scale(_: Any, args: tuple[Any, ...], output: Tensor, kept: list[Tensor] = kept) -> Tensor:
                    bias = 0.0 if site.bias is None else site.bias  # noqa: B023 (used while the site is)
                    scaled = (alpha[:, None, None] * (output - bias)).detach().requires_grad_()
                    kept[:] = [args[0], scaled]
                    return scaled + bias

                with site.module.register_forward_hook(scale), torch.enable_grad():
                    objective = f(lm, [row] * how.n_points)
                (g,) = torch.autograd.grad(objective, [kept[1]])
                gradients = torch.einsum("mto,mti->moi", g, kept[0])  # one whole weight gradient per point
                score += (gradients.mean(0) * site.weight).sum(1) / len(facts)
    return scores


def activations(lm: LM, facts: Sequence[Edit], sites: Sequence[Site], how: Attribution) -> Scores:
    """Compute all points of a fact and layer in one pass from the tokens on, activations and their gradients only."""
    alpha, weight = how.points()
    scores = [torch.zeros(len(site.weight)) for site in sites]
    with lm.frozen_eval():
        for row in answer_rows(lm, facts):
            for score, site in zip(scores, sites, strict=True):
                for caught in catch([site], partial(f, lm, [row] * how.n_points), alpha.float()):
                    score += caught.rows() * float(weight[0]) / len(facts)
    return scores


def replayed(lm: LM, facts: Sequence[Edit], sites: Sequence[Site], how: Attribution) -> Scores:
    """Run the library's form, one fact at a time."""
    each = [attribute(lm, [fact], sites, how) for fact in facts]
    return [torch.stack(scores).mean(0) for scores in zip(*each, strict=True)]


def pooled(lm: LM, facts: Sequence[Edit], sites: Sequence[Site], how: Attribution) -> Scores:
    """Run the library's form, facts side by side."""
    return attribute(lm, facts, sites, how)


FORMS: dict[str, Callable[[LM, Sequence[Edit], Sequence[Site], Attribution], Scores]] = {
    "separate": separate,
    "batched": batched,
    "activations": activations,
    "replayed": replayed,
    "pooled": pooled,
}


class TensorPeak(TorchDispatchMode):
    """The most bytes that tensors made inside ever held at once (each storage once)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return made

    def _see(self, storage: Any) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if not place or place in self.known:
            return
        self.known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def main() -> None:
    parser = command_line(__doc__, cases=True)
    parser.add_argument("--n", type=int, default=5, help="facts")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()

    lm = retcon.load(args.model)
    facts = [case.edits[0] for case in cases_of(args.data, args.start, args.n, args.seed)]
    sites = [lm.site(layer, "down_proj") for layer in range(lm.n_layers)]
    how = Attribution(n_points=args.points)
    wanted = separate(lm, facts, sites, how)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    off: dict[str, float] = {}
    for repeat in range(args.repeat + 1):
        for name, form in FORMS.items():
            found, took = timed(partial(form, lm, facts, sites, how))
            if repeat:
                seconds[name].append(took / len(facts))
            largest = max(float(w.abs().max()) for w in wanted)
            off[name] = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) / largest
    print(f"{args.model}, {args.n} facts, m = {args.points}, {lm.n_layers} layers; {machine()}\n")
    print("| form | s/fact | against separate | peak memory, MB | furthest score off |\n|---|---|---|---|---|")
    first = min(seconds["separate"])
    for name, form in FORMS.items():
        with TensorPeak() as peak:
            form(lm, facts[:1], sites, how) if name != "pooled" else form(lm, facts, sites, how)
        fastest = min(seconds[name])
        print(
            f"| {name} | {fastest:.3f} | {first / fastest:.1f} | {peak.peak / 1e6:.1f} | {off[name]:.1e} |", flush=True
        )


if __name__ == "__main__":
    main()
