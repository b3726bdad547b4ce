"""What methods share that filter another method's change: the base method, its settings, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from retcon.methods.common.contract import Method, ModelShape, check_settings
from retcon.methods.common.registry import method


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """A filter over a base method."""

    layerwise: ClassVar[bool] = False

    base_method: str
    """Method that writes the edits."""
    base_settings: Mapping[str, Any] = field(default_factory=dict)
    """The base method's settings; for a model, its preset's with these over them."""

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """The same for every model; what depends on it are the base method's settings."""
        return {}

    @property
    def wrapped(self) -> Method:
        """The base method with its settings."""
        return method(self.base_method, **self.base_settings)

    @property
    def supports_batches(self) -> bool:
        """As the base method."""
        return self.wrapped.supports_batches

    @property
    def uses_moments(self) -> bool:
        """As the base method."""
        return self.wrapped.uses_moments

    @property
    def needs_subject(self) -> bool:
        """As the base method."""
        return self.wrapped.needs_subject
