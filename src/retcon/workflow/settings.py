"""A method with its settings: a preset or the starting points for the model's shape, and what is given over them."""

import difflib
import tomllib
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from retcon.errors import InvalidSetting, RetconWarning

if TYPE_CHECKING:
    from retcon.edits import Edit
    from retcon.lm.model import LM
    from retcon.methods.common.contract import Method
    from retcon.methods.common.registry import Preset


@dataclass(frozen=True)
class Resolved:
    """A method ready to run, and where its settings come from."""

    name: str
    method: "Method"
    preset: "Preset | None"
    given: frozenset[str]
    """Settings that were asked for on the command line."""
    n_probed: int = 0
    """Facts that the layers were chosen with, by the contrast-based probe; 0 where it was not asked."""
    notes: tuple[str, ...] = ()
    """What was chosen for a model without a preset, and why, a line each."""

    @property
    def source(self) -> str:
        """Where the settings come from."""
        probed = f"; layers by the probe over {self.n_probed:,} facts" if self.n_probed else ""
        if self.preset is None:
            return "no preset for this model: by its shape and the edits" + probed
        return f"preset {self.preset.name} ({self.preset.source})" + probed

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the method."""
        return {f.name: getattr(self.method, f.name) for f in fields(self.method)}  # type: ignore[arg-type]


def read_settings(name: str, *, dataset: str | None, preset: str | None, assignments: Sequence[str]) -> dict[str, Any]:
    """What `assignments` (each "field=value") set, with all checked that needs no model.

    Raises:
        InvalidSetting: an assignment is malformed, its field unknown, or its value of another type than the field.
        UnknownMethod, UnknownPreset: the message lists what is known.
    """
    from retcon.methods.common import registry

    if preset and dataset:
        raise InvalidSetting(f"--preset {preset} names its dataset already; leave out --dataset {dataset}")
    hints = get_type_hints(registry.method_class(name))
    if preset:
        registry.preset_named(name, preset)
    known = {field: hint for field, hint in hints.items() if get_origin(hint) is not ClassVar}
    return dict(_parse(assignment, known, name) for assignment in assignments)


def resolve(
    lm: "LM",
    name: str,
    *,
    dataset: str | None = None,
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    edits: "Sequence[Edit]" = (),
    probe: bool = False,
) -> Resolved:
    """The method with the model's settings (or the preset's), and those of `given` over them.

    Args:
        edits: what is to be edited; without a preset, clamps are fitted on a few of them.
        probe: take the layers that the contrast-based probe advises for `edits`.
    """
    from retcon.methods.common import registry
    from retcon.methods.common.contract import check_model_has_layers

    given = given or {}
    probed = {"layers": "probe"} if probe else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no [a-z_]+ preset for this model", RetconWarning)  # the notes say so
        chosen = registry.choose(
            name, for_model=lm, dataset=dataset, preset=preset, cases=edits or None, **{**given, **probed}
        )
    check_model_has_layers(chosen.method, lm)
    return Resolved(name, chosen.method, chosen.preset, frozenset(given), len(edits) if probe else 0, chosen.notes)


def _parse(assignment: str, hints: Mapping[str, Any], method: str) -> tuple[str, Any]:
    name, equals, text = (part.strip() for part in assignment.partition("="))
    if not (name and equals and text):
        raise InvalidSetting(f"--set {assignment}: expected field=value, such as --set steps=25 or --set 'low=[3,4]'")
    if name not in hints:
        close = difflib.get_close_matches(name, hints, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidSetting(f"--set {assignment}: {method} has no such setting{hint} (known: {', '.join(hints)})")
    value = _value(text)
    if text.lower() == "none" and _fits(None, hints[name]):
        return name, None
    if not _fits(value, hints[name]):
        raise InvalidSetting(f"--set {assignment}: {method}'s {name} must be {_described(hints[name])}")
    return name, float(value) if hints[name] is float else value


def _value(text: str) -> Any:
    """`text` as a TOML value; what is none is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(_fits(v, parts[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _described(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_described, parts)))
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (tuple, list):
        return f"a list of {_described(parts[0]).split()[-1]}s"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(hint, str(hint))
