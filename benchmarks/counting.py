"""What a run asks of the host: launches, waits for the device, and tensors made from Python's numbers, by count.

Counted on any device, by the operators that torch dispatches; on a card a wait is where the host stops until the card
has caught up, and a tensor of Python's numbers is a copy to it.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retcon.memory.values.schedule import Chunk
from retcon.memory.values.step import ActiveBatch

WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal")
"""Operators whose answer, or whose answer's shape, the host must know."""
VIEWS = (
    "view", "_unsafe_view", "expand", "slice", "select", "transpose", "t", "permute", "unsqueeze", "squeeze", "detach",
    "alias", "split", "split_with_sizes", "unbind", "as_strided", "_reshape_alias", "lift_fresh", "chunk", "diagonal",
)  # fmt: skip
"""Operators that launch nothing."""


class Counts(TorchDispatchMode):
    """Counts while the scope lasts; `mark()` begins anew and returns what was counted since the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.ops[name] += 1
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.ops["nonzero"] += 1  # what indexing by a mask does first
        kwargs = kwargs or {}
        if name == "_to_copy" and kwargs.get("device") is not None and kwargs["device"] != args[0].device:
            self.ops["moved"] += 1
        return func(*args, **kwargs)

    def mark(self) -> Counter[str]:
        """Return the operators since the last mark."""
        found, self.ops = self.ops, Counter()
        return found


def launches(ops: Counter[str]) -> int:
    """Return how many of the operators run something on the device."""
    return sum(n for name, n in ops.items() if name not in VIEWS and name != "moved")


def waits(ops: Counter[str]) -> int:
    """Return how often the host must wait for the device."""
    return sum(ops[name] for name in WAITS) + ops["moved"]


def uploads(ops: Counter[str]) -> int:
    """Return how many tensors are made from Python's numbers."""
    return ops["lift_fresh"]


@dataclass(frozen=True)
class Asked:
    """What one step asked of the host."""

    shape: tuple[int, ...]
    """Rows, columns, earlier tokens and labels of each of its passes."""
    first: bool
    """Whether it is the first step of a batch, which makes masks and positions."""
    launches: int
    waits: int
    uploads: int


class CountedChunk(Chunk):
    """A chunk that notes what each of its steps asks of the host."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps: list[Asked] = []
        self.batch_before: ActiveBatch | None = None

    def step(self, now: ActiveBatch, *, only_measure: bool) -> None:
        """Take a step, counted."""
        parts = [(*p.recorded.states.shape[:2], p.recorded.keys[0].shape[2], p.labels.shape[1]) for p in now.passes]
        first, self.batch_before = now is not self.batch_before, now
        with Counts() as counts:
            super().step(now, only_measure=only_measure)
        ops = counts.mark()
        shape = tuple(n for part in parts for n in part)
        self.steps.append(Asked(shape, first, launches(ops), waits(ops), uploads(ops)))
