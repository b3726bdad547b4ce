"""Is this checkout slower than an older one? The same JEEP edits by both, in alternation, each time in a new process.

    git worktree add ../older f0674c9
    python -m benchmarks.two_checkouts ../older . --model demo:gptj demo:llama --n 100 --rounds 2

Seconds of the processor, so that other processes on the machine disturb less; the least of the rounds counts, and the
ratio is the older checkout's over the newer one's. Both edit by the older one's preset. Contexts and moments are at
hand, and two edits warm up.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, machine, print_row

PROGRAM = """
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


def edited_by(checkout: Path, asked: Sequence[Any]) -> dict[str, Any]:
    """Return what a process of a checkout says of its edits."""
    path = os.pathsep.join([str(checkout / "src"), str(checkout)])
    command = [sys.executable, "-P", "-c", PROGRAM, json.dumps(asked)]  # -P: nothing of the folder it runs in
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = command_line(__doc__)
    parser.add_argument("older", type=Path, help="folder of a checkout")
    parser.add_argument("newer", type=Path)
    parser.add_argument("--model", nargs="+", default=["demo:gptj"], help="model ids or paths")
    parser.add_argument("--data", help="CounterFact file; the embedded world's cases by default")
    parser.add_argument("--corpus", help="text file for the second moments; the model's default if left out")
    parser.add_argument("--n", type=int, default=100, help="edits")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    print(f"{machine()}\n\n| model | edits | older, ms an edit | newer, ms an edit | older / newer | same steps |")
    print("|---|---|---|---|---|---|")
    for name in args.model:
        path = str(Path(name).resolve()) if Path(name).exists() else name
        settings: dict[str, Any] = {}
        took: dict[Path, list[float]] = {args.older: [], args.newer: []}
        steps: dict[Path, list[int]] = {}
        for i in range(args.rounds):
            for checkout in list(took)[:: -1 if i % 2 else 1]:
                found = edited_by(checkout.resolve(), [path, args.n, args.data, args.corpus, settings])
                settings = settings or found["settings"]  # the older one's preset, which comes first, for both
                took[checkout].append(found["processor"])
                steps[checkout] = found["steps"]
        older, newer = ([1000 * t / args.n for t in took[c]] for c in (args.older, args.newer))
        same = sum(a == b for a, b in zip(steps[args.older], steps[args.newer], strict=True))
        cells = [
            name.rstrip("/").rsplit("/", 1)[-1], f"{args.n}", " / ".join(f"{t:.0f}" for t in older),
            " / ".join(f"{t:.0f}" for t in newer), f"**{min(older) / min(newer):.2f}**", f"{same} of {args.n}",
        ]  # fmt: skip
        print_row(*cells)


if __name__ == "__main__":
    main()
