"""What methods share that filter another method's change: the base method, its settings, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retcon.methods.common.contract import Method, check_choices, needs_subject, uses_moments
from retcon.methods.common.registry import method


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """A filter over a base method."""

    base_method: str
    """Method that writes the edits."""
    base_settings: Mapping[str, Any] = field(default_factory=dict)
    """The base method's settings; for a model, its preset's with these over them."""

    def __post_init__(self) -> None:
        check_choices(self)

    @classmethod
    def fallback_settings(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """The same for every model; what depends on it are the base method's settings."""
        return {}

    @property
    def wrapped(self) -> Method:
        """The base method with its settings."""
        return method(self.base_method, **self.base_settings)

    @property
    def batch(self) -> bool:
        """As the base method."""
        return self.wrapped.batch

    @property
    def uses_moments(self) -> bool:
        """As the base method."""
        return uses_moments(self.wrapped)

    @property
    def needs_subject(self) -> bool:
        """As the base method."""
        return needs_subject(self.wrapped)
