"""Moments that know how long their preparation took, so that it can be told apart from editing."""

from collections.abc import Callable, Sequence
from typing import Any

from retcon.lm.model import LM, Site
from retcon.memory.moments import Moments


class TimedMoments:
    """`inner`, with the seconds its preparation took so far."""

    def __init__(self, inner: Moments, clock: Callable[[], float]) -> None:
        self.inner = inner
        self.clock = clock
        self.seconds = 0.0

    def prepare(self, lm: LM, sites: Sequence[Site]) -> None:
        """As `inner` does, timed."""
        started = self.clock()
        try:
            self.inner.prepare(lm, sites)
        finally:
            self.seconds += self.clock() - started

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
