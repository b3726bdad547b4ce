"""What an evaluation leaves behind: tidy records, one number each, and a summary computed from nothing but them."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.errors import MalformedFile
from retcon.evaluation.intervals import N_RESAMPLES, Interval, ci_boot, ci_case
from retcon.evaluation.metrics import macro, score_am, score_hm
from retcon.files import read_json_rows, require, write_atomically

SCHEMA = 1
"""Version of the record's columns."""

When = Literal["pre", "final"]
Status = Literal["ok", "skipped", "error"]
Family = Literal["cf", "zsre"]

_MAIN: dict[Family, str] = {"cf": "cf.prob_mean", "zsre": "zsre.tok"}
_LOCALITY = ("LS", "NM", "NA")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One number from one query; what holds for the whole run is in `Evaluation.context`."""

    when: When
    """`pre`: the model before; `final`: the model with all edits in place."""
    case_id: str
    subject: str
    """Whom the case's first edit is about: the bootstrap draws cases by it."""
    axis: str
    probe_id: str
    """The query's id."""
    metric: str
    variant: str
    value: float | None
    """0 to 1 (magnitudes -1 to 1); None unless status is `ok`."""
    n: int
    """Target tokens (for `gen.*`, words written) behind the value."""
    status: Status = "ok"
    detail: str | None = None
    """Notes joined by "; ": `tie`, `contaminated`, `boundary_merge`, or the reason of a status that is not ok."""

    def noted(self, note: str) -> bool:
        return self.detail is not None and note in self.detail.split("; ")


@dataclass(frozen=True)
class Estimate:
    """A metric over cases: macro mean, interval, and what is behind it."""

    value: float | None
    """None where nothing was measured."""
    interval: Interval | None
    n: int
    """Cases behind the value; those without the metric are left out."""
    n_queries: int
    ties: int = 0
    """Queries whose two answers were exactly as probable (they count as failures)."""

    def percent(self) -> str:
        """The value times 100 with its interval: `89.7 ± 4.4`, or `94.6 [92.5, 96.4]` where it is not symmetric."""
        if self.value is None:
            return "-"
        text, interval = f"{100 * self.value:.1f}", self.interval
        if interval is None:
            return text
        if interval.kind == "ci.boot":
            return f"{text} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
        return f"{text} ± {100 * interval.half_width:.1f}"


@dataclass(frozen=True)
class Line:
    """One metric before and after."""

    metric: str
    variant: str
    pre: Estimate | None
    post: Estimate | None


