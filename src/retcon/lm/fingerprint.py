"""Identity of a model: a hash of its config, its dtypes and every tensor."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from retcon.delta import as_bytes
from retcon.errors import UnsupportedModel
from retcon.files import cache_dir, write_atomically

_NOT_IDENTITY = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over config and every parameter and buffer (name, dtype, shape, bytes), as hexadecimal digits.

    Raises:
        UnsupportedModel: a tensor has no data here (meta device, offloaded).
    """
    digest = hashlib.sha256()
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_IDENTITY}  # type: ignore[union-attr,operator]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _add(digest, name, tensor)
    return digest.hexdigest()


def cached_fingerprint(model: nn.Module, files: Iterable[Path], dtype: str) -> str:
    """`fingerprint` of a model just read from `files`, remembered under their names, sizes and times."""
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    key = hashlib.sha256(json.dumps([stamps, dtype]).encode()).hexdigest()[:32]
    record = cache_dir() / "fingerprints" / f"{key}.json"
    try:
        return str(json.loads(record.read_text())["fingerprint"])
    except (OSError, ValueError, KeyError):
        value = fingerprint(model)
        write_atomically(record, json.dumps({"files": stamps, "dtype": dtype, "fingerprint": value}).encode())
        return value


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise UnsupportedModel(
            f"{name} has no data on this machine (meta or offloaded), so the model has no fingerprint and cannot be "
            "edited; load it with enough memory, or spread it over GPUs with device_map"
        )
    digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
    digest.update(as_bytes(tensor))
