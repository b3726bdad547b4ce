"""Where the large float64 problems of a model on a card are solved: there, or on the CPU.

The choice decides a delta's last bits. So it follows from the card, from the problem and from what the user sets, never
from a measurement or from what else is in the card's memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from retcon.errors import InvalidSetting, OutOfMemory
from retcon.lm.batches import is_out_of_memory

CPU = torch.device("cpu")
SETTING = "RETCON_SOLVE_ON"
"""Environment variable: `cpu` takes every such problem off the card."""
COPIES = 8
"""How many matrices of a problem's order must fit into the whole memory of a card: work space, and the model beside."""
GOOD_AT_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of NVIDIA's cards made for computing, P100 to B200: float64 takes them 2 to 8 times as long as
float32, other cards 32 to 128 times."""


def solve_device(device: torch.device, order: int) -> torch.device:
    """Return where an (order x order) problem of a model on `device` is solved, in the precision that suits the card.

    There, where that is a CUDA card whose whole memory takes `COPIES` of its matrix in float64, else on the CPU.

    Raises:
        InvalidSetting: RETCON_SOLVE_ON is neither empty nor `cpu`.
    """
    wanted = os.environ.get(SETTING, "")
    if wanted not in ("", "cpu"):
        raise InvalidSetting(f"{SETTING} is {wanted!r}: set it to 'cpu', or leave it out")
    if device.type != "cuda" or wanted or COPIES * 8 * order**2 > total_memory(device):
        return CPU
    return device


def float64_device(device: torch.device, order: int) -> torch.device:
    """Do as `solve_device`, for what must be done in float64: the CPU also for a card that is bad at it.

    Raises:
        InvalidSetting: see `solve_device`.
    """
    where = solve_device(device, order)
    return where if where == CPU or good_at_float64(where) else CPU


def good_at_float64(device: torch.device) -> bool:
    """Return whether a device is made for float64, by its compute capability; AMD's Instinct cards (gfx9) are."""
    if device.type == "cpu":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    return major == 9 if torch.version.hip else (major, minor) in GOOD_AT_FLOAT64


def in_float64(x: Tensor, device: torch.device) -> Tensor:
    """Return a fresh copy on a device, in float64; widened there, for a copy to a card that widens as well does so on
    the CPU, and sends twice as much."""
    there = x.to(device)
    return there.to(torch.float64, copy=there is x)


def total_memory(device: torch.device) -> int:
    """Return the bytes that a card has in all, whatever is in use."""
    return int(torch.cuda.get_device_properties(device).total_memory)


@contextmanager
def explained_oom(device: torch.device, order: int) -> Iterator[None]:
    """Turn running out of memory on a card into an OutOfMemory that says what to do.

    Raises:
        OutOfMemory: the card has no room for a problem of this order. It is not solved elsewhere instead: that would be
            another delta, in its bits.
    """
    try:
        yield
    except RuntimeError as error:
        if device == CPU or not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"a linear problem of {order:,} x {order:,} in float64 finds no room on {device} beside what "
            f"else is there: run again when the card is free (finished edits are found again), or with {SETTING}=cpu; "
            "the delta then differs in its last bits from the one that a free card gives"
        ) from None
