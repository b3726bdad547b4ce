"""EMMET: write many facts at once under ROME's constraint, that each is stored exactly.

Gupta et al. 2024, arXiv:2403.14236; symbols as there. Departures, and what the released settings amount to:
docs/methods/emmet.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.model import LM
from retcon.lm.trace import Point
from retcon.memory.contexts import Contexts
from retcon.memory.keys import KeyAverage
from retcon.memory.moments import Moments
from retcon.memory.solve import equality
from retcon.memory.values import ValueSite
from retcon.memory.write import LayerGroup, LayerProblem, Spread, Temper
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
class Emmet:
    """Equality-constrained mass model editing."""

    batch: ClassVar[bool] = True
    keeps: ClassVar[str] = ""

    layers: tuple[int, ...]
    """Blocks whose down-projections are rewritten, ascending, counted from 0; published settings have one."""
    stabiliser: float | None = None
    """a (`emmet_lambda`): added to the diagonal of K^T C^-1 K. 0 stores every fact exactly. None: 0 for one edit, 0.1
    for more."""
    moment_weight: float = 1.0
    """w (`mom2_update_weight`): factor of C. With a > 0 and mu = 0 the update is MEMIT's with lambda = a w; with a = 0,
    w changes nothing."""
    identity_weight: float = 0.0
    """mu (`update_norm_lambda`): weight of the update's own norm."""
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
    key_average: KeyAverage = "two_level"
    """Mean over contexts."""

    def __post_init__(self) -> None:
        check_layers("emmet", self, "layers")
        check_not_negative("emmet", self, "clamp", "weight_decay", "identity_weight")
        check_choices("emmet", self)
        if self.moment_weight <= 0:
            raise InvalidSetting(f"emmet: moment_weight must be positive, found {self.moment_weight}")
        if self.stabiliser is not None and self.stabiliser < 0:
            raise InvalidSetting(f"emmet: stabiliser must not be negative, found {self.stabiliser}")

    @classmethod
    def starting_point(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """Untuned: ROME's layer."""
        return {"layers": (min(early_layers(n_layers)[0] + 1, n_layers - 1),)}

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
        check_stateless("emmet", state)
        a = self.stabiliser if self.stabiliser is not None else 0.0 if len(edits) == 1 else 0.1

        def solve(layer: LayerProblem) -> Float[Tensor, "n m"]:
            return equality(
                layer.keys, layer.moment, stabiliser=a, weight=self.moment_weight,
                identity_weight=self.identity_weight, factor=layer.factor, device=layer.site.weight.device,
            )  # fmt: skip

        tensor = measured_tensor(lm, "block", "emmet")
        group = LayerGroup(self.layers, "subject_last", tensor, self.spread, solve)
        with proposing(
            "emmet",
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
            site = ValueSite(Point(self.layers[-1], tensor), "subject_last", self.clamp, self.weight_decay)
            values = proposal.search([site], stopping(self))
            proposal.write(group, values.target(0), key_average=self.key_average)
            return proposal.delta(values.report)
