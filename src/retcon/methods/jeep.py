"""JEEP: edit low and high layers together, towards values that were optimised together.

Shi et al. 2024, arXiv:2412.17872, section 4.2; symbols as there: primes for the low group (information
enrichment, read at the subject's last token i'), stars for the high group (probability promotion, read at the
prediction position i*).

    Step 1   delta', delta* together:  -log P(y) + alpha KL + beta' ||delta'|| + beta* ||delta*||    (Eqs. 8, 11)
             ||delta'|| <= gamma' ||h'||,  ||delta*|| <= gamma* ||h*||                               (Eq. 12)
             v' = h' + delta',  v* = h* + delta*
    Step 2   low layers at i',   R = (v' - h') / sqrt(L' - l + 1)
    Step 3   high layers at i*,  R = (v* - h*) / (L* - l + 1)     dW = R K^T (lambda C + K K^T)^-1   (Eq. 10)

Departures from the paper and from the released code: docs/methods/jeep.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from retcon.delta import Delta, EditReport
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.forward import Point, TensorName
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.keys import KeyAverage
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache, ValueSite
from retcon.memory.write import LayerGroup, Spread, is_routed, weighted
from retcon.methods.common.contract import ModelShape, State, UpdateFilter, by_key_width, check_mlp, early_layers
from retcon.methods.common.locate_then_edit import SearchSettings
from retcon.methods.common.proposal import ProposeArguments, proposing, target_tensor
from retcon.methods.common.settings import AnyLayers, Count, NotNegative
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class Jeep(SearchSettings):
    """Joint editing of low and high layers."""

    name: ClassVar[str] = "jeep"
    state_description: ClassVar[str] = ""
    supports_batches: ClassVar[bool] = True

    low: AnyLayers
    """Low layers [l'..L'], ascending, counted from 0; () leaves the low group out (Table 4, "w/o delta' & Step 2")."""
    high: AnyLayers
    """High layers [l*..L*]; () leaves the high group out (Table 4, "w/o delta* & Step 3")."""
    low_clamp: NotNegative = 1.0
    """gamma': radius of delta' as a multiple of the clean value's norm (Eq. 12)."""
    high_clamp: NotNegative = 0.25
    """gamma*: radius of delta*; good values are well below gamma' (paper, appendix B)."""
    low_moment_weight: NotNegative = 2500.0
    """lambda': how many old keys the second moment counts as in Step 2."""
    high_moment_weight: NotNegative = 1000.0
    """lambda*: the same in Step 3."""
    low_weight_decay: NotNegative = 0.5
    """beta': weight of ||delta'|| / ||init'||^2."""
    high_weight_decay: NotNegative = 0.5
    """beta*: weight of ||delta*|| / ||init*||^2."""
    steps: Count = 30
    stop: Literal["loss", "probability"] = "probability"
    sites: Literal["mlp", "release", "block"] = "mlp"
    """Which tensor is "h": the MLP's output, for search, clamp and residual alike; the released code's mixture (delta*
    is added to the attention's output, the residual is against the MLP's); or the block's output, as in the paper."""
    high_target: Literal["clean", "joint"] | None = None
    """z*: clean value plus delta* (published), or the activation that reached the loss, delta' in force. None: `joint`
    for sites `block`, where `clean` would undo Step 2, and `clean` otherwise."""
    low_spread: Spread = "sqrt"
    """Spread of Step 2 (Table 4, "even spread in Step 2")."""
    high_spread: Spread = "even"
    """Spread of Step 3."""
    high_module: Literal["mlp", "attn"] = "mlp"
    """Matrix that Step 3 writes: down-projection, or attention out-projection, with z* on its output (Table 4)."""
    joint_optimisation: bool = True
    """False: delta' alone, Step 2, then delta* alone on the edited weights, Step 3 (Table 4)."""
    mlp: Literal["dense", "experts"] | None = None
    """What is written in a mixture of experts, as in MEMIT; for routed experts `sites` is `block`, the one output that
    they share."""
    write_low: bool = True
    """False: optimise both values, skip Step 2 (Table 4)."""
    write_high: bool = True
    """False: optimise both values, skip Step 3 (Table 4)."""
    key_average: KeyAverage = "two_level"
    """Mean over contexts: `two_level` as every released code, `uniform` as the paper's formula."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low and not self.high:
            raise InvalidSetting("jeep: low and high are both empty, so there is nothing to edit")
        if not (self.write_low or self.write_high):
            raise InvalidSetting("jeep: write_low and write_high are both False, so nothing would be written")
        if not (self.write_low and self.write_high) and not (self.low and self.high and self.joint_optimisation):
            raise InvalidSetting("jeep: write_low and write_high can be False only with both groups optimised jointly")

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Layers by relative depth; the weights published for LLaMA-7B (2,500 and 1,000) over its key width.

        Values at the blocks' outputs, one after the other: a write that is spread over layers reaches a block's output
        and overshoots a single MLP's, and high keys of small models differ little between prompts of one form, so that
        the high value is better for what the low one leaves (docs/results/without-preset.md).
        """
        n_layers = shape.n_layers
        n_high = 3 if n_layers >= 22 else 2
        last = min(round((0.55 if shape.parallel else 0.7) * n_layers) + n_high - 1, n_layers - 2)  # not the topmost
        first = max(last - n_high + 1, 1)
        low = early_layers(n_layers)
        if low[-1] >= first:
            low = tuple(range(max(first - 3, 0), first))
        return {
            "low": low,
            "high": tuple(range(first, last + 1)),
            "low_moment_weight": by_key_width(0.23, shape),
            "high_moment_weight": by_key_width(0.09, shape),
            "sites": "block",
            "joint_optimisation": False,
            "low_clamp": 0.75,
        }

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
        arguments = ProposeArguments(contexts, moments, values, keep_values, seed, progress, update_filter)
        return self._for_model(lm)._proposed(lm, edits, arguments)

    def _proposed(self, lm: LM, edits: Sequence[Edit], arguments: ProposeArguments) -> Delta:
        """Write one batch; the sites are those that the model allows."""
        low, high = self.groups()
        groups = [g for g in (low, high) if g]
        with proposing(self, lm, edits, groups, arguments) as proposal:
            if not edits:
                return proposal.delta()
            if low and high and self.joint_optimisation:
                found = proposal.search(self.value_sites(lm), self.value_search())  # Step 1
                if self.write_low:
                    proposal.write(low, found.target(0), key_average=self.key_average)  # Step 2
                if self.write_high:  # Step 3, on keys that Step 2 has changed
                    proposal.write(high, found.target(1, self._high_target), key_average=self.key_average)
                reports = [found.report]
            else:  # one group, or one after the other
                reports = []
                for group in groups:
                    found = proposal.search([self.value_site(group)], self.value_search())
                    proposal.write(group, found.target(0), key_average=self.key_average)
                    reports.append(found.report)
            return proposal.delta(_joined_reports(reports))

    def searching_what_is_written(self) -> "Jeep":
        """Without delta* where delta' is searched by itself first: delta* then makes up for what that leaves."""
        return replace(self, high=()) if self.low and self.high and not self.joint_optimisation else self

    def _for_model(self, lm: LM) -> "Jeep":
        """Return the method with the `sites` that this model allows."""
        layers = (*self.low, *(self.high if self.high_module == "mlp" else ()))
        check_mlp(self.name, lm, layers, self.mlp)
        routed = self.mlp == "experts"
        if self.sites != "block" and not any(is_routed(lm, layer, routed) for layer in layers):
            return self
        tensor = target_tensor(self.name, lm, "block", layers=layers, routed=routed)
        if tensor == "mlp":
            return replace(self, sites="mlp", high_target=self._high_target)
        return self if self.sites == "block" else replace(self, sites="block")

    def groups(self) -> tuple[LayerGroup | None, LayerGroup | None]:
        """Return the low and the high group, None where one is left out."""
        tensor: TensorName = "block" if self.sites == "block" else "mlp"
        high_tensor: TensorName = "attn" if self.high_module == "attn" else tensor
        routed, low_solve = self.mlp == "experts", weighted(self.low_moment_weight)
        low = LayerGroup(self.low, "subject_last", tensor, self.low_spread, low_solve, routed=routed)
        high = LayerGroup(
            self.high,
            "prediction",
            high_tensor,
            self.high_spread,
            weighted(self.high_moment_weight),
            module="o_proj" if self.high_module == "attn" else "down_proj",
            routed=routed,
        )
        return (low if self.low else None), (high if self.high else None)

    def value_sites(self, lm: LM) -> list[ValueSite]:
        """Return where values are searched: low before high."""
        method = self._for_model(lm)
        return [method.value_site(group) for group in method.groups() if group]

    def value_site(self, group: LayerGroup) -> ValueSite:
        """Return where the value of a group is searched."""
        if group.where == "subject_last":
            return ValueSite(
                Point(group.layers[-1], group.target_tensor), "subject_last", self.low_clamp, self.low_weight_decay
            )
        tensor: TensorName = "attn" if self.sites == "release" else group.target_tensor
        return ValueSite(Point(group.layers[-1], tensor), "prediction", self.high_clamp, self.high_weight_decay)

    @property
    def _high_target(self) -> Literal["clean", "joint"]:
        return self.high_target or ("joint" if self.sites == "block" else "clean")


def _joined_reports(reports: Sequence[Sequence[EditReport]]) -> tuple[EditReport, ...]:
    """Return one report per edit of searches that followed each other: the last one's, with the steps of all."""
    return tuple(
        replace(runs[-1], steps=sum(r.steps for r in runs), detail={k: v for r in runs for k, v in r.detail.items()})
        for runs in zip(*reports, strict=True)
    )
