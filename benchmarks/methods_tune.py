"""Sweep a method's settings on a small model, all edits at once (one by one for methods that take one fact).

    python -m benchmarks.methods_tune --method memit --model demo:gptj --start 1000 --cases 100 \
        --grid 'clamp=[2,4,6]' 'moment_weight=[30,300]' --set 'layers=[1,2,3]'

Every combination of the grid is one line: Score, ES, GS, LS and seconds per edit (of those that differ in the write
alone, the first pays for the values); the best five stand last. For models that are not shipped, give --model PATH
--data FILE [--corpus FILE].
"""

import argparse
import itertools
import json
import time
import tomllib
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import retcon
from benchmarks.common import add_places, cases_of, moments_of
from retcon.errors import RetconWarning
from retcon.evaluation import evaluate
from retcon.memory.values import ValueCache
from retcon.methods.common.sequence import in_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True)
    add_places(parser, start=1000)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--grid", nargs="*", default=[], metavar="FIELD=[...]", help="values to try, as TOML lists")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="settings for all, as TOML")
    parser.add_argument("--batch-size", type=int)
    args = parser.parse_args()

    with TemporaryDirectory() as folder:
        sweep(args, Path(folder))


def sweep(args: argparse.Namespace, folder: Path) -> None:
    """Every combination of the grid, a line each; values that are needed again are kept in `folder`."""
    warnings.simplefilter("ignore", RetconWarning)
    lm = retcon.load(args.model)
    cases = cases_of(args.data, args.start, args.cases, args.seed)
    edits = [case.edits[0] for case in cases]
    contexts = retcon.sample_contexts(lm, seed=args.seed)
    moments = moments_of(lm, args.corpus)
    pre = evaluate(lm, cases, generate=False)
    grid = tomllib.loads("\n".join(args.grid))
    found = []
    for values in itertools.product(*grid.values()):
        settings = tomllib.loads("\n".join(args.set)) | dict(zip(grid, values, strict=True))
        method = retcon.method(args.method, for_model=lm, **settings)
        started = time.perf_counter()
        kept = ValueCache(folder)  # settings that differ in the write alone share their values
        delta = in_steps(method, lm, edits, batch_size=args.batch_size, contexts=contexts, moments=moments, values=kept)
        seconds = (time.perf_counter() - started) / len(edits)
        summary = evaluate(lm, cases, delta=delta, pre=pre, generate=False).summary(n_resamples=2)
        row = {m: round(100 * (summary[m].post.value or 0), 1) for m in ("Score", "ES", "GS", "LS")}
        reached = sum(r.stopped == "reached" for r in delta.report) / len(edits)
        found.append({**settings, **row, "reached": round(reached, 2), "seconds_per_edit": round(seconds, 3)})
        print(json.dumps(found[-1]), flush=True)
    print("\nbest:")
    for row in sorted(found, key=lambda r: r["Score"])[-5:]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
