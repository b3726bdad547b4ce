"""EMMET: write many facts at once under ROME's constraint, that each is stored exactly.

Gupta et al. 2024, arXiv:2403.14236; symbols as there:

    dW = R (K^T C^-1 K)^-1 K^T C^-1

Departures, and what the released settings amount to: docs/methods/emmet.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.solve import equality
from retcon.memory.values import ValueCache
from retcon.memory.write import LayerGroup, LayerProblem
from retcon.methods.common.contract import ModelShape, State, UpdateFilter, rome_layer
from retcon.methods.common.locate_then_edit import BatchSettings
from retcon.methods.common.proposal import ProposeArguments, proposing, target_tensor
from retcon.methods.common.settings import NotNegative, Positive
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class Emmet(BatchSettings):
    """Equality-constrained mass model editing."""

    name: ClassVar[str] = "emmet"
    state_description: ClassVar[str] = ""
    one_layer: ClassVar[bool] = True

    stabiliser: NotNegative | None = None
    """a (`emmet_lambda`): added to the diagonal of K^T C^-1 K. 0 stores every fact exactly. None: 0 for one edit, 0.1
    for more."""
    moment_weight: Positive = 1.0
    """w (`mom2_update_weight`): factor of C. With a > 0 and mu = 0 the update is MEMIT's with lambda = a w; with a = 0,
    w changes nothing."""
    identity_weight: NotNegative = 0.0
    """mu (`update_norm_lambda`): weight of the update's own norm."""

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Untuned: ROME's layer."""
        return {"layers": (rome_layer(shape.n_layers),)}

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
        """Return the change that writes `edits` as one batch; the model is untouched, and nothing is kept."""
        a = self.stabiliser
        if a is None:
            a = 0.0 if len(edits) == 1 else 0.1

        def solve(layer: LayerProblem) -> Float[Tensor, "n m"]:
            """X^T = (K^T C'^-1 K + a I)^-1 K^T C'^-1 with C' = w C + mu I: the least change that has dW K = R."""
            return equality(
                layer.keys, layer.moment, stabiliser=a, weight=self.moment_weight,
                identity_weight=self.identity_weight, factor=layer.factor, device=layer.site.device,
            )  # fmt: skip

        tensor = target_tensor(self.name, lm, "block")
        group = LayerGroup(self.layers, "subject_last", tensor, self.spread, solve)
        arguments = ProposeArguments(contexts, moments, values, keep_values, seed, progress, update_filter)
        with proposing(self, lm, edits, [group], arguments) as proposal:
            if not edits:
                return proposal.delta()
            found = proposal.search(self.value_sites(lm), self.value_search())
            proposal.write(group, found.target(0), key_average=self.key_average)
            return proposal.delta(found.report)
