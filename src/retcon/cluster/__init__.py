"""Other places where pieces of work are done: processes of this machine, or a Ray cluster.

    with retcon.cluster.workers("processes:2") as workers, working_on(lm, workers):
        delta = method.propose(lm, edits)

The pieces are those that work in one process is cut into anyway (a value search's chunks), so that the result is the
same to the bit, however many workers there are and whichever of them are lost, on one type of device and with the same
number of threads.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from retcon.errors import InvalidSetting
from retcon.work import Here, Workers

if TYPE_CHECKING:
    from retcon.lm.model import LM

__all__ = ["workers", "working_on"]


def workers(on: str) -> AbstractContextManager[Workers]:
    """Return the workers of a place; they are gone when the scope ends.

    Args:
        on: "local" (this process), "processes:N" (N processes of this machine), "ray" (Ray is started on this machine)
            or "ray:ADDRESS" (a Ray cluster that runs).

    Raises:
        InvalidSetting: it is none of these.
        MissingPackage: Ray is not installed.
    """
    kind, _, rest = on.partition(":")
    if on == "local":
        return nullcontext(Here())
    if kind == "processes" and rest.isdecimal() and int(rest) >= 1:
        from retcon.cluster.processes import Processes

        return Processes(int(rest))
    if on == "ray" or (kind == "ray" and rest):
        from retcon.cluster.actors import RayCluster

        return RayCluster(rest or None)
    raise InvalidSetting(f"work cannot be done on {on!r}; known: local, processes:N (N at least 1), ray, ray:ADDRESS")


@contextmanager
def working_on(lm: "LM", place: Workers) -> Iterator[None]:
    """Do pieces of work on `lm` at `place` while the scope lasts."""
    before, lm.workers = lm.workers, place
    try:
        yield
    finally:
        lm.workers = before
