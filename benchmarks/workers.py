"""What a second worker brings: the value search and the whole of `propose` with one and with two workers.

    python -m benchmarks.workers --model demo:gptj --n 400 --on processes ray
    python -m benchmarks.workers --model demo:gptj --n 40 --on processes --trials 8

Workers are started, and have loaded the model, before the clock is; one and two workers take turns, and the least of
`--rounds` counts. The delta must be that of this process, to the bit. With `--trials` a search for the settings of
fine-tuning is timed instead, whose candidates are the pieces; its trials must be those of this process.
"""

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
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
from retcon.workflow.tuning import tune

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
    parser.add_argument("--trials", type=int, default=0, help="search the settings of fine-tuning with so many trials")
    args = parser.parse_args()
    warnings.simplefilter("ignore", LargeChange)
    lm = retcon.load(args.model)
    moments = moments_of(lm, args.corpus)
    cases = cases_of(args.data, args.start, args.n, args.seed)
    edits = [c.edits[0] for c in cases]
    jeep = jeep_of(lm)

    def propose() -> tuple[Any, list[float]]:
        delta, *seconds = timed_search(lambda: jeep.propose(lm, edits, moments=moments, seed=args.seed))
        return (delta.id, delta.report), seconds

    def search_settings() -> tuple[Any, list[float]]:
        started = time.perf_counter()
        found = tune(lm, "ft", cases, max_trials=args.trials, seed=args.seed)
        trials = [replace(trial, seconds=0.0) for trial in found.trials]
        return (found.method, trials, found.summary.as_dict()), [time.perf_counter() - started]

    do, what, times = propose, f"JEEP, {len(edits)} edits", ["search", "propose"]
    if args.trials:
        do, what, times = search_settings, f"ft, {args.trials} trials, {len(cases)} cases", ["tune"]
    wanted, alone = do()
    few, many = args.workers
    print(f"{machine()}\n{args.model}, {what}, {torch.get_num_threads()} thread a worker")
    print(f"this process alone: {', '.join(f'{name} {s:.1f} s' for name, s in zip(times, alone, strict=True))}\n")
    heads = ["on", *(head for name in times for head in (f"{name}, {few} / {many} workers, s", "gain")), "same result"]
    print_row(*heads)
    print("|---" * len(heads) + "|")
    for kind in args.on:
        found: dict[int, list[list[float]]] = {few: [], many: []}
        same = True
        with ExitStack() as stack:
            if kind == "ray":
                stack.enter_context(RayCluster(n=few + many))  # room for both
            places = {n: stack.enter_context(place(kind, n)) for n in found}
            for at in places.values():
                with working_on(lm, at):
                    do()  # each worker loads the model
            for _ in range(args.rounds):
                for n, at in places.items():
                    with working_on(lm, at):
                        result, seconds = do()
                    found[n].append(seconds)
                    same &= result == wanted
        cells = [kind]
        for i in range(len(times)):
            one, two = (min(seconds[i] for seconds in found[n]) for n in (few, many))
            cells += [f"{one:.1f} / {two:.1f}", f"**{one / two:.2f}**"]
        print_row(*cells, "yes" if same else "NO")


if __name__ == "__main__":
    main()
