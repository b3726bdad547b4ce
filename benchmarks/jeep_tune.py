"""Sweep JEEP's settings on a small model: values are optimised once per layers and clamps, weights on C swept on top.

    python -m benchmarks.jeep_tune --model demo:gptj --cases 200 --low 2,3,4 --high 5,6 \
        --low-clamp 2 4 6 --high-clamp 0.5 1 --low-weight 10 100 --high-weight 10 100

Prints one line per setting, the best last, and writes all of them to --out as JSON lines. For models that are not
shipped, give --model PATH --data FILE [--corpus FILE].
"""

import argparse
import itertools
import json
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import retcon
from benchmarks.common import add_places, cases_of, moments_of
from retcon.evaluation import evaluate
from retcon.memory.values import search_values
from retcon.memory.write import write
from retcon.methods.jeep import Jeep


def layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_places(parser)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--low", type=layers, nargs="+", required=True)
    parser.add_argument("--high", type=layers, nargs="+", required=True)
    parser.add_argument("--low-clamp", type=float, nargs="+", default=[1.0])
    parser.add_argument("--high-clamp", type=float, nargs="+", default=[0.25])
    parser.add_argument("--low-weight", type=float, nargs="+", default=[100.0])
    parser.add_argument("--high-weight", type=float, nargs="+", default=[100.0])
    parser.add_argument("--weight-decay", type=float, nargs="+", default=[0.5])
    parser.add_argument("--kl-factor", type=float, nargs="+", default=[0.0625])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    lm = retcon.load(args.model)
    cases = cases_of(args.data, args.start, args.cases, args.seed)
    edits = [case.edits[0] for case in cases]
    contexts = retcon.sample_contexts(lm, seed=args.seed)
    moments = moments_of(lm, args.corpus)
    pre = evaluate(lm, cases, generate=False)
    found = []
    grid = itertools.product(args.low, args.high, args.low_clamp, args.high_clamp, args.weight_decay, args.kl_factor)
    for low, high, low_clamp, high_clamp, decay, kl_factor in grid:
        base = Jeep(
            low=low,
            high=high,
            low_clamp=low_clamp,
            high_clamp=high_clamp,
            low_weight_decay=decay,
            high_weight_decay=decay,
            kl_factor=kl_factor,
        )
        started = time.perf_counter()
        groups = [g for g in base.groups() if g]
        sites = [base.value_site(g) for g in groups]
        values = search_values(lm, edits, sites, contexts, base.value_search())
        seconds = (time.perf_counter() - started) / len(edits)
        moments.prepare(lm, [lm.site(layer, "down_proj") for layer in low + high])
        for low_weight, high_weight in itertools.product(args.low_weight, args.high_weight):
            setting = replace(base, low_moment_weight=low_weight, high_moment_weight=high_weight)
            with ExitStack() as scope:
                for i, group in enumerate(g for g in setting.groups() if g):
                    write(lm, edits, values.target(i), group, contexts, moments, scope)
                summary = evaluate(lm, cases, pre=pre, generate=False).summary(n_resamples=2)
            row = {
                "low": low, "high": high, "low_clamp": low_clamp, "high_clamp": high_clamp, "weight_decay": decay,
                "kl_factor": kl_factor, "low_weight": low_weight, "high_weight": high_weight,
                "seconds_per_edit": round(seconds, 3),
                **{m: round(100 * (summary[m].post.value or 0), 1) for m in ("Score", "ES", "GS", "LS")},
            }  # fmt: skip
            found.append(row)
            print(json.dumps(row), flush=True)
    found.sort(key=lambda r: r["Score"])
    print("\nbest:")
    for row in found[-5:]:
        print(json.dumps(row))
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
