"""What is left of earlier edits as more are made: a curve per method, and a picture.

    python -m benchmarks.retention run --model demo:gptj --edits 500 --step 10 --out retention.jsonl
    python -m benchmarks.retention plot retention.jsonl --out retention

Edits come in steps; every step is proposed on top of all before it, and a method's state is handed on. Every `--every`
edits, all edits so far are measured: Score, ES, GS, and LS. PRUNE is MEMIT's run, restrained at the point of measuring
(as published: once, after the last edit). Settings are the model's presets.
"""

import argparse
import json
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import retcon
from benchmarks.common import (
    METRICS,
    add_cases,
    add_corpus,
    add_dataset,
    add_editors,
    cases_of,
    command_line,
    estimated,
    machine,
    moments_of,
    named,
)
from benchmarks.methods_table import FAMILY
from benchmarks.methods_table import ROWS as METHODS
from retcon.drawing import figure, save
from retcon.evaluation import evaluate
from retcon.methods.common.sequence import in_steps

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{label: (name, {}) for label, name in METHODS.items() if label not in ("PRUNE", "MEND")},
    "MEMIT-seq": ("memit", {"cache_keys": True}),
    "JEEP, separate": ("jeep", {"dataset": "world-separate"}),
}
FINE_TUNING = ("FT", "FT-L", "FT-M", "FT-WD", "Full-C", "LoRA", "AdaLoRA")
"""Drawn dashed."""
MARKERS = "os^DvPX*<>hp"


def run(args: argparse.Namespace) -> None:
    lm = retcon.load(args.model)
    cases = cases_of(args.data, args.start, args.edits, args.seed)
    contexts, moments = retcon.sample_contexts(lm, seed=args.seed), moments_of(lm, args.corpus)
    pre = evaluate(lm, cases, generate=False)
    print(f"{args.model}, seed {args.seed}; {machine()}")
    with args.out.open("a", encoding="utf-8") as out:

        def measured(label: str, n: int) -> None:
            summary = evaluate(lm, cases[:n], pre=pre, generate=False).summary(n_resamples=2)
            row = {m: round(100 * (estimated(summary[m].post).value or 0), 1) for m in METRICS}
            out.write(json.dumps({"model": args.model, "method": label, "n": n, **row}) + "\n")
            out.flush()
            print(label, n, row, flush=True)

        for label in args.methods:
            name, settings = ROWS[label]
            own = {"dataset": args.dataset, **settings, **named(args.editor, label, "editor")}
            method = retcon.method(name, for_model=lm, **own)
            prune = retcon.method("prune", for_model=lm, dataset=args.dataset) if label == "MEMIT" else None
            state, started = None, time.perf_counter()
            for first in range(0, args.edits, args.step):
                edits = [case.edits[0] for case in cases[first : first + args.step]]
                delta = in_steps(method, lm, edits, contexts=contexts, moments=moments, state=state)
                lm.apply(delta)
                state, n = delta.state, first + len(edits)
                if n % args.every == 0 or n == args.edits:
                    measured(label, n)
                    if prune is not None:
                        with lm.edited(prune.propose(lm, [], moments=moments)):
                            measured("PRUNE", n)
            lm.revert_all()
            print(f"{label}: {time.perf_counter() - started:.0f} s", flush=True)


def plot(args: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    made, axes = figure(1, 3, 12, 3.8, sharex=True)
    titles = {"ES": "new answers on edited prompts (ES)", "GS": "on paraphrases (GS)", "LS": "neighbours kept (LS)"}
    for axis, (metric, title) in zip(axes[0], titles.items(), strict=True):
        for method, marker in zip(dict.fromkeys(row["method"] for row in rows), cycle(MARKERS), strict=False):
            own = [row for row in rows if row["method"] == method]
            look = dict(marker=marker, markersize=4, linestyle="--" if method in FINE_TUNING else "-")
            axis.plot([r["n"] for r in own], [r[metric] for r in own], label=method, **look)
        axis.set(title=title, xlabel="edits so far", ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("of all edits so far, %")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    print(", ".join(map(str, save(made, args.out))))


def main() -> None:
    parser = command_line(__doc__, quiet=True)
    verbs = parser.add_subparsers(required=True)
    running = verbs.add_parser("run")
    add_cases(running)
    add_corpus(running)
    add_dataset(running)
    running.add_argument("--edits", type=int, default=500)
    running.add_argument("--step", type=int, default=10)
    running.add_argument("--every", type=int, default=50)
    running.add_argument(
        "--methods", nargs="+", choices=ROWS, default=["MEMIT-seq", *(row for row in FAMILY if row in ROWS)]
    )
    add_editors(running)
    running.add_argument("--out", type=Path, required=True, help="JSON lines; rows are added")
    running.set_defaults(act=run)
    plotting = verbs.add_parser("plot")
    plotting.add_argument("rows", type=Path)
    plotting.add_argument("--out", required=True, metavar="STEM", help="writes STEM.png and STEM.svg")
    plotting.set_defaults(act=plot)
    args = parser.parse_args()
    args.act(args)


if __name__ == "__main__":
    main()
