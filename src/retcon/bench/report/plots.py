"""Pictures of a benchmark, with matplotlib (the extra `plot`), as SVG texts."""

import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retcon.bench.report.curves import curves
from retcon.bench.report.groups import Group, Number, blocks, by_dataset, row_names
from retcon.bench.report.names import distinct, slug
from retcon.drawing import drawn, figure
from retcon.evaluation.records import Record
from retcon.evaluation.summary import case_means, main_variant

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#b83280", "#6b46c1", "#975a16", "#319795", "#c53030", "#4a5568", "#d69e2e")
"""By method, in order; told apart by marker too."""
MARKERS = "osD^vPX*<>d"
"""One more than colours, so that the two together repeat only after 110 methods."""
MAX_RELATIONS = 12
"""Relations shown, those with most cases."""
LOGARITHMIC_FROM = 30
"""Largest number over smallest from which on an axis is logarithmic."""


Places = Mapping[str, int]
"""Place of a method among all: its colour and marker, the same in every picture."""


@dataclass(frozen=True)
class Picture:
    """One picture."""

    name: str
    """For its file."""
    title: str
    alt: str
    """What it shows, for who cannot see it."""
    svg: str


def pictures_of(groups: Sequence[Group]) -> list[Picture]:
    """Return every picture that the runs have the numbers for.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    draws: list[Callable[[Sequence[Group], Places], list[Picture]]] = [trade_off, scaling, retention, relations, times]
    places = {method: place for place, method in enumerate(dict.fromkeys(g.method for g in groups))}
    return distinct(picture for draw in draws for picture in draw(groups, places))


def trade_off(groups: Sequence[Group], places: Places) -> list[Picture]:
    """Draw generalisation against locality, each method a point with its intervals."""
    pictures = []
    for model, protocol, dataset, own in by_dataset(groups):
        points = []
        for g in own:
            x, y = g.number("LS"), g.number("GS")
            if x is not None and y is not None:
                points.append((places[g.method], g.method, x, y))
        if not points:
            continue
        made, axes = _figure(5.2, 4.5)
        for place, name, x, y in points:
            marker, colour = _look(place)
            axes.errorbar(
                100 * x.value,
                100 * y.value,
                xerr=_arms(x),
                yerr=_arms(y),
                fmt=marker,
                color=colour,
                capsize=2,
                label=name,
            )
        for limits, ends in ((axes.set_xlim, axes.get_xlim()), (axes.set_ylim, axes.get_ylim())):
            limits(max(ends[0], -3), min(ends[1], 103))  # a margin for the marks at 0 and 100
        axes.set_xlabel("LS: neighbours that keep their answer, %")
        axes.set_ylabel("GS: paraphrases that give the new one, %")
        _legend(made, axes, 4)
        title = f"Generalisation against locality: {model}, {dataset}, {protocol}"
        alt = "; ".join(f"{n}: LS {100 * x.value:.1f}, GS {100 * y.value:.1f}" for _, n, x, y in points)
        pictures.append(_done(made, f"trade-off-{model}-{dataset}-{protocol}", title, alt))
    return pictures


def scaling(groups: Sequence[Group], places: Places) -> list[Picture]:
    """Draw JEEP's Figures 4 and 6, CTP's 5 and 6: scores against the number of edits or a setting, intervals shaded."""
    pictures = []
    for curve in curves(groups):
        made, panels = _figure(9, 2.9, columns=4)
        numbers = [x for x, _, _ in curve.points]
        for axes, name in zip(panels, ("Score", "ES", "GS", "LS"), strict=True):
            for i, (line, points) in enumerate(curve.lines.items()):
                known = [(x, number) for x, group in points if (number := group.number(name)) is not None]
                _line(axes, known, places.get(line, i), line)
            if min(numbers) > 0 and max(numbers) >= LOGARITHMIC_FROM * min(numbers):
                axes.set_xscale("log")
            axes.set_title(name, fontsize=10)
            axes.set_xlabel(curve.x)
        _legend(made, panels[0], 8)
        alt = f"Four line plots of Score, ES, GS and LS against {curve.x} for {', '.join(curve.lines)}"
        pictures.append(_done(made, curve.name, curve.title, alt))
    return pictures


def retention(groups: Sequence[Group], places: Places) -> list[Picture]:
    """Draw sequences: success right after each edit, and of all edits so far at checkpoints and at the end."""
    pictures = []
    sequential = [g for g in groups if "sequential" in g.runs[0].manifest["protocol"]["kind"]]
    for model, protocol, dataset, own in by_dataset(sequential):
        made, panels = _figure(9, 3.9, columns=3)
        for axes, name in zip(panels, ("ES", "GS", "LS"), strict=True):
            for group in own:
                marker, colour = _look(places[group.method])
                axes.plot(*_columns(_kept(group, name)), marker=marker, ms=4, color=colour, label=group.method)
                axes.plot(*_columns(_right_after(group, name)), color=colour, lw=0.8, ls=":")
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("edits so far")
            axes.set_ylim(-3, 103)
        _legend(made, panels[0], 6, title="all so far; dotted: just made")
        title = f"What is left of the edits: {model}, {dataset}, {protocol}"
        alt = "; ".join(
            f"{g.method}: ES {_last(_right_after(g, 'ES'))} right after, {_last(_kept(g, 'ES'))} at the end"
            for g in own
        )
        pictures.append(_done(made, f"retention-{model}-{dataset}-{protocol}", title, alt))
    return pictures


def relations(groups: Sequence[Group], places: Places) -> list[Picture]:
    """Draw GS and LS by relation, for the relations with most cases."""
    pictures = []
    for model, protocol, dataset, own in by_dataset(groups):
        by_case = own[0].runs[0].relations
        counted: dict[str, int] = {}
        for relation in by_case.values():
            counted[relation] = counted.get(relation, 0) + 1
        shown = sorted(counted, key=lambda r: -counted[r])[:MAX_RELATIONS]
        if len(shown) < 2:
            continue
        made, panels = _figure(9, 1.3 + 0.27 * len(shown), columns=2, sharey=True)
        for axes, name in zip(panels, ("GS", "LS"), strict=True):
            for place, group in enumerate(own):
                values = _by_relation(group, name)
                heights = [i + 0.7 * (place + 0.5) / len(own) - 0.35 for i, r in enumerate(shown) if r in values]
                points = [values[r] for r in shown if r in values]
                marker, colour = _look(places[group.method])
                axes.plot(points, heights, marker, ms=4, color=colour, label=group.method)
            axes.set_yticks(range(len(shown)), [f"{r} ({counted[r]})" for r in shown], fontsize=8)
            axes.set_xlabel(f"{name}, %")
            axes.set_xlim(-3, 103)
        panels[0].invert_yaxis()
        _legend(made, panels[1], 6)
        title = f"By relation: {model}, {dataset}, {protocol}"
        alt = f"GS and LS of {', '.join(g.method for g in own)} for {', '.join(shown)}"
        pictures.append(_done(made, f"relations-{model}-{dataset}-{protocol}", title, alt))
    return pictures


def times(groups: Sequence[Group], places: Places) -> list[Picture]:
    """Draw CTP's Figure 3: seconds per edit and method."""
    pictures = []
    for model, protocol, block in blocks(groups):
        timed = [g for g in block if g.seconds_per_edit() is not None]
        found = [(name, g.method, g.seconds_per_edit() or 0.0) for name, g in zip(row_names(timed), timed, strict=True)]
        if len(found) < 2:
            continue
        names = [textwrap.fill(name, 36) for name, *_ in found]
        made, axes = _figure(5.2, 1.1 + 0.3 * sum(1 + name.count("\n") for name in names))
        colours = [_look(places[method])[1] for _, method, _ in found]
        axes.barh(range(len(found)), [s for *_, s in found], color=colours, height=0.6)
        axes.set_yticks(range(len(found)), names)
        axes.invert_yaxis()
        axes.set_xlabel("seconds per edit")
        title = f"Time: {model}, {protocol}"
        alt = "; ".join(f"{name}: {seconds:.3f} s" for name, _, seconds in found)
        pictures.append(_done(made, f"time-{model}-{protocol}", title, alt))
    return pictures


