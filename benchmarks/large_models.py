"""JEEP on models of real size with random weights: seconds an edit, the rate it runs at, and memory.

    python -m benchmarks.large_models --shape gpt-j-6b llama-7b --device cuda --n 512 --steps 20 30
    python -m benchmarks.large_models --shape llama-256 --n 32 --steps 5     # to try it on a CPU
    python -m benchmarks.moments --shape gpt-j-6b llama-7b --tokens 1000000 --device cuda

Time does not depend on the weights' values. Edits are the embedded world's, every one runs all its steps (no stop), and
second moments are the identity. The rate counts what the search cannot do without (`fast_path.floor`), and is set
against the best matrix product of the model's dtype measured in the same run. Beside it is what a step asks of the
host, counted on the edits that are searched at once (`counting.py`): operators that run something, times that the host
waits for the device, tensors made from Python's numbers, and in how many shapes the steps of a chunk are run. With
`--pace card` a CPU runs its steps as a card would, fused operations included.
"""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from benchmarks.common import command_line, dtype_on, machine, print_row, timed
from benchmarks.counting import CountedChunk
from benchmarks.fast_path import floor
from benchmarks.moments import SHAPES, product_rates, random_lm
from retcon import world
from retcon.edits import Edit
from retcon.errors import LargeChange
from retcon.lm.model import LM
from retcon.lm.peak import Peak
from retcon.lm.replay import fused
from retcon.lm.site import Site
from retcon.memory.contexts import Contexts, sample_contexts
from retcon.memory.moments import GivenMoments
from retcon.memory.values import schedule, search_values
from retcon.memory.values.objective import ValueSearch, ValueSite
from retcon.memory.values.plan import plan_search
from retcon.memory.values.rows import EditRows
from retcon.memory.values.schedule import Pace
from retcon.methods.jeep import Jeep


def settings(layers: Sequence[int], steps: int) -> Jeep:
    """Return JEEP on a shape's layers, taking every step: those in a row are the low group, after the gap the high."""
    gap = next((i for i in range(1, len(layers)) if layers[i] > layers[i - 1] + 1), len(layers) - 1)
    low, high = tuple(layers[:gap]), tuple(layers[gap:])
    return Jeep(low=low, high=high, steps=steps, stop="loss", threshold=0.0)


def identity(sites: Iterable[Site]) -> GivenMoments:
    """Return the identity as second moment of every site."""
    return GivenMoments({site.name: torch.eye(site.weight.shape[1]) for site in sites})


def prepared(lm: LM, method: Jeep) -> tuple[GivenMoments, Contexts, list[ValueSite], ValueSearch]:
    """Return what an edit takes: moments, contexts, where values are searched, and how."""
    groups = [g for g in method.groups() if g]
    moments = identity(lm.site(layer, g.module) for g in groups for layer in g.layers)
    return moments, sample_contexts(lm), [method.value_site(g) for g in groups], method.value_search()


def measure(name: str, lm: LM, edits: Sequence[Edit], steps: int, profile: AbstractContextManager) -> None:
    """Print one row of the table."""
    method = settings(SHAPES[name][1], steps)
    moments, contexts, places, search = prepared(lm, method)
    method.propose(lm, edits[:2], contexts=contexts, moments=moments)  # warms up
    rate = max(product_rates(lm).values())
    with Peak(lm.device) as peak, profile:
        _, searching = timed(lambda: search_values(lm, edits, places, contexts, search))
    delta, whole = timed(lambda: method.propose(lm, edits, contexts=contexts, moments=moments))
    least = floor(lm, method, edits, contexts, [r.steps for r in delta.report])
    n = len(edits)
    asked = count(lm, edits, places, contexts, search)
    memory = f"{peak.nbytes / 2**30:.1f}" if peak.nbytes else "unknown"
    plan = delta.provenance["values"][0]["chunks"]
    cells = [
        name, f"{n:,}", steps, f"{searching / n:.4f}", f"{whole / n:.4f}", f"{10_000 * whole / n / 60:.1f}",
        f"{least / searching / 1e12:.2f}", f"{rate / 1e12:.2f}", f"{100 * least / searching / rate:.0f} %", memory,
        f"{max(w for _, w in plan)}", *asked,
    ]  # fmt: skip
    print_row(*cells)


def as_on_a_card() -> None:
    """Let a CPU run its steps as a card would, for the rest of the process."""
    schedule.LOOK_EVERY.clear()
    schedule.MAX_SHAPES.clear()
    fused.OWN_CODE_ON.clear()


def count(
    lm: LM, edits: Sequence[Edit], sites: Sequence[ValueSite], contexts: Contexts, search: ValueSearch
) -> list[str]:
    """Return launches, waits and uploads per step, and shapes, of the first chunk of the plan."""
    with lm.frozen_eval():
        rows = [EditRows.of(lm, edit, sites, contexts, search) for edit in edits]
        first = plan_search(lm, rows, sites).chunks[0]
        chunk = CountedChunk(lm, [rows[i] for i in first.edits], sites, replace(search, steps=min(search.steps, 9)))
        for _ in chunk.run(first.max_active, pace=replace(Pace.on(lm.device.type), capture=None)):
            pass
    steps = chunk.steps
    n = len(steps)
    return [
        f"{sum(s.launches for s in steps) / n:,.0f}",
        f"{sum(s.waits for s in steps) / n:.2f}",
        f"{sum(s.uploads for s in steps) / n:.2f}",
        f"{len({s.shape for s in steps})}",
    ]


def main() -> None:
    """Print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--shape", nargs="+", default=["gpt-j-6b"], choices=SHAPES)
    parser.add_argument("--n", type=int, default=512, help="edits")
    parser.add_argument("--steps", type=int, nargs="+", default=[20], help="steps that every edit takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="bfloat16 on a GPU and float32 on a CPU if left out")
    parser.add_argument("--pace", choices=["card"], help="run a CPU's steps in the shapes of a card's")
    parser.add_argument("--profile", help="folder for a trace of the search, in Chrome's format")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore", LargeChange)
    torch.manual_seed(args.seed)
    if args.pace:
        as_on_a_card()
    dtype = args.dtype or dtype_on(args.device)
    print(f"{machine()}, {dtype} on {args.device}, seed {args.seed}\n")
    print(
        "| shape | edits | steps | search, s an edit | JEEP, s an edit | 10,000 edits, min | search, TFLOP/s |"
        " products, TFLOP/s | share | peak GiB | edits at once | launches a step | waits a step | uploads a step |"
        " shapes of a chunk |\n" + "|" + "---|" * 15
    )
    edits = [c.edits[0] for c in world.cases(args.n, seed=args.seed)]
    for name in args.shape:
        lm = random_lm(name, args.device, getattr(torch, dtype))
        for steps in args.steps:
            profile: AbstractContextManager = nullcontext()
            if args.profile:
                profile = torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(args.profile))
            measure(name, lm, edits, steps, profile)
        del lm


if __name__ == "__main__":
    main()
