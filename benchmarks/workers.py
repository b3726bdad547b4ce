"""What a second worker brings: the value search and the whole of `propose` with one and with two workers.

    python -m benchmarks.workers --model demo:gptj --n 400 --on processes ray

Workers are started, and have loaded the model, before the clock is; one and two workers take turns, and the least of
`--rounds` counts. The delta must be that of this process, to the bit.
"""

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import torch

import retcon
from benchmarks.common import cases_of, command_line, jeep_of, machine, moments_of, print_row
from retcon.cluster import workers, working_on
from retcon.cluster.actors import RayCluster
from retcon.delta import Delta
from retcon.errors import LargeChange
from retcon.memory.values import search_values
from retcon.work import Workers

CLOCK = "retcon.methods.common.proposal.search_values"


def place(kind: str, n: int) -> AbstractContextManager[Workers]:
    """Return n workers of a kind."""
    return RayCluster(n=n) if kind == "ray" else workers(f"{kind}:{n}")


def timed_search(propose: Callable[[], Delta]) -> tuple[Delta, float, float]:
    """Return the delta, the seconds of its value search, and those of the whole."""
    searching = 0.0

    def search(*args: Any, **kwargs: Any) -> Any:
        nonlocal searching
        started = time.perf_counter()
        found = search_values(*args, **kwargs)
        searching += time.perf_counter() - started
        return found

    started = time.perf_counter()
    with patch(CLOCK, search):
        delta = propose()
    return delta, searching, time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = command_line(__doc__, cases=True, corpus=True)
    parser.add_argument("--n", type=int, default=400, help="edits")
    parser.add_argument("--on", nargs="+", default=["processes", "ray"], choices=["processes", "ray"])
    parser.add_argument("--workers", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    warnings.simplefilter("ignore", LargeChange)
    lm = retcon.load(args.model)
    moments = moments_of(lm, args.corpus)
    edits = [c.edits[0] for c in cases_of(args.data, args.start, args.n, args.seed)]
    jeep = jeep_of(lm)

    def propose() -> Delta:
        return jeep.propose(lm, edits, moments=moments, seed=args.seed)

    wanted, searching, whole = timed_search(propose)
    few, many = args.workers
    print(f"{machine()}\n{args.model}, JEEP, {len(edits)} edits, {torch.get_num_threads()} thread a worker")
    print(f"this process alone: search {searching:.1f} s, propose {whole:.1f} s\n")
    print(f"| on | search, {few} / {many} workers, s | gain | propose, s | gain | same delta |\n" + "|---" * 6 + "|")
    for kind in args.on:
        found: dict[int, list[tuple[float, float]]] = {few: [], many: []}
        same = True
        with ExitStack() as stack:
            if kind == "ray":
                stack.enter_context(RayCluster(n=few + many))  # room for both
            places = {n: stack.enter_context(place(kind, n)) for n in found}
            for at in places.values():
                with working_on(lm, at):
                    propose()  # each worker loads the model
            for _ in range(args.rounds):
                for n, at in places.items():
                    with working_on(lm, at):
                        delta, *seconds = timed_search(propose)
                    found[n].append((seconds[0], seconds[1]))
                    same &= delta.id == wanted.id and delta.report == wanted.report
        search, propose_s = ({n: min(t[i] for t in times) for n, times in found.items()} for i in (0, 1))
        cells = [
            kind, f"{search[few]:.1f} / {search[many]:.1f}", f"**{search[few] / search[many]:.2f}**",
            f"{propose_s[few]:.1f} / {propose_s[many]:.1f}", f"**{propose_s[few] / propose_s[many]:.2f}**",
            "yes" if same else "NO",
        ]  # fmt: skip
        print_row(*cells)


if __name__ == "__main__":
    main()
