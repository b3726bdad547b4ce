"""ROME: write one fact into one MLP with a rank-one update.

Meng et al. 2022, arXiv:2202.05262, section 3; symbols as there. Departures from the paper and from the released code:
docs/methods/rome.md.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import RetconWarning, UnsafeUpdate
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
class Rome:
    """Rank-one model editing: one fact, one layer."""

    batch: ClassVar[bool] = False
    keeps: ClassVar[str] = ""

    layer: int
    """Block whose down-projection is rewritten (l*), counted from 0."""
    clamp: float = 4.0
    """Radius of delta as a multiple of the clean value's norm."""
    weight_decay: float = 0.5
    """Weight of ||delta|| / ||init||^2."""
    steps: int = 20
    """Forward passes at most."""
    learning_rate: float = 0.5
    """Adam's."""
    kl_factor: float = 0.0625
    """Weight of the divergence at the subject (Eq. 4)."""
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
    min_denominator: float = 0.1
    """Smallest |k . u| of the bare prompt's key k, as a share of that of the mean key k*."""
    small_denominator: Literal["warn", "raise"] = "warn"
    """What to do below that: such an update is huge (the "disabling edits" of arXiv:2403.07175)."""

    def __post_init__(self) -> None:
        check_not_negative("rome", self, "clamp", "weight_decay", "min_denominator")
        check_choices("rome", self)

    @classmethod
    def starting_point(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """Untuned: the first of the layers where MEMIT would write, and one up."""
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
            UnsafeUpdate: with `small_denominator="raise"`, the two keys disagree.
        """
        only_one("rome", edits)
        check_stateless("rome", state)

        def solve(layer: LayerProblem) -> Float[Tensor, "1 m"]:
            """u^T / (k . u) with u = C^-1 k*: divided by another key than it was made from."""
            k_star = layer.keys
            device = layer.site.weight.device
            u = whitened(k_star, layer.moment, factor=layer.factor, device=device) if self.use_moment else k_star
            bare, _ = mean_keys(lm, edits, Contexts(), Point(self.layer, "key"), "subject_last")
            k = bare.T.to(u)
            self._check_denominator(edits[0], float((k * u).sum()), float((k_star * u).sum()))
            return u.T / (k * u).sum()

        group = LayerGroup((self.layer,), "subject_last", "mlp", "even", solve)
        with proposing(
            "rome", self, lm, edits, [group], contexts=contexts, moments=moments, seed=seed, temper=temper,
            progress=progress, context_style=self.context_style,
        ) as proposal:  # fmt: skip
            if not edits:
                return proposal.delta()
            site = ValueSite(Point(self.layer, "mlp"), "subject_last", self.clamp, self.weight_decay)
            values = proposal.search([site], stopping(self))  # v* (Eq. 4)
            proposal.write(group, values.target(0), key_average=self.key_average)  # (v* - W k) u^T / (k . u)
            return proposal.delta(values.report)

    def _check_denominator(self, edit: Edit, bare: float, mean: float) -> None:
        if abs(bare) >= self.min_denominator * abs(mean):
            return
        message = (
            f"edit {edit.id!r} ({edit.subject!r}): ROME divides by {bare:.3g}, its averaged key gives {mean:.3g}; "
            "so large an update usually disables a model. The subject's key depends much on what stands before it (is "
            "it the prompt's first token?). Use r_rome, which has one key throughout"
        )
        if self.small_denominator == "raise":
            raise UnsafeUpdate(message)
        warnings.warn(message, RetconWarning, stacklevel=2)