@dataclass(frozen=True)
class Summary:
    """An evaluation's metrics. `summary["ES"]` is the family's own variant, `summary["ES", "gen.em"]` any other."""

    family: Family
    """`cf` where queries have a rival answer, else `zsre`."""
    n_cases: int
    lines: tuple[Line, ...]
    counts: Mapping[str, int]
    """Queries skipped, in error, contaminated, tied, or tokenised apart from their prompt (`boundary_merge`)."""

    def __getitem__(self, key: str | tuple[str, str]) -> Line:
        metric, variant = key if isinstance(key, tuple) else (key, self._own_variant(key))
        for line in self.lines:
            if (line.metric, line.variant) == (metric, variant):
                return line
        known = ", ".join(f"{line.metric} {line.variant}" for line in self.lines)
        raise KeyError(f"no metric {metric} {variant}; measured: {known or 'nothing'}")

    def _own_variant(self, metric: str) -> str:
        variants = [line.variant for line in self.lines if line.metric == metric]
        own = _MAIN[self.family]
        return own if own in variants or not variants else variants[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return self.table()

    def table(self, *, everything: bool = False) -> str:
        """Plain text, values times 100. Side variants are left out unless `everything`."""
        lines = [line for line in self.lines if everything or self._shown(line)]
        has_post = any(line.post is not None for line in lines)
        head = ["metric", "variant", "pre", *(["post"] if has_post else []), "cases", "queries", "interval"]
        rows = [head]
        for line in lines:
            last = line.post or line.pre
            assert last is not None
            values = [
                line.pre.percent() if line.pre else "-",
                *([line.post.percent() if line.post else "-"] if has_post else []),
            ]
            kind = last.interval.kind if last.interval else "-"
            rows.append([line.metric, line.variant, *values, f"{last.n:,}", f"{last.n_queries:,}", kind])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        counts = ", ".join(f"{name} {n:,}" for name, n in self.counts.items() if n)
        return f"{self.n_cases:,} cases, values x100 with 95 % intervals\n{text}" + (f"\n{counts}" if counts else "")

    def _shown(self, line: Line) -> bool:
        aside = {"cf.prob_sum", "cf.magnitude", "score.am", "zsre.first", "gen.prefix", "gen.contains"}
        return line.variant not in aside and not (self.family == "cf" and self._beside_main(line))

    def _beside_main(self, line: Line) -> bool:
        """Token accuracy of something that the comparison of probabilities covers already."""
        return line.variant == "zsre.tok" and any(
            (other.metric, other.variant) == (line.metric, "cf.prob_mean") for other in self.lines
        )


@dataclass(frozen=True)
class Evaluation:
    """Records of one evaluation, in the order of cases and queries, before then after."""

    records: list[Record]
    context: Mapping[str, Any] = field(default_factory=dict)
    """What holds for every record: model, method, dataset, protocol, n_edits, edit_batch, step, seed, run_id."""
    texts: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    """Generated answers by (when, case id, query id). Kept in memory only."""
    predictions: Mapping[tuple[str, str, str], tuple[int, ...]] = field(default_factory=dict)
    """The model's own tokens at the answer's places, by (when, case id, query id), on locality axes. In memory only."""

    def __repr__(self) -> str:
        cases = len({record.case_id for record in self.records})
        return (
            f"Evaluation({len(self.records):,} records of {cases:,} cases; print(evaluation.summary()) for the figures)"
        )

    def summary(self, *, n_resamples: int = N_RESAMPLES) -> Summary:
        """Macro means with intervals: over cases (`ci.case`) for the CounterFact family, by subject (`ci.boot`) for the
        zsRE family, whose cases share subjects, and for the score of either.
        """
        return _summarise(self.records, int(self.context.get("seed", 0)), n_resamples)

    def write(self, path: str | os.PathLike[str]) -> None:
        """One JSON object per record and line, the context repeated in each."""
        head = {"schema": SCHEMA, **self.context}
        lines = (json.dumps({**head, **asdict(record)}, ensure_ascii=False, allow_nan=False) for record in self.records)
        write_atomically(path, "".join(line + "\n" for line in lines).encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Records as `write` wrote them; texts and predictions are not among them.

        Raises:
            MalformedFile: a column is missing, or the records are of another schema.
        """
        own = {f.name for f in fields(Record)}
        records: list[Record] = []
        context: dict[str, Any] = {}
        for number, row in read_json_rows(path):
            where = f"{path}, row {number}"
            if require(row, "schema", int, where) != SCHEMA:
                raise MalformedFile(f"{where}: schema {row['schema']}, this version reads {SCHEMA}")
            record = _record_from({name: value for name, value in row.items() if name in own}, where)
            shared = {name: value for name, value in row.items() if name not in own and name != "schema"}
            if records and shared != context:
                differing = ", ".join(sorted(k for k in shared | context if shared.get(k) != context.get(k)))
                raise MalformedFile(
                    f"{where}: of another run than the rows above ({differing}); one file holds one run"
                )
            context = shared
            records.append(record)
        return cls(records, context)


def _record_from(row: Mapping[str, Any], where: str) -> Record:
    for name in ("when", "case_id", "subject", "axis", "probe_id", "metric", "variant"):
        require(row, name, str, where)
    require(row, "n", int, where)
    if require(row, "value", object, where) is not None and not isinstance(row["value"], int | float):
        raise MalformedFile(f"{where}: field 'value' must be a number or null, found {row['value']!r}")
    for name, known in (("when", get_args(When)), ("status", get_args(Status))):
        if name in row and row[name] not in known:
            raise MalformedFile(f"{where}: field {name!r} must be {' or '.join(known)}, found {row[name]!r}")
    return Record(**row)


# --- from records to a summary -----------------------------------------------------------------------------------

Key = tuple[str, str]
"""(metric, variant)."""


@dataclass
class _Column:
    """One metric at one time: values by case and axis."""

    cases: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    n_queries: int = 0
    ties: int = 0

    def add(self, record: Record) -> None:
        if record.value is None:
            return
        self.cases.setdefault(record.case_id, {}).setdefault(record.axis, []).append(record.value)
        self.n_queries += 1
        self.ties += record.noted("tie")

    def per_case(self) -> dict[str, float]:
        """Mean over axes of the mean over queries."""
        return {case: macro(axes) or 0.0 for case, axes in self.cases.items()}


def _summarise(records: Sequence[Record], seed: int, n_resamples: int) -> Summary:
    family: Family = "cf" if any(r.variant == "cf.prob_mean" and r.status != "skipped" for r in records) else "zsre"
    main = _MAIN[family]
    subjects = {r.case_id: r.subject for r in records}
    columns = _columns(records, main)
    whens: list[When] = [when for when in ("pre", "final") if when in columns]
    estimates = {when: _estimates(columns[when], subjects, family, seed, n_resamples) for when in whens}
    if len(whens) == 2:
        change = _change(columns["pre"], columns["final"], ("LS", main), subjects, family, seed, n_resamples)
        if change is not None:
            estimates["final"]["LS", f"{family}.ls.delta"] = change
    keys = dict.fromkeys(key for when in whens for key in estimates[when])
    lines = [Line(*k, estimates.get("pre", {}).get(k), estimates.get("final", {}).get(k)) for k in keys]
    lines.sort(key=lambda line: _rank(line, main))
    return Summary(family, len(subjects), tuple(lines), _counts(records))


def _rank(line: Line, main: str) -> tuple[bool, int]:
    """The score and the family's own variants first, then by metric; a stable sort keeps variants as they come."""
    metrics = ("Score", "ES", "GS", "LS", "EA", "PA", "NA", "EM", "PM", "NM")
    place = metrics.index(line.metric) if line.metric in metrics else len(metrics)
    return line.metric != "Score" and line.variant != main, place


def _columns(records: Iterable[Record], main: str) -> dict[When, dict[Key, _Column]]:
    columns: dict[When, dict[Key, _Column]] = {}
    dirty = {(r.case_id, r.probe_id) for r in records if r.noted("contaminated")}
    for record in records:
        here = columns.setdefault(record.when, {})
        if record.status == "skipped":  # only counted: a line of nothing but skipped queries says nothing
            continue
        here.setdefault((record.metric, record.variant), _Column()).add(record)
        clean = (record.case_id, record.probe_id) not in dirty
        if dirty and clean and (record.metric, record.variant) == ("LS", main):
            here.setdefault(("LS", f"{main}.clean"), _Column()).add(record)
    return columns


def _estimates(
    columns: Mapping[Key, _Column], subjects: Mapping[str, str], family: Family, seed: int, n_resamples: int
) -> dict[Key, Estimate]:
    per_case = {key: column.per_case() for key, column in columns.items()}
    intervals = _intervals(per_case, subjects, family, seed, n_resamples)
    estimates = {
        key: Estimate(_mean(values), intervals[key], len(values), columns[key].n_queries, columns[key].ties)
        for key, values in per_case.items()
    }
    keys = [(name, _MAIN[family]) for name in ("ES", "GS", "LS")]
    parts = [estimates[key].value if key in estimates else None for key in keys]
    n = max((estimates[key].n for key in keys if key in estimates), default=0)
    queries = sum(estimates[key].n_queries for key in keys if key in estimates)
    boot: list[Interval | None] = [None]
    if all(part is not None for part in parts):
        values = _matrix([per_case[key] for key in keys], list(subjects))
        boot = ci_boot(values, list(subjects.values()), _harmonic, seed=seed, n_resamples=n_resamples)
    estimates["Score", "score.hm"] = Estimate(score_hm(parts), boot[0], n, queries)
    estimates["Score", "score.am"] = Estimate(score_am(*parts), None, n, queries)
    return estimates


def _intervals(
    per_case: Mapping[Key, Mapping[str, float]],
    subjects: Mapping[str, str],
    family: Family,
    seed: int,
    n_resamples: int,
) -> dict[Key, Interval | None]:
    if family == "cf":
        return {key: ci_case(list(values.values())) for key, values in per_case.items()}
    values = _matrix(list(per_case.values()), list(subjects))
    return dict(
        zip(per_case, ci_boot(values, list(subjects.values()), seed=seed, n_resamples=n_resamples), strict=True)
    )


def _change(
    pre: Mapping[Key, _Column],
    post: Mapping[Key, _Column],
    key: Key,
    subjects: Mapping[str, str],
    family: Family,
    seed: int,
    n_resamples: int,
) -> Estimate | None:
    """Post minus pre, paired by case; None where the two have no case in common."""
    if key not in pre or key not in post:
        return None
    before, after = pre[key].per_case(), post[key].per_case()
    change = {case: after[case] - before[case] for case in after if case in before}
    if not change:
        return None
    interval = _intervals({key: change}, subjects, family, seed, n_resamples)[key]
    return Estimate(_mean(change), interval, len(change), post[key].n_queries)


def _matrix(columns: Sequence[Mapping[str, float]], cases: Sequence[str]) -> Float[Tensor, "cases metrics"]:
    rows = [[column.get(case, math.nan) for column in columns] for case in cases]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(cases), len(columns))


def _harmonic(means: Float[Tensor, "resamples metrics"]) -> Float[Tensor, "resamples 1"]:
    """`score_hm` of every resample: 1 / 0 is infinite here, so a part of 0 gives 0."""
    return means.shape[1] / means.reciprocal().sum(1, keepdim=True)


def _mean(values: Mapping[str, float]) -> float | None:
    return math.fsum(values.values()) / len(values) if values else None


def _counts(records: Iterable[Record]) -> dict[str, int]:
    """Distinct (time, query) pairs, for a query leaves several records."""
    found: dict[str, set[tuple[str, str, str]]] = {
        name: set() for name in ("skipped", "error", "contaminated", "tie", "boundary_merge")
    }
    for record in records:
        place = (record.when, record.case_id, record.probe_id)
        if record.status != "ok":
            found[record.status].add(place)
        for name in ("contaminated", "tie", "boundary_merge"):
            if record.noted(name):
                found[name].add(place)
    return dict(Counter({name: len(places) for name, places in found.items()}))
