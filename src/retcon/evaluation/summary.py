"""From records to a summary: macro means with intervals, before and after."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.escaping import as_html
from retcon.evaluation.intervals import N_RESAMPLES, Interval, ci_boot, ci_case, ci_wilson, near_a_bound
from retcon.evaluation.metrics import macro, score_am, score_hm
from retcon.evaluation.records import NO_TARGET, Record
from retcon.plural import plural

ScoreFamily = Literal["cf", "zsre", "ee", "mq", "ripple"]
Key = tuple[str, str]
"""(metric, variant)."""

_MAIN: Mapping[ScoreFamily, str] = {
    "cf": "cf.prob_mean",
    "zsre": "zsre.tok",
    "ee": "ee.tok",
    "mq": "zsre.tok",
    "ripple": "zsre.tok",
}
N_UNREAD_SHOWN = 5
"""Queries that were not asked, shown below a table with the reason."""
_UNSCALED = ("loc.kl", "ppl.", "gen.tokens", "time.", "memory.")
_NO_SHARES = (*_UNSCALED, "cf.magnitude", "flu.", "cons.")
"""Variants that are no share of successes, whatever their values: differences, bits, similarities."""


def scale(variant: str) -> int:
    """Return what a variant's values are multiplied by for reading: 100, or 1 for nats, tokens and seconds."""
    return 1 if variant.startswith(_UNSCALED) else 100


@dataclass(frozen=True)
class CaseMean:
    """A metric over cases: macro mean, interval, and how many cases it is of."""

    value: float | None
    """None where nothing was measured."""
    interval: Interval | None
    n: int
    """Cases that the value is the mean of; those without the metric are left out."""
    n_queries: int
    ties: int = 0
    """Queries whose two answers were exactly as probable (they count as failures)."""

    def percent(self, times: int = 100) -> str:
        """Return the value times 100 with its interval: `89.7 ± 4.4`, or `94.6 [92.5, 96.4]` if lopsided."""
        if self.value is None:
            return "-"
        text, interval = f"{times * self.value:.1f}", self.interval
        if interval is None:
            return text
        if interval.kind in ("ci.boot", "ci.wilson"):
            return f"{text} [{times * interval.low:.1f}, {times * interval.high:.1f}]"
        return f"{text} ± {times * interval.half_width:.1f}"


@dataclass(frozen=True)
class Line:
    """One metric before and after."""

    metric: str
    variant: str
    pre: CaseMean | None
    post: CaseMean | None


@dataclass(frozen=True)
class Summary:
    """An evaluation's metrics. `summary["ES"]` is the family's own variant, `summary["ES", "gen.em"]` any other."""

    family: ScoreFamily
    """`cf` where queries have a rival answer, `ee`, `mq`, `ripple` by what was measured, else `zsre`."""
    n_cases: int
    lines: tuple[Line, ...]
    counts: Mapping[str, int]
    """Queries skipped, in error, contaminated, tied, or tokenised apart from their prompt (`boundary_merge`); and cases
    whose edits failed (`failed_edits`; measured all the same) or were left out (`skipped_edits`; not measured)."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Why queries that have an answer could not be scored, by case and query."""

    def __getitem__(self, key: str | Key) -> Line:
        metric, variant = key if isinstance(key, tuple) else (key, self._own_variant(key))
        for line in self.lines:
            if (line.metric, line.variant) == (metric, variant):
                return line
        known = ", ".join(f"{line.metric} {line.variant}" for line in self.lines)
        raise KeyError(f"no metric {metric} {variant}; measured: {known or 'nothing'}")

    def get(self, key: str | Key) -> Line | None:
        """Return `summary[key]`, or None where that was not measured."""
        try:
            return self[key]
        except KeyError:
            return None

    def _own_variant(self, metric: str) -> str:
        variants = [line.variant for line in self.lines if line.metric == metric]
        own = main_variant(self.family, metric)
        return own if own in variants or not variants else variants[0]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return self.table()

    def table(self, *, everything: bool = False) -> str:
        """Return plain text, values times 100. Side variants are left out unless `everything`."""
        rows = self._cells(everything)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([self._title(), text, *self._notes()])

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        head, *rows = [[as_html(cell) for cell in row] for row in self._cells(False)]
        lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
        lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
        notes = "<br>".join(map(as_html, self._notes()))
        return f"<table><caption>{as_html(self._title())}</caption>{''.join(lines)}</table><small>{notes}</small>"

    def _title(self) -> str:
        return f"{plural(self.n_cases, 'case')}, values x100 with 95 % intervals"

    def _notes(self) -> list[str]:
        """Return what is worth knowing about the queries, a line each."""
        counts = ", ".join(f"{name.replace('_edits', ' edits')} {n:,}" for name, n in self.counts.items() if n)
        return [*([counts] if counts else []), *unread_notes(self.unread)]

    def _cells(self, everything: bool) -> list[list[str]]:
        """Return the table's head and rows."""
        lines = [line for line in self.lines if everything or self._shown(line)]
        has_post = any(line.post is not None for line in lines)
        head = ["metric", "variant", "pre", *(["post"] if has_post else []), "cases", "queries", "interval"]
        rows = [head]
        for line in lines:
            last = line.post or line.pre
            assert last is not None
            times = scale(line.variant)
            values = [
                line.pre.percent(times) if line.pre else "-",
                *([line.post.percent(times) if line.post else "-"] if has_post else []),
            ]
            kind = last.interval.kind if last.interval else "-"
            rows.append([line.metric, line.variant, *values, f"{last.n:,}", f"{last.n_queries:,}", kind])
        return rows

    def _shown(self, line: Line) -> bool:
        hidden = {"cf.prob_sum", "cf.magnitude", "score.am", "zsre.first", "gen.contains", "gen.tokens"}
        hidden |= {"gen.em", "gen.prefix"} - {generation_variant(self.family)}
        if self.family == "ee":
            hidden = (hidden | {"score.hm", "gen.cut"}) - {"score.am", "gen.contains"}
        else:
            hidden.add("gen.cut")
        return line.variant not in hidden and not (self.family == "cf" and self._beside_main(line))

    def _beside_main(self, line: Line) -> bool:
        """Return whether a line is token accuracy of something that the comparison of probabilities covers already."""
        return line.variant == "zsre.tok" and any(
            (other.metric, other.variant) == (line.metric, "cf.prob_mean") for other in self.lines
        )


