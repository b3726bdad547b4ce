"""Independent pieces of work on a model, and the map over them: in this process, or where `retcon.cluster` has workers.

A result does not depend on where its piece was worked on, so a map may hand results over in any order.
"""

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from retcon.lm.model import LM

Piece = TypeVar("Piece")
Piece_contra = TypeVar("Piece_contra", contravariant=True)
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while something is worked on."""
Done = Callable[[int], None]
"""Called with how much of a piece is done."""


def silent(*progress: object) -> None:
    """Report no progress."""


class Work(Protocol[Piece_contra, Result_co]):
    """What is done with every piece: an object that can be sent to another process."""

    def __call__(self, lm: "LM", piece: Piece_contra, progress: Done) -> Result_co:
        """Return the piece's result, the model left as it was."""


class Workers(Protocol):
    """A place where pieces are worked on."""

    def map(
        self, lm: "LM", work: Work[Piece, Result], pieces: Sequence[Piece], progress: Done
    ) -> Iterator[tuple[int, Result]]:
        """Give (place of the piece, its result) as pieces are done, on the model's weights as they are now.

        Args:
            progress: called for pieces that are worked on in this process.
        """


class Here:
    """This process: one piece after the other, in their order."""

    def map(
        self, lm: "LM", work: Work[Piece, Result], pieces: Sequence[Piece], progress: Done
    ) -> Iterator[tuple[int, Result]]:
        for place, piece in enumerate(pieces):
            yield place, work(lm, piece, progress)


def in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Give results of `Workers.map` in the order of their pieces; one that comes early waits."""
    early: dict[int, Result] = {}
    due = 0
    for place, result in results:
        early[place] = result
        del result
        while due in early:
            yield early.pop(due)
            due += 1


@dataclass(frozen=True)
class _AllAtOnce(Generic[Piece, Result]):
    """Work whose results are made before they are sent, with its warnings, which nobody reads in a worker."""

    work: Work[Piece, Iterable[Result]]

    def __call__(self, lm: "LM", piece: Piece, progress: Done) -> tuple[list[Result], list[Any]]:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            results = list(self.work(lm, piece, progress))
        return results, [warning.message for warning in heard]


def map_whole_edits(
    lm: "LM", work: Work[Piece, Iterable[Result]], pieces: Sequence[Piece]
) -> Iterator[tuple[int, Iterable[Result]]]:
    """Give (place of the piece, its results) for pieces that are edits with their measurement.

    In this process the results of a piece come one by one as they are asked for. A single piece is worked on here, so
    that what is inside it goes to the workers.
    """
    if len(pieces) < 2 or isinstance(lm.workers, Here):
        yield from Here().map(lm, work, pieces, silent)
        return
    for place, (results, heard) in lm.workers.map(lm, _AllAtOnce(work), pieces, silent):
        for message in heard:
            warnings.warn(message, stacklevel=2)
        yield place, results


def whole_edits(lm: "LM", work: Work[Piece, Iterable[Result]], pieces: Sequence[Piece]) -> Generator[Result]:
    """Give the results of all pieces, in the pieces' order; as `map_whole_edits`. Closed, it closes a running piece."""
    for results in in_order(map_whole_edits(lm, work, pieces)):
        yield from results
