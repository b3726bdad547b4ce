"""R-ROME: ROME with one and the same key throughout, so that sequences of edits do not disable the model.

Gupta et al. 2024, arXiv:2403.07175; symbols as in ROME. Departures: docs/methods/r_rome.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.lm.trace import Point
from retcon.memory.contexts import Contexts, ContextStyle
from retcon.memory.keys import KeyAverage, mean_keys
from retcon.memory.moments import Moments
from retcon.memory.solve import whitened
from retcon.memory.values import ValueSite
from retcon.memory.write import LayerGroup, LayerProblem, Temper
from retcon.methods.base import (
    Progress,
    check_choices,
    check_not_negative,
    check_stateless,
    early_layers,
    silent,
    stopping,
    untempered,
)
from retcon.methods.proposal import only_one, proposing


@dataclass(frozen=True, kw_only=True)
class RRome:
    """Rank-one model editing with one key."""

    batch: ClassVar[bool] = False
    keeps: ClassVar[str] = ""

    layer: int
    """Block whose down-projection is rewritten (l*), counted from 0."""
    key_mode: Literal["avg", "prompt"] = "avg"
    """k*: the mean over contexts, or the bare prompt's key."""
    residual: Literal["value", "delta"] = "value"
    """What `avg` writes: v* less the mean output over contexts (the paper, with v* = bare output + delta), or delta."""
    clamp: float = 4.0
    """Radius of delta as a multiple of the clean value's norm."""
    weight_decay: float = 0.5
    """Weight of ||delta|| / ||init||^2."""
    steps: int = 20
    """Forward passes at most."""
    learning_rate: float = 0.5
    """Adam's."""
    kl_factor: float = 0.0625
    """Weight of the divergence at the subject."""
    stop: Literal["loss", "probability"] = "loss"
    """What ends the search: the total loss under `threshold`, or the target's mean token probability at it."""
    threshold: float | None = None
    """None: 0.05 for `loss`, 0.9 for `probability`."""
    use_moment: bool = True
    """False: the identity in place of C (as EasyEdit's settings have it; `mom2_adjustment`)."""
    key_average: KeyAverage = "uniform"
    """Mean over contexts behind k*."""
    context_style: ContextStyle = "memit"
    """Prefixes where none are given; `rome` is the released code's."""

    def __post_init__(self) -> None:
        check_not_negative("r_rome", self, "clamp", "weight_decay")
        check_choices("r_rome", self)

    @classmethod
    def starting_point(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """Untuned: ROME's."""
        return {"layer": min(early_layers(n_layers)[0] + 1, n_layers - 1)}

    @property
    def uses_moments(self) -> bool:
        """Whether C has to be known."""
        return self.use_moment

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
        """The change that writes one edit; the model is untouched. Nothing is kept between edits.

        Raises:
            InvalidEdit: more than one edit, or one that cannot mean anything.
        """
        only_one("r_rome", edits)
        check_stateless("r_rome", state)

        def solve(layer: LayerProblem) -> Float[Tensor, "1 m"]:
            """u^T / (k* . u) with u = C^-1 k*."""
            k_star = layer.keys
            device = layer.site.weight.device
            u = whitened(k_star, layer.moment, factor=layer.factor, device=device) if self.use_moment else k_star
            return u.T / (k_star * u).sum()

        group = LayerGroup((self.layer,), "subject_last", "mlp", "even", solve)
        with proposing(
            "r_rome", self, lm, edits, [group], contexts=contexts, moments=moments, seed=seed, temper=temper,
            progress=progress, context_style=self.context_style,
        ) as proposal:  # fmt: skip
            if not edits:
                return proposal.delta()
            output = Point(self.layer, "mlp")
            site = ValueSite(output, "subject_last", self.clamp, self.weight_decay)
            values = proposal.search([site], stopping(self))
            v_star = values.target(0)
            if self.key_mode == "avg" and self.residual == "value":  # W k* + b is the mean output; `write` takes off y
                mean, _ = mean_keys(lm, edits, proposal.contexts, output, "subject_last", average=self.key_average)
                v_star = v_star - (mean.to(v_star) - values.init[0])
            own = Contexts() if self.key_mode == "prompt" else proposal.contexts
            proposal.write(group, v_star, contexts=own, key_average=self.key_average)
            return proposal.delta(values.report)
