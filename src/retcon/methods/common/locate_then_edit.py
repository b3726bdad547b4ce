"""What the locate-then-edit methods share: the settings of the value search, and what follows from them.

A method adds its own settings and overrides a default by naming the field again.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.forward import Point, TensorName
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts, ContextStyle
from retcon.memory.defaults import default_contexts
from retcon.memory.key_cache import earlier_keys, extended
from retcon.memory.keys import KeyAverage, mean_keys
from retcon.memory.values import ValueSearch, ValueSite
from retcon.memory.write import Spread
from retcon.methods.common.contract import Method, ModelShape, State, check_settings, early_layers, rome_layer
from retcon.methods.common.proposal import target_tensor
from retcon.methods.common.settings import Count, Layer, Layers, NotNegative


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Method):
    """How values are searched: Adam on offsets that are added to activations."""

    layerwise: ClassVar[bool] = True
    uses_moments: ClassVar[bool] = True
    needs_subject: ClassVar[bool] = True

    steps: Count = 25
    """Forward passes per edit at most."""
    learning_rate: NotNegative = 0.5
    """Adam's."""
    kl_factor: NotNegative = 0.0625
    """Weight of the divergence at the subject."""
    stop: Literal["loss", "probability"] = "loss"
    """What ends the search: the total loss under `threshold`, or the target's mean token probability at it."""
    threshold: float | None = None
    """None: 0.05 for `loss`, 0.9 for `probability`."""
    shrink: bool = False
    """Go on with fewer edits at a time where memory runs out; the delta is then another one in its last bits."""

    def __post_init__(self) -> None:
        check_settings(self)
        self.value_search()  # which checks ranges
        if self.threshold is None:
            return
        if self.stop == "loss" and self.threshold < 0:
            raise InvalidSetting(
                f"{self.name}: with stop='loss' the threshold is a loss, found {self.threshold}; leave it out for the "
                "default, or set 0, which is never reached"
            )
        if self.stop == "probability" and not 0 < self.threshold <= 1:
            raise InvalidSetting(
                f"{self.name}: with stop='probability' the threshold is above 0 and at most 1, found {self.threshold}; "
                "leave it out for the default"
            )

    @property
    def takes_shrunk_moments(self) -> bool:  # type: ignore[override]
        """As the search: what may go on smaller may be given what did."""
        return self.shrink

    @abstractmethod
    def value_sites(self, lm: LM) -> list[ValueSite]:
        """Return where values are searched on a model."""

    def sampled_contexts(self, lm: LM, seed: int) -> Contexts:
        """Return the prefixes for prompts where none are given."""
        return default_contexts(lm, seed)

    def searching_what_is_written(self) -> Self:
        """Return the method with no values but those it writes: what clamps are fitted with (`starting_point`)."""
        return self

    def value_search(self, **more: Any) -> ValueSearch:
        """Return how it is searched; `more` are further fields of the search."""
        threshold = self.threshold
        if threshold is None:
            threshold = 0.05 if self.stop == "loss" else 0.9
        return ValueSearch(
            steps=self.steps,
            learning_rate=self.learning_rate,
            kl_factor=self.kl_factor,
            shrink=self.shrink,
            stop=self.stop,
            threshold=threshold,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class ValueSettings(SearchSettings):
    """A value at the subject's last token."""

    clamp: NotNegative = 0.75
    """Radius of the offset as a multiple of the clean value's norm."""
    weight_decay: NotNegative = 0.5
    """Weight of ||offset|| / ||init||^2."""

    def value_site(self, layer: int, tensor: TensorName) -> ValueSite:
        """Return where the value is searched."""
        return ValueSite(Point(layer, tensor), "subject_last", self.clamp, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class OneFactSettings(ValueSettings):
    """ROME's way: one fact, one layer, the value at the MLP's output."""

    supports_batches: ClassVar[bool] = False

    layer: Layer
    """Block whose down-projection is rewritten (l*), counted from 0."""
    clamp: NotNegative = 4.0
    steps: Count = 20
    use_moment: bool = True
    """False: the identity in place of C (as EasyEdit's settings have it; `mom2_adjustment`)."""
    key_average: KeyAverage = "uniform"
    """Which mean over contexts k* is."""
    context_style: ContextStyle = "memit"
    """Prefixes where none are given; `rome` is the released code's."""

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Untuned: the first of the layers where MEMIT would write, and one up."""
        return {"layer": rome_layer(shape.n_layers)}

    def value_sites(self, lm: LM) -> list[ValueSite]:
        """Return the MLP's output."""
        return [self.value_site(self.layer, "mlp")]

    def sampled_contexts(self, lm: LM, seed: int) -> Contexts:
        """Sample prefixes as `context_style` says."""
        return default_contexts(lm, seed, self.context_style)

    @property
    def uses_moments(self) -> bool:  # type: ignore[override]
        """Whether C has to be known."""
        return self.use_moment


@dataclass(frozen=True, kw_only=True)
class BatchSettings(ValueSettings):
    """MEMIT's way: many facts, the value at the last of several layers, each layer taking its share."""

    layers: Layers
    """Blocks whose down-projections are rewritten (R), ascending, counted from 0; the value is searched at the last."""
    spread: Spread = "even"
    """Share of each layer in what is missing."""
    key_average: KeyAverage = "two_level"
    """Mean over contexts: `two_level` as the released codes, `uniform` as the papers' formula."""

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Untuned: published layers by relative depth."""
        return {"layers": early_layers(shape.n_layers)}

    def value_sites(self, lm: LM) -> list[ValueSite]:
        """Return the block's output, or the MLP's where a norm follows it."""
        return [self.value_site(self.layers[-1], target_tensor(self.name, lm, "block"))]

    def state_as_written(
        self, lm: LM, edits: Sequence[Edit], contexts: Contexts, *, earlier: State | None, proposed: State | None
    ) -> State | None:
        """Return the keys so far, where keys are kept: those of the batch are read on the weights as they now are."""
        if proposed is None or not edits:
            return proposed
        sites = [lm.site(layer, "down_proj") for layer in self.layers]
        keys = {
            site.name: mean_keys(
                lm, edits, contexts, Point(site.layer, "key"), "subject_last", average=self.key_average
            )[0]
            for site in sites
        }
        return extended(earlier_keys(earlier, lm, sites), keys, lm)
