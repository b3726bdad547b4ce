"""Groups that differ in one number: edits at once (JEEP's Figure 4), or a setting (JEEP's Figure 6, CTP's 5 and 6)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retcon.bench.report.groups import Group

MIN_POINTS = 3
"""Values from which on there is a curve."""


@dataclass(frozen=True)
class Plot:
    """One picture, or one table."""

    name: str
    """For its file."""
    title: str
    x: str
    """What the number is."""
    points: tuple[tuple[float, str, Group], ...]
    """(number, line it belongs to, group), by number."""

    @property
    def lines(self) -> dict[str, list[tuple[float, Group]]]:
        """Points by line."""
        found: dict[str, list[tuple[float, Group]]] = {}
        for number, line, group in self.points:
            found.setdefault(line, []).append((number, group))
        return found


def curves(groups: Sequence[Group]) -> list[Plot]:
    """Return every curve that the runs have three points for."""
    return [*_sizes(groups), *_settings(groups)]


def _sizes(groups: Sequence[Group]) -> list[Plot]:
    found: dict[tuple[str, str], list[tuple[float, str, Group]]] = {}
    for group in groups:
        protocol = group.runs[0].manifest["protocol"]
        if protocol["kind"] == "batch":
            size = min(protocol["batch"] or group.n_cases, group.n_cases)
            found.setdefault((group.model, group.dataset), []).append((size, group.method, group))
    return [
        _curve(f"curve-{model}-{dataset}", f"{model}, {dataset}: against the number of edits", "edits at once", points)
        for (model, dataset), points in found.items()
        if len({size for size, _, _ in points}) >= MIN_POINTS
    ]


def _settings(groups: Sequence[Group]) -> list[Plot]:
    """Draw one method's runs that differ in a number; a line for each value of what else differs."""
    alike: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        name = str(group.runs[0].manifest["method"]["name"])
        alike.setdefault((group.model, group.dataset, group.protocol, name), []).append(group)
    found = []
    for (model, dataset, protocol, name), own in alike.items():
        settings: list[Mapping[str, Any]] = [group.runs[0].manifest["method"]["settings"] for group in own]
        differing = [key for key in settings[0] if len({json.dumps(s.get(key)) for s in settings}) > 1]
        for key in differing:
            values = [s[key] for s in settings]
            if not all(isinstance(v, int | float) for v in values) or len(set(values)) < MIN_POINTS:
                continue
            rest = [", ".join(f"{k} {s[k]}" for k in differing if k != key) or name for s in settings]
            points = [(float(v), line, group) for v, line, group in zip(values, rest, own, strict=True)]
            title = f"{model}, {dataset}, {protocol}: {name} against {key}"
            found.append(_curve(f"setting-{model}-{dataset}-{protocol}-{name}-{key}", title, key, points))
    return found


def _curve(name: str, title: str, x: str, points: list[tuple[float, str, Group]]) -> Plot:
    return Plot(name, title, x, tuple(sorted(points, key=lambda p: p[0])))
