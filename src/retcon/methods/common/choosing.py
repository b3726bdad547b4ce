"""A method with its settings for a model: published, tuned, or by the rule for models that no preset knows."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from retcon.edits import Case, Edit
from retcon.errors import InvalidSetting, NoPreset
from retcon.lm.model import LM, require_lm
from retcon.methods.common.advised import probe_layers, settings_for
from retcon.methods.common.contract import Method, ModelShape, check_as_trained
from retcon.methods.common.fine_tuning import FineTuning
from retcon.methods.common.locate_then_edit import SearchSettings
from retcon.methods.common.presets import Preset, check_one_asked, preset_for, preset_named, presets
from retcon.methods.common.registry import NO_PRESET, build, method_class
from retcon.methods.common.settings import checked_settings
from retcon.methods.common.starting_point import (
    clamp_settings,
    edits_of,
    fit_clamps,
    fit_layer,
    fit_learning_rate,
    shape_notes,
)
from retcon.methods.common.tuning import TuningSettings
from retcon.methods.common.wrappers import Filter

Facts = Iterable[Edit | Case] | None


@dataclass(frozen=True)
class ChosenMethod:
    """A method with its settings, and where these come from."""

    method: Method
    preset: Preset | None
    """Where its settings are a preset's; an editor's file has settings of its own."""
    notes: tuple[str, ...] = ()
    """What was chosen for a model without a preset, and why, a line each."""
    base_preset: Preset | None = None
    """Where it filters what a base method writes: the preset that the base method's settings are from."""


def method(
    name: str,
    *,
    for_model: LM | None = None,
    dataset: str | None = None,
    preset: str | None = None,
    cases: Facts = None,
    at_once: int | None = None,
    **settings: Any,
) -> Method:
    """Return a method with the settings published or tuned for a model; any field can be overridden by keyword.

    Args:
        name: one of `list_methods()`, or "module:Class" for one of your own.
        for_model: its preset is looked up by architecture and sizes, never by name or path. Without a preset, settings
            follow from its shape and from `cases` (`choose` says which), with a warning that says so.
        dataset: which of a model's presets to take ("counterfact", "zsre", "world"); CounterFact's where there are two
            and none is asked for, and that is said. Not beside `preset`.
        preset: a preset by its full name, "method/model/dataset", whatever the model; "none": as if no preset knew the
            model.
        cases: the facts to edit. Without a preset, clamps and learning rates are fitted on some of them;
            `layers="probe"` probes the model with them and takes the layers that the contrast-based probe advises
            (`retcon.locate`), whatever the method calls them; the embedded models bring their own facts for that.
        at_once: how many of the facts one batch will hold (None: all), which a learning rate that is fitted goes by.

    Raises:
        UnknownMethod, UnknownPreset, InvalidSetting: the message lists what is known; or a setting is given beside a
            trained editor whose own is another.
        UnsupportedModel: `for_model` is no `LM`.
    """
    return choose(
        name, for_model=for_model, dataset=dataset, preset=preset, cases=cases, at_once=at_once, **settings
    ).method


def choose(
    name: str,
    *,
    for_model: LM | None = None,
    dataset: str | None = None,
    preset: str | None = None,
    cases: Facts = None,
    at_once: int | None = None,
    **settings: Any,
) -> ChosenMethod:
    """Return what `method` returns, with the preset that it comes from, or what was chosen without one and why."""
    chosen = method_class(name)
    check_one_asked(preset, dataset)
    cases = None if cases is None else edits_of(cases)
    if for_model is not None:
        require_lm(for_model)
    found = _preset(name, preset, for_model, dataset)
    if isinstance(layers := settings.get("layers"), str) and layers == "probe":
        settings = _advised(chosen, for_model, cases, settings, found)
    settings = checked_settings(name, chosen, settings)
    as_trained = settings.get("editor") is not None and chosen.as_trained is not Method.as_trained
    if as_trained:
        found = None  # all else is in the editor's file
    by_rule = for_model if found is None and not as_trained else None
    shape = None if by_rule is None else ModelShape.of(by_rule)
    guess = {} if shape is None else chosen.fallback_settings(shape)
    own = checked_settings(f"preset {found.name}" if found else name, chosen, found.settings if found else guess)
    resolved = {**own, **settings}
    base: ChosenMethod | None = None
    if for_model is not None and issubclass(chosen, Filter):
        base = _wrapped(chosen, resolved, for_model, dataset, preset, cases, at_once)
        resolved |= {"base_settings": base.method.settings}
    made = build(name, resolved, lm=for_model)
    if settings.keys() > {"editor"} and settings["editor"] is not None:
        check_as_trained(made, made.as_trained(), settings)
    notes: list[str] = []
    if by_rule is not None and shape is not None:
        made, fitted = _fitted(by_rule, made, settings, cases, at_once)
        of_shape = {name: value for name, value in guess.items() if name not in {*settings, *fitted}}
        notes = shape_notes(chosen, shape, of_shape) + list(dict.fromkeys(fitted.values()))
    if base is not None:
        notes += base.notes
    if by_rule is not None and (guess.keys() - settings.keys() or (_clamps(chosen, settings) and not cases)):
        warnings.warn(
            f"no {name} preset for this model ({by_rule.model.config.model_type}, {by_rule.n_layers} layers); "
            f"its settings follow from its shape: {'; '.join(notes)}",
            NoPreset,
            stacklevel=3,
        )
    return ChosenMethod(made, found, tuple(notes), base.preset if base else None)


