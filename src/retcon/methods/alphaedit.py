"""AlphaEdit: MEMIT's values, written only into the null space of the old keys.

Fang et al. 2024, arXiv:2410.02355, section 3; symbols as there. Kp: the keys of earlier batches.

    C = U diag(s) U^T        P = U0 U0^T, U0: the columns of U with s < tau
    dW = R K^T P ((Kp Kp^T + K K^T) P + L2 I)^-1        (Eq. 14)

Departures: docs/methods/alphaedit.md.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting, RetconWarning
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.key_cache import earlier_keys, extended
from retcon.memory.moments import Moments
from retcon.memory.solve import Form, NullSpace, ThresholdMode, null_space, null_space_ridge
from retcon.memory.values import ValueCache
from retcon.memory.write import LayerGroup, LayerProblem, with_earlier
from retcon.methods.common.contract import ModelShape, State, UpdateFilter
from retcon.methods.common.locate_then_edit import BatchSettings
from retcon.methods.common.proposal import ProposeArguments, proposing, sites_of, target_tensor
from retcon.methods.common.settings import NotNegative, Positive
from retcon.work import Progress

USUAL_RANKS = (0.3, 0.99)
"""Share of a key's dimensions that the null space usually has; outside it a warning is given."""


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(BatchSettings):
    """Null-space constrained editing."""

    name: ClassVar[str] = "alphaedit"
    state_description: ClassVar[str] = "the keys of earlier edits"

    null_threshold: NotNegative = 0.02
    """tau (`nullspace_threshold`): eigenvectors of C below it span the null space."""
    threshold_mode: ThresholdMode = "absolute"
    """What tau is: an eigenvalue (published), a share of C's trace, or the null space's share of all dimensions."""
    ridge: Positive = 10.0
    """L2: weight of the update's own norm."""
    ridge_mode: Literal["absolute", "median"] = "absolute"
    """What `ridge` is: the weight itself (published), or a multiple of the median of C's diagonal, which follows the
    size of a model's keys, whatever a few outlying dimensions do."""
    cache_keys: bool = True
    """Keys of earlier batches are kept, and stay where they are."""
    form: Form = "auto"
    """Which of the equal forms of the update is solved; `released` is the authors' non-symmetric system."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold_mode != "absolute" and self.null_threshold > 1:
            raise InvalidSetting(f"alphaedit: null_threshold is a share here, at most 1; found {self.null_threshold}")

    @property
    def keeps_state(self) -> bool:
        """With `cache_keys`."""
        return self.cache_keys

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Layers by relative depth; threshold and ridge that follow the size of a model's keys: the published ones are
        absolute and suit models of some billion parameters."""
        scale_free = {"threshold_mode": "rank", "null_threshold": 0.6, "ridge_mode": "median", "ridge": 2.0}
        return super().fallback_settings(shape) | scale_free

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
        """Return the change that writes `edits` as one batch; the model is untouched. The state: all keys so far."""
        earlier = earlier_keys(state, lm, sites_of(self.name, lm, self.layers))
        ranks: dict[str, int] = {}

        def solve(layer: LayerProblem) -> Float[Tensor, "n m"]:
            """X^T = K^T P ((Kp Kp^T + K K^T) P + L2 I)^-1 (Eq. 14)."""
            p = self._null_space(layer)
            ranks[layer.site.name] = p.rank
            keys = with_earlier(layer, earlier)
            scale = 1.0
            if self.ridge_mode == "median":
                scale = float(layer.derived("median-square", lambda c: c.diagonal().median()[None]))
            right = null_space_ridge(keys, p, self.ridge * scale, self.form, layer.site.device)
            return right[-layer.keys.shape[1] :]  # [Kp, K]: the earlier keys' residual is zero

        tensor = target_tensor(self.name, lm, "block")
        group = LayerGroup(self.layers, "subject_last", tensor, self.spread, solve)
        arguments = ProposeArguments(contexts, moments, values, keep_values, seed, progress, update_filter)
        with proposing(self, lm, edits, [group], arguments) as proposal:
            if not edits:
                return proposal.delta(state=state)
            found = proposal.search(self.value_sites(lm), self.value_search())
            proposal.write(group, found.target(0), key_average=self.key_average)
            kept = extended(earlier, proposal.keys, lm) if self.cache_keys else None
            return proposal.delta(found.report, state=kept, null_space_ranks=ranks)

    def _null_space(self, layer: LayerProblem) -> NullSpace:
        """P, from the moment's eigenvectors; computed once per model and threshold, and kept beside the moment."""

        def build(c: Tensor) -> Tensor:
            return null_space(c, self.null_threshold, self.threshold_mode, layer.site.device).packed()

        p = NullSpace.unpacked(layer.derived(f"null-space-{self.threshold_mode}-{self.null_threshold!r}", build))
        share = p.rank / len(p.basis)
        if not USUAL_RANKS[0] <= share <= USUAL_RANKS[1]:
            warnings.warn(
                f"alphaedit: {layer.site.name} has {p.rank} of {len(p.basis)} dimensions in its null space "
                f"({share:.0%}) at null_threshold={self.null_threshold}; "
                + ("little can be written there: raise it" if share < 0.5 else "little is protected: lower it"),
                RetconWarning,
                stacklevel=2,
            )
        return p
