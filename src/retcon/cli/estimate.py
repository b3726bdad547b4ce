"""What an edit would take: measured on a few of its own edits, and scaled up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from retcon.cli.shell import count, seconds, size

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from retcon.edits import Edit
    from retcon.lm.model import LM, Site
    from retcon.memory.moments import CorpusMoments

N_TRIED = 6
"""Edits that are tried, behind one that warms up."""
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
    peak_bytes: int | None
    """Peak of the trial: the device's, or the whole process's on a CPU. A full batch is cut to what memory allows."""
    delta_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def table(self) -> Table:
        """In words."""
        table = Table.grid(padding=(0, 2), pad_edge=False)
        tried = f"from {count(self.tried, 'edit')} tried just now"
        table.add_row("time", f"about {seconds(self.edit_seconds)} for {count(self.edits, 'edit')}", f"[dim]{tried}[/]")
        if self.moments_missing:
            what = f"{count(self.moments_missing, 'second moment')} from {self.moments_tokens:,} tokens, once"
            table.add_row("", f"about {seconds(self.moments_seconds)} before that", f"[dim]{what}[/]")
        elif self.moments_asked:
            table.add_row("", "no second moments to collect", "[dim]they are on disk[/]")
        peak = size(self.peak_bytes) if self.peak_bytes else "unknown"
        table.add_row("memory", f"model {size(self.model_bytes)}, peak {peak}", "[dim]of the trial[/]")
        table.add_row("delta", f"about {size(self.delta_bytes)}", "")
        return table


class StoredOrIdentity:
    """Moments for a trial: those that are on disk, and the identity for others, which are noted."""

    def __init__(self, inner: "CorpusMoments") -> None:
        self.inner = inner
        self.asked: set[str] = set()
        self.missing: dict[str, Site] = {}

    def prepare(self, lm: "LM", sites: "Sequence[Site]") -> None:
        self.asked |= {s.name for s in sites}
        self.missing |= {s.name: s for s in sites if self.inner.stored(lm, s) is None}

    def second_moment(self, lm: "LM", site: "Site") -> "Float[Tensor, 'd_in d_in']":
        return self._identity(site) if site.name in self.missing else self.inner.second_moment(lm, site)

    def factor(self, lm: "LM", site: "Site") -> "Float[Tensor, 'd_in d_in']":
        return self._identity(site) if site.name in self.missing else self.inner.factor(lm, site)

    def derived(self, lm: "LM", site: "Site", what: str, build: "Callable[[Tensor], Tensor]") -> "Tensor":
        if site.name in self.missing:
            return build(self._identity(site))
        return self.inner.derived(lm, site, what, build)

    def keys(self, lm: "LM", sites: "Sequence[Site]") -> dict[str, str]:
        return self.inner.keys(lm, sites)

    def _identity(self, site: "Site") -> "Tensor":
        import torch

        return torch.eye(site.weight.shape[1], dtype=torch.float64)


def estimate(
    lm: "LM", propose: "Callable[..., Any]", edits: "Sequence[Edit]", moments: "CorpusMoments", *, seed: int
) -> Estimate:
    """Propose a few of the edits, time it, and scale.

    Args:
        propose: (lm, edits, moments=, seed=) -> Delta.
    """
    from retcon.bench.peak import Peak

    trial = StoredOrIdentity(moments)
    step = max(1, len(edits) // N_TRIED)
    tried = list(edits[::step])[:N_TRIED]
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
    touched = sum(lm.parameter(name).numel() * 4 for name in delta.changes)
    return Estimate(
        edits=len(edits),
        tried=len(tried),
        edit_seconds=took + more * (len(edits) - len(tried)),
        moments_asked=len(trial.asked),
        moments_missing=len(trial.missing),
        moments_tokens=n_tokens,
        moments_seconds=collecting,
        model_bytes=sum(p.nbytes for p in lm.model.parameters()),
        peak_bytes=peak.nbytes,
        delta_bytes=min(delta.nbytes() * len(edits) // len(tried), touched),
    )


def _collecting(lm: "LM", moments: "CorpusMoments", missing: "list[Site]") -> tuple[int, float]:
    """Tokens that the missing moments take, and seconds, from a few of them."""
    from retcon.memory.collect import collect
    from retcon.memory.corpus import document_rows

    if not missing:
        return 0, 0.0
    n_tokens = max(moments.key(lm, s).n_tokens for s in missing)
    rows = document_rows(lm, moments.corpus.documents, min(TOKENS_TRIED, n_tokens), moments.max_length)
    started = time.perf_counter()
    for _ in collect(lm, missing, rows):
        pass
    return n_tokens, (time.perf_counter() - started) * n_tokens / max(sum(len(r.ids) for r in rows), 1)
