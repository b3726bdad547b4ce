"""Masked tuning (KNE, CTP) measured: single edits, one batch, or one edit after another, over values of a setting.

    python -m benchmarks.masked_tuning kne ctp jeep --model demo:gptj --n 100
    python -m benchmarks.masked_tuning kne --model demo:gptj --n 100 --vary budget='[0.002, 0.01, 0.05]'
    python -m benchmarks.masked_tuning kne --model PATH --data FILE --start 1000 --n 100 --located 25 100 400
    python -m benchmarks.masked_tuning ctp --protocol single --n 50 --vary contrast='["none", "mirror"]'

Settings are each method's preset for the model; `--set` overrides. Several `--vary` make a grid. ES, GS, LS are
CounterFact's comparison of probabilities, Score their harmonic mean, "agreement" the share of answer tokens under
neighbours where the edited model's own choice is the unedited one's. A row's last columns are seconds per edit,
the share of the model's parameters that changed (the mean over deltas), and edits whose loss came below the threshold.
"""

import argparse
import itertools
import json
import statistics
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import retcon
from benchmarks.common import cases_of, machine, moments_of
from retcon.delta import Delta
from retcon.edits import Case
from retcon.evaluation import Evaluation, evaluate
from retcon.lm.model import LM
from retcon.methods.base import Method
from retcon.methods.kne import Kne

HEAD = ("row", "Score", "ES", "GS", "LS", "agreement", "s/edit", "changed", "reached")


class Bench:
    """A model with cases, measured once before any edit."""

    def __init__(self, lm: LM, cases: Sequence[Case], protocol: str, corpus: str | None, seed: int) -> None:
        self.lm, self.cases, self.protocol, self.seed = lm, cases, protocol, seed
        self.pre = evaluate(lm, cases, generate=False)
        self.n_parameters = sum(p.numel() for p in lm.model.parameters())
        self.more: dict[str, Any] = {}
        self.corpus = corpus

    def given(self, method: Method) -> dict[str, Any]:
        """Contexts and moments, prepared beforehand, for methods that use them."""
        if not hasattr(method, "low") and not hasattr(method, "layers"):
            return {}
        if not self.more:
            self.more = dict(contexts=retcon.sample_contexts(self.lm, seed=self.seed))
            self.more["moments"] = moments_of(self.lm, self.corpus)
        layers = (*method.low, *method.high) if hasattr(method, "low") else method.layers  # type: ignore[attr-defined]
        self.more["moments"].prepare(self.lm, [self.lm.site(layer, "down_proj") for layer in layers])
        return self.more

    def row(self, name: str, method: Method, state: Any = None) -> list[str]:
        """One line of the table."""
        given = self.given(method)
        deltas: list[Delta] = []
        records: list[Any] = []
        seconds = 0.0
        groups = [self.cases] if self.protocol == "batch" else [[case] for case in self.cases]
        try:
            for group in groups:
                started = time.perf_counter()
                edits = [case.edits[0] for case in group]
                deltas.append(method.propose(self.lm, edits, state=state, seed=self.seed, **given))
                seconds += time.perf_counter() - started
                if self.protocol == "consecutive":
                    self.lm.apply(deltas[-1])
                else:
                    records += self._after(group, deltas[-1])
            if self.protocol == "consecutive":
                records = self._after(self.cases, None)
        finally:
            self.lm.revert_all()
        summary = Evaluation(list(self.pre.records) + records, dict(self.pre.context), {}, {}).summary()
        cells = [summary[m].post.percent() for m in ("Score", "ES", "GS", "LS")]
        cells.append(summary["LS", "ee.loc.argmax"].post.percent())
        changed = statistics.mean(self._n_changed(delta) for delta in deltas) / self.n_parameters
        reports = [report for delta in deltas for report in delta.report]
        reached = sum(report.stopped == "reached" for report in reports) / len(reports)
        return [name, *cells, f"{seconds / len(reports):.2f}", f"{100 * changed:.2f} %", f"{100 * reached:.0f} %"]

    def _after(self, cases: Sequence[Case], delta: Delta | None) -> list[Any]:
        measured = evaluate(self.lm, cases, delta=delta, pre=self.pre, generate=False)
        return [record for record in measured.records if record.when == "final"]

    def _n_changed(self, delta: Delta) -> int:
        """Parameters that the delta touches; low-rank changes touch all of theirs."""
        count = 0
        for name, changes in delta.changes.items():
            for change in changes:
                whole = change.kind in ("low_rank", "dense")
                count += self.lm.parameter(name).numel() if whole else change.values().numel()
        return count


def varied(settings: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every combination of the values given as FIELD=[VALUE, ...] in TOML."""
    lists = tomllib.loads("\n".join(settings))
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--model", default="demo:gptj")
    parser.add_argument("--data", help="CounterFact file; the embedded world's cases if left out")
    parser.add_argument("--corpus", help="text for second moments, for methods that use them")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--protocol", choices=("single", "batch", "consecutive"), default="batch")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting, as TOML")
    parser.add_argument("--vary", action="append", default=[], metavar="FIELD=[VALUE, ...]")
    parser.add_argument("--located", type=int, nargs="+", help="kne: locate once on so many facts from --start on")
    parser.add_argument("--random", action="store_true", help="beside each row, one with random units or nodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="rows as JSON lines, too")
    args = parser.parse_args()

    lm = retcon.load(args.model)
    fixed = tomllib.loads("\n".join(args.set))
    bench = Bench(lm, cases_of(args.data, args.start, args.n, args.seed), args.protocol, args.corpus, args.seed)
    print(f"{args.model}, {args.protocol}, n = {args.n} from {args.start}, seed {args.seed}; {machine()}\n")
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)

    def show(cells: list[str]) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(dict(zip(HEAD, cells, strict=True))) + "\n")

    before = bench.pre.summary()
    cells = [before[m].pre.percent() for m in ("Score", "ES", "GS", "LS")]
    show(["unedited", *cells, "", "", "", ""])
    for name, settings in itertools.product(args.methods, varied(args.vary)):
        for control in ({}, {"score": "random"}) if args.random and name in ("kne", "ctp") else ({},):
            method = retcon.method(name, for_model=lm, **{**fixed, **settings, **control})
            label = ", ".join([name, *(f"{k}={v}" for k, v in {**settings, **control}.items())])
            if args.located and isinstance(method, Kne):
                facts = [case.edits[0] for case in cases_of(args.data, args.start, max(args.located), args.seed)]
                method = retcon.method(
                    name, for_model=lm, **{**fixed, **settings, **control, "reuse": True, "locate_limit": len(facts)}
                )
                for n in args.located:
                    state = method.locate(lm, facts[:n], seed=args.seed)  # type: ignore[attr-defined]
                    show(bench.row(f"{label}, {n} facts", method, state))
            else:
                show(bench.row(label, method))


if __name__ == "__main__":
    main()
