"""The table of methods, and how a name and a model become a method with its settings."""

import difflib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from retcon.edits import Case, Edit
from retcon.errors import InvalidEdit, InvalidSetting, RetconWarning, UnknownMethod
from retcon.methods.common import presets as presets_module
from retcon.methods.common.presets import Preset
from retcon.methods.common.settings import checked, declared, fitted, types_of

if TYPE_CHECKING:
    from retcon.lm.model import LM
    from retcon.methods.common.contract import Method
    from retcon.methods.common.wrappers import Filter

METHODS = {
    "adalora": "retcon.methods.adalora:AdaLora",
    "alphaedit": "retcon.methods.alphaedit:AlphaEdit",
    "ctp": "retcon.methods.ctp:Ctp",
    "emmet": "retcon.methods.emmet:Emmet",
    "ft": "retcon.methods.ft:Ft",
    "ft_l": "retcon.methods.ft_l:FtL",
    "ft_m": "retcon.methods.ft_m:FtM",
    "ft_wd": "retcon.methods.ft_wd:FtWd",
    "full_c": "retcon.methods.full_c:FullC",
    "jeep": "retcon.methods.jeep:Jeep",
    "kn": "retcon.methods.kn:Kn",
    "kne": "retcon.methods.kne:Kne",
    "lora": "retcon.methods.lora:Lora",
    "malmen": "retcon.methods.malmen:Malmen",
    "memit": "retcon.methods.memit:Memit",
    "mend": "retcon.methods.mend:Mend",
    "pmet": "retcon.methods.pmet:Pmet",
    "prune": "retcon.methods.prune:Prune",
    "r_rome": "retcon.methods.r_rome:RRome",
    "rect": "retcon.methods.rect:Rect",
    "rome": "retcon.methods.rome:Rome",
}


ENTRY_POINTS = "retcon.methods"
"""Group of entry points by which an installed package brings methods of its own."""


def list_methods() -> list[str]:
    """Names of all registered methods, those of installed packages among them."""
    return sorted({**_installed(), **METHODS})


def _installed() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def method_class(name: str) -> type["Method"]:
    """The class registered under a name, or the one that "module:Class" names.

    Raises:
        UnknownMethod: there is none, or it is no method.
    """
    from retcon.methods.common.contract import Method

    try:
        found = _named_object(_place(name))
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownMethod(
            f"cannot find the method {name!r}: {error}. module:Class names a class in a file of the current folder "
            "or in an installed package; see docs/guides/add-a-method.md"
        ) from None
    lacks = [] if isinstance(found, type) and issubclass(found, Method) else ["Method as a base class"]
    lacks += [what for what in ("name", "propose") if not hasattr(found, what)]
    lacks += sorted(getattr(found, "__abstractmethods__", ()))
    if not is_dataclass(found):
        lacks.append("@dataclass(frozen=True, kw_only=True)")
    if lacks:
        raise UnknownMethod(f"{name} is no method: it lacks {', '.join(lacks)}; see docs/guides/add-a-method.md")
    return found


def _place(name: str) -> str:
    """Where the class of a method is, as "module:Class"."""
    table = {**_installed(), **METHODS}
    if name not in table and ":" not in name:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownMethod(
            f"no method {name!r}; known: {', '.join(list_methods())}; one of your own is named module:Class.{hint}"
        )
    return table.get(name, name)


def check_early(name: str, settings: Mapping[str, Any], preset: str | None = None) -> dict[str, Any]:
    """Return settings of a method as its fields want them, where no model is there yet, and check a preset's too.

    A method of this package is read from its source (`declared`), so that a setting that cannot be is refused before
    torch is imported. What depends on two settings or on the model is checked when the method is made.

    Raises:
        UnknownMethod, UnknownPreset, InvalidSetting: the message names the method, preset or setting.
    """
    hints = setting_types(name)
    if preset is not None:
        found = presets_module.preset_named(name, preset, parents_of(name))
        fitted(f"preset {preset}", hints, found.settings)
    made = fitted(name, hints, settings)
    if "base_method" in made:  # a filter's
        check_early(made["base_method"], made.get("base_settings", {}))
    return made


def setting_types(name: str) -> Mapping[str, Any]:
    """Return the type of each setting of a method, in order.

    Raises:
        UnknownMethod: there is none of that name.
    """
    place = _place(name)
    if place.startswith("retcon."):
        return declared(place).fields
    return types_of(method_class(name))


