"""A delta's changes as low-rank factors: exact, or the nearest of a given rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.delta import Change, Columns, Delta, LowRank, Rows, sum_of
from retcon.errors import DeltaMismatch, InvalidSetting
from retcon.lm.model import LM


@dataclass(frozen=True)
class Factors:
    """One parameter's change as left @ right, in stored orientation."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]
    exact_rank: int
    """Rank that gives the change exactly."""
    error: float
    """Frobenius norm of what is lost, over that of the change; 0 where nothing is."""

    @property
    def rank(self) -> int:
        """Inner dimension of the factors."""
        return self.left.shape[1]

    def padded(self, rank: int) -> "Factors":
        """Return the same product with zeros up to `rank`."""
        more = rank - self.rank
        left = torch.nn.functional.pad(self.left, (0, more))
        return Factors(left, torch.nn.functional.pad(self.right, (0, 0, 0, more)), self.exact_rank, self.error)


def factors_of(lm: LM, deltas: Sequence[Delta], *, rank: int | Literal["max"] | None = None) -> dict[str, Factors]:
    """Return the sum of the deltas as factors, by parameter name.

    Args:
        rank: the largest rank allowed; a larger change is replaced by the nearest of that rank (truncated SVD, in
            float64). None and "max" keep every change exact.

    Raises:
        DeltaMismatch: a change of a vector (a bias or a norm), which has no factors.
        InvalidSetting: `rank` is below 1.
    """
    if rank == "max":
        rank = None
    if rank is not None and rank < 1:
        raise InvalidSetting(f"rank must be at least 1, found {rank}")
    changes: dict[str, list[Change]] = {}
    for delta in deltas:
        for name, own in delta.changes.items():
            changes.setdefault(name, []).extend(own)
    found = {name: _factored(name, own, lm.shape_of(name), rank) for name, own in changes.items()}
    return {name: f for name, f in found.items() if f.rank}  # of no rows or columns there are no factors


def compressed(lm: LM, factors: Mapping[str, Factors], deltas: Sequence[Delta]) -> Delta:
    """Return a delta of these factors in the place of `deltas`, so that what a smaller rank costs can be measured."""
    return Delta(
        {name: (LowRank(left=f.left, right=f.right),) for name, f in factors.items()},
        base=deltas[0].base if deltas else lm.fingerprint(),
        edits=tuple(e for d in deltas for e in d.edits),
        provenance={"compressed_from": [d.id for d in deltas]},
    )


def check_has_factors(name: str, shape: torch.Size) -> None:
    """Check that a parameter of that shape is a matrix.

    Raises:
        DeltaMismatch: it is a vector or a tensor of experts.
    """
    if len(shape) == 3:
        raise DeltaMismatch(
            f"{name}: a tensor of experts ({tuple(shape)}) has no place in an adapter; export it with format hf or diff"
        )
    if len(shape) != 2:
        raise DeltaMismatch(
            f"{name}: a change of a vector ({tuple(shape)}) has no low-rank factors; export it with format hf or diff"
        )


def _factored(name: str, changes: Sequence[Change], shape: torch.Size, rank: int | None) -> Factors:
    check_has_factors(name, shape)
    parts = [_exact(change, shape) for change in changes]
    if any(p is None for p in parts):
        left, right = _by_svd(sum_of(changes, shape, torch.float64, "cpu"))
    else:
        known = [p for p in parts if p is not None]
        left, right = torch.cat([p[0] for p in known], 1), torch.cat([p[1] for p in known], 0)
        if left.shape[1] > min(shape):  # more factors than the matrix has dimensions
            left, right = _by_svd(left.double() @ right.double())
    exact, error = left.shape[1], 0.0
    dtype = torch.promote_types(changes[0].values().dtype, torch.float32)
    if rank is not None and exact > rank:
        left, right, error = _truncated(left.double(), right.double(), rank)
    return Factors(left.to(dtype).contiguous(), right.to(dtype).contiguous(), exact, error)


def _exact(change: Change, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """Return the factors that the change's own form gives, over the whole parameter; None: it has none."""
    rows, columns = (int(n) for n in change.part_of(torch.empty(shape, device="meta")).shape)
    if isinstance(change, LowRank):
        left, right = change.left.cpu(), change.right.cpu()
    elif isinstance(change, Rows):
        left, right = _selector(change.index.cpu(), rows, change.rows.dtype), change.rows.cpu()
    elif isinstance(change, Columns):
        left, right = change.columns.cpu(), _selector(change.index.cpu(), columns, change.columns.dtype).T
    else:
        return None
    if change.region is not None:
        axis, start, stop = change.region.axis, change.region.start, change.region.stop
        before, after = start, int(shape[axis]) - stop
        if axis == 0:
            left = torch.nn.functional.pad(left, (0, 0, before, after))
        else:
            right = torch.nn.functional.pad(right, (before, after))
    return left, right


def _selector(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return (size, n): column j is 1 at index[j]."""
    chosen = torch.zeros(size, len(index), dtype=dtype)
    chosen[index, torch.arange(len(index))] = 1
    return chosen


def _by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of a matrix without the singular values that float32 cannot tell from zero."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    n = max(1, int((s > s[0] * torch.finfo(torch.float32).eps / 4).sum()))
    root = s[:n].sqrt()
    return u[:, :n] * root, root[:, None] * v[:n]


def _truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the nearest product of that rank, and the relative Frobenius error (Eckart and Young 1936)."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    root = s[:rank].sqrt()
    norm = float(s.norm())
    lost = float(s[rank:].norm()) / norm if norm else 0.0
    return q_left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q_right.T, lost
