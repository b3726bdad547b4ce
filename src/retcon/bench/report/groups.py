"""Runs that differ in nothing but the seed, gathered; numbers over them, each with its interval's name."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from retcon.bench import Bench, Run
from retcon.bench.spec import Protocol
from retcon.evaluation.intervals import Interval, ci_seed
from retcon.evaluation.summary import CaseMean, ScoreFamily, Summary, edits_of, summarise
from retcon.plural import plural

UNEDITED = "unedited"
"""The row of the model without edits."""


@dataclass(frozen=True)
class Number:
    """A value over the runs of a group."""

    value: float
    interval: Interval | None
    """`ci.seed` over several runs; of one run, its own over cases."""
    n: int
    """Cases that it is the mean of, in each run; in the one with the fewest where they differ."""
    n_cases: int
    """Cases that each run has."""
    runs: int


@dataclass(frozen=True)
class Group:
    """Runs of one model, method, dataset and protocol."""

    model: str
    method: str
    dataset: str
    protocol: str
    runs: tuple[Run, ...]
    missing: tuple[int, ...] = ()
    """Seeds that were asked for and are not finished."""

    @property
    def unfinished_notes(self) -> tuple[str, ...]:
        """What readers should know where seeds are missing."""
        if not self.missing:
            return ()
        seeds = ", ".join(map(str, self.missing))
        row = f"{self.method}, {self.model}, {self.dataset}, {self.protocol}"
        return (f"Not finished: {row} lacks seed{'s' * (len(self.missing) > 1)} {seeds}.",)

    @property
    def model_notes(self) -> tuple[str, ...]:
        """What readers should know about the model (`LM.notes`), each as a sentence that names it."""
        return tuple(f"{self.model}: {note}." for note in self.runs[0].manifest["model"].get("notes", ()))

    @property
    def n_cases(self) -> int:
        return len(self.runs[0].manifest["cases"])

    @cached_property
    def summaries(self) -> tuple[Summary, ...]:
        """Of each run: before, and after the last edit."""
        return tuple(
            summarise(run.at("pre"), run.at("final"), edits=edits_of(run.records), seed=int(run.context["seed"]))
            for run in self.runs
        )

    @property
    def family(self) -> ScoreFamily:
        return self.summaries[0].family

    def number(self, metric: str, *variants: str, before: bool = False) -> Number | None:
        """Return a metric by the first of `variants` that was measured (the family's own where none is named)."""
        found = [self._estimate(summary, metric, variants, before) for summary in self.summaries]
        known = [e for e in found if e is not None and e.value is not None]
        if not known or len(known) < len(found):
            return None
        values = [e.value for e in known if e.value is not None]
        interval = ci_seed(values) if len(values) > 1 else known[0].interval
        return Number(math.fsum(values) / len(values), interval, min(e.n for e in known), self.n_cases, len(values))

    def seconds_per_edit(self) -> float | None:
        """Return the mean over all edits of all runs, statistics apart."""
        return self._per_edit("time.edit")

    def peak_bytes(self) -> float | None:
        """Return the highest of any call."""
        values = [r.value for run in self.runs for r in run.timings if r.metric == "memory" and r.value is not None]
        return max(values, default=None)

    def _per_edit(self, variant: str) -> float | None:
        timed = [r for run in self.runs for r in run.timings if r.variant == variant and r.value is not None]
        n = sum(r.n for r in timed)
        return math.fsum((r.value or 0.0) * r.n for r in timed) / n if n else None

    @staticmethod
    def _estimate(summary: Summary, metric: str, variants: Sequence[str], before: bool) -> CaseMean | None:
        keys: list[str | tuple[str, str]] = [(metric, v) for v in variants] or [metric]
        line = next((line for key in keys if (line := summary.get(key))), None)
        if line is None:
            return None
        return line.pre if before else line.post


def groups_of(bench: Bench) -> list[Group]:
    """Return groups in the order of the runs; a seed counts once in each, however its protocol was worded."""
    gathered: dict[tuple[str, str, str, Protocol], dict[int, Run]] = {}
    for run in bench.runs:
        manifest = run.manifest
        key = (manifest["model"]["name"], manifest["method"]["label"], manifest["dataset"]["path"], _protocol_of(run))
        gathered.setdefault(key, {}).setdefault(int(manifest["seed"]), run)
    names = _names({protocol for *_, protocol in gathered})
    seeds = bench.manifest["spec"].get("seeds", ())
    return [
        Group(model, method, dataset, names[protocol], tuple(runs.values()), tuple(s for s in seeds if s not in runs))
        for (model, method, dataset, protocol), runs in gathered.items()
    ]


def _protocol_of(run: Run) -> Protocol:
    """Return a run's protocol, settled; a manifest of an earlier version may have left something to it."""
    kept, n_cases = run.manifest["protocol"], len(run.manifest["cases"])
    between = tuple(c for c in kept["checkpoints"] if c < n_cases and not c % (kept["batch"] or 1))
    return Protocol(kind=kept["kind"], batch=kept["batch"], checkpoints=between).settled(n_cases)


def _in_words(protocol: Protocol) -> str:
    """Return a settled protocol for reading, its checkpoints left out."""
    assert protocol.n is not None
    n, size = plural(protocol.n, "edit"), protocol.batch
    if protocol.kind == "single":
        return f"{n}, each alone"
    if protocol.kind == "sequential":
        return f"{n}, one after another"
    if protocol.kind == "batch_sequential":
        return f"{n}, {size} after {size}"
    return f"{n} at once" if size == protocol.n else f"{n}, {size} at once"


def _names(protocols: Iterable[Protocol]) -> dict[Protocol, str]:
    """Return a protocol's name for reading, each its own: with checkpoints where others differ in nothing else."""
    protocols = list(protocols)
    found = Counter(map(_in_words, protocols))
    names = {}
    for protocol in protocols:
        listed = ", ".join(f"{c:,}" for c in protocol.checkpoints)
        more = f" ({f'checkpoints {listed}' if listed else 'no checkpoints'})" if found[_in_words(protocol)] > 1 else ""
        names[protocol] = f"{_in_words(protocol)}{more}"
    return names


def row_names(block: Sequence[Group]) -> list[str]:
    """Return what tells the groups of a block apart: the method, and the dataset where there are several."""
    several = len({group.dataset for group in block}) > 1
    return [f"{group.method}, {group.dataset}" if several else group.method for group in block]


def blocks(groups: Sequence[Group]) -> list[tuple[str, str, list[Group]]]:
    """Return (model, protocol, groups) in order: what one table compares."""
    found: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        found.setdefault((group.protocol, group.model), []).append(group)
    return [(model, protocol, own) for (protocol, model), own in found.items()]


def by_dataset(groups: Sequence[Group]) -> list[tuple[str, str, str, list[Group]]]:
    """Return (model, protocol, dataset, groups) in order: what one picture compares."""
    return [
        (model, protocol, dataset, [g for g in block if g.dataset == dataset])
        for model, protocol, block in blocks(groups)
        for dataset in dict.fromkeys(g.dataset for g in block)
    ]
