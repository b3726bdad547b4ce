"""Identity of a model: a hash of its config and of every tensor as the checkpoint stores it.

A checkpoint in bfloat16 that is loaded in float32 has the identity of the checkpoint: a delta made on either fits both.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    *("_name_or_path", "transformers_version", "transformers_weights", "architectures", "dtype", "torch_dtype"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "initializer_range"),
    *(DEQUANTIZED_FROM, "quantization_config"),  # what is packed counts dequantised
}
"""Settings that do not enter a forward pass; callers set some of them (`pad_token_id`), transformers the others."""
PIECE = 2**26
"""Bytes that one thread hashes at a time."""
AHEAD = 4
"""Pieces, and names beside them, that are waited for at once, for every thread; what they are pieces of is held."""
FINGERPRINTS = Kind("fingerprint", format=2, computation=3)
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Places of a file that are read to see whether it is still the file that was hashed."""


class StoredTensors:
    """The tensors of a checkpoint's safetensors files, by name, read only when asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        from safetensors import safe_open

        self.dtypes: dict[str, torch.dtype] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        whole = set()
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_slice(name)
                    self.dtypes[name] = _DTYPES.get(tensor.get_dtype(), torch.float32)
                    if tensor.get_dtype().startswith(("I", "U", "BOOL")):
                        whole.add(name)
                    self._shapes[name] = tuple(tensor.get_shape())
                    self._file[name] = path
        floats = {dtype for name, dtype in self.dtypes.items() if name not in whole}
        self.common_dtype = floats.pop() if len(floats) == 1 else None
        """The dtype that all tensors of floats are stored in; None where they differ."""

    def find(self, names: Iterable[str], shape: Sequence[int]) -> str | None:
        """Return the first of these names that a tensor of that shape is stored under, None where there is none."""
        return next((name for name in names if self._shapes.get(name) == tuple(shape)), None)

    def read(self, name: str) -> Tensor | None:
        """Return one tensor; None where its file can no longer be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file[name], framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError):
            return None


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fingerprint(
    model: nn.Module, stored: StoredTensors | None = None, packed: Mapping[str, PackedMatrix] | None = None
) -> str:
    """Return the SHA-256 over config and every parameter and buffer (name, dtype, shape, bytes), as hexadecimal digits.

    Tensors are hashed in pieces, on as many threads as there are cores, several tensors at a time.

    Args:
        stored: the checkpoint that the model was read from. A tensor counts as it is stored there, whatever dtype it
            was loaded in, as long as the model holds the values that were loaded. A tensor that is stored otherwise
            (under another name, in another shape) counts in the dtype that the whole checkpoint has, if that loses
            nothing. All others, and all tensors without a checkpoint, count as the model holds them.
        packed: quantised matrices, by their parameters' names. They count dequantised: a delta
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
                "be edited; load it so that nothing is offloaded: on more or larger cards, in a smaller dtype or packed"
            )
    tied = _names_by_storage(model)

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if name in packed:
                yield name, packed[name].floats()
            else:
                yield name, tensor if stored is None else _as_stored(tensor, stored, _names(model, name, tensor, tied))

    digest = hashlib.sha256()
    digest.update(json.dumps(_settings(model.config), sort_keys=True, default=str).encode())
    for part in _hashed(counted()):
        digest.update(part)
    return digest.hexdigest()


def _hashed(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes]:
    """Yield what a fingerprint takes in of every tensor: name, dtype and shape, and the digest of each piece.

    Most tensors are one or two pieces, so that threads are kept busy only by the pieces of tensors that follow.
    """
    n_threads = os.cpu_count() or 1
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(n_threads) as threads:
        for name, tensor in tensors:
            waiting.append(threads.submit(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode))
            for piece in _pieces(tensor):
                waiting.append(threads.submit(_digest, piece))
                while len(waiting) > AHEAD * n_threads:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _digest(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()


def _as_stored(tensor: Tensor, stored: StoredTensors, names: Sequence[str]) -> Tensor:
    """Return the tensor in the dtype in which the checkpoint has it; one that was narrowed on loading is read from
    there. One that no longer holds what was loaded is returned as it is."""
    known = stored.find(names, tensor.shape)
    dtype = stored.common_dtype if known is None else stored.dtypes[known]
    if not tensor.is_floating_point() or dtype is None or dtype == tensor.dtype:
        return tensor
    back = tensor.detach().to(dtype)
    if torch.promote_types(dtype, tensor.dtype) == tensor.dtype and _same_bits(back.to(tensor.dtype), tensor):
        return back
    read = None if known is None else stored.read(known)
    return read if read is not None and _same_bits(read.to(tensor.dtype), tensor.detach().cpu()) else tensor


def _same_bits(one: Tensor, other: Tensor) -> bool:
    whole = _INTEGERS[one.dtype.itemsize]
    return torch.equal(one.view(whole), other.view(whole))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _names(model: nn.Module, name: str, tensor: Tensor, tied: Mapping[int, list[str]]) -> list[str]:
    """Return the names that a checkpoint may have a tensor under: its own, those of parameters that share it, and each
    as the bare decoder has it (older checkpoints of GPT-2)."""
    found = [name, *tied.get(tensor.data_ptr(), ())]
    bare = f"{getattr(model, 'base_model_prefix', '')}."
    return [*found, *(each.removeprefix(bare) for each in found if bare != "." and each.startswith(bare))]


def _all_stored(model: nn.Module, stored: StoredTensors) -> bool:
    """Return whether a checkpoint says of each of the model's tensors how it is stored."""
    tied = _names_by_storage(model)
    return all(
        stored.find(_names(model, name, tensor, tied), tensor.shape) is not None
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    )


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
    """Return the config where it differs from its class's defaults, to which a later transformers adds."""
    try:
        default = type(config)().to_dict()
    except (TypeError, ValueError):  # a class that needs arguments
        default = {}
    own = {k: v for k, v in config.to_dict().items() if k not in _NOT_IDENTITY}
    return {"model_type": config.model_type} | {k: v for k, v in own.items() if k not in default or default[k] != v}


