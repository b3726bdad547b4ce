"""The table of methods, and how a name and a model become a method with its settings."""

import difflib
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any

from retcon.edits import Case, Edit
from retcon.errors import InvalidEdit, InvalidSetting, RetconWarning, UnknownMethod, UnknownPreset
from retcon.lm.model import LM
from retcon.methods.common.contract import Method, ModelShape

METHODS = {
    "alphaedit": "retcon.methods.alphaedit:AlphaEdit",
    "ctp": "retcon.methods.ctp:Ctp",
    "emmet": "retcon.methods.emmet:Emmet",
    "jeep": "retcon.methods.jeep:Jeep",
    "kne": "retcon.methods.kne:Kne",
    "memit": "retcon.methods.memit:Memit",
    "pmet": "retcon.methods.pmet:Pmet",
    "prune": "retcon.methods.prune:Prune",
    "r_rome": "retcon.methods.r_rome:RRome",
    "rect": "retcon.methods.rect:Rect",
    "rome": "retcon.methods.rome:Rome",
}


@dataclass(frozen=True)
class Preset:
    """Published or tuned settings of one method for one model and one kind of data."""

    method: str
    model: str
    dataset: str
    source: str
    """Where the settings come from."""
    match: Mapping[str, Any]
    """What the model must look like; see `signature`."""
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.method}/{self.model}/{self.dataset}"


def list_methods() -> list[str]:
    """Names of all registered methods."""
    return sorted(METHODS)


