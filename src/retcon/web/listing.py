"""The facts in force as the page lists them: filtered, sorted, and by the hundred."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from retcon.store.index import Line

N_ROWS, MAX_ROWS = 100, 1000
"""Facts in force that the page shows at first, and at most; a filter finds the others."""

Order = Literal["applied", "newest", "prompt", "answer"]
"""How the facts in force are sorted: as applied, the other way round, or by the alphabet."""


@dataclass(frozen=True)
class Listing:
    """The facts in force that a browser asked for."""

    shown: tuple[Line, ...]
    n_found: int
    n_all: int

    @property
    def more(self) -> int:
        """How many to ask for next; 0 where all are shown, or as many as can be."""
        return min(len(self.shown) + N_ROWS, MAX_ROWS) if len(self.shown) < min(self.n_found, MAX_ROWS) else 0


def listed(lines: Sequence[Line], words: str, order: str, rows: int) -> Listing:
    """Return those of the facts that were asked for.

    Args:
        lines: the facts in force, in the order in which they were applied.
        words: each of them is in a fact's prompt, its answer or its id, in any case.
        order: an `Order`; another word is the first one.
        rows: how many, between `N_ROWS` and `MAX_ROWS`.
    """
    wanted = words.casefold().split()
    found = [
        line
        for line in lines
        if not wanted or all(w in f"{line.prompt}\n{line.target}\n{line.fact}".casefold() for w in wanted)
    ]
    if order == "newest":
        found.reverse()
    elif order in ("prompt", "answer"):
        found.sort(key=lambda line: (line.prompt if order == "prompt" else line.target).casefold())
    return Listing(tuple(found[: max(N_ROWS, min(rows, MAX_ROWS))]), len(found), len(lines))