def _named_object(name: str) -> Any:
    """Import what "module:attribute" names. Modules of the current folder are found too, after all installed ones."""
    module, _, attribute = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module), attribute)
    finally:
        sys.path.pop()


def parents_of(name: str) -> tuple[str, ...]:
    """Names of the registered methods that one inherits from: their presets are its own too."""
    place = _place(name)
    own = {path: known for known, path in METHODS.items()}
    if place.startswith("retcon."):
        return tuple(own[base] for base in declared(place).bases if base in own)
    bases = (f"{base.__module__}:{base.__qualname__}" for base in method_class(name).__mro__[1:])
    return tuple(own[base] for base in bases if base in own)


def check_subjects(method: Any, edits: Sequence[Edit]) -> None:
    """Raise InvalidEdit where an edit names no subject and `method` needs one; the message names those that do not."""
    lost = next((edit for edit in edits if edit.subject is None), None)
    if lost is None or not method.needs_subject:
        return
    able = [name for name in list_methods() if method_class(name).needs_subject is False]
    raise InvalidEdit(
        f"edit {lost.id!r} names no subject, and {method.name} writes at the subject's last token; name the subject, "
        f"or take a method that needs none: {', '.join(able)}"
    )


@dataclass(frozen=True)
class Choice:
    """A method with its settings, and where these come from."""

    method: "Method"
    preset: Preset | None
    notes: tuple[str, ...] = ()
    """What was chosen for a model without a preset, and why, a line each."""


def method(
    name: str,
    *,
    for_model: "LM | None" = None,
    dataset: str | None = None,
    preset: str | None = None,
    cases: Sequence[Edit | Case] | None = None,
    at_once: int | None = None,
    **settings: Any,
) -> "Method":
    """Return a method with the settings published or tuned for a model; any field can be overridden by keyword.

    Args:
        name: one of `list_methods()`, or "module:Class" for one of your own.
        for_model: its preset is looked up by architecture and sizes, never by name or path. Without a preset, settings
            follow from its shape and from `cases` (`choose` says which), with a warning that says so.
        dataset: which of a model's presets to take ("counterfact", "zsre", "world"); CounterFact's where there are two
            and none is asked for, and that is said.
        preset: a preset by its full name, "method/model/dataset", whatever the model.
        cases: the facts to edit. Without a preset, clamps and learning rates are fitted on some of them;
            `layers="probe"` probes the model with them and takes the layers that the contrast-based probe advises
            (`retcon.locate`), whatever the method calls them; the embedded models bring their own facts for that.
        at_once: how many of the facts one batch will hold (None: all), which a learning rate that is fitted goes by.

    Raises:
        UnknownMethod, UnknownPreset, InvalidSetting: the message lists what is known.
    """
    return choose(
        name, for_model=for_model, dataset=dataset, preset=preset, cases=cases, at_once=at_once, **settings
    ).method


