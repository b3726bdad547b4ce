"""How the verbs load a model and deltas."""

import inspect
import json
import os
import shlex
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retcon.cli.options import DeviceMap, Packed, Revision, TrustRemoteCode, VerifyBase
from retcon.cli.printing import warn
from retcon.cli.progress import spinner
from retcon.errors import InvalidSetting, UnsupportedModel
from retcon.files import looks_like_path

if TYPE_CHECKING:
    from retcon.attachment import Attachment
    from retcon.lm.model import LM

NARROW = 512
"""Width of the residual stream up to which one thread is used."""


@dataclass(frozen=True)
class _Loading:
    """What the options of `loads_a_model` say."""

    revision: str | None = None
    device_map: Any = None
    trust_remote_code: bool = False
    packed: bool = False
    verify_base: bool = False


_LOADING: ContextVar[_Loading | None] = ContextVar("_LOADING", default=None)


def loads_a_model(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of how a model is loaded (--revision, --packed, ...); `load_model` hears of them."""

    @wraps(verb)
    def with_options(
        *args: Any,
        revision: str | None = None,
        device_map: str | None = None,
        packed: bool = False,
        trust_remote_code: bool = False,
        verify_base: bool = False,
        **options: Any,
    ) -> None:
        token = _LOADING.set(_Loading(revision, _device_map(device_map), trust_remote_code, packed, verify_base))
        try:
            verb(*args, **options)
        finally:
            _LOADING.reset(token)

    more = {
        "revision": Revision, "device_map": DeviceMap, "packed": Packed, "trust_remote_code": TrustRemoteCode,
        "verify_base": VerifyBase,
    }  # fmt: skip
    defaults = dict.fromkeys(more, False) | {"revision": None, "device_map": None}
    parameters = []
    for name, parameter in inspect.signature(verb).parameters.items():
        parameters.append(parameter)
        if name == "dtype":
            parameters += [parameter.replace(name=n, default=defaults[n], annotation=more[n]) for n in more]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {**verb.__annotations__, **more}  # typer reads both
    return with_options


def loading_options() -> str:
    """Return the options of `loads_a_model` as they were given, to be repeated in a command that is suggested."""
    asked = _LOADING.get() or _Loading()
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


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> "LM":
    """`retcon.load`, with a spinner, a checked device and the options of `loads_a_model`."""
    asked = _LOADING.get() or _Loading()
    if device is not None and asked.device_map is not None:
        raise InvalidSetting("--device and --device-map both say where the model goes; give one of them")
    if asked.trust_remote_code:
        warn_of_remote_code("--trust-remote-code", name)
    with spinner(f"loading {name}"):
        import retcon

        check_model_path(name)
        _check_device(device)
        lm = retcon.load(
            name,
            device=device,
            dtype=dtype,
            device_map=asked.device_map,
            revision=asked.revision,
            trust_remote_code=asked.trust_remote_code,
            packed=asked.packed,
            verify_base=asked.verify_base,
        )
        _one_thread_for_a_small_model(lm)
        return lm


def warn_of_remote_code(asked: str, name: str) -> None:
    """Warn that code of a checkpoint is run, since `asked` says so."""
    warn(f"{asked}: code that comes with {name}, if there is any, is run with your rights")


def _one_thread_for_a_small_model(lm: "LM") -> None:
    """On a CPU, matrices this narrow gain little from threads, and waiting for each other on busy cores costs a lot.

    `OMP_NUM_THREADS`, where it is set, stands.
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

    find_model(name, (_LOADING.get() or _Loading()).revision)


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
        raise InvalidSetting(f"device {name!r} asked for, but torch sees {found or 'no'} GPU(s) on this machine")


def load_deltas(paths: Sequence[Path]) -> list["Attachment"]:
    """Deltas, or attachments of other kinds, from files, in that order.

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
