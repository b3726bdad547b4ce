"""How much memory is free on a device, and how much to plan with."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from retcon.lm.model import LM

PLANNED_BYTES = 2**33
"""On a CPU."""
CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device | str) -> int:
    """Return the memory left on a device: the allocator's reserve counts as free, a container's limit holds."""
    device = torch.device(device)
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return int(max(min(_pages_free(), _container_free()), 0))


def planned_bytes(lm: "LM") -> int:
    """Return the memory that work on a model is planned with: the same on every run, whatever else the machine does.

    On an accelerator what its memory leaves beside the weights, else `PLANNED_BYTES`.
    """
    if lm.device.type != "cuda":
        return PLANNED_BYTES
    weights = sum(p.nbytes for p in lm.model.parameters() if p.device == lm.device)
    return max(torch.cuda.get_device_properties(lm.device).total_memory - weights, 0)


def key_value_bytes(lm: "LM") -> int:
    """Return the bytes of one token's attention keys and values, over all layers."""
    return 2 * lm.n_layers * key_width(lm) * lm.dtype.itemsize


def key_width(lm: "LM") -> int:
    """Return the width of a token's attention keys in a layer."""
    with_keys = next((i for i in range(lm.n_layers) if lm.has(i, "k_proj")), None)
    return lm.d_model if with_keys is None else lm.site(with_keys, "k_proj").shape[0]


def _container_free() -> float:
    """Return what the container's limit leaves, infinite where there is none (control groups, version 2).

    Pages of files that were read, such as a checkpoint's, are given back when room is needed, so they count as free.
    """
    try:
        limit, used = (int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        return float(limit - used + sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file ")))
    except (OSError, ValueError):  # no control group, or its limit is "max"
        return math.inf


def _pages_free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