def choose(
    name: str,
    *,
    for_model: "LM | None" = None,
    dataset: str | None = None,
    preset: str | None = None,
    cases: Sequence[Edit | Case] | None = None,
    at_once: int | None = None,
    **settings: Any,
) -> Choice:
    """Return what `method` returns, with the preset that it comes from, or what was chosen without one and why."""
    from retcon.methods.common import starting_point
    from retcon.methods.common.contract import ModelShape
    from retcon.methods.common.locate_then_edit import SearchSettings
    from retcon.methods.common.tuning import TuningSettings
    from retcon.methods.common.wrappers import Filter

    chosen = method_class(name)
    if settings.get("layers") == "probe":
        settings = _advised(chosen, for_model, cases, settings)
    settings = checked(name, chosen, settings)
    found: Preset | None = None
    guess: dict[str, Any] = {}
    notes: list[str] = []
    if preset is not None:
        found = preset_named(name, preset)
    elif for_model is not None:
        found = preset_for(name, for_model, dataset)
        if found is None:
            shape = ModelShape.of(for_model)
            guess = chosen.fallback_settings(shape)
            fitted_later = {*starting_point.clamp_settings(chosen)}  # which have a note of their own
            if issubclass(chosen, TuningSettings) and chosen.fits_learning_rate and cases:
                fitted_later.add("learning_rate")
            notes = starting_point.shape_notes(
                chosen, shape, {k: v for k, v in guess.items() if k not in {*settings, *fitted_later}}
            )
    resolved = {**checked(name, chosen, dict(found.settings) if found else guess), **settings}
    if for_model is not None and issubclass(chosen, Filter):
        base = _wrapped(chosen, resolved, for_model, dataset, cases, at_once)
        resolved |= {"base_settings": base.method.settings}
        notes += base.notes
    needed = [f.name for f in fields(chosen) if f.default is MISSING and f.default_factory is MISSING]
    missing = [field for field in needed if field not in resolved]
    if missing:
        tried = "neither a preset nor the model's shape gives" if for_model is not None else "no default gives"
        raise InvalidSetting(
            f"{name} needs {', '.join(missing)}, which {tried}: set it (on the command line --set {missing[0]}=..., in "
            "Python by keyword)" + ("" if for_model is not None else ", or pass for_model=lm for a model's preset")
        )
    made = chosen(**resolved)
    if for_model is not None and found is None and preset is None:
        clamps = [clamp for clamp in starting_point.clamp_settings(chosen) if clamp not in settings]
        if isinstance(made, SearchSettings) and clamps and cases:
            found_clamps = starting_point.fit_clamps(for_model, made, starting_point.edits_of(cases), clamps)
            made = replace(made, **found_clamps.clamps)
            notes.append(str(found_clamps))
        elif isinstance(made, TuningSettings) and made.fits_learning_rate and cases and "learning_rate" not in settings:
            step = starting_point.fit_learning_rate(for_model, made, starting_point.edits_of(cases), at_once=at_once)
            made = replace(made, learning_rate=step.learning_rate)
            notes.append(str(step))
        elif clamps:
            shown = ", ".join(f"{clamp} = {made.settings[clamp]:g}" for clamp in clamps)
            notes.append(f"{shown}: the default, made for large models; given the edits (cases=), it is fitted to them")
        if guess.keys() - settings.keys() or (clamps and not cases):
            warnings.warn(
                f"no {name} preset for this model ({for_model.model.config.model_type}, {for_model.n_layers} layers); "
                f"its settings follow from its shape: {'; '.join(notes)}",
                RetconWarning,
                stacklevel=3,
            )
    return Choice(made, found, tuple(notes))


def presets(name: str) -> list[Preset]:
    """All presets of a method, the user's first."""
    return presets_module.presets(name, parents_of(name))


def preset_named(name: str, preset: str) -> Preset:
    """The preset of that full name.

    Raises:
        UnknownPreset: there is none.
    """
    return presets_module.preset_named(name, preset, parents_of(name))


def preset_for(name: str, lm: "LM", dataset: str | None = None) -> Preset | None:
    """The preset that fits the model, or None; the user's, then CounterFact's where several fit and none is asked for.

    Raises:
        UnknownPreset: the model has presets, but none for that dataset.
    """
    return presets_module.preset_for(name, lm, dataset, parents_of(name))


def _advised(
    chosen: type["Method"], lm: "LM | None", cases: Sequence[Edit | Case] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings with the probe's layers for `layers="probe"`; what is given by its own name stands over them."""
    from retcon.methods.common.advised import probe_layers, settings_for
    from retcon.methods.common.wrappers import Filter

    if lm is None:
        raise InvalidSetting("layers='probe' needs the model that is to be probed: pass for_model=lm")
    given = {name: value for name, value in settings.items() if name != "layers"}
    advice = probe_layers(lm, cases)
    if not issubclass(chosen, Filter):
        return {**settings_for(advice, chosen), **given}
    base = method_class(chosen.base_of(given))
    return {**given, "base_settings": {**settings_for(advice, base), **given.get("base_settings", {})}}


def _wrapped(
    chosen: type["Filter"],
    settings: Mapping[str, Any],
    lm: "LM",
    dataset: str | None,
    cases: Sequence[Edit | Case] | None,
    at_once: int | None,
) -> Choice:
    """The method that a filter wraps, with its settings for the model, those given over them."""
    base = chosen.base_of(settings)
    has = dataset in {p.dataset for p in presets(base)}
    own = settings.get("base_settings", {})
    return choose(base, for_model=lm, dataset=dataset if has else None, cases=cases, at_once=at_once, **own)
