"""Files that are believed only after reading: content under a checksum, with what it is for and what made it.

Factors, searched values, fingerprints, text, unfinished work and records of the unedited model are written by
`write_checked` and read by `read_checked`; second moments have a format of their own (`memory/moments.py`). A file
that is damaged, that belongs to something else, or that another computation made is reported as such and never used.
"""

import hashlib
import json
import os
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retcon import shared_cache
from retcon.atomic import replacing
from retcon.errors import AnotherIdentity, MalformedFile, RetconWarning
from retcon.files import cache_dir, tidy_cache
from retcon.version import __version__

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """What a kind of file holds, and which computation fills it."""

    name: str
    """What the content is, in words: "second moment", "searched values"."""
    format: int
    """Layout of the file; raised when readers change."""
    computation: int
    """Raised only when the same inputs give other results. retcon's own version is recorded, and not compared."""


def write_checked(
    path: str | os.PathLike[str],
    kind: Kind,
    identity: Mapping[str, Any],
    tensors: Mapping[str, "Tensor"] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors and JSON values to one safetensors file, whole or not at all.

    Args:
        identity: all that the content is for and that determines it; compared on reading. JSON values.
        tensors: by name.
        about: what else the file says. JSON values.
    """
    from safetensors.torch import save_file

    own = for_file(tensors or {})
    record: dict[str, Any] = {
        "kind": kind.name,
        "format": kind.format,
        "computation": kind.computation,
        "identity": through_json(identity),
        "about": through_json(about or {}),
        "retcon": __version__,
    }
    record["check"] = checksum(record, own)
    with replacing(path) as temporary:
        save_file(own, temporary, metadata={"retcon": json.dumps(record)})


def read_checked(
    path: str | os.PathLike[str], kind: Kind, identity: Mapping[str, Any]
) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return the tensors and the `about` of a file that `write_checked` wrote for this identity.

    Raises:
        FileNotFoundError: there is no such file.
        MalformedFile: it cannot be read, its checksum is another, or it is of another kind or computation; the message
            names the file and says which.
        AnotherIdentity: it was written for another identity; the message says what differs.
    """
    record, tensors = read_intact(path, kind.name)
    found = tuple(record.get(what, "unknown") for what in ("kind", "format", "computation"))  # moments have none
    if found != (kind.name, kind.format, kind.computation):
        raise MalformedFile(
            f"{path}: holds {found[0]}, format {found[1]}, computation {found[2]}; this version reads {kind.name}, "
            f"format {kind.format}, computation {kind.computation}"
        )
    if differing := list(_differences(record["identity"], through_json(identity))):
        what = kind.name.removeprefix("a ")
        raise AnotherIdentity(f"{path}: not the {what} asked for ({', '.join(differing)})")
    return tensors, record["about"]


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*wanted, *found]):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            yield f"{name}: found {reprlib.repr(old)}, wanted {reprlib.repr(new)}"


def read_intact(
    path: str | os.PathLike[str], what: str = "checked content"
) -> tuple[dict[str, Any], dict[str, "Tensor"]]:
    """Return the record and the tensors of a file that `write_checked` wrote, whatever they are for.

    Raises:
        FileNotFoundError: there is no such file.
        MalformedFile: it cannot be read, or its checksum is another.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["retcon"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        check = record.pop("check")
        intact = check == checksum(record, tensors)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise MalformedFile(f"{path}: not a readable file of {what} ({type(error).__name__}: {error})") from None
    if not intact:
        raise MalformedFile(f"{path}: damaged; its content does not match its checksum")
    return record, tensors


def cached(
    path: str | os.PathLike[str], kind: Kind, identity: Mapping[str, Any]
) -> tuple[dict[str, "Tensor"], dict[str, Any]] | None:
    """Return what a cache holds, this machine's or the shared one, or None where it has to be made (again): with a
    warning that names the file and the reason where there is one that cannot be used."""
    tidy_cache()
    try:
        try:
            return read_checked(path, kind, identity)
        except FileNotFoundError:
            return read_checked(path, kind, identity) if shared_cache.fetch(Path(path)) else None
    except FileNotFoundError:  # another process has removed it in between
        return None
    except MalformedFile as error:
        warnings.warn(f"{error}; it is not used and is made again", RetconWarning, stacklevel=3)
        return None


def keep(
    path: str | os.PathLike[str],
    kind: Kind,
    identity: Mapping[str, Any],
    tensors: Mapping[str, "Tensor"] | None = None,
    about: Mapping[str, Any] | None = None,
) -> bool:
    """Write a cache file, to the shared cache too; return whether this machine's was written. A cache that cannot be
    written costs time, nothing else."""
    tidy_cache()
    try:
        try:
            write_checked(path, kind, identity, tensors, about)
        except FileNotFoundError:  # another process has removed the folder in between
            write_checked(path, kind, identity, tensors, about)
        shared_cache.put(Path(path))
        return True
    except OSError as error:
        warn_unwritable(error)
        return False


_warned: set[str] = set()
"""Caches that this process has said it cannot write to."""


def warn_unwritable(error: OSError) -> None:
    """Warn, once for each cache, that it cannot be written to and that the run goes on without it."""
    cache = str(cache_dir())
    if cache in _warned:
        return
    _warned.add(cache)
    what = error.filename or cache
    warnings.warn(
        f"the cache cannot be written: {error.strerror or error} ({what}). The run goes on without it, and makes again "
        "next time what it makes now; set RETCON_CACHE to a directory that can be written to.",
        RetconWarning,
        stacklevel=4,
    )


def for_file(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return tensors as safetensors takes them: on the CPU, contiguous, no two in the same memory."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        found[name] = own.clone() if own.untyped_storage().data_ptr() in taken else own
        taken.add(own.untyped_storage().data_ptr())
    return found


def checksum(record: Mapping[str, Any], tensors: Mapping[str, "Tensor"]) -> str:
    """Return the SHA-256 over a record and the tensors beside it: names, dtypes, shapes and bytes."""
    return digest_of(json.dumps(record, sort_keys=True), sorted(tensors.items()))


def digest_of(head: str, tensors: Iterable[tuple[str, "Tensor"]]) -> str:
    """Return the SHA-256 over a text and tensors with their names, in that order."""
    digest = hashlib.sha256(head.encode())
    for name, tensor in tensors:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def under(prefix: str, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def as_bytes(tensor: "Tensor") -> memoryview:
    """Return the tensor's bytes, without a copy where it already lies contiguous on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def from_bytes(data: bytes) -> "Tensor":
    """Return bytes as a tensor, for a file that holds text beside its record."""
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def through_json(values: Any) -> Any:
    """Return values as a JSON file gives them back, so that they equal those read; what JSON lacks is a text."""
    return json.loads(json.dumps(values, default=str))
