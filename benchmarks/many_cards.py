"""What very many edits would take on 1 to 64 cards, by count, and where it stops scaling.

    python -m benchmarks.many_cards --shape gpt-j-6b --n 1000000
    python -m benchmarks.many_cards --shape llama-3-8b --rate 8e14 --share 0.45

A model of cost, nothing is run: FLOPs are counted on the shape (weights on no device) for edits of the embedded world,
and divided by rates that are given. Replace those by what `benchmarks.gpu` prints on your card. The search is spread
over the cards; its results travel to the process that asked, which reads the keys and solves, one batch after the
other, since the next batch is searched on the weights that this one leaves.
"""

import statistics
from dataclasses import dataclass

import torch

from benchmarks.common import command_line, flops_per_token, print_row
from benchmarks.fast_path import floor
from benchmarks.large_models import settings
from benchmarks.moments import SHAPES, random_lm
from retcon import world
from retcon.memory.contexts import Contexts

CARDS = (1, 2, 4, 8, 16, 32, 64)
PREFIXES = Contexts(("The ", "It was late. ", "I read that ", "In the end ", "He said: "))


@dataclass(frozen=True)
class PerEdit:
    """What one edit takes, on average."""

    search: float
    """FLOPs of the value search."""
    keys: float
    """FLOPs of reading keys, every layer once."""
    nbytes: float
    """What its values weigh when they travel."""


@dataclass(frozen=True)
class Edited:
    """What is written."""

    layers: int
    d_ff: int
    d_model: int


def counted(name: str, steps: int, n: int) -> tuple[PerEdit, Edited]:
    """Return the counts of JEEP on a shape, over n edits of the embedded world."""
    lm = random_lm(name, "meta", torch.bfloat16)
    method = settings(SHAPES[name][1], steps)
    edits = [case.edits[0] for case in world.cases(n)]
    search = floor(lm, method, edits, PREFIXES, [steps - 1] * n) / n
    per_token = flops_per_token(lm.block(0))
    layers = sorted({layer for g in method.groups() if g for layer in g.layers})
    tokens = statistics.mean(
        sum(len(lm.tokenizer(prefix + edit.text).input_ids) for prefix in PREFIXES.all) for edit in edits
    )
    n_sites = sum(1 for g in method.groups() if g)
    edited = Edited(len(layers), lm.site(layers[0], "down_proj").weight.shape[1], lm.d_model)
    return PerEdit(search, per_token * tokens * (max(layers) + 1), 3 * 4 * n_sites * lm.d_model), edited


def write_flops(edited: Edited, n: int) -> float:
    """Return the FLOPs of one batch's write: sums over keys, a factor and a solve, per layer."""
    d, r = edited.d_ff, edited.d_model
    return edited.layers * (2 * n * d * d + 2 * n * d * r + d**3 / 3 + 2 * d * d * r)


def main() -> None:
    """Print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--shape", default="gpt-j-6b", choices=SHAPES)
    parser.add_argument("--n", type=int, default=1_000_000, help="edits")
    parser.add_argument("--batch", type=int, default=10_000, help="edits written at once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=8e14, help="FLOP/s of matrix products on one card")
    parser.add_argument("--share", type=float, default=0.2, help="of that rate which the search reaches")
    parser.add_argument("--rate64", type=float, default=3e13, help="FLOP/s in float64, of the write")
    parser.add_argument("--bandwidth", type=float, default=1.25e9, help="bytes a second to the process that asked")
    args = parser.parse_args()
    edit, edited = counted(args.shape, args.steps, 64)
    batches = -(-args.n // args.batch)
    search = args.n * edit.search / (args.rate * args.share)
    keys = args.n * edit.keys / (args.rate * args.share)
    transfer = args.n * edit.nbytes / args.bandwidth
    write = batches * write_flops(edited, args.batch) / args.rate64
    print(
        f"{args.shape}, {args.n:,} JEEP edits in {batches} batches, {args.steps} steps; assumed: "
        f"{args.rate:.2g} FLOP/s, {100 * args.share:.0f} % of it, {args.rate64:.2g} in float64, "
        f"{args.bandwidth / 1e9:.3g} GB/s\n"
        f"an edit: {edit.search / 1e12:.2f} TFLOP to search, {edit.keys / 1e12:.3f} for its keys, "
        f"{edit.nbytes / 1e3:.0f} kB of values\n"
        f"keys of a batch: {4 * args.batch * edited.d_ff * edited.layers / 2**30:.1f} GiB in float32\n"
    )
    print(
        "| cards | search, h | transfer, h | keys, h | write, h | in all, h | of one card's speed | share in one place"
        " |"
    )
    print("|---" * 8 + "|")
    one_place = transfer + keys + write
    alone = search + one_place - transfer
    for cards in CARDS:
        moved = transfer if cards > 1 else 0.0
        whole = search / cards + moved + keys + write
        cells = [
            f"{cards}", *(f"{x / 3600:.2f}" for x in (search / cards, moved, keys, write, whole)),
            f"{alone / whole:.1f} x", f"{100 * (whole - search / cards) / whole:.0f} %",
        ]  # fmt: skip
        print_row(*cells)


if __name__ == "__main__":
    main()