def _preset(name: str, preset: str | None, for_model: LM | None, dataset: str | None) -> Preset | None:
    """Return the preset that is named, or else the model's; None where there is none, or none is wanted."""
    if preset not in (None, NO_PRESET):
        return preset_named(name, preset)
    return preset_for(name, for_model, dataset) if preset is None and for_model is not None else None


def _fitted(
    lm: LM, made: Method, given: Mapping[str, Any], cases: Facts, at_once: int | None
) -> tuple[Method, dict[str, str]]:
    """Return the method with what suits the cases of clamps, layer and learning rate, where not given, and what to say
    of each."""
    clamps = _clamps(type(made), given)
    said: dict[str, str] = {}
    if isinstance(made, SearchSettings) and clamps and cases:
        found = fit_clamps(lm, made, edits_of(cases), clamps)
        return replace(made, **found.clamps), dict.fromkeys(clamps, str(found))
    if isinstance(made, FineTuning) and made.fits_layer and "layers" not in given and cases:
        best = fit_layer(lm, made, edits_of(cases), at_once=at_once)
        said |= {} if best is None else {"layers": str(best)}
        made = made if best is None else replace(made, layers=(best.layer,))
    if isinstance(made, TuningSettings) and _rate_to_fit(made, given) and cases:
        step = fit_learning_rate(lm, made, edits_of(cases), at_once=at_once)
        made, said["learning_rate"] = replace(made, learning_rate=step.learning_rate), str(step)
    if clamps:
        shown = ", ".join(f"{clamp} = {made.settings[clamp]:g}" for clamp in clamps)
        note = f"{shown}: the default, made for large models; given the edits (cases=), it is fitted to them"
        return made, dict.fromkeys(clamps, note)
    return made, said


def _rate_to_fit(made: TuningSettings, given: Iterable[str]) -> bool:
    """Return whether the method's learning rate follows from the edits: where it is not given, and they can reach a
    loss."""
    return made.fits_learning_rate and made.stop_loss > 0 and "learning_rate" not in given


def _clamps(chosen: type[Method], given: Iterable[str]) -> list[str]:
    """Return the method's clamps that are not given."""
    return [clamp for clamp in clamp_settings(chosen) if clamp not in given]


def _advised(
    chosen: type[Method], lm: LM | None, cases: Facts, settings: Mapping[str, Any], preset: Preset | None
) -> dict[str, Any]:
    """Return the settings with the probe's layers for `layers="probe"`; what is given by its own name wins."""
    if lm is None:
        raise InvalidSetting("layers='probe' needs the model that is to be probed: pass for_model=lm")
    given = {name: value for name, value in settings.items() if name != "layers"}
    advice = probe_layers(lm, cases)
    if not issubclass(chosen, Filter):
        return {**settings_for(advice, chosen), **given}
    base = method_class(chosen.base_of({**(preset.settings if preset else {}), **given}))
    return {**given, "base_settings": {**settings_for(advice, base), **given.get("base_settings", {})}}


def _wrapped(
    chosen: type[Filter],
    settings: Mapping[str, Any],
    lm: LM,
    dataset: str | None,
    preset: str | None,
    cases: Facts,
    at_once: int | None,
) -> ChosenMethod:
    """Return the method that a filter wraps, with its settings for the model, those given over them.

    Where the filter's preset was asked for by its full name, these are of the base method's like it, if there is one.
    """
    base = chosen.base_of(settings)
    known = presets(base)
    has = dataset in {p.dataset for p in known}
    if preset not in (None, NO_PRESET):
        twin = f"{base}/{preset.partition('/')[2]}"
        preset = twin if twin in {p.name for p in known} else None
    own = settings.get("base_settings", {})
    return choose(
        base, for_model=lm, dataset=dataset if has else None, preset=preset, cases=cases, at_once=at_once, **own
    )
