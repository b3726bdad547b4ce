"""What an edit keeps when the edited model is quantised afterwards.

    python -m benchmarks.quantised --model demo:llama --n 100
    python -m benchmarks.quantised --model .cache/smollm2-135m --data FILE --corpus text.txt --n 20

Weights are rounded here as the simplest quantisers do it: to the nearest of 2^bits evenly spaced values, symmetric,
with a scale per output row for 8 bits, per group of 32 or 128 inputs for 4; all matrices of the blocks. They are run in
float32, so what is lost is what rounding loses, not what a kernel does to activations. One line of JSON per method and
treatment with Score, ES, GS, LS (`cf.prob_mean`) and how many edits the model says first: the edited model in float,
rounded, and the rounded unedited model with the edit beside it in float, as an adapter is.
"""

import copy
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import retcon
from benchmarks.common import cases_of, command_line, machine, moments_of, percents
from retcon.edits import Case
from retcon.evaluation import evaluate
from retcon.lm.model import LM
from retcon.methods.common.choosing import choose
from retcon.methods.common.proposal import answers

METHODS = ("memit", "jeep")
TREATMENTS: dict[str, tuple[int, int | None]] = {
    "8 bits, per row": (8, None),
    "4 bits, groups of 32": (4, 32),
    "4 bits, groups of 128": (4, 128),
}
"""Bits, and inputs that share a scale (None: all of a row)."""


def rounded(weight: Tensor, bits: int, group: int | None) -> Tensor:
    """Return W (out, in) rounded to multiples of a scale per row and group of inputs; a last group may be short."""
    groups = weight.split(group or weight.shape[1], dim=1)
    return torch.cat([_nearest(part, 2 ** (bits - 1) - 1) for part in groups], dim=1)


def _nearest(part: Tensor, top: int) -> Tensor:
    scale = part.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
    return (part / scale).round().clamp(-top, top) * scale


def round_blocks(lm: LM, bits: int, group: int | None) -> None:
    """Round every matrix of every block of a model that nothing is applied to, in place."""
    for layer in range(lm.n_layers):
        for module in lm.block(layer).modules():
            if isinstance(module, nn.Linear):
                with torch.no_grad():
                    module.weight.copy_(rounded(module.weight, bits, group))


def copied(lm: LM, change: Callable[[LM], None] = lambda lm: None) -> LM:
    """Return a model of its own with the weights that `lm` has now."""
    made = LM(copy.deepcopy(lm.model), lm.tokenizer, name=lm.name)
    change(made)
    return made


def measured(lm: LM, cases: list[Case]) -> dict[str, Any]:
    """Return the figures of a model."""
    found = percents(evaluate(lm, cases, generate=False).summary(), "pre")
    return {**found, "first": sum(first for _, first in answers(lm, [case.edits[0] for case in cases]))}


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, quiet=True)
    parser.add_argument("--n", type=int, default=100, help="cases")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    asked = parser.parse_args()
    print(f"# {machine()}", flush=True)
    lm = retcon.load(asked.model)
    moments = moments_of(lm, asked.corpus)
    cases = cases_of(asked.data, asked.start, asked.n, asked.seed)

    def show(method: str, treatment: str, model: LM) -> None:
        line = {"model": lm.label, "method": method, "weights": treatment, "n": len(cases), **measured(model, cases)}
        print(json.dumps(line, ensure_ascii=False), flush=True)

    show("unedited", "float32", lm)
    for name, (bits, group) in TREATMENTS.items():
        show("unedited", name, copied(lm, partial(round_blocks, bits=bits, group=group)))
    for method in asked.methods:
        chosen = choose(method, for_model=lm, cases=cases)
        delta = chosen.method.propose(lm, [case.edits[0] for case in cases], moments=moments, seed=asked.seed)
        with lm.edited(delta):
            edited = copied(lm)
        show(method, "float32", edited)
        for name, (bits, group) in TREATMENTS.items():
            show(method, name, copied(edited, partial(round_blocks, bits=bits, group=group)))
            beside = copied(lm, partial(round_blocks, bits=bits, group=group))
            beside.apply(delta, other_base=True)
            show(method, f"{name}, the edit beside it", beside)


if __name__ == "__main__":
    main()
