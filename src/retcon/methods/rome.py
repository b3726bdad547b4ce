"""ROME: write one fact into one MLP with a rank-one update.

Meng et al. 2022, arXiv:2202.05262, section 3; symbols as there:

    u = C^-1 k*        dW = (v* - W k) u^T / (k . u)        (Eq. 2 with k = k*)

k*: mean key over contexts; k: key of the bare prompt, as the released code has it. R-ROME puts k* in both places.
Departures from the paper and from the released code: docs/methods/rome.md.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import RetconWarning, UnsafeUpdate
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.keys import mean_keys
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.memory.write import LayerGroup, LayerProblem
from retcon.methods.common.contract import State, UpdateFilter
from retcon.methods.common.locate_then_edit import OneFactSettings
from retcon.methods.common.proposal import ProposeArguments, only_one, proposing
from retcon.methods.common.settings import NotNegative
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class Rome(OneFactSettings):
    """Rank-one model editing: one fact, one layer."""

    name: ClassVar[str] = "rome"
    state_description: ClassVar[str] = ""

    min_denominator: NotNegative = 0.1
    """Smallest |k . u| of the bare prompt's key k, as a share of that of the mean key k*."""
    small_denominator: Literal["warn", "raise"] = "warn"
    """What to do below that: such an update is huge (the "disabling edits" of arXiv:2403.07175)."""

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
        update_filter: UpdateFilter | None = None,
    ) -> Delta:
        """Return the change that writes one edit; the model is untouched. Nothing is kept between edits.

        Raises:
            InvalidEdit: more than one edit, or one that cannot mean anything.
            UnsafeUpdate: with `small_denominator="raise"`, the two keys disagree.
        """
        only_one(self.name, edits)

        def solve(layer: LayerProblem) -> Float[Tensor, "1 m"]:
            """X^T = u^T / (k . u), u = C^-1 k*: direction from the mean key, divisor from the bare prompt's."""
            k_star = layer.keys
            u = layer.whitened(k_star) if self.use_moment else k_star
            bare, _ = mean_keys(lm, edits, Contexts(), Point(self.layer, "key"), "subject_last")
            k = bare.T.to(u)
            self._check_denominator(edits[0], float((k * u).sum()), float((k_star * u).sum()))
            return u.T / (k * u).sum()

        group = LayerGroup((self.layer,), "subject_last", "mlp", "even", solve)
        arguments = ProposeArguments(contexts, moments, values, keep_values, seed, progress, update_filter)
        with proposing(self, lm, edits, [group], arguments) as proposal:
            if not edits:
                return proposal.delta()
            found = proposal.search(self.value_sites(lm), self.value_search())  # v* (Eq. 4)
            proposal.write(group, found.target(0), key_average=self.key_average)  # (v* - W k) u^T / (k . u)
            return proposal.delta(found.report)

    def _check_denominator(self, edit: Edit, bare: float, mean: float) -> None:
        if abs(bare) >= self.min_denominator * abs(mean):
            return
        message = (
            f"edit {edit.id!r} ({edit.subject!r}): ROME divides by {bare:.3g}, its averaged key gives {mean:.3g}; "
            "so large an update usually disables a model. The subject's key depends much on the text before it (is "
            "it the prompt's first token?). Use r_rome, which has one key throughout"
        )
        if self.small_denominator == "raise":
            raise UnsafeUpdate(message)
        warnings.warn(message, RetconWarning, stacklevel=2)