def settings_that_differ(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Return the settings that are part of the identity and differ between two configs, with both values; of one with
    parts, such as `rope_parameters`, each part by its own name."""
    counted = _settings(one).keys() | _settings(other).keys()
    ours, theirs = (_flat({k: v for k, v in config.to_dict().items() if k in counted}) for config in (one, other))
    both = {name: (ours.get(name), theirs.get(name)) for name in sorted(ours.keys() | theirs.keys())}
    return {name: (a, b) for name, (a, b) in both.items() if a != b}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def checkpoint_fingerprint(
    model: nn.Module, files: Sequence[Path], stored: StoredTensors | None = None, *, verify: bool = False
) -> str:
    """Return the fingerprint of a model just read from the checkpoint of these files, from the cache where they are
    still the files that were hashed.

    That is judged by name, size, times (the inode's change time among them, which copying with times kept does not
    keep) and a sample of bytes at fixed places of every file.

    Args:
        stored: the tensors of these files; see `fingerprint`.
        verify: hash every byte again, whatever the cache says.
    """
    identity = {"files": [_stamp(path) for path in sorted(files)], "transformers": version("transformers")}
    # whole numbers counted for the common dtype once: what was worked out then is not found again
    as_loaded = identity | {"dtype": str(next(model.parameters()).dtype), "common_dtype": "of floats"}
    for each in () if verify else (identity, as_loaded):
        found = cached(_record(each), FINGERPRINTS, each)
        if found is not None and isinstance(found[1].get("fingerprint"), str):
            return found[1]["fingerprint"]
    value = fingerprint(model, stored)
    # else a tensor may count in the dtype in which it was loaded (all of GGUF, which is dequantised into it)
    key = identity if stored is not None and _all_stored(model, stored) else as_loaded
    keep(_record(key), FINGERPRINTS, key, about={"fingerprint": value})
    return value


def _record(identity: Mapping[str, Any]) -> Path:
    """Return where the fingerprint of that identity is kept."""
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    return cache_dir() / "fingerprints" / f"{digest}.safetensors"


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
