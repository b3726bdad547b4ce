"""Second moments for a run: from the corpus named, or the model's default ones."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retcon.lm.model import LM
    from retcon.memory.moments import Moments
    from retcon.methods.common.contract import Method


def moments_for(lm: "LM", corpus: str | Path | None = None) -> "Moments":
    """Moments from `corpus` (a file, or a dataset of the hub), or the model's default ones.

    Raises:
        MalformedFile: the file cannot be read as text.
    """
    from retcon.memory.corpus import Corpus
    from retcon.memory.defaults import default_moments
    from retcon.memory.moments import CorpusMoments

    return default_moments(lm) if corpus is None else CorpusMoments(Corpus.named(corpus))


def needed_moments(lm: "LM", method: "Method", corpus: str | Path | None = None) -> "Moments":
    """Moments for a method; none, and no corpus read, where it has no use for them."""
    from retcon.memory.moments import GivenMoments

    return moments_for(lm, corpus) if method.uses_moments else GivenMoments({})
