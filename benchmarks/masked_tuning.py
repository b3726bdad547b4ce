"""Masked tuning (KNE, CTP) measured: single edits, one batch, or one edit after another, over values of a setting.

    python -m benchmarks.masked_tuning run kne ctp jeep --model demo:gptj --n 100
    python -m benchmarks.masked_tuning run kne --n 100 --vary budget='[0.002, 0.01, 0.05]' --out budget.jsonl
    python -m benchmarks.masked_tuning run kne --model PATH --data FILE --start 1000 --n 100 --located 25 100 400
    python -m benchmarks.masked_tuning run ctp --protocol single --n 50 --vary contrast='["none", "mirror"]'
    python -m benchmarks.masked_tuning plot budget=budget.jsonl facts=located.jsonl --out docs/methods/figures/kne-size

Settings are each method's preset for the model; `--set` overrides. Several `--vary` make a grid. ES, GS, LS are
CounterFact's comparison of probabilities, Score their harmonic mean, "agreement" the share of answer tokens under
neighbours where the edited model's own choice is the unedited one's. A row's last columns are seconds per edit,
the share of the model's parameters that changed (the mean over deltas), and edits whose loss came below the threshold.

`plot` draws rows that `--out` kept, over a setting that was varied (or `facts`, of `--located`): a panel for each
SETTING=ROWS, and one for each value of another setting that was varied with it.
"""

import argparse
import itertools
import json
import statistics
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import retcon
from benchmarks.common import (
    add_cases,
    add_corpus,
    add_dataset,
    cases_of,
    command_line,
    edited_and_measured,
    estimated,
    machine,
    moments_of,
    percents,
    print_row,
)
from retcon.attachment import Attachment
from retcon.drawing import figure, save
from retcon.edits import Case
from retcon.evaluation import evaluate
from retcon.evaluation.summary import CaseMean
from retcon.lm.model import LM
from retcon.methods.common.contract import Method
from retcon.methods.kne import Kne

METRICS: dict[str, str | tuple[str, str]] = {
    "Score": "Score",
    "ES": "ES",
    "GS": "GS",
    "LS": "LS",
    "agreement": ("LS", "ee.loc.argmax"),
}
HEAD = ("row", *METRICS, "s/edit", "changed", "reached")
STYLES: dict[str, dict[str, Any]] = {
    "ES": dict(color="black", linestyle="-", marker="o"),
    "GS": dict(color="black", linestyle="--", marker="s"),
    "LS": dict(color="0.5", linestyle="-", marker="^"),
    "agreement": dict(color="0.5", linestyle="--", marker="v"),
    "reached": dict(color="0.7", linestyle=":", marker="x"),
}
LABELS = {
    "facts": "facts localised",
    "budget": "ensemble, share of all parameters",
    "n_positive": "paths in T+",
    "contrast_weight": "λ",
}


class Bench:
    """A model with cases, measured once before any edit."""

    def __init__(self, lm: LM, cases: Sequence[Case], protocol: str, corpus: str | None, seed: int) -> None:
        self.lm, self.cases, self.protocol, self.corpus, self.seed = lm, cases, protocol, corpus, seed
        self.pre = evaluate(lm, cases, generate=False)
        self.n_parameters = sum(p.numel() for p in lm.model.parameters())
        self.more: dict[str, Any] = {}

    def given(self, method: Method) -> dict[str, Any]:
        """Return contexts and every layer's moment, prepared beforehand, for methods that use moments."""
        if not method.uses_moments:
            return {}
        if not self.more:
            moments = moments_of(self.lm, self.corpus)
            moments.prepare(self.lm, [self.lm.site(layer, "down_proj") for layer in range(self.lm.n_layers)])
            self.more = dict(contexts=retcon.sample_contexts(self.lm, seed=self.seed), moments=moments)
        return self.more

    def row(self, method: Method, state: Any = None) -> dict[str, Any]:
        """Edit the cases and measure them; the model is as before. Return what `plot` reads: metrics as value, low and
        high, all but seconds (per edit) times 100; and the cells of the table."""
        changed: list[int] = []
        found = edited_and_measured(
            self.lm,
            method,
            self.cases,
            alone=self.protocol != "batch",
            on_top=self.protocol == "consecutive",
            pre=self.pre,
            each=lambda _, delta: changed.append(self._n_changed(delta)),
            state=state,
            seed=self.seed,
            **self.given(method),
        )
        summary, n = found.evaluation.summary(), len(found.report)
        quality = {metric: estimated(summary[key].post) for metric, key in METRICS.items()}
        seconds, share = found.seconds / n, 100 * statistics.mean(changed) / self.n_parameters
        reached = 100 * sum(report.stopped == "reached" for report in found.report) / n
        cells = [estimate.percent() for estimate in quality.values()]
        return {
            **{metric: _percents(estimate) for metric, estimate in quality.items()},
            "seconds": seconds,
            "changed": share,
            "reached": [reached] * 3,
            "cells": [*cells, f"{seconds:.2f}", f"{share:.2f} %", f"{reached:.0f} %"],
        }

    def _n_changed(self, delta: Attachment) -> int:
        """Return how many parameters the delta touches; low-rank changes touch all of theirs."""
        count = 0
        for name, changes in delta.changes.items():
            for change in changes:
                whole = change.kind in ("low_rank", "dense")
                count += self.lm.parameter(name).numel() if whole else change.values().numel()
        return count


