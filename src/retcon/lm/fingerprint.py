"""Identity of a model: a hash of its config, its dtypes and every tensor."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from retcon.delta import as_bytes
from retcon.errors import UnsupportedModel
from retcon.files import cache_dir, write_atomically

_NOT_IDENTITY = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "initializer_range"),
}
"""Settings that do not enter a forward pass; callers set some of them (`pad_token_id`), transformers the others."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over config and every parameter and buffer (name, dtype, shape, bytes), as hexadecimal digits.

    Raises:
        UnsupportedModel: a tensor has no data here (meta device, offloaded).
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_settings(model.config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _settings(config: Any) -> dict[str, Any]:
    """The config as far as it differs from its class's defaults: a later transformers adds fields with defaults."""
    try:
        default = type(config)().to_dict()
    except (TypeError, ValueError):  # a class that wants arguments
        default = {}
    own = {k: v for k, v in config.to_dict().items() if k not in _NOT_IDENTITY}
    return {"model_type": config.model_type} | {k: v for k, v in own.items() if k not in default or default[k] != v}


def cached_fingerprint(model: nn.Module, files: Iterable[Path], dtype: str) -> str:
    """`fingerprint` of a model just read from `files`, remembered under their names, sizes and times (and the version
    of transformers, which may read them another way)."""
    stamps = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]
    asked = {"files": stamps, "dtype": dtype, "transformers": version("transformers")}
    record = cache_dir() / "fingerprints" / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"
    try:
        found = json.loads(record.read_text())
        if {name: found[name] for name in asked} == asked and isinstance(found["fingerprint"], str):
            return found["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none there, or damaged: it is written anew
    value = fingerprint(model)
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        write_atomically(record, json.dumps(asked | {"fingerprint": value}).encode())
    return value


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise UnsupportedModel(
            f"{name} has no data on this machine (meta or offloaded), so the model has no fingerprint and cannot be "
            "edited; load it with enough memory, or spread it over GPUs with device_map"
        )
    digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
    digest.update(as_bytes(tensor))
