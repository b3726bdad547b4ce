"""What every editing method is: settings in a frozen dataclass, one verb, and no side effect."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import torch

import retcon
from retcon.delta import Delta
from retcon.edits import Edit
from retcon.lm.model import LM, Site
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments

Progress = Callable[[str, int, int], None]
"""Hears (stage, done, total) while a method works."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody listens to."""


@runtime_checkable
class Method(Protocol):
    """An editing method; its fields are its settings.

    What `propose` returns is something the LM can attach and detach. A Delta is the kind that is only weights.
    """

    def propose(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        state: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Delta:
        """The change that writes `edits`; the model is untouched. What is None is made, or read from the cache."""

    @classmethod
    def starting_point(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """Settings by relative depth, for a model that has no preset; `parallel`: attention and MLP side by side."""


def provenance(
    name: str,
    method: Any,
    lm: LM,
    edits: Sequence[Edit],
    *,
    contexts: Contexts,
    moments: Moments,
    sites: Sequence[Site],
    seed: int,
) -> dict[str, Any]:
    """The record of a run: enough to repeat it and to compare it with another implementation."""
    import transformers

    return {
        "method": name,
        "settings": asdict(method),
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "edits": [{k: v for k, v in asdict(e).items() if v is not None} for e in edits],
        "contexts": list(contexts.prefixes),
        "moments": moments.keys(lm, sites),
        "seed": seed,
        "versions": {
            "retcon": retcon.__version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
