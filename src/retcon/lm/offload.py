"""What a step leaves for its backward pass, out of the way where memory is short, with every bit as it was.

On a CPU tensors go to files that are mapped into memory and have no name any more: the system writes them out when it
needs room, and they are gone with the process, however that ends. From an accelerator they go to the CPU's memory.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from retcon.atomic import TEMPORARY, writer_mark
from retcon.files import cache_dir

LEAST_BYTES = 2**16
"""Storages under this size stay where they are."""


@contextmanager
def offloading(stay: Iterable[Tensor]) -> Iterator[None]:
    """Inside, what autograd saves is put out of the way, and brought back when the backward pass asks for it.

    Args:
        stay: tensors that are held anyway (weights, recorded states); they and their views are left alone.

    Raises:
        OSError: neither the cache's folder nor the system's temporary one has room.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in stay}

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in held or storage.nbytes() < LEAST_BYTES or tensor.layout != torch.strided:
            return tensor
        moved = _put_away(storage)
        device, dtype = tensor.device, tensor.dtype
        where = (tensor.storage_offset(), tensor.size(), tensor.stride())

        def back() -> Tensor:
            own = moved if device.type == "cpu" else _on(moved, device)
            return torch.empty(0, dtype=dtype, device=device).set_(own, *where)

        return back

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def put_away(tensor: Tensor) -> Tensor:
    """Return a tensor with the same bits, strides and device, whose memory the system can write out (CPU only)."""
    if tensor.device.type != "cpu" or tensor.untyped_storage().nbytes() < LEAST_BYTES:
        return tensor
    moved = _put_away(tensor.untyped_storage())
    return torch.empty(0, dtype=tensor.dtype).set_(moved, tensor.storage_offset(), tensor.size(), tensor.stride())


def _put_away(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    if storage.device.type != "cpu":
        return _on(storage, torch.device("cpu"))
    mapped = _mapped(storage.nbytes())
    mapped.copy_(storage)
    return mapped


def _on(storage: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    moved = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
    moved.copy_(storage)
    return moved


def _mapped(n_bytes: int) -> torch.UntypedStorage:
    """Return memory that is a file without a name, in the cache, or if need be among temporary files."""
    for folder in (cache_dir(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f".offloaded.{writer_mark()}{TEMPORARY}"
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            problem = error
            continue
        try:
            os.posix_fallocate(handle, 0, n_bytes)  # or a full disk would be a crash on writing
            return cast("torch.UntypedStorage", torch.UntypedStorage.from_file(os.fspath(path), True, n_bytes))
        except OSError as error:
            problem = OSError(error.errno, error.strerror, os.fspath(folder))
        finally:
            os.close(handle)
            path.unlink()
    raise problem
