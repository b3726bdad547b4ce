"""Presets: settings published or tuned for a model and a kind of data, ours and the user's.

A file `<method>.toml` holds `[[preset]]` tables with `model`, `dataset`, `source` and `settings`; `model` names a table
of `models.toml` (beside it, or the package's), which says what the model must look like, or is such a table itself. The
user's files, in the folder that `RETCON_PRESETS` names or in `./retcon-presets`, are found before those that come with
the package.
"""

import os
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retcon.atomic import write_atomically
from retcon.errors import InvalidSetting, MalformedFile, RetconWarning, UnknownPreset
from retcon.methods.common.registry import NO_PRESET, method_class, parents_of, setting_types
from retcon.methods.common.settings import fitted, reads_none, toml_value

if TYPE_CHECKING:
    from retcon.lm.model import LM

OWN_FOLDER = Path(str(files("retcon") / "presets"))
USER_FOLDER = "retcon-presets"
"""Where a user's presets are, below the current directory, where `RETCON_PRESETS` does not say otherwise."""


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
    is_users: bool = False
    """Whether it is from the user's folder."""

    @property
    def name(self) -> str:
        return f"{self.method}/{self.model}/{self.dataset}"


def presets(name: str) -> list[Preset]:
    """Return all presets of a method, the user's first; those of methods that it inherits its settings from come last.

    Raises:
        MalformedFile: a file of the user's is no file of presets.
    """
    return [preset for method in (name, *parents_of(name)) for preset in _presets_of(name, method)]


def _presets_of(name: str, file: str) -> list[Preset]:
    return [*_presets_in(user_folder(), name, file), *_presets_in(OWN_FOLDER, name, file)]


def user_folder() -> Path:
    """Return the folder of the user's own presets; it need not exist."""
    return Path(os.environ.get("RETCON_PRESETS") or USER_FOLDER)


def preset_named(name: str, preset: str) -> Preset:
    """Return the preset of that full name.

    Raises:
        UnknownPreset: there is none.
    """
    known = presets(name)
    for candidate in known:
        if candidate.name == preset:
            return candidate
    of = preset.partition("/")[0]
    if of != name and any(p.name == preset for p in _presets_of(of, of)):
        raise UnknownPreset(f"{preset!r} is a preset of {of}, and the method is {name}; name that one")
    raise UnknownPreset(f"no preset {preset!r}; known: {', '.join(p.name for p in known) or 'none'}")


def preset_for(name: str, lm: "LM", dataset: str | None = None) -> Preset | None:
    """Return the preset that fits the model, or None.

    Where several fit and no dataset is asked for: the last that `retcon tune` wrote; else the user's before the
    package's, and among those CounterFact's. One for a part of what another is for ("world-single" beside "world") is
    then taken only if `retcon tune` wrote it.

    Raises:
        UnknownPreset: the model has presets, but none for that dataset.
    """
    looks = signature(lm)
    fitting = [p for p in presets(name) if all(looks.get(k) == v for k, v in p.match.items())]
    if not fitting and dataset is None:
        return None
    if dataset is not None:
        for candidate in fitting:
            if candidate.dataset == dataset:
                return candidate
        known = ", ".join(p.name for p in fitting)
        raise UnknownPreset(f"{name} has no preset for this model and dataset {dataset!r}; known: {known or 'none'}")
    if tuned := [p for p in fitting if p.source.startswith(TUNED)]:
        return tuned[0]
    fitting = [p for p in fitting if p.is_users] or fitting
    fitting = [p for p in fitting if not any(p.dataset.startswith(f"{q.dataset}-") for q in fitting)]
    if len(fitting) == 1:
        return fitting[0]
    chosen = next((p for p in fitting if p.dataset == "counterfact"), fitting[0])
    warnings.warn(
        f"{len(fitting)} presets fit ({', '.join(p.name for p in fitting)}); taking {chosen.name}. "
        "Pass dataset= to choose.",
        RetconWarning,
        stacklevel=2,
    )
    return chosen


def check_one_asked(preset: str | None, dataset: str | None) -> None:
    """Raise InvalidSetting where a dataset is asked for beside a preset, which leaves it no choice."""
    if preset is not None and dataset is not None:
        why = "leaves all presets aside" if preset == NO_PRESET else "names its dataset already"
        raise InvalidSetting(
            f"preset {preset} {why}",
            python=f"; leave out dataset={dataset!r}",
            option=f"; leave out --dataset {dataset}",
        )


def check_early(
    name: str, settings: Mapping[str, Any], preset: str | None = None, dataset: str | None = None
) -> dict[str, Any]:
    """Return settings of a method as its fields want them, where no model is there yet, and check a preset's too.

    A method of this package is read from its source (`declared`), so that a setting that cannot be is refused before
    torch is imported. What depends on two settings or on the model is checked when the method is made.

    Raises:
        UnknownMethod, UnknownPreset, InvalidSetting: the message names the method, preset or setting.
    """
    check_one_asked(preset, dataset)
    hints = setting_types(name)
    if preset not in (None, NO_PRESET):
        found = preset_named(name, preset)
        fitted(f"preset {preset}", hints, found.settings)
    made = fitted(name, hints, settings)
    if "base_method" in made:  # a filter's
        check_early(made["base_method"], made.get("base_settings", {}))
    return made


def _rope_theta(config: Any) -> Any:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_theta", getattr(config, "rope_theta", None))


