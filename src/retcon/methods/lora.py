"""LoRA: train a low-rank change of a few matrices in every layer.

Hu et al. 2021, arXiv:2106.09685, section 4.1; symbols as there. As a knowledge editor it is a baseline of many tables;
what EasyEdit's code means by it, and where we depart: docs/methods/lora.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import DeltaMismatch
from retcon.lm.model import LM
from retcon.lm.site import Site
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import State
from retcon.methods.common.marks import marked, unmarked
from retcon.methods.common.settings import AnyLayers, Count, Matrices, NotNegative
from retcon.methods.common.tuning import TuningSettings, sites_named, tuning
from retcon.seed import generator_of
from retcon.training.parts import TrainedLowRank, fresh
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class Lora(TuningSettings):
    """Low-rank adaptation: dW = (alpha / rank) B A."""

    name: ClassVar[str] = "lora"
    state_description: ClassVar[str] = "the adapter's factors, for continue_adapter"

    rank: Count = 8
    """r: rank of the change of each matrix."""
    alpha: float = 32.0
    """The change is alpha / rank times B A."""
    layers: AnyLayers = ()
    """Blocks that are adapted, ascending, counted from 0; none: all that have such a matrix."""
    modules: Matrices = ("q_proj", "v_proj")
    """Matrices that are adapted: kinds of sites, or a module's path inside a block (`attn.c_attn`)."""
    learning_rate: NotNegative = 5e-3
    continue_adapter: bool = False
    """In a sequence, go on training the adapter in `state` rather than begin another on top of it."""

    @property
    def keeps_state(self) -> bool:
        """With `continue_adapter`."""
        return self.continue_adapter

    @property
    def state_is_change(self) -> bool:
        """With `continue_adapter`."""
        return self.continue_adapter

    def propose(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        state: State | None = None,
        values: ValueCache | None = None,
        keep_values: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Delta:
        """Return the change that writes `edits` as one adapter; contexts and moments are not used.

        The seed draws A and mini-batches.

        Raises:
            DeltaMismatch: the adapter given is not one of this model, these matrices, this rank and this alpha / rank;
                an earlier version kept neither the model nor the scale, and they are then not compared.
        """
        sites = sites_named(self.name, lm, self.layers, self.modules)
        with tuning(self, lm, edits, [site.name for site in sites], seed=seed, progress=progress) as run:
            if not edits:
                return run.delta(state=state if self.keeps_state else None)
            generator, scale = generator_of(seed), self.alpha / self.rank
            begun = None
            if self.continue_adapter and state:
                begun = unmarked(self.name, state, lm, "begin anew (continue_adapter=False)", scale=scale)
                if others := begun.keys() - {_key(site, which) for site in sites for which in ("B", "A")}:
                    raise DeltaMismatch(
                        f"{self.name}: the state given has an adapter for {min(others).rpartition('.')[0]} too, which "
                        "would be lost to the next batch; name the same layers and modules, or begin anew "
                        "(continue_adapter=False)"
                    )
            parts, before = [], []
            for site in sites:
                b, a = adapter(site, self.rank, generator) if begun is None else self._given(site, begun)
                parts.append(TrainedLowRank(site, b, a, scale))
                if begun is not None:  # its B A is in the weights already, by the delta that made it
                    before.append(TrainedLowRank(site, b.detach().clone(), a.detach().clone(), -scale))
            ended = run.train(parts, beside=before)
            kept = {_key(part.site, which): t.detach().cpu() for part in parts for which, t in _factors(part)}
            kept = marked(kept, lm, scale=scale)
            return run.delta([*parts, *before], ended, state=kept if self.continue_adapter else None)

    def n_trained(self, lm: LM) -> int:
        """Return how many values are trained."""
        return self.rank * sum(sum(site.shape) for site in sites_named(self.name, lm, self.layers, self.modules))

    @property
    def bytes_per_value(self) -> int:  # type: ignore[override]
        """With the adapter as it was given besides, where it is trained on."""
        return TuningSettings.bytes_per_value + (4 if self.continue_adapter else 0)

    def _given(self, site: Site, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the factors of a state, to be trained on."""
        out, into = site.shape
        found = [state.get(_key(site, which)) for which in ("B", "A")]
        for tensor, shape in zip(found, ((out, self.rank), (self.rank, into)), strict=True):
            if tensor is None or tensor.shape != shape:
                raise DeltaMismatch(
                    f"{self.name}: the state given has no adapter of rank {self.rank} for {site.name}; begin anew "
                    "(continue_adapter=False)"
                )
        like = fresh(site)
        return tuple(t.to(like.device, like.dtype).clone().requires_grad_() for t in found)  # type: ignore[union-attr, return-value]


def adapter(site: Site, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return B = 0 (out x rank) and A (rank x in), Kaiming-uniform with a = sqrt(5): uniform up to 1 / sqrt(in)."""
    out, into = site.shape
    b, a = fresh(site, out, rank), fresh(site, rank, into)
    with torch.no_grad():
        a.copy_((2 * torch.rand(rank, into, generator=generator, dtype=torch.float64) - 1) / math.sqrt(into))
    return b, a


def _factors(part: TrainedLowRank) -> list[tuple[str, Tensor]]:
    return [("B", part.left), ("A", part.right)]


def _key(site: Site, which: str) -> str:
    expert = "" if site.expert is None else f".{site.expert}"
    return f"{site.layer}.{site.kind}{expert}.{which}"
