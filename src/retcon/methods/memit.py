"""MEMIT: write many facts at once, spread over several layers.

Meng et al. 2022, arXiv:2210.07229, section 4; symbols as there. With `cache_keys` it is MEMIT-seq, the sequential form
that AlphaEdit's authors compare with (arXiv:2410.02355). Departures: docs/methods/memit.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.lm.trace import Point
from retcon.memory.contexts import Contexts
from retcon.memory.key_cache import earlier_keys, extended
from retcon.memory.keys import KeyAverage
from retcon.memory.moments import Moments
from retcon.memory.values import ValueSite
from retcon.memory.write import LayerGroup, Spread, Temper, weighted
from retcon.methods.base import (
    Progress,
    check_choices,
    check_layers,
    check_not_negative,
    check_stateless,
    early_layers,
    silent,
    stopping,
    untempered,
)
from retcon.methods.proposal import measured_tensor, proposing, sites_of


@dataclass(frozen=True, kw_only=True)
class Memit:
    """Mass-editing memory in a transformer."""

    batch: ClassVar[bool] = True
    keeps: ClassVar[str] = "with cache_keys, the keys of earlier edits"

    layers: tuple[int, ...]
    """Blocks whose down-projections are rewritten (R), ascending, counted from 0; the value is sought at the last."""
    moment_weight: float = 15_000.0
    """lambda: how many old keys the second moment stands for."""
    clamp: float = 0.75
    """Radius of delta as a multiple of the clean value's norm."""
    weight_decay: float = 0.5
    """Weight of ||delta|| / ||init||^2."""
    steps: int = 25
    """Forward passes per edit at most."""
    learning_rate: float = 0.5
    """Adam's."""
    kl_factor: float = 0.0625
    """Weight of the divergence at the subject."""
    stop: Literal["loss", "probability"] = "loss"
    """What ends the search: the total loss under `threshold`, or the target's mean token probability at it."""
    threshold: float | None = None
    """None: 0.05 for `loss`, 0.9 for `probability`."""
    spread: Spread = "even"
    """Share of each layer in what is missing."""
    cache_keys: bool = False
    """MEMIT-seq: the keys of earlier batches join the old keys, so that their values stay too."""
    key_average: KeyAverage = "two_level"
    """Mean over contexts: `two_level` as the released code, `uniform` as the paper's formula."""

    def __post_init__(self) -> None:
        check_layers("memit", self, "layers")
        check_not_negative("memit", self, "clamp", "weight_decay", "moment_weight")
        check_choices("memit", self)

    @classmethod
    def starting_point(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """Untuned: published layers by relative depth."""
        return {"layers": early_layers(n_layers)}

    def propose(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        state: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        progress: Progress = silent,
        temper: Temper = untempered,
    ) -> Delta:
        """The change that writes `edits` as one batch; the model is untouched. `state` is taken with `cache_keys`."""
        if not self.cache_keys:
            check_stateless("memit without cache_keys", state)
        earlier = earlier_keys(state, lm, sites_of("memit", lm, self.layers))
        tensor = measured_tensor(lm, "block", "memit")
        group = LayerGroup(self.layers, "subject_last", tensor, self.spread, weighted(self.moment_weight, earlier))
        with proposing(
            "memit",
            self,
            lm,
            edits,
            [group],
            contexts=contexts,
            moments=moments,
            seed=seed,
            temper=temper,
            progress=progress,
        ) as proposal:
            if not edits:
                return proposal.delta(state=state)
            site = ValueSite(Point(self.layers[-1], tensor), "subject_last", self.clamp, self.weight_decay)
            values = proposal.search([site], stopping(self))
            proposal.write(group, values.target(0), key_average=self.key_average)
            kept = extended(earlier, proposal.keys, lm) if self.cache_keys else None
            return proposal.delta(values.report, state=kept)
