"""MEMIT: write many facts at once, spread over several layers.

Meng et al. 2022, arXiv:2210.07229, section 4; symbols as there. Layer after layer, each on the weights written so far:

    R = (z - h_L) / (L - l + 1)        dW = R K^T (lambda C + K K^T)^-1        (Eq. 14)

With `cache_keys` it is MEMIT-seq, the sequential form that AlphaEdit's authors compare with (arXiv:2410.02355).
Departures: docs/methods/memit.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.forward import TensorName
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.key_cache import earlier_keys, extended
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache, ValueSite
from retcon.memory.write import LayerGroup, LayerProblem, with_earlier
from retcon.methods.common.contract import ModelShape, State, UpdateFilter, by_key_width, check_mlp
from retcon.methods.common.locate_then_edit import BatchSettings
from retcon.methods.common.proposal import ProposeArguments, proposing, sites_of, target_tensor
from retcon.methods.common.settings import NotNegative
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class Memit(BatchSettings):
    """Mass-editing memory in a transformer."""

    name: ClassVar[str] = "memit"
    state_description: ClassVar[str] = "with cache_keys, the keys of earlier edits"

    moment_weight: NotNegative = 15_000.0
    """lambda: how many old keys the second moment counts as."""
    cache_keys: bool = False
    """MEMIT-seq: the keys of earlier batches join the old keys, so that their values stay too."""
    mlp: Literal["dense", "experts"] | None = None
    """What is written in a mixture of experts: the dense or the shared MLP, or all routed experts by one solve. None:
    the experts where a block has nothing else."""

    @property
    def keeps_state(self) -> bool:
        """With `cache_keys`."""
        return self.cache_keys

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Layers by relative depth; 0.3 m old keys, near the least that was published (0.24 m to 3.1 m): GPT-J's 0.92 m
        stores too little on small models, and 0.03 m to 0.3 m score alike there."""
        return super().fallback_settings(shape) | {"moment_weight": by_key_width(0.3, shape)}

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
        """Return the change that writes `edits` as one batch; the model is untouched. `cache_keys` takes `state`."""
        check_mlp(self.name, lm, self.layers, self.mlp)
        routed = self.mlp == "experts"
        sites = sites_of(self.name, lm, self.layers, routed=routed)
        if self.cache_keys and any(site.expert is not None for site in sites):
            others = all(lm.has(layer, "down_proj") for layer in self.layers)
            raise InvalidSetting(
                f"{self.name}: cache_keys knows no routed experts"
                + (
                    ", which mlp='experts' writes; leave either out"
                    if others
                    else ", and these layers have no other MLP; leave it out"
                )
            )
        earlier = earlier_keys(state, lm, sites)

        def solve(layer: LayerProblem) -> Float[Tensor, "n m"]:
            """X^T = K^T (lambda C + Kp Kp^T + K K^T)^-1; Kp: the keys of earlier batches."""
            right = layer.ridge(with_earlier(layer, earlier), self.moment_weight)
            return right[-layer.keys.shape[1] :]  # [Kp, K]: the earlier keys' residual is zero

        tensor = self._target_tensor(lm)
        group = LayerGroup(self.layers, "subject_last", tensor, self.spread, solve, routed=routed)
        arguments = ProposeArguments(contexts, moments, values, keep_values, seed, progress, update_filter)
        with proposing(self, lm, edits, [group], arguments) as proposal:
            if not edits:
                return proposal.delta(state=state)
            found = proposal.search(self.value_sites(lm), self.value_search())  # z (Eq. 16)
            proposal.write(group, found.target(0), key_average=self.key_average)
            kept = extended(earlier, proposal.keys, lm) if self.cache_keys else None
            return proposal.delta(found.report, state=kept)

    def value_sites(self, lm: LM) -> list[ValueSite]:
        """Return the block's output, or the MLP's where a norm follows it."""
        return [self.value_site(self.layers[-1], self._target_tensor(lm))]

    def _target_tensor(self, lm: LM) -> TensorName:
        return target_tensor(self.name, lm, "block", layers=self.layers, routed=self.mlp == "experts")
