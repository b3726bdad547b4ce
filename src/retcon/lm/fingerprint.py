"""Identity of a model: a hash of its config and of every tensor as the checkpoint stores it.

A checkpoint in bfloat16 that is loaded in float32 has the identity of the checkpoint: a delta made on either fits both.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retcon.checked import Kind, as_bytes, cached, keep
from retcon.errors import UnsupportedModel
from retcon.files import cache_dir
from retcon.lm.gguf import DEQUANTIZED_FROM
from retcon.lm.packed import PackedMatrix

_NOT_IDENTITY = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "initializer_range"),
    *(DEQUANTIZED_FROM, "quantization_config"),  # what is packed counts as the floats that it stands for
}
"""Settings that do not enter a forward pass; callers set some of them (`pad_token_id`), transformers the others."""
PIECE = 2**26
"""Bytes that one thread hashes at a time."""
FINGERPRINTS = Kind("fingerprint", format=2, computation=2)
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Places of a file that are read to see whether it is still the file that was hashed."""


class StoredTensors:
    """The tensors of a checkpoint's safetensors files, by name, read only when asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        from safetensors import safe_open

        self.dtypes: dict[str, torch.dtype] = {}
        self._file: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    self.dtypes[name] = _DTYPES.get(file.get_slice(name).get_dtype(), torch.float32)
                    self._file[name] = path

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        from safetensors import safe_open

        with safe_open(self._file[name], framework="pt") as file:
            return file.get_tensor(name)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fingerprint(
    model: nn.Module, stored: StoredTensors | None = None, packed: Mapping[str, PackedMatrix] | None = None
) -> str:
    """Return the SHA-256 over config and every parameter and buffer (name, dtype, shape, bytes), as hexadecimal digits.

    Tensors are hashed in pieces, on as many threads as there are cores.

    Args:
        stored: the checkpoint that the model was read from. A tensor counts as it is stored there, whatever dtype it
            was loaded in; without it, as the model holds it.
        packed: quantised matrices, by their parameters' names. They count as the floats that they stand for: a delta
            made on the packed model fits the dequantised one.

    Raises:
        UnsupportedModel: a tensor has no data here (meta device, offloaded).
    """
    packed = packed or {}
    beside = tuple(name.removesuffix("weight") for name in packed)  # scales and the like, which floats have not
    tensors = [
        (name, tensor)
        for name, tensor in sorted(model.state_dict().items())
        if name in packed or not name.startswith(beside) or name.endswith(".bias")
    ]
    for name, tensor in tensors:
        if tensor.is_meta:
            raise UnsupportedModel(
                f"{name} has no data on this machine (meta or offloaded), so the model has no fingerprint and cannot "
                "be edited; load it with enough memory, or spread it over GPUs with device_map"
            )
    tied = _names_by_storage(model)
    digest = hashlib.sha256()
    digest.update(json.dumps(_settings(model.config), sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for name, tensor in tensors:
            if name in packed:
                own = packed[name].floats()
            else:
                own = tensor if stored is None else _as_stored(name, tensor, stored, tied)
            digest.update(f"{name}:{own.dtype}:{tuple(own.shape)}".encode())
            for piece in threads.map(lambda part: hashlib.sha256(part).digest(), _pieces(own)):
                digest.update(piece)
    return digest.hexdigest()


def _as_stored(name: str, tensor: Tensor, stored: StoredTensors, tied: Mapping[int, list[str]]) -> Tensor:
    """Return the tensor in the dtype in which the checkpoint has it; one that was narrowed on loading is read from
    there."""
    names = [name, *tied.get(tensor.data_ptr(), ())]
    known = next((n for n in names if n in stored.dtypes), None)
    if known is None or not tensor.is_floating_point() or stored.dtypes[known] == tensor.dtype:
        return tensor
    back = tensor.detach().to(stored.dtypes[known])
    if torch.equal(back.to(tensor.dtype), tensor) and torch.promote_types(back.dtype, tensor.dtype) == tensor.dtype:
        return back
    read = stored.read(known)
    return read if read.shape == tensor.shape else tensor


def _names_by_storage(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    return names


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    whole = as_bytes(tensor)
    for start in range(0, len(whole), PIECE):
        yield whole[start : start + PIECE]


def _settings(config: Any) -> dict[str, Any]:
    """Return the config as far as it differs from its class's defaults: a later transformers adds fields with
    defaults."""
    try:
        default = type(config)().to_dict()
    except (TypeError, ValueError):  # a class that wants arguments
        default = {}
    own = {k: v for k, v in config.to_dict().items() if k not in _NOT_IDENTITY}
    return {"model_type": config.model_type} | {k: v for k, v in own.items() if k not in default or default[k] != v}


def checkpoint_fingerprint(model: nn.Module, files: Sequence[Path], *, verify: bool = False) -> str:
    """Return the fingerprint of a model just read from the checkpoint of these files, from the cache where they are
    still the files that were hashed.

    That is judged by name, size, times (the inode's change time among them, which copying with times kept does not
    keep) and a sample of bytes at fixed places of every file.

    Args:
        verify: hash every byte again, whatever the cache says.
    """
    stored = [path for path in files if path.suffix == ".safetensors"]
    identity = {"files": [_stamp(path) for path in sorted(files)], "transformers": version("transformers")}
    if not stored:  # GGUF: dequantised straight into the dtype asked for
        identity["dtype"] = str(next(model.parameters()).dtype)
    record = (
        cache_dir() / "fingerprints" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.safetensors"
    )
    found = None if verify else cached(record, FINGERPRINTS, identity)
    if found is not None and isinstance(found[1].get("fingerprint"), str):
        return found[1]["fingerprint"]
    value = fingerprint(model, StoredTensors(stored) if stored else None)
    keep(record, FINGERPRINTS, identity, about={"fingerprint": value})
    return value


def _stamp(path: Path) -> list[Any]:
    facts = path.stat()
    return [
        str(path.resolve()),
        *(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino),
        _sample(path, facts.st_size),
    ]


def _sample(path: Path, size: int) -> str:
    """Return a hash over `SAMPLES` places spread evenly over a file, first and last bytes among them."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
