"""A method with its settings: a preset or the starting points for the model's shape, and what is given over them."""

import tomllib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retcon.errors import InvalidSetting, NoPreset
from retcon.plural import plural

if TYPE_CHECKING:
    from retcon.edits import Edit
    from retcon.lm.model import LM
    from retcon.methods.common.contract import Method
    from retcon.methods.common.presets import Preset


@dataclass(frozen=True)
class Resolved:
    """A method ready to run, and where its settings come from."""

    name: str
    method: "Method"
    preset: "Preset | None"
    given: frozenset[str]
    """Names of the settings that the caller set over the preset's."""
    n_probed: int = 0
    """Facts that the layers were chosen with, by the contrast-based probe; 0 where it was not asked."""
    notes: tuple[str, ...] = ()
    """What was chosen for a model without a preset, and why, and what training takes, a line each."""
    base_preset: "Preset | None" = None
    """Of RECT and PRUNE: the preset that the base method's settings are from."""

    @property
    def source(self) -> str:
        """Where the settings come from."""
        if (editor := self.settings.get("editor")) is not None:
            return f"those that {editor} was trained with"
        probed = f"; layers by the probe over {plural(self.n_probed, 'fact')}" if self.n_probed else ""
        from_shape = "" if self.base_preset else ": by its shape and the edits"
        own = f"no preset for this model{from_shape}" if self.preset is None else _named(self.preset)
        base = f"; {self.base_preset.method} by {_named(self.base_preset)}" if self.base_preset else ""
        return own + base + probed

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the method."""
        return self.method.settings


def _named(preset: "Preset") -> str:
    return f"preset {preset.name} ({preset.source})"


def read_settings(name: str, *, dataset: str | None, preset: str | None, assignments: Sequence[str]) -> dict[str, Any]:
    """Return what `assignments` (each "field=value") set, with all checked that needs no model and no torch.

    Raises:
        InvalidSetting: an assignment is malformed, its field unknown, or its value of another type than the field.
        UnknownMethod, UnknownPreset: the message lists what is known.
    """
    from retcon.methods.common.presets import check_early
    from retcon.methods.common.registry import setting_types

    hints = setting_types(name)
    return check_early(name, dict(_given(each, hints, name) for each in assignments), preset, dataset)


def as_toml(value: Any) -> str:
    """Write a setting as `--set` reads it; a text that TOML takes for nothing else has no quotes."""
    from retcon.methods.common.settings import toml_value

    if value is None:
        return "none"
    is_bare = isinstance(value, str) and value.splitlines() == [value] == [value.strip()] and _value(value) == value
    return value if is_bare and value.lower() != "none" else toml_value(value)


def resolve(
    lm: "LM",
    name: str,
    *,
    dataset: str | None = None,
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    edits: "Sequence[Edit]" = (),
    batch_size: int | None = None,
    probe: bool = False,
) -> Resolved:
    """Return the method with the model's settings (or the preset's), and those of `given` over them.

    Args:
        edits: what is to be edited; without a preset, clamps and learning rates are fitted on some of them.
        batch_size: how many of them will be written at once, as `write_facts` takes it.
        probe: take the layers that the contrast-based probe advises for `edits`.
    """
    from retcon.methods.common.choosing import choose
    from retcon.methods.common.contract import check_model_has_layers
    from retcon.methods.common.tuning import memory_note

    given = given or {}
    probed = {"layers": "probe"} if probe else {}
    with warnings.catch_warnings(action="ignore", category=NoPreset):  # the notes say so
        chosen = choose(
            name,
            for_model=lm,
            dataset=dataset,
            preset=preset,
            cases=edits or None,
            at_once=batch_size,
            **{**given, **probed},
        )
    method, notes = chosen.method.as_trained(), chosen.notes
    check_model_has_layers(method, lm)
    if n_trained := method.n_trained(lm):
        notes = (*notes, memory_note(n_trained, method.bytes_per_value))
    preset_used = chosen.preset if method is chosen.method else None  # an editor's file has settings of its own
    return Resolved(name, method, preset_used, frozenset(given), len(edits) if probe else 0, notes, chosen.base_preset)


def _given(assignment: str, hints: Mapping[str, Any], method: str) -> tuple[str, Any]:
    """Return a setting's name and value from "field=value"; the value is TOML, and what is none is a text."""
    from retcon.methods.common.settings import fitted

    name, equals, text = (part.strip() for part in assignment.partition("="))
    if not (name and equals and text):
        raise InvalidSetting(f"setting {assignment}: expected field=value, such as steps=25 or 'low=[3,4]'")
    if text.lower() == "none":
        with suppress(InvalidSetting):
            return name, fitted(method, hints, {name: None})[name]
    try:
        return name, fitted(method, hints, {name: _value(text)})[name]
    except InvalidSetting as error:
        raise InvalidSetting(f"setting {assignment}: {error}") from None


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text
