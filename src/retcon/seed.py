"""Seeds of everything drawn: whole numbers that torch's generators take."""

import hashlib
import json
from numbers import Integral
from typing import TYPE_CHECKING

from retcon.errors import InvalidSetting

if TYPE_CHECKING:
    import torch

SMALLEST, LARGEST = -(2**63), 2**64 - 1


def check_seed(seed: object) -> int:
    """Return the seed, one of NumPy's as Python's own.

    Raises:
        InvalidSetting: it is no whole number, or one of more than 64 bits.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not SMALLEST <= int(seed) <= LARGEST:
        raise InvalidSetting(f"seed: expected a whole number of at most 64 bits, found {seed!r}")
    return int(seed)


def generator_of(seed: object) -> "torch.Generator":
    """Return a generator on the CPU that begins at the seed.

    Raises:
        InvalidSetting: as `check_seed`.
    """
    import torch

    return torch.Generator().manual_seed(check_seed(seed))


def derive_seed(seed: int, *names: str) -> int:
    """Return a seed of its own for everything that has a name, so that changing one draw does not move the others."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *names]).encode()).digest()[:7], "big")
