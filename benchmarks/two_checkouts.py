"""Is this checkout slower than an older one? The same work by both, in alternation, each time in a new process.

    git worktree add ../older f0674c9
    python -m benchmarks.two_checkouts ../older . --model demo:gptj demo:llama --n 100 --rounds 2
    python -m benchmarks.two_checkouts ../older . --evaluate --n 1000 --rounds 4

JEEP's edits, or with `--evaluate` the unedited model's evaluation, scores alone and with written answers. Seconds of
the processor, so that other processes on the machine disturb less; the least of the rounds counts, and the ratio is
the older checkout's over the newer one's. Both edit by the older one's preset. Contexts and moments are at hand, and
two edits or cases warm up.
"""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, machine, print_row

EDITS = """
import json, sys, time, warnings
import retcon
from benchmarks.common import cases_of, moments_of
from retcon.memory.contexts import sample_contexts
from dataclasses import asdict
model, n, data, corpus, settings = json.loads(sys.argv[1])
settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
warnings.simplefilter("ignore")
lm = retcon.load(model)
moments, contexts, jeep = moments_of(lm, corpus), sample_contexts(lm), retcon.method("jeep", for_model=lm, **settings)
edits = [c.edits[0] for c in cases_of(data, 0, n, 0)]
jeep.propose(lm, edits[:2], contexts=contexts, moments=moments)
wall, processor = time.perf_counter(), time.process_time()
delta = jeep.propose(lm, edits, contexts=contexts, moments=moments)
print(json.dumps({
    "processor": time.process_time() - processor, "wall": time.perf_counter() - wall,
    "steps": [r.steps for r in delta.report], "settings": asdict(jeep),
}))
"""


EVALUATION = """
import inspect, json, sys, time, warnings
import retcon
from benchmarks.common import cases_of
from retcon.evaluation import Measures, evaluate
model, n, data = json.loads(sys.argv[1])
warnings.simplefilter("ignore")
lm, cases, found = retcon.load(model), cases_of(data, 0, n, 0), []
asked = "measures" in inspect.signature(evaluate).parameters
for generate in (False, False, True):
    options = {"generate": generate, "stops": ("\\n", ".")}
    options = {"measures": Measures(**options)} if asked else options
    evaluate(lm, cases[:2], **options)
    processor = time.process_time()
    evaluation = evaluate(lm, cases, **options)
    found.append([time.process_time() - processor, len(evaluation.records)])
alone, again, written = found
print(json.dumps({"scores alone": min(alone, again), "with written answers": written}))
"""


def done_by(checkout: Path, program: str, asked: Sequence[Any]) -> dict[str, Any]:
    """Return what a process of a checkout says of its work."""
    path = os.pathsep.join([str(checkout / "src"), str(checkout)])
    command = [sys.executable, "-P", "-c", program, json.dumps(asked)]  # -P: nothing of the folder it runs in
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_turns(checkouts: Sequence[Path], rounds: int) -> Iterator[Path]:
    """Give the checkouts, as often as there are rounds, every second time the other way round."""
    for i in range(rounds):
        yield from checkouts[:: -1 if i % 2 else 1]


def compare_edits(checkouts: Sequence[Path], models: Sequence[str], args: Namespace) -> None:
    """Print a row for each model: how long its edits took."""
    print("| model | edits | older, ms an edit | newer, ms an edit | older / newer | same steps |")
    print("|---|---|---|---|---|---|")
    for model in models:
        settings: dict[str, Any] = {}
        took: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
        steps: dict[Path, list[int]] = {}
        for checkout in in_turns(checkouts, args.rounds):
            found = done_by(checkout, EDITS, [model, args.n, args.data, args.corpus, settings])
            settings = settings or found["settings"]  # the older one's preset, which comes first, for both
            took[checkout].append(1000 * found["processor"] / args.n)
            steps[checkout] = found["steps"]
        same = sum(a == b for a, b in zip(*steps.values(), strict=True))
        print_row(short(model), f"{args.n}", *compared(took, ".0f"), f"{same} of {args.n}")


def compare_evaluations(checkouts: Sequence[Path], models: Sequence[str], args: Namespace) -> None:
    """Print two rows for each model: how long its evaluation took."""
    print("| model | cases | what | older, s | newer, s | older / newer | records |")
    print("|---|---|---|---|---|---|---|")
    for model in models:
        found: dict[Path, list[dict[str, Any]]] = {checkout: [] for checkout in checkouts}
        for checkout in in_turns(checkouts, args.rounds):
            found[checkout].append(done_by(checkout, EVALUATION, [model, args.n, args.data]))
        for what in found[checkouts[0]][0]:
            took = {checkout: [each[what][0] for each in rounds] for checkout, rounds in found.items()}
            records = dict.fromkeys(f"{rounds[0][what][1]:,}" for rounds in found.values())
            print_row(short(model), f"{args.n:,}", what, *compared(took, ".1f"), " / ".join(records))


def compared(took: Mapping[Path, Sequence[float]], digits: str) -> list[str]:
    """Return the cells of a row: the times of both, and the ratio of the shortest ones."""
    older, newer = took.values()
    times = [" / ".join(f"{t:{digits}}" for t in each) for each in (older, newer)]
    return [*times, f"**{min(older) / min(newer):.2f}**"]


def short(model: str) -> str:
    """Return a model's name without its folder."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def main() -> None:
    """Print the table."""
    parser = command_line(__doc__)
    parser.add_argument("older", type=Path, help="folder of a checkout")
    parser.add_argument("newer", type=Path)
    parser.add_argument("--evaluate", action="store_true", help="time evaluation in place of edits")
    parser.add_argument("--model", nargs="+", default=["demo:gptj"], help="model ids or paths")
    parser.add_argument("--data", help="CounterFact file; the embedded world's cases by default")
    parser.add_argument("--corpus", help="text file for the second moments; the model's default if left out")
    parser.add_argument("--n", type=int, default=100, help="edits, or cases")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    models = [str(Path(name).resolve()) if Path(name).exists() else name for name in args.model]
    print(f"{machine()}\n")
    compare = compare_evaluations if args.evaluate else compare_edits
    compare([args.older.resolve(), args.newer.resolve()], models, args)


if __name__ == "__main__":
    main()
