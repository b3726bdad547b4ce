"""What the locate-then-edit methods share: the settings of the value search, and what follows from them.

A method adds its own settings and overrides a default by naming the field again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from retcon.lm.forward import Point, TensorName
from retcon.memory.contexts import ContextStyle
from retcon.memory.keys import KeyAverage
from retcon.memory.values import ValueSearch, ValueSite
from retcon.memory.write import Spread, Temper
from retcon.methods.common.contract import Given, check_choices, check_layers, check_not_negative, early_layers


class Tempered(Given):
    """What a method that writes layer by layer may be given."""

    temper: Temper
    """Has the last word on each layer's change before the next layer is solved."""


@dataclass(frozen=True, kw_only=True)
class ValueSettings:
    """How a value is sought; Adam on a vector delta that is added at the subject's last token."""

    name: ClassVar[str]
    keeps: ClassVar[str] = ""
    layerwise: ClassVar[bool] = True

    clamp: float = 0.75
    """Radius of delta as a multiple of the clean value's norm."""
    weight_decay: float = 0.5
    """Weight of ||delta|| / ||init||^2."""
    steps: int = 25
    """Forward passes per edit at most."""
    learning_rate: float = 0.5
    """Adam's."""
    kl_factor: float = 0.0625
    """Weight of the divergence at the subject."""
    stop: Literal["loss", "probability"] = "loss"
    """What ends the search: the total loss under `threshold`, or the target's mean token probability at it."""
    threshold: float | None = None
    """None: 0.05 for `loss`, 0.9 for `probability`."""

    def __post_init__(self) -> None:
        check_not_negative(self, "clamp", "weight_decay")
        check_choices(self)

    def value_site(self, layer: int, tensor: TensorName) -> ValueSite:
        """Where the value is sought."""
        return ValueSite(Point(layer, tensor), "subject_last", self.clamp, self.weight_decay)

    def value_search(self, **more: Any) -> ValueSearch:
        """How it is sought; `more` are further fields of the search."""
        return ValueSearch(
            steps=self.steps,
            learning_rate=self.learning_rate,
            kl_factor=self.kl_factor,
            stop=self.stop,
            threshold=self.threshold if self.threshold is not None else 0.05 if self.stop == "loss" else 0.9,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class OneFactSettings(ValueSettings):
    """ROME's way: one fact, one layer, the value at the MLP's output."""

    batch: ClassVar[bool] = False

    layer: int
    """Block whose down-projection is rewritten (l*), counted from 0."""
    clamp: float = 4.0
    steps: int = 20
    use_moment: bool = True
    """False: the identity in place of C (as EasyEdit's settings have it; `mom2_adjustment`)."""
    key_average: KeyAverage = "uniform"
    """Mean over contexts behind k*."""
    context_style: ContextStyle = "memit"
    """Prefixes where none are given; `rome` is the released code's."""

    @classmethod
    def fallback_settings(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """Untuned: the first of the layers where MEMIT would write, and one up."""
        return {"layer": min(early_layers(n_layers)[0] + 1, n_layers - 1)}

    @property
    def uses_moments(self) -> bool:
        """Whether C has to be known."""
        return self.use_moment


@dataclass(frozen=True, kw_only=True)
class BatchSettings(ValueSettings):
    """MEMIT's way: many facts, the value at the last of several layers, each layer taking its share."""

    batch: ClassVar[bool] = True

    layers: tuple[int, ...]
    """Blocks whose down-projections are rewritten (R), ascending, counted from 0; the value is sought at the last."""
    spread: Spread = "even"
    """Share of each layer in what is missing."""
    key_average: KeyAverage = "two_level"
    """Mean over contexts: `two_level` as the released codes, `uniform` as the papers' formula."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "layers")

    @classmethod
    def fallback_settings(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """Untuned: published layers by relative depth."""
        return {"layers": early_layers(n_layers)}
