"""Random changes and deltas of every kind, and what applying them must give, computed the plain way."""

import torch
from torch import Tensor

from retcon.delta import Change, Columns, Delta, Dense, Entries, LowRank, Region, Rows

KINDS = ("low_rank", "rows", "columns", "entries", "dense")


def random_change(
    kind: str,
    shape: tuple[int, ...],
    seed: int = 0,
    *,
    region: Region | None = None,
    dtype: torch.dtype = torch.float32,
    n: int = 2,
    scale: float = 0.1,
) -> Change:
    """A change of that kind with `n` rows, columns, entries or ranks, fitting a parameter of that shape."""
    generator = torch.Generator().manual_seed(seed)
    inner = list(shape)
    if region is not None:
        inner[region.axis] = region.stop - region.start

    def draw(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def places(limit: int) -> Tensor:
        return torch.randperm(limit, generator=generator)[:n]

    if kind == "low_rank":
        return LowRank(left=draw(inner[0], n), right=draw(n, inner[1]), region=region)
    if kind == "rows":
        return Rows(index=places(inner[0]), rows=draw(n, inner[1]), region=region)
    if kind == "columns":
        return Columns(index=places(inner[1]), columns=draw(inner[0], n), region=region)
    if kind == "entries":
        return Entries(index=places(torch.Size(inner).numel()), entries=draw(n), region=region)
    return Dense(full=draw(*inner), region=region)


def random_delta(
    seed: int, shapes: dict[str, tuple[int, ...]], base: str = "base", *, dtype: torch.dtype = torch.float32
) -> Delta:
    """One to three changes, of any kind, whole or in a region, on one or more of the parameters."""
    generator = torch.Generator().manual_seed(seed)

    def pick(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    changes: dict[str, list[Change]] = {}
    names = list(shapes)
    for i in range(1 + pick(3)):
        name = names[pick(len(names))]
        shape = shapes[name]
        kind = KINDS[pick(5)] if len(shape) == 2 else ("entries", "dense")[pick(2)]
        region = None
        if pick(4) == 0:
            axis = pick(len(shape))
            start = pick(shape[axis] - 3)
            region = Region(axis, start, start + 3 + pick(shape[axis] - start - 2))
        changes.setdefault(name, []).append(
            random_change(kind, shape, 1000 * seed + i, region=region, dtype=dtype, n=1 + pick(2))
        )
    return Delta({name: tuple(c) for name, c in changes.items()}, base=base)


def by_hand(base: Tensor, name: str, deltas: list[Delta]) -> Tensor:
    """cast(base + running sum), the sum in at least float32 and in order of application."""
    total = torch.zeros(base.shape, dtype=torch.promote_types(base.dtype, torch.float32))
    for delta in deltas:
        for change in delta.changes.get(name, ()):
            change.add_to(total)
    return (base.to(total.dtype) + total).to(base.dtype)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: tells -0.0 from 0.0, and NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and bytes(_raw(a)) == bytes(_raw(b))


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