def method_class(name: str) -> type[Any]:
    """The class registered under a name.

    Raises:
        UnknownMethod: there is none.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownMethod(f"no method {name!r}; known: {', '.join(list_methods())}.{hint}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)


def check_subjects(method: Any, edits: Sequence[Edit]) -> None:
    """Raise InvalidEdit where an edit names no subject and `method` needs one; the message names those that do not."""
    lost = next((edit for edit in edits if edit.subject is None), None)
    if lost is None or not method.needs_subject:
        return
    able = [name for name in list_methods() if getattr(method_class(name), "needs_subject", True) is False]
    raise InvalidEdit(
        f"edit {lost.id!r} names no subject, and {method.name} writes at the subject's last token; name the subject, "
        f"or take a method that needs none: {', '.join(able)}"
    )


def method(
    name: str,
    *,
    for_model: LM | None = None,
    dataset: str | None = None,
    preset: str | None = None,
    cases: Sequence[Edit | Case] | None = None,
    **settings: Any,
) -> Method:
    """A method with the settings published or tuned for a model; any field can be overridden by keyword.

    Args:
        name: one of `list_methods()`.
        for_model: its preset is looked up by architecture and sizes, never by name or path. A model without a preset
            gets starting points by relative depth, with a warning that says so.
        dataset: which of a model's presets to take ("counterfact", "zsre", "world"); CounterFact's where there are two
            and none is asked for, and that is said.
        preset: a preset by its full name, "method/model/dataset", whatever the model.
        cases: facts to probe the model with, where `layers="probe"` asks for the layers that the contrast-based probe
            advises (`retcon.locate`), whatever the method calls them; the embedded models bring their own facts.

    Raises:
        UnknownMethod, UnknownPreset, InvalidSetting: the message lists what is known.
    """
    chosen = method_class(name)
    if settings.get("layers") == "probe":
        settings = _advised(chosen, for_model, cases, settings)
    _check_names(name, chosen, settings)
    base: dict[str, Any] = {}
    if preset is not None:
        base = dict(preset_named(name, preset).settings)
    elif for_model is not None:
        found = preset_for(name, for_model, dataset)
        base = dict(found.settings) if found else _starting_point(name, chosen, for_model, settings)
    resolved = _as_fields({**base, **settings})
    if for_model is not None and "base_method" in {f.name for f in fields(chosen)}:
        resolved |= _wrapped(chosen, resolved, for_model, dataset)
    needed = [f.name for f in fields(chosen) if f.default is MISSING and f.default_factory is MISSING]
    missing = [field for field in needed if field not in resolved]
    if missing:
        raise InvalidSetting(
            f"{name} needs {', '.join(missing)}: give them as keywords, or pass for_model=lm for a preset"
        )
    return chosen(**resolved)


def presets(name: str) -> list[Preset]:
    """All presets of a method."""
    method_class(name)
    return [
        Preset(name, p["model"], p["dataset"], p["source"], _models()[p["model"]], p["settings"])
        for p in _toml(f"{name}.toml").get("preset", [])
    ]


def preset_named(name: str, preset: str) -> Preset:
    """The preset of that full name.

    Raises:
        UnknownPreset: there is none.
    """
    for candidate in presets(name):
        if candidate.name == preset:
            return candidate
    raise UnknownPreset(f"no preset {preset!r}; known: {', '.join(p.name for p in presets(name)) or 'none'}")


def preset_for(name: str, lm: LM, dataset: str | None = None) -> Preset | None:
    """The preset that fits the model, or None; CounterFact's where several fit and none is asked for.

    Raises:
        UnknownPreset: the model has presets, but none for that dataset.
    """
    looks = signature(lm)
    fitting = [p for p in presets(name) if all(looks.get(k) == v for k, v in p.match.items())]
    if not fitting:
        return None
    if dataset is not None:
        for candidate in fitting:
            if candidate.dataset == dataset:
                return candidate
        known = ", ".join(p.name for p in fitting)
        raise UnknownPreset(f"{name} has no preset for this model and dataset {dataset!r}; known: {known}")
    if len(fitting) == 1:
        return fitting[0]
    chosen = next((p for p in fitting if p.dataset == "counterfact"), fitting[0])
    warnings.warn(
        f"{len(fitting)} presets fit ({', '.join(p.name for p in fitting)}); taking {chosen.name}. "
        "Pass dataset= to choose.",
        RetconWarning,
        stacklevel=3,
    )
    return chosen


def signature(lm: LM) -> dict[str, Any]:
    """What presets are matched on: architecture and sizes."""
    config = lm.model.config
    weight = lm.site(0, "down_proj").weight
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "model_type": config.model_type,
        "n_layers": lm.n_layers,
        "d_model": weight.shape[0],
        "d_ff": weight.shape[1],
        "vocabulary": config.vocab_size,
        "rope_theta": rope.get("rope_theta", getattr(config, "rope_theta", None)),
        "context": getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None),
    }


def _starting_point(name: str, chosen: type[Any], lm: LM, settings: Mapping[str, Any]) -> dict[str, Any]:
    guess: dict[str, Any] = chosen.fallback_settings(ModelShape.of(lm))
    if guess.keys() <= settings.keys():  # nothing is left to guess
        return guess
    shown = ", ".join(f"{k}={v}" for k, v in guess.items() if k not in settings)
    warnings.warn(
        f"no {name} preset for this model ({lm.model.config.model_type}, {lm.n_layers} layers); starting points by "
        f"relative depth are used, which nobody has tuned: {shown}",
        RetconWarning,
        stacklevel=3,
    )
    return guess


def _advised(
    chosen: type[Any], lm: LM | None, cases: Sequence[Edit | Case] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings with the probe's layers for `layers="probe"`; what is given by its own name stands over them."""
    from retcon.methods.common.advised import probe_layers, settings_for

    if lm is None:
        raise InvalidSetting("layers='probe' needs the model that is to be probed: pass for_model=lm")
    given = {name: value for name, value in settings.items() if name != "layers"}
    base_methods = [f.default for f in fields(chosen) if f.name == "base_method"]
    advice = probe_layers(lm, cases)
    if not base_methods:
        return {**settings_for(advice, chosen), **given}
    base = method_class(given.get("base_method", base_methods[0]))
    return {**given, "base_settings": {**settings_for(advice, base), **given.get("base_settings", {})}}


def _wrapped(chosen: type[Any], settings: Mapping[str, Any], lm: LM, dataset: str | None) -> dict[str, Any]:
    """The settings of the method that a filter wraps: its preset's for the model, those given over them."""
    base = settings.get("base_method", next(f.default for f in fields(chosen) if f.name == "base_method"))
    has = dataset in {p.dataset for p in presets(base)}
    wrapped = method(base, for_model=lm, dataset=dataset if has else None, **settings.get("base_settings", {}))
    return {"base_settings": {f.name: getattr(wrapped, f.name) for f in fields(wrapped)}}  # type: ignore[arg-type]


def _check_names(name: str, chosen: type[Any], settings: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(chosen)]
    for setting in settings:
        if setting not in known:
            close = difflib.get_close_matches(setting, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidSetting(f"{name} has no setting {setting!r}{hint} (known: {', '.join(known)})")


def _as_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


@cache
def _toml(name: str) -> dict[str, Any]:
    path = files("retcon") / "presets" / name
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _models() -> dict[str, dict[str, Any]]:
    return _toml("models.toml")
