"""The report of a file that was read: what became cases, what was left out and flagged, and how it was read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retcon.plural import plural

QUIET = {"conflict", "duplicate"}
"""Reasons that a count says enough of."""
N_LISTED = 5
"""Rows left out that a report's text names."""


@dataclass(frozen=True)
class LeftOut:
    """A row that gave no case."""

    row: int
    """Its number in the file."""
    id: str
    reason: str
    """A short name, by which they are counted."""
    detail: str
    """What is wrong with it, in words."""


@dataclass(frozen=True)
class LoadReport:
    """What was read, left out and flagged, and how; part of any result made from the cases."""

    path: str
    format: str
    sha256: str
    """Of the file's bytes; of the rows where there is no file."""
    rows: int
    """Rows read: those of the file from `start` on, at most `limit`."""
    cases: int
    """Cases kept."""
    dropped: Mapping[str, int]
    """Rows left out, by reason."""
    dropped_queries: Mapping[str, int]
    """Queries left out of cases that were kept, by reason."""
    flags: Mapping[str, int]
    """Cases kept that carry a flag, by flag."""
    options: Mapping[str, Any]
    """The reader's settings."""
    left_out: tuple[LeftOut, ...] = ()
    """The rows that `dropped` counts, one by one."""
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Fields that the format does not have, by name, with the rows that have them; kept in `meta["extra"]`."""
    likely: Mapping[str, str] = field(default_factory=dict)
    """The field that was probably meant, for those of them that look like one."""

    def __str__(self) -> str:
        text = self.summary()
        if hints := self.hints():
            text += "; " + "; ".join(hints)
        return text + (f"; left out: {self.refusals()}" if self.refused else "")

    @property
    def refused(self) -> list[LeftOut]:
        """The rows left out because they cannot be used."""
        return [r for r in self.left_out if r.reason not in QUIET]

    def refusals(self) -> str:
        """Return the first of them, by row and reason, and how many more there are."""
        text = ", ".join(f"row {r.row} ({r.detail})" for r in self.refused[:N_LISTED])
        more = len(self.refused) - N_LISTED
        return text + (f" and {more:,} more" if more > 0 else "")

    def hints(self) -> list[str]:
        """Return a line per unknown field, with the likely one."""
        return [
            f"unknown field {name!r} in {plural(n, 'row')}"
            + (f" (did you mean {self.likely[name]!r}?)" if name in self.likely else "")
            for name, n in self.unknown.items()
        ]

    def losses(self) -> list[str]:
        """Return a line of counts per kind of what was left out: rows, and queries of rows that were kept."""
        return _counted("dropped", self.dropped) + _counted("queries dropped", self.dropped_queries)

    def summary(self) -> str:
        """Return one line of counts."""
        chosen = [self.format, *(f"{k}={v}" for k, v in self.options.items() if v not in _USUAL.get(k, ()))]
        kept = (
            f"{self.path} ({', '.join(chosen)}, sha256 {self.sha256[:12]}): {self.cases:,} of {self.rows:,} rows kept"
        )
        return "; ".join([kept, *self.losses(), *_counted("flagged", self.flags)])


def _counted(what: str, counts: Mapping[str, int]) -> list[str]:
    return [f"{what}: " + ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items()))] if counts else []


_USUAL: Mapping[str, tuple[Any, ...]] = {
    "start": (0,),
    "limit": (None,),
    "conflicts": ("error", "drop"),
    "on_error": ("stop", "skip"),
    "case_target": ("new",),
    "prompt_style": ("loc.nq_q",),
    "answers": ("all",),
    "prompting": ("standard",),
}
"""Options that need no mention: the defaults, and those whose effect the counts show."""