# --- numbers -----------------------------------------------------------------------------------------------------


def _mine(group: Group, record: Record, metric: str) -> bool:
    own = main_variant(group.summaries[0].family, metric)
    return record.metric == metric and record.variant == own and record.value is not None


def _kept(group: Group, metric: str) -> list[tuple[int, float]]:
    """Return (edits so far, value over all of them) at checkpoints and at the end, of the first run."""
    size = int(group.runs[0].context["edit_batch"])
    records: dict[int, list[Record]] = {}
    for r in group.runs[0].records:
        if r.when in ("checkpoint", "final") and _mine(group, r, metric):
            records.setdefault(min((r.step + 1) * size, group.n_cases), []).append(r)
    return [(n, _mean(case_means(own).values())) for n, own in sorted(records.items())]


def _right_after(group: Group, metric: str) -> list[tuple[int, float]]:
    """Return (edits so far, mean right after the edit over the steps up to here), of the first run."""
    size = int(group.runs[0].context["edit_batch"])
    records: dict[int, list[Record]] = {}
    for r in group.runs[0].records:
        if r.when == "immediate" and _mine(group, r, metric):
            records.setdefault(r.step, []).append(r)
    values: list[float] = []
    found = []
    for step, own in sorted(records.items()):
        values += case_means(own).values()
        found.append((min((step + 1) * size, group.n_cases), _mean(values)))
    return found