_LOOKS: Mapping[str, Callable[["LM"], Any]] = {
    "model_type": lambda lm: lm.config.model_type,
    "n_layers": lambda lm: lm.n_layers,
    "d_model": lambda lm: lm.d_model,
    "d_ff": lambda lm: lm.d_ff,
    "vocabulary": lambda lm: lm.config.vocab_size,
    "rope_theta": lambda lm: _rope_theta(lm.config),
    "context": lambda lm: lm.context_length,
}


def signature(lm: "LM") -> dict[str, Any]:
    """Return what presets are matched on: architecture and sizes."""
    return {name: look(lm) for name, look in _LOOKS.items()}


TUNED = "tuned by retcon"
"""What the source of a preset that `retcon tune` wrote begins with; such a preset is taken before all others."""


def preset_path(method: str, folder: Path | None = None) -> Path:
    """Return the file that a preset is written to, in the user's folder (or `folder`); it need not exist.

    Raises:
        MalformedFile: the file that is there is no file of presets.
    """
    folder = folder or user_folder()
    list(_presets_in(folder, method, method))
    return _file_of(folder, method)


def write_preset(
    method: str,
    match: Mapping[str, Any],
    dataset: str,
    source: str,
    settings: Mapping[str, Any],
    folder: Path | None = None,
) -> Path:
    """Write a preset into the user's folder (or `folder`), before those that are there; one of its like is replaced.

    Args:
        match: what the model must look like (`signature`).
        settings: None is left out where it is the default, and written "none" elsewhere; always in `base_settings`,
            which are read over a preset of the base method.

    Raises:
        MalformedFile: the file that is there is no file of presets; it is left as it is.
        InvalidSetting: a setting is None where no file can say so.
    """
    path = preset_path(method, folder)
    written = _without_none(method, settings, leave_out_defaults=True)
    look = ", ".join(f"{name} = {toml_value(value)}" for name, value in match.items() if value is not None)
    head = f"# {method} for "
    begin = f"{head}{look}; {dataset}"
    old = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    if begin in old:  # up to its end; where that line is gone, up to the next preset
        start = old.index(begin)
        end = start + 1 + (old[start + 1 : start + 2] == ["[[preset]]"])
        while end < len(old) and old[end] != "# end" and not old[end].startswith(("[[preset]]", head)):
            end += 1
        del old[start : end + (old[end : end + 1] == ["# end"])]
    lines = [
        begin,
        "[[preset]]",
        f"model = {{{look}}}",
        f'name = "{match["model_type"]}-{match["n_layers"]}x{match["d_model"]}"',
        f"dataset = {toml_value(dataset)}",
        f"source = {toml_value(source)}",
        "[preset.settings]",
        *(f"{name} = {toml_value(value)}" for name, value in written.items()),
        "# end",
    ]
    write_atomically(path, ("\n".join(lines) + "\n" + "\n".join(old)).encode())
    return path


def _without_none(method: str, settings: Mapping[str, Any], *, leave_out_defaults: bool = False) -> dict[str, Any]:
    """Return settings with "none" for None, for which TOML has no word; those of a base method likewise."""
    hints = setting_types(method)
    defaults = {f.name: f.default for f in fields(method_class(method))}
    written = dict(settings)
    if written.get("base_settings"):
        base = written.get("base_method", defaults["base_method"])
        written["base_settings"] = _without_none(base, written["base_settings"])
    for name in [name for name, value in settings.items() if value is None]:
        if reads_none(hints[name]) and not (leave_out_defaults and defaults[name] is None):
            written[name] = "none"
        elif defaults[name] is None:
            del written[name]
        else:
            raise InvalidSetting(
                f'{method}: {name} is None, which no preset can say, for "none" is a text there; set another value'
            )
    return written


def _presets_in(folder: Path, name: str, file: str) -> Iterator[Preset]:
    """Yield the presets of a method in a folder, read from a file's `[[preset]]` tables."""
    path = _file_of(folder, file)
    try:
        for i, p in enumerate(_toml(path).get("preset", []), 1):
            models = _toml(OWN_FOLDER / "models.toml") | _toml(path.with_name("models.toml"))
            match = p["model"] if isinstance(p["model"], dict) else models[p["model"]]
            label = str(p.get("name", f"model{i}")) if isinstance(p["model"], dict) else p["model"]
            if not match or match.keys() - _LOOKS.keys():
                raise TypeError(f"model needs some of {', '.join(_LOOKS)}, found {', '.join(match) or 'none'}")
            for field in ("dataset", "source"):
                if not isinstance(p[field], str):
                    raise TypeError(f"{field} = {p[field]!r}")
            yield Preset(name, label, p["dataset"], p["source"], match, {**p["settings"]}, folder != OWN_FOLDER)
    except (KeyError, TypeError, AttributeError) as error:
        raise MalformedFile(
            f"{path}: a [[preset]] needs model (a name in models.toml, or a table), dataset, source and settings; "
            f"missing or wrong: {error}"
        ) from None


def _file_of(folder: Path, method: str) -> Path:
    return folder / f"{method.partition(':')[2] or method}.toml"


def _toml(path: Path) -> dict[str, Any]:
    try:
        return _parsed(str(path), path.stat().st_mtime_ns)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise MalformedFile(f"{path}: not a readable TOML file ({error})") from None


@cache
def _parsed(path: str, changed: int) -> dict[str, Any]:
    return tomllib.loads(Path(path).read_text(encoding="utf-8"))
