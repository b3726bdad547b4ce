"""What an edit would take: measured on a few of its own edits, and scaled up."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from retcon.edits import Edit, list_of_edits
from retcon.errors import InvalidSetting
from retcon.workflow.moments import needed_moments
from retcon.workflow.settings import Resolved

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from retcon.lm.model import LM
    from retcon.lm.site import Site
    from retcon.memory.moments import Moments

N_TRIED = 6
"""Edits that are tried, after one that warms up."""
TOKENS_TRIED = 1024
"""Tokens of the corpus that are tried where moments are missing."""


@dataclass(frozen=True)
class Estimate:
    """What to expect of a run."""

    edits: int
    tried: int
    """How many of them were proposed for this estimate; nothing of that is kept."""
    edit_seconds: float
    """For all edits; more of them share what batches share, so it is rather too much than too little."""
    moments_asked: int
    """Second moments that the method asks for."""
    moments_missing: int
    """Those of them that are not yet on disk."""
    moments_tokens: int
    moments_seconds: float
    model_bytes: int
    float_bytes: int
    """Of packed matrices: those that the edit would replace by floats."""
    peak_bytes: int | None
    """Peak of the trial: the device's, or the whole process's on a CPU. A full batch is cut to what memory allows."""
    delta_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for `--json`."""
        return asdict(self)


class StoredOrIdentity:
    """Return moments for a trial: those that are on disk, and the identity for others, which are noted."""

    def __init__(self, inner: "Moments") -> None:
        self.inner = inner
        self.asked: set[str] = set()
        self.missing: dict[str, Site] = {}

    def prepare(self, lm: "LM", sites: "Sequence[Site]") -> None:
        self.asked |= {s.id for s in sites}
        self.missing |= {s.id: s for s in sites if not _is_there(self.inner, lm, s)}

    def second_moment(self, lm: "LM", site: "Site") -> "Float[Tensor, 'd_in d_in']":
        return self._identity(site) if site.id in self.missing else self.inner.second_moment(lm, site)

    def factor(self, lm: "LM", site: "Site") -> "Float[Tensor, 'd_in d_in']":
        return self._identity(site) if site.id in self.missing else self.inner.factor(lm, site)

    def derived(self, lm: "LM", site: "Site", what: str, build: "Callable[[Tensor], Tensor]") -> "Tensor":
        if site.id in self.missing:
            return build(self._identity(site))
        return self.inner.derived(lm, site, what, build)

    def keys(self, lm: "LM", sites: "Sequence[Site]") -> dict[str, str]:
        return self.inner.keys(lm, sites)

    def _identity(self, site: "Site") -> "Tensor":
        import torch

        return torch.eye(site.shape[1], dtype=torch.float64)


def _is_there(moments: "Moments", lm: "LM", site: "Site") -> bool:
    """Return whether a moment can be had without reading a corpus."""
    from retcon.memory.moments import CorpusMoments

    return not isinstance(moments, CorpusMoments) or moments.stored(lm, site) is not None


def estimate(
    lm: "LM",
    resolved: Resolved,
    edits: Iterable[Edit],
    *,
    moments: "Moments | None" = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Propose a few of the edits, time it, and scale. Nothing is kept.

    Args:
        moments: None: the model's default ones, where the method uses any.
        batch_size: as `in_steps` takes it.

    Raises:
        InvalidSetting: there are no edits.
    """
    edits = list_of_edits(edits)
    if not edits:
        raise InvalidSetting("no facts to edit")
    from retcon.lm.peak import Peak
    from retcon.methods.common.sequence import in_steps

    moments = needed_moments(lm, resolved.method) if moments is None else moments
    propose = partial(in_steps, resolved.method, batch_size=batch_size)
    trial = StoredOrIdentity(moments)
    step = max(1, len(edits) // N_TRIED)
    tried = edits[::step][:N_TRIED]
    propose(lm, tried[:1], moments=trial, seed=seed)
    started = time.perf_counter()
    propose(lm, tried[:1], moments=trial, seed=seed)
    first = time.perf_counter() - started
    with Peak(lm.device) as peak:
        started = time.perf_counter()
        delta = propose(lm, tried, moments=trial, seed=seed)
        took = time.perf_counter() - started
    more = max(took - first, 0.0) / (len(tried) - 1) if len(tried) > 1 else first
    n_tokens, collecting = _collecting(lm, moments, list(trial.missing.values()))
    touched = sum(lm.shape_of(name).numel() * 4 for name in delta.changes)
    return Estimate(
        edits=len(edits),
        tried=len(tried),
        edit_seconds=took + more * (len(edits) - len(tried)),
        moments_asked=len(trial.asked),
        moments_missing=len(trial.missing),
        moments_tokens=n_tokens,
        moments_seconds=collecting,
        model_bytes=lm.model_bytes(),
        float_bytes=sum(
            matrix.shape.numel() * matrix.dtype.itemsize for n, matrix in lm.packed.items() if n in delta.changes
        ),
        peak_bytes=peak.nbytes,
        delta_bytes=min(delta.nbytes() * len(edits) // len(tried), touched),
    )


def _collecting(lm: "LM", moments: "Moments", missing: "list[Site]") -> tuple[int, float]:
    """Return the tokens that the missing moments take, and seconds, from a few of them."""
    from retcon.memory.collect import collect
    from retcon.memory.moments import CorpusMoments, document_rows

    if not missing or not isinstance(moments, CorpusMoments):
        return 0, 0.0
    n_tokens, seconds = 0, 0.0
    for sites in moments.passes(lm, missing):
        n_wanted = moments.key(lm, sites[0]).n_tokens
        rows = document_rows(lm, moments.corpus.documents, min(TOKENS_TRIED, n_wanted), moments.max_length)
        started = time.perf_counter()
        for _ in collect(lm, sites, rows):
            pass
        n_tokens += n_wanted
        seconds += (time.perf_counter() - started) * n_wanted / max(sum(len(r.ids) for r in rows), 1)
    return n_tokens, seconds
