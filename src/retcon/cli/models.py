"""How the verbs load a model and deltas."""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retcon.cli.options import (
    Device,
    DeviceMap,
    DType,
    Packed,
    Revision,
    StoredDType,
    TrustRemoteCode,
    VerifyBase,
    add_options,
)
from retcon.cli.printing import warn
from retcon.cli.progress import spinner
from retcon.errors import InvalidSetting, UnsupportedModel
from retcon.files import looks_like_path
from retcon.plural import plural
from retcon.shared_cache import shared_cache

if TYPE_CHECKING:
    from retcon.attachment import Attachment
    from retcon.lm.model import LM

NARROW = 512
"""Width of the residual stream up to which one thread is used."""


@dataclass(frozen=True)
class Loading:
    """How models are loaded: the options of `loads_a_model`."""

    device: Device = None
    dtype: DType = None
    revision: Revision = None
    device_map: DeviceMap = None
    packed: Packed = False
    trust_remote_code: TrustRemoteCode = False
    verify_base: VerifyBase = False


_LOADING: ContextVar[Loading | None] = ContextVar("_LOADING", default=None)


def loads_a_model(verb: Callable[..., None], *, as_stored: bool = False) -> Callable[..., None]:
    """Give a verb the options of how a model is loaded (--device, --revision, ...), which `load_model` reads.

    Args:
        as_stored: whether weights keep the dtype they are stored in where --dtype names none.
    """

    def run(asked: dict[str, Any], own: dict[str, Any]) -> None:
        read = {
            "device_map": _device_map(asked["device_map"]),
            "dtype": asked["dtype"] or ("auto" if as_stored else None),
        }
        token = _LOADING.set(Loading(**asked | read))
        try:
            verb(**own)
        finally:
            _LOADING.reset(token)

    options = {field.name: (field.type, field.default) for field in fields(Loading)}
    options["dtype"] = (StoredDType if as_stored else DType, None)
    return add_options(verb, options, run, before="as_json")


loads_as_stored = partial(loads_a_model, as_stored=True)


def loading() -> Loading:
    """Return what the options of `loads_a_model` say."""
    return _LOADING.get() or Loading()


def loading_options() -> str:
    """Return the options of `loads_a_model` as they were given, to be repeated in a command that is suggested."""
    asked = loading()
    given = [f"--revision {shlex.quote(asked.revision)}"] if asked.revision else []
    if asked.device_map is not None:
        place = asked.device_map if isinstance(asked.device_map, str) else json.dumps(asked.device_map)
        given.append(f"--device-map {shlex.quote(place)}")
    given += ["--packed"] * asked.packed + ["--trust-remote-code"] * asked.trust_remote_code
    given += ["--verify-base"] * asked.verify_base
    return "".join(f" {option}" for option in given)


def _device_map(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidSetting(f"--device-map {text}: is no JSON object ({error})") from None


def load_model(name: str) -> "LM":
    """Call `retcon.load`, with a spinner, a checked device and the options of `loads_a_model`."""
    asked = loading()
    if asked.device is not None and asked.device_map is not None:
        raise InvalidSetting("--device and --device-map both say where the model goes; give one of them")
    if asked.trust_remote_code:
        warn_of_remote_code("--trust-remote-code", name)
    shared_cache()  # a name that cannot be one is refused before anything is loaded
    with spinner(f"loading {name}"):
        import retcon

        check_model_path(name)
        _check_device(asked.device)
        lm = retcon.load(name, **vars(asked))
        _one_thread_for_a_small_model(lm)
        return lm


def warn_of_remote_code(asked: str, name: str) -> None:
    """Warn that code of a checkpoint is run, since `asked` says so."""
    warn(f"{asked}: code that comes with {name}, if there is any, is run with your rights")


def _one_thread_for_a_small_model(lm: "LM") -> None:
    """On a CPU, matrices this narrow gain little from threads, and waiting for each other on busy cores costs a lot.

    `OMP_NUM_THREADS`, where it is set, is kept.
    """
    import torch

    width = lm.d_model
    if lm.device.type == "cpu" and width <= NARROW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check_model_path(name: str) -> None:
    """Refuse what can only be a path, and leads nowhere.

    Raises:
        UnsupportedModel: there is no such directory, and no such file.
    """
    if looks_like_path(name) and not name.startswith("demo:") and not Path(name).exists():
        raise UnsupportedModel(f"cannot load {name!r}: no such directory or file")


def check_model_exists(name: str) -> None:
    """Refuse a model that is neither here nor on the hub, before another one is loaded.

    Raises:
        UnsupportedModel: there is none, or the hub cannot be asked.
    """
    check_model_path(name)

    from retcon.lm.load import find_model

    find_model(name, loading().revision)


def _check_device(name: str | None) -> None:
    import torch

    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidSetting(f"unknown device {name!r}; try cpu, cuda or cuda:0") from None
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise InvalidSetting(f"device {name!r} asked for, but torch sees {plural(found, 'GPU')} on this machine")


def load_deltas(paths: Sequence[Path]) -> list["Attachment"]:
    """Read deltas, or attachments of other kinds, from files, in that order.

    A store stands for those in force, `store@ENTRY` for those after an entry.

    Raises:
        InvalidSetting: one is given twice.
    """
    from retcon.attachment import load

    found: dict[str, Attachment] = {}
    for path in delta_files(paths):
        delta = load(path)
        if delta.id in found:
            raise InvalidSetting(f"{path}: the delta {delta.id} is given twice; a model takes it once")
        found[delta.id] = delta
    return list(found.values())


def delta_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of deltas, with those of a store in its place."""
    from retcon.store import Store
    from retcon.store.contents import CONFIG

    found: list[Path] = []
    for path in paths:
        folder, _, entry = str(path).rpartition("@")
        if (path / CONFIG).is_file():
            found += Store(path).paths()
        elif folder and (Path(folder) / CONFIG).is_file():
            found += Store(folder).paths(entry)
        else:
            found.append(path)
    return found
