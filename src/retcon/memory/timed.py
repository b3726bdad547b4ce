"""Time the preparation of moments apart from editing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from retcon.lm.model import LM
from retcon.lm.site import Site
from retcon.memory.moments import CorpusMoments, Moments


class TimedMoments:
    """`inner`, with the seconds that its preparation took so far.

    Args:
        clock: seconds, from anywhere.
        progress: called with (tokens done, tokens wanted) where a corpus is read.
    """

    def __init__(
        self,
        inner: Moments,
        *,
        clock: Callable[[], float] = time.perf_counter,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        reports = progress is not None and isinstance(inner, CorpusMoments)
        self.inner: Moments = replace(inner, progress=progress) if reports else inner  # type: ignore[type-var]
        self.clock = clock
        self.seconds = 0.0

    def prepare(self, lm: LM, sites: Sequence[Site]) -> None:
        """Prepare as `inner` does, timed."""
        started = self.clock()
        try:
            self.inner.prepare(lm, sites)
        finally:
            self.seconds += self.clock() - started

    def second_moment(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        return self.inner.second_moment(lm, site)

    def factor(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        return self.inner.factor(lm, site)

    def derived(self, lm: LM, site: Site, what: str, build: Callable[[Tensor], Tensor]) -> Tensor:
        return self.inner.derived(lm, site, what, build)

    def keys(self, lm: LM, sites: Sequence[Site]) -> dict[str, str]:
        return self.inner.keys(lm, sites)
