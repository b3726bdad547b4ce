"""PMET: optimise attention and MLP outputs together, write the MLP's alone.

Li et al. 2023, arXiv:2308.08742; symbols as there. Each layer l of R, in turn, on the weights written so far:

    R = (v_m - m_L) / sqrt(L - l + 1)        dW = R K^T (lambda C + K K^T)^-1

The attention's value v_a is searched with v_m and not written. Departures: docs/methods/pmet.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache, ValueSearch, ValueSite
from retcon.memory.write import LayerGroup, Spread, weighted
from retcon.methods.common.contract import ModelShape, State, UpdateFilter, by_key_width
from retcon.methods.common.locate_then_edit import BatchSettings
from retcon.methods.common.proposal import ProposeArguments, proposing, target_tensor
from retcon.methods.common.settings import Count, NotNegative
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class Pmet(BatchSettings):
    """Precise model editing in a transformer."""

    name: ClassVar[str] = "pmet"
    state_description: ClassVar[str] = ""

    clamp: NotNegative = 1.0
    steps: Count = 30
    kl_factor: NotNegative = 1.0
    spread: Spread = "sqrt"
    moment_weight: NotNegative = 6000.0
    """lambda: how many old keys the second moment counts as."""
    attn_weight_decay: NotNegative = 0.5
    """`weight_decay` at the attention's output."""
    settled_factor: NotNegative | None = 0.1
    """phi: weight of the nll once every target token is the most likely one in every context; None: always 1."""
    settled_kl: NotNegative = 0.01
    """The search also stops once that is so and kl_factor * KL is at most this."""
    attention: bool = True
    """False: no value at the attention's output."""
    site: Literal["mlp", "block"] = "mlp"
    """Where the value that is written is searched and measured; `block` is MEMIT's."""

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Layers by relative depth; fewer old keys than are published (0.36 m to 1.4 m), with which small models store
        little; a search until the answer is likely, with LLaMA-2's weight of the divergence, and an attention's value
        held short, so that the MLP's, which alone is written, carries the fact."""
        search = {"kl_factor": 0.0625, "stop": "probability", "settled_factor": None, "attn_weight_decay": 15.0}
        return super().fallback_settings(shape) | {"moment_weight": by_key_width(0.1, shape)} | search

    def searching_what_is_written(self) -> "Pmet":
        """Without the attention's value, which carries a part of the search and is not written."""
        return replace(self, attention=False, settled_factor=None)

    def value_search(self, **more: Any) -> ValueSearch:
        """Return how both values are searched."""
        return super().value_search(settled_factor=self.settled_factor, settled_kl=self.settled_kl, **more)

    def value_sites(self, lm: LM) -> list[ValueSite]:
        """Return the MLP's output, whose value is written, and the attention's."""
        sites = [self.value_site(self.layers[-1], target_tensor(self.name, lm, self.site))]
        if self.attention:
            sites += [ValueSite(Point(self.layers[-1], "attn"), "subject_last", self.clamp, self.attn_weight_decay)]
        return sites

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
        tensor = target_tensor(self.name, lm, self.site)
        group = LayerGroup(self.layers, "subject_last", tensor, self.spread, weighted(self.moment_weight))
        arguments = ProposeArguments(contexts, moments, values, keep_values, seed, progress, update_filter)
        with proposing(self, lm, edits, [group], arguments) as proposal:
            if not edits:
                return proposal.delta()
            found = proposal.search(self.value_sites(lm), self.value_search())
            proposal.write(group, found.target(0), key_average=self.key_average)  # v_m; v_a is not written
            return proposal.delta(found.report)
