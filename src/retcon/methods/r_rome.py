"""R-ROME: ROME with one and the same key throughout, so that sequences of edits do not disable the model.

Gupta et al. 2024, arXiv:2403.07175; symbols as in ROME:

    u = C^-1 k*        dW = (v* - W k*) u^T / (k* . u)

Departures: docs/methods/r_rome.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.keys import mean_keys
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.memory.write import LayerGroup, LayerProblem
from retcon.methods.common.contract import State, UpdateFilter
from retcon.methods.common.locate_then_edit import OneFactSettings
from retcon.methods.common.proposal import ProposeArguments, only_one, proposing
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class RRome(OneFactSettings):
    """Rank-one model editing with one key."""

    name: ClassVar[str] = "r_rome"
    state_description: ClassVar[str] = ""

    key_mode: Literal["avg", "prompt"] = "avg"
    """k*: the mean over contexts, or the bare prompt's key."""
    residual: Literal["value", "delta"] = "value"
    """With `key_mode="avg"`: write v* less the mean output over contexts (the paper: v* = bare output + offset), or the
    offset alone (`delta`)."""

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
        """
        only_one(self.name, edits)

        def solve(layer: LayerProblem) -> Float[Tensor, "1 m"]:
            """X^T = u^T / (k* . u), u = C^-1 k*."""
            k_star = layer.keys
            u = layer.whitened(k_star) if self.use_moment else k_star
            return u.T / (k_star * u).sum()

        group = LayerGroup((self.layer,), "subject_last", "mlp", "even", solve)
        arguments = ProposeArguments(contexts, moments, values, keep_values, seed, progress, update_filter)
        with proposing(self, lm, edits, [group], arguments) as proposal:
            if not edits:
                return proposal.delta()
            (site,) = self.value_sites(lm)
            found = proposal.search([site], self.value_search())
            v_star = found.target(0)
            if self.key_mode == "avg" and self.residual == "value":
                # the averaged key gives mean = W k* + b, and `write` subtracts init: subtract the rest here
                mean, _ = mean_keys(lm, edits, proposal.contexts, site.point, site.where, average=self.key_average)
                v_star = v_star - (mean.to(v_star) - found.init[0])
            own = Contexts() if self.key_mode == "prompt" else proposal.contexts
            proposal.write(group, v_star, contexts=own, key_average=self.key_average)
            return proposal.delta(found.report)