def family_of(records: Iterable[Record]) -> ScoreFamily:
    """Return which way of scoring the records belong to."""
    variants = {r.variant for r in records if r.status != "skipped"}
    if "cf.prob_mean" in variants:
        return "cf"
    if "ee.tok" in variants:
        return "ee"
    if any(v.startswith("mq.") for v in variants):
        return "mq"
    return "ripple" if any(v.startswith("ripple") for v in variants) else "zsre"


def main_variant(family: ScoreFamily, metric: str) -> str:
    """Return the variant that a metric's own column shows."""
    return "ee.loc.argmax" if family == "ee" and metric == "LS" else _MAIN[family]


def generation_variant(family: str) -> str:
    """Return the variant that stands for generated text: `gen.prefix` for completions, after which a model goes on
    writing, `gen.em` for questions, whose answers end by themselves."""
    return "gen.prefix" if family == "cf" else "gen.em"


def summarise(
    before: Sequence[Record],
    after: Sequence[Record],
    *,
    edits: Iterable[Record] = (),
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> Summary:
    """Return macro means with intervals: over cases (`ci.case`) for the CounterFact family, by subject (`ci.boot`) for
    the others, whose cases share subjects, and for scores made of several means.

    Args:
        before: records of the unedited model; may be empty.
        after: records of the edited one, all of one moment; may be empty.
        edits: records of how the edits ended (`edits_of`), which are counted.
        seed: of the bootstrap.
    """
    family = family_of([*before, *after])
    parts = {"pre": [r for r in before if r.case_id is not None], "post": [r for r in after if r.case_id is not None]}
    subjects = {r.case_id: r.subject for r in [*before, *after] if r.case_id is not None}
    resampler = _Resampler(subjects, seed, n_resamples)
    columns = {when: _columns(part, family) for when, part in parts.items() if part}
    estimates = {when: _estimates(own, family, resampler) for when, own in columns.items()}
    ls = ("LS", main_variant(family, "LS"))
    if len(columns) == 2:
        change = _change(columns["pre"], columns["post"], ls, family, resampler)
        if change is not None:
            estimates["post"]["LS", f"{family}.ls.delta"] = change
    for when, own in (("pre", before), ("post", after)):
        if found := _of_whole_models(own):
            estimates.setdefault(when, {}).update(found)
    keys = dict.fromkeys(key for own in estimates.values() for key in own)
    lines = [Line(*k, estimates.get("pre", {}).get(k), estimates.get("post", {}).get(k)) for k in keys]
    lines.sort(key=lambda line: _rank(line, family))
    asked = [*before, *after]
    return Summary(
        family, len(resampler.subjects), tuple(lines), _counts(asked) | _counts_of_edits(edits), unread_queries(asked)
    )


def edits_of(records: Iterable[Record]) -> list[Record]:
    """Return the records of how the edits themselves ended."""
    return [record for record in records if record.axis == "edit"]


def case_values(records: Iterable[Record], metric: str, variant: str) -> dict[str, float]:
    """Return the value of one metric by case: mean over axes of the mean over queries."""
    return case_means(r for r in records if (r.metric, r.variant) == (metric, variant))


def case_means(records: Iterable[Record]) -> dict[str, float]:
    """Return the value by case of records of one metric: mean over axes of the mean over queries."""
    column = _Column()
    for record in records:
        column.add(record)
    return column.per_case()


@dataclass
class _Column:
    """One metric at one time: values by case and axis."""

    cases: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    n_queries: int = 0
    ties: int = 0

    def add(self, record: Record) -> None:
        if record.value is None or record.case_id is None:
            return
        self.cases.setdefault(record.case_id, {}).setdefault(record.axis or "", []).append(record.value)
        self.n_queries += 1
        self.ties += record.noted("tie")

    def per_case(self) -> dict[str, float]:
        """Return, by case, the mean over axes of the mean over queries."""
        return {case: macro(axes) or 0.0 for case, axes in self.cases.items()}


_ORDER = ("Score", "ES", "GS", "LS", "Portability", "EA", "PA", "NA", "EM", "PM", "NM", "fluency", "consistency")


def _rank(line: Line, family: ScoreFamily) -> tuple[bool, int]:
    """Return the score and the family's own variants first, then by metric; variants stay as they come."""
    name = line.metric.partition(".")[0]
    place = _ORDER.index(name) if name in _ORDER else len(_ORDER)
    return line.metric != "Score" and line.variant != main_variant(family, line.metric), place


def _columns(records: Sequence[Record], family: ScoreFamily) -> dict[Key, _Column]:
    columns: dict[Key, _Column] = {}
    main = main_variant(family, "LS")
    dirty = {(r.case_id, r.query_id) for r in records if r.noted("contaminated")}
    axes: dict[Key, set[str]] = {}
    for r in records:
        if "." in (r.axis or ""):
            axes.setdefault((r.metric, r.variant), set()).add(str(r.axis))
    for record in records:
        if record.status == "skipped":  # only counted: a line of nothing but skipped queries says nothing
            continue
        key = (record.metric, record.variant)
        columns.setdefault(key, _Column()).add(record)
        if len(axes.get(key, ())) > 1 and record.axis is not None and not record.metric.startswith(record.axis):
            part = f"{record.metric}.{record.axis.partition('.')[2] or record.axis}"
            columns.setdefault((part, record.variant), _Column()).add(record)
        if dirty and (record.case_id, record.query_id) not in dirty and key == ("LS", main):
            columns.setdefault(("LS", f"{main}.clean"), _Column()).add(record)
    return columns


@dataclass(frozen=True)
class _Resampler:
    """How intervals are bootstrapped: cases are drawn by their subjects."""

    subjects: Mapping[str, str | None]
    """By case."""
    seed: int
    n_resamples: int

    def intervals(
        self,
        columns: Sequence[Mapping[str, float]],
        statistic: Callable[[Float[Tensor, "resamples metrics"]], Float[Tensor, "resamples scores"]] = lambda m: m,
    ) -> list[Interval | None]:
        """Return an interval per column of the statistic of these metrics' means."""
        values, clusters = _matrix(columns, list(self.subjects)), list(self.subjects.values())
        return ci_boot(values, clusters, statistic, seed=self.seed, n_resamples=self.n_resamples)


def _estimates(columns: Mapping[Key, _Column], family: ScoreFamily, resampler: _Resampler) -> dict[Key, CaseMean]:
    per_case = {key: column.per_case() for key, column in columns.items()}
    intervals = _intervals(per_case, family, resampler) | _near_bounds(per_case, resampler.subjects)
    estimates = {
        key: CaseMean(_mean(values), intervals[key], len(values), columns[key].n_queries, columns[key].ties)
        for key, values in per_case.items()
    }
    keys = [(name, main_variant(family, name)) for name in ("ES", "GS", "LS")]
    known = [key for key in keys if key in estimates]
    if not known:
        return estimates
    parts = [estimates[key].value if key in estimates else None for key in keys]
    n = max(estimates[key].n for key in known)
    queries = sum(estimates[key].n_queries for key in known)
    boot: list[Interval | None] = [None, None]
    if all(part is not None for part in parts):
        boot = resampler.intervals([per_case[key] for key in keys], _scores)
    estimates["Score", "score.hm"] = CaseMean(score_hm(parts), boot[0], n, queries)
    estimates["Score", "score.am"] = CaseMean(score_am(*parts), boot[1], n, queries)
    return estimates


def _of_whole_models(records: Sequence[Record]) -> dict[Key, CaseMean]:
    """Return what belongs to no case: the mean over the models that were measured, each counted by its cases."""
    n_cases = Counter(step for step, _ in {(r.step, r.case_id) for r in records if r.case_id is not None})
    by_key: dict[Key, list[Record]] = {}
    for record in records:
        if record.case_id is None and record.status == "ok":
            by_key.setdefault((record.metric, record.variant), []).append(record)
    found = {}
    for key, own in by_key.items():
        weights = [n_cases[r.step] or 1 for r in own]
        mean = math.fsum((r.value or 0.0) * (w / sum(weights)) for r, w in zip(own, weights, strict=True))
        found[key] = CaseMean(mean, None, 0, own[-1].n)
    return found


def _intervals(
    per_case: Mapping[Key, Mapping[str, float]], family: ScoreFamily, resampler: _Resampler
) -> dict[Key, Interval | None]:
    if family == "cf":
        return {key: ci_case(list(values.values())) for key, values in per_case.items()}
    return dict(zip(per_case, resampler.intervals(list(per_case.values())), strict=True))


def _near_bounds(
    per_case: Mapping[Key, Mapping[str, float]], subjects: Mapping[str, str | None]
) -> dict[Key, Interval | None]:
    """Return Wilson's intervals, over subjects, of the shares that are near 0 or 1."""
    found = {}
    for (metric, variant), values in per_case.items():
        is_share = not variant.startswith(_NO_SHARES) and all(0 <= v <= 1 for v in values.values())
        n = len({subjects[case] for case in values})
        if is_share and n and near_a_bound(share := math.fsum(values.values()) / len(values), n):
            found[metric, variant] = ci_wilson(share, n)
    return found


def _change(
    pre: Mapping[Key, _Column], post: Mapping[Key, _Column], key: Key, family: ScoreFamily, resampler: _Resampler
) -> CaseMean | None:
    """Return post minus pre, paired by case; None where the two have no case in common."""
    if key not in pre or key not in post:
        return None
    before, after = pre[key].per_case(), post[key].per_case()
    change = {case: after[case] - before[case] for case in after if case in before}
    if not change:
        return None
    interval = _intervals({key: change}, family, resampler)[key]
    return CaseMean(_mean(change), interval, len(change), post[key].n_queries)


def _matrix(columns: Sequence[Mapping[str, float]], cases: Sequence[str]) -> Float[Tensor, "cases metrics"]:
    rows = [[column.get(case, math.nan) for column in columns] for case in cases]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(cases), len(columns))