def _by_relation(group: Group, metric: str) -> dict[str, float]:
    relations_of = group.runs[0].relations
    values: dict[str, list[float]] = {}
    for case_id, value in case_means(r for r in group.runs[0].at("final") if _mine(group, r, metric)).items():
        if case_id in relations_of:
            values.setdefault(relations_of[case_id], []).append(value)
    return {relation: _mean(own) for relation, own in values.items()}


def _mean(of_cases: Collection[float]) -> float:
    """Return the mean, in percent, as tables have it: every case counts once, however many queries it has."""
    return 100 * math.fsum(of_cases) / len(of_cases)


def _last(points: Sequence[tuple[int, float]]) -> str:
    return f"{points[-1][1]:.1f}" if points else "-"


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# --- drawing -----------------------------------------------------------------------------------------------------


def _legend(made: Any, axes: Any, ncols: int, title: str | None = None) -> None:
    """Say what the lines of `axes` are, below the panels, where it hides none."""
    handles, labels = axes.get_legend_handles_labels()
    place: dict[str, Any] = dict(loc="outside lower center", ncols=ncols)
    made.legend(handles, labels, frameon=False, fontsize=8, title=title, title_fontsize=7, **place)


def _figure(width: float, height: float, *, columns: int = 1, **more: Any) -> tuple[Any, Any]:
    """Return a figure and its axes, an array where there are several."""
    made, axes = figure(1, columns, width, height, **more)
    for each in axes[0]:
        each.grid(True, color="#e2e8f0", lw=0.6)
        each.set_axisbelow(True)
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
    return made, axes[0] if columns > 1 else axes[0, 0]


def _look(place: int) -> tuple[str, str]:
    """Return a method's marker and colour."""
    return MARKERS[place % len(MARKERS)], COLOURS[place % len(COLOURS)]


def _line(axes: Any, points: Sequence[tuple[float, Number]], place: int, label: str) -> None:
    marker, colour = _look(place)
    x, y = [n for n, _ in points], [100 * number.value for _, number in points]
    axes.plot(x, y, marker=marker, ms=4, color=colour, label=label)
    banded = [(n, number.interval) for n, number in points if number.interval is not None]
    low, high = [_within(100 * i.low) for _, i in banded], [_within(100 * i.high) for _, i in banded]
    axes.fill_between([n for n, _ in banded], low, high, color=colour, alpha=0.15, lw=0)


def _arms(n: Number) -> list[list[float]] | None:
    if n.interval is None:
        return None
    value = 100 * n.value
    low, high = _within(100 * n.interval.low), _within(100 * n.interval.high)
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _within(percent: float) -> float:
    """Return a bound of an interval, cut where no share can be."""
    return min(100.0, max(0.0, percent))


def _done(made: Any, name: str, title: str, alt: str) -> Picture:
    """Return the picture with its title inside, so that it says what it is of wherever it is pasted."""
    made.suptitle(textwrap.fill(title, int(15 * made.get_figwidth())), fontsize=9)
    svg = drawn(made, "svg", transparent=True).decode()
    return Picture(slug(name), title, alt, svg[svg.index("<svg") :])
