"""What methods share that filter another method's change: the host, its settings, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retcon.methods.base import Method, check_choices, uses_moments
from retcon.methods.registry import method


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """A filter over a host method."""

    host: str
    """Method that writes the edits."""
    host_settings: Mapping[str, Any] = field(default_factory=dict)
    """The host's settings; for a model, its preset's with these over them."""

    def __post_init__(self) -> None:
        check_choices(self)

    @classmethod
    def starting_point(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """The same for every model; what depends on it are the host's settings."""
        return {}

    @property
    def hosted(self) -> Method:
        """The host with its settings."""
        return method(self.host, **self.host_settings)

    @property
    def batch(self) -> bool:
        """As the host."""
        return self.hosted.batch

    @property
    def uses_moments(self) -> bool:
        """As the host."""
        return uses_moments(self.hosted)