def _scores(means: Float[Tensor, "resamples metrics"]) -> Float[Tensor, "resamples 2"]:
    """Return `score_hm` and `score_am` of every resample: 1 / 0 is infinite here, so a part of 0 gives 0."""
    harmonic = means.shape[1] / means.reciprocal().sum(1, keepdim=True)
    return torch.cat([harmonic, means.mean(1, keepdim=True)], dim=1)


def _mean(values: Mapping[str, float]) -> float | None:
    return math.fsum(values.values()) / len(values) if values else None


def unread_notes(unread: Mapping[str, str]) -> list[str]:
    """Return a line for each of the first queries that could not be asked, with the reason; one for the others."""
    notes = [f"not asked: {query} ({reason})" for query, reason in list(unread.items())[:N_UNREAD_SHOWN]]
    more = len(unread) - N_UNREAD_SHOWN
    return notes + ([f"not asked: {more:,} more"] if more > 0 else [])


def unread_queries(records: Sequence[Record]) -> dict[str, str]:
    """Return the reasons of queries of which nothing at all was measured."""
    measured = {(r.case_id, r.query_id) for r in records if r.status != "skipped"}
    return {
        f"{r.case_id}, {r.query_id}": r.detail or ""
        for r in records
        if r.query_id is not None and (r.case_id, r.query_id) not in measured and not r.noted(NO_TARGET)
    }


def _counts(records: Iterable[Record]) -> dict[str, int]:
    """Count distinct (time, query) pairs, for a query leaves several records."""
    found: dict[str, set[tuple[str, str | None, str | None]]] = {
        name: set() for name in ("skipped", "error", "contaminated", "tie", "boundary_merge")
    }
    for record in records:
        place = (record.when, record.case_id, record.query_id)
        if record.status != "ok" and not record.noted(NO_TARGET):
            found[record.status].add(place)
        if record.detail is not None:
            for name in ("contaminated", "tie", "boundary_merge"):
                if record.noted(name):
                    found[name].add(place)
    return dict(Counter({name: len(places) for name, places in found.items()}))


def _counts_of_edits(records: Iterable[Record]) -> dict[str, int]:
    """Count distinct cases whose edits failed, or were left out."""
    cases: dict[str, set[str | None]] = {"error": set(), "skipped": set()}
    for record in records:
        if record.status != "ok":
            cases[record.status].add(record.case_id)
    return {"failed_edits": len(cases["error"]), "skipped_edits": len(cases["skipped"])}