def _percents(estimate: CaseMean) -> list[float]:
    value, interval = estimate.value or 0.0, estimate.interval
    return [100 * x for x in (value, *((interval.low, interval.high) if interval else (value, value)))]


def varied(settings: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Return every combination of the values given as FIELD=[VALUE, ...] in TOML."""
    lists = tomllib.loads("\n".join(settings))
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def run(args: argparse.Namespace) -> None:
    lm = retcon.load(args.model)
    fixed = tomllib.loads("\n".join(args.set))
    bench = Bench(lm, cases_of(args.data, args.start, args.n, args.seed), args.protocol, args.corpus, args.seed)
    about = dict(model=args.model, protocol=args.protocol, n=len(bench.cases), start=args.start, seed=args.seed)
    print(f"{args.model}, {args.protocol}, n = {args.n} from {args.start}, seed {args.seed}; {machine()}\n")
    print_row(*HEAD)
    print("|" + "---|" * len(HEAD))
    print_row("unedited", *percents(bench.pre.summary(), "pre", METRICS.values()).values(), "", "", "")

    def show(name: str, settings: dict[str, Any], row: dict[str, Any]) -> None:
        print_row(", ".join([name, *(f"{k}={v}" for k, v in settings.items())]), *row.pop("cells"))
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**about, "method": name, "settings": settings, **row}) + "\n")

    for name, settings in itertools.product(args.methods, varied(args.vary)):
        for control in ({}, {"score": "random"}) if args.random and name in ("kne", "ctp") else ({},):
            shown = {**settings, **control}
            method = retcon.method(name, for_model=lm, dataset=args.dataset, **{**fixed, **shown})
            if args.located and isinstance(method, Kne):
                facts = [case.edits[0] for case in cases_of(args.data, args.start, max(args.located), args.seed)]
                method = replace(method, reuse=True, locate_limit=len(facts))
                for n in args.located:
                    state = method.locate(lm, facts[:n], seed=args.seed)
                    show(name, {**shown, "facts": n}, bench.row(method, state))
            else:
                show(name, shown, bench.row(method))


def plot(args: argparse.Namespace) -> None:
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for panel in args.panels:
        field, rows = panel.split("=", 1)
        for line in Path(rows).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            others = ", ".join(f"{k}={v}" for k, v in row["settings"].items() if k != field)
            panels.setdefault((field, others), []).append(row)
    made, axes = figure(1, len(panels), 3.6 * len(panels), 3.6, sharey=True)
    for axis, ((field, others), rows_of) in zip(axes[0], panels.items(), strict=True):
        for i, (metric, style) in enumerate(STYLES.items()):
            values, low, high = zip(*(row[metric] for row in rows_of), strict=True)
            places = [place + 0.05 * (i - 2) for place in range(len(rows_of))]  # so that no interval hides another
            below, above = ([abs(end - v) for end, v in zip(ends, values, strict=True)] for ends in (low, high))
            axis.errorbar(places, values, [below, above], markersize=4, capsize=2, linewidth=1, label=metric, **style)
        axis.set_xticks(range(len(rows_of)), [_said(row["settings"][field]) for row in rows_of])
        axis.set(xlabel=LABELS.get(field, field), ylim=(-2, 103), title=others)
    axes[0, 0].set_ylabel("%, with 95 % intervals over cases")
    axes[0, -1].legend(fontsize=8)
    print(", ".join(map(str, save(made, args.out))))


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> None:
    parser = command_line(__doc__)
    verbs = parser.add_subparsers(required=True)
    running = verbs.add_parser("run")
    running.add_argument("methods", nargs="+")
    add_cases(running)
    add_corpus(running)
    add_dataset(running)
    running.add_argument("--n", type=int, default=100)
    running.add_argument("--protocol", choices=("single", "batch", "consecutive"), default="batch")
    running.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting, as TOML")
    running.add_argument("--vary", action="append", default=[], metavar="FIELD=[VALUE, ...]")
    running.add_argument("--located", type=int, nargs="+", help="kne: locate once on so many facts from --start on")
    running.add_argument("--random", action="store_true", help="beside each row, one with random units or nodes")
    running.add_argument("--out", type=Path, help="JSON lines, for `plot`; rows are added")
    running.set_defaults(act=run)
    plotting = verbs.add_parser("plot")
    plotting.add_argument("panels", nargs="+", metavar="SETTING=ROWS", help="what is on the x axis, and a file of rows")
    plotting.add_argument("--out", required=True, metavar="STEM", help="writes STEM.png and STEM.svg")
    plotting.set_defaults(act=plot)
    args = parser.parse_args()
    args.act(args)


if __name__ == "__main__":
    main()
