"""What methods share that filter another method's change: the base method, its settings, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from retcon.attachment import Attachment
from retcon.delta import Delta, only_deltas
from retcon.errors import InvalidSetting
from retcon.methods.common.contract import Method, check_settings
from retcon.methods.common.registry import build


@dataclass(frozen=True, kw_only=True)
class Filter(Method):
    """A filter over what a base method writes."""

    base_method: str
    """Method that writes the edits."""
    base_settings: Mapping[str, Any] = field(default_factory=dict)
    """The base method's settings; for a model, its preset's with these over them."""

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def base_of(cls, settings: Mapping[str, Any]) -> str:
        """Return the base method that settings name; the filter's default where they name none."""
        return settings.get("base_method", {f.name: f.default for f in fields(cls)}["base_method"])

    @property
    def wrapped(self) -> Method:
        """The base method with its settings."""
        return build(self.base_method, self.base_settings)

    def update_of_base(self, proposed: Attachment) -> Delta:
        """Return what the base method proposed, which has to be a change on top of the applied deltas.

        Raises:
            InvalidSetting: it acts beside the weights, or replaces earlier deltas.
        """
        (delta,) = only_deltas([proposed], self.name)
        if delta.supersedes:
            raise InvalidSetting(
                f"{self.name}: {self.base_method} replaces earlier deltas, so its change is no update to filter; take "
                "another base_method, or revert those deltas first"
            )
        return delta

    @property
    def supports_batches(self) -> bool:  # type: ignore[override]
        """As the base method."""
        return self.wrapped.supports_batches

    @property
    def keeps_state(self) -> bool:
        """As the base method."""
        return self.wrapped.keeps_state

    @property
    def state_layers(self) -> tuple[int, ...] | None:
        """As the base method."""
        return self.wrapped.state_layers

    @property
    def uses_moments(self) -> bool:  # type: ignore[override]
        """As the base method."""
        return self.wrapped.uses_moments

    @property
    def needs_subject(self) -> bool:  # type: ignore[override]
        """As the base method."""
        return self.wrapped.needs_subject

    @property
    def takes_shrunk_moments(self) -> bool:  # type: ignore[override]
        """As the base method."""
        return self.wrapped.takes_shrunk_moments
