"""PMET: optimise attention and MLP outputs together, write the MLP's alone.

Li et al. 2023, arXiv:2308.08742; symbols as there. Departures: docs/methods/pmet.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.model import LM
from retcon.lm.trace import Point
from retcon.memory.contexts import Contexts
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
from retcon.methods.proposal import measured_tensor, proposing


@dataclass(frozen=True, kw_only=True)
class Pmet:
    """Precise model editing in a transformer."""

    batch: ClassVar[bool] = True
    keeps: ClassVar[str] = ""

    layers: tuple[int, ...]
    """Blocks whose down-projections are rewritten, ascending, counted from 0; values are sought at the last."""
    moment_weight: float = 6000.0
    """lambda: how many old keys the second moment stands for."""
    clamp: float = 1.0
    """Radius of each delta as a multiple of its own clean value's norm."""
    weight_decay: float = 0.5
    """Weight of ||delta|| / ||init||^2 at the MLP's output."""
    attn_weight_decay: float = 0.5
    """The same at the attention's output."""
    steps: int = 30
    """Forward passes per edit at most."""
    learning_rate: float = 0.5
    """Adam's, for both values."""
    kl_factor: float = 1.0
    """Weight of the divergence at the subject."""
    stop: Literal["loss", "probability"] = "loss"
    """What ends the search: the total loss under `threshold`, or the target's mean token probability at it."""
    threshold: float | None = None
    """None: 0.05 for `loss`, 0.9 for `probability`."""
    settled_factor: float | None = 0.1
    """phi: weight of the nll once every target token is the most likely one in every context; None: always 1."""
    settled_kl: float = 0.01
    """The search also stops once that is so and kl_factor * KL is at most this."""
    attention: bool = True
    """False: no value at the attention's output."""
    site: Literal["mlp", "block"] = "mlp"
    """Where the value that is written is sought and measured; `block` is MEMIT's."""
    spread: Spread = "sqrt"
    """Share of each layer in what is missing."""
    key_average: KeyAverage = "two_level"
    """Mean over contexts."""

    def __post_init__(self) -> None:
        check_layers("pmet", self, "layers")
        check_not_negative("pmet", self, "clamp", "weight_decay", "attn_weight_decay", "moment_weight", "settled_kl")
        check_choices("pmet", self)
        if self.settled_factor is not None and self.settled_factor < 0:
            raise InvalidSetting(f"pmet: settled_factor must not be negative, found {self.settled_factor}")

    @classmethod
    def starting_point(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """Untuned: MEMIT's layers."""
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
        """The change that writes `edits` as one batch; the model is untouched. Nothing is kept between batches."""
        check_stateless("pmet", state)
        tensor = measured_tensor(lm, self.site, "pmet")
        group = LayerGroup(self.layers, "subject_last", tensor, self.spread, weighted(self.moment_weight))
        with proposing(
            "pmet",
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
                return proposal.delta()
            last = self.layers[-1]
            sites = [ValueSite(Point(last, tensor), "subject_last", self.clamp, self.weight_decay)]
            if self.attention:
                sites += [ValueSite(Point(last, "attn"), "subject_last", self.clamp, self.attn_weight_decay)]
            search = stopping(self, settled_factor=self.settled_factor, settled_kl=self.settled_kl)
            values = proposal.search(sites, search)
            proposal.write(group, values.target(0), key_average=self.key_average)  # the attention's value is let go
            return proposal.delta(values.report)
