"""Second moments for a run: from the corpus named, or the model's default ones."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retcon.lm.model import LM
    from retcon.memory.moments import Moments
    from retcon.methods.common.contract import Method


def moments_for(lm: "LM", corpus: str | Path | None = None, *, shrink: bool = False) -> "Moments":
    """Return moments from `corpus` (a file, or a dataset of the hub), or the model's default ones.

    Args:
        shrink: see `CorpusMoments.shrink`.

    Raises:
        MalformedFile: the file cannot be read as text.
    """
    from retcon.memory.corpus import Corpus
    from retcon.memory.defaults import default_moments
    from retcon.memory.moments import CorpusMoments

    found = default_moments(lm) if corpus is None else CorpusMoments(Corpus.named(corpus))
    return replace(found, shrink=True) if shrink else found


def needed_moments(lm: "LM", method: "Method", corpus: str | Path | None = None) -> "Moments":
    """Return moments for a method; none, and no corpus read, where it has no use for them.

    A method that may search with a smaller cut where memory runs out (`shrink`) may be given moments so collected.
    """
    from retcon.memory.moments import GivenMoments

    if not method.uses_moments:
        return GivenMoments({})
    return moments_for(lm, corpus, shrink=method.takes_shrunk_moments)
