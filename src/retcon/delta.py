"""A weight edit as a value: five kinds of change, and `Delta`, which says what changes, why, and on which base.

A Delta is inert: only the LM applies and reverts it. Changes are kept in the smallest exact form and in the *stored*
orientation of their parameter, so that applying one needs no knowledge of the architecture.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from retcon.atomic import write_atomically
from retcon.attachment import Attachment, Cost, FrozenDict, Hook
from retcon.attachment import EditReport as EditReport
from retcon.checked import checksum, digest_of, for_file, under
from retcon.edits import Edit, edit_record
from retcon.errors import DeltaMismatch, InvalidSetting, MalformedFile, NonFinite
from retcon.files import as_json, check_exists
from retcon.plural import plural

FORMAT = "retcon-delta-2"
_BLOCK = 2**24  # values of a low-rank product written out at a time


@dataclass(frozen=True)
class Region:
    """A contiguous slice of a parameter along one axis: one projection inside a fused one, or one expert's matrix.

    A slice of one along the first axis of a tensor of three is that expert's matrix.
    """

    axis: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Change:
    """What is added to one parameter, or to a region of it. Use one of the five kinds below."""

    region: Region | None = None
    """The part of the parameter that the change speaks of; None is the whole."""

    kind: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """Return the change's own tensors by field name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def values(self) -> Tensor:
        """Return the tensor whose dtype is the change's precision."""
        raise NotImplementedError

    def add_to(self, total: Tensor) -> None:
        """Add the change, in place, to `total`: a tensor of the parameter's shape (or any of its regions')."""
        raise NotImplementedError

    def part_of(self, total: Tensor) -> Tensor:
        """Return the region of `total` (a view) that the change adds to.

        Raises:
            DeltaMismatch: the region lies outside the parameter.
        """
        if self.region is None:
            return total
        axis, start, stop = self.region.axis, self.region.start, self.region.stop
        if not (0 <= axis < total.dim() and 0 <= start < stop <= total.shape[axis]):
            raise DeltaMismatch(f"{self.region} lies outside a parameter of shape {tuple(total.shape)}")
        part = total.narrow(axis, start, stop - start)
        return part[0] if total.dim() == 3 and axis == 0 and stop == start + 1 else part

    def check(self, shape: torch.Size) -> None:
        """Check that the change fits a parameter of that shape.

        Raises:
            DeltaMismatch: it does not; the message gives both shapes.
            NonFinite: a value is NaN or infinite.
        """
        if not self.values().is_floating_point():
            raise DeltaMismatch(f"{self.kind} change: its values must be floating, found {self.values().dtype}")
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFinite(f"{self.kind} change: {name} holds NaN or infinity; the edit that made it went wrong")
        self._check(self.part_of(torch.empty(shape, device="meta")).shape)

    def _check(self, shape: torch.Size) -> None:
        raise NotImplementedError

    def dense(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return the change written out, zeros elsewhere, on the change's device."""
        return sum_of([self], shape, dtype)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def _index_fits(index: Tensor, limit: int, what: str) -> None:
    if index.dim() != 1 or index.dtype != torch.long:
        raise DeltaMismatch(f"{what} index must be a vector of int64, found {tuple(index.shape)} {index.dtype}")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= limit):
        found = f"{int(index.min())} to {int(index.max())}"
        raise DeltaMismatch(f"{what} index runs from {found}, the parameter has 0 to {limit - 1}")
    if len(index.unique()) != len(index):
        raise DeltaMismatch(f"{what} index names the same place twice")


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Change):
    """left @ right; left: (rows, rank), right: (rank, columns)."""

    left: Tensor
    right: Tensor
    kind = "low_rank"

    def values(self) -> Tensor:
        return self.left

    def add_to(self, total: Tensor) -> None:
        part = self.part_of(total)
        left, right = self.left.to(part.device, part.dtype), self.right.to(part.device, part.dtype)
        rows = max(1, _BLOCK // max(1, part.shape[1]))  # so that the product is never whole in memory
        for first in range(0, len(part), rows):
            part[first : first + rows] += left[first : first + rows] @ right

    def _check(self, shape: torch.Size) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if not (len(left) == len(right) == 2 and left[1] == right[0] and (left[0], right[1]) == tuple(shape)):
            raise DeltaMismatch(f"low-rank factors {left} x {right} do not give {tuple(shape)}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows(Change):
    """values (n, columns) added to the rows `index` (n) of a matrix."""

    index: Tensor
    rows: Tensor
    kind = "rows"

    def values(self) -> Tensor:
        return self.rows

    def add_to(self, total: Tensor) -> None:
        part = self.part_of(total)
        part.index_add_(0, self.index.to(part.device), self.rows.to(part.device, part.dtype))

    def _check(self, shape: torch.Size) -> None:
        if len(shape) != 2 or self.rows.shape != (self.index.numel(), shape[1]):
            raise DeltaMismatch(f"rows of shape {tuple(self.rows.shape)} do not fit a parameter of {tuple(shape)}")
        _index_fits(self.index, shape[0], "row")


@dataclass(frozen=True, eq=False, kw_only=True)
class Columns(Change):
    """values (rows, n) added to the columns `index` (n) of a matrix."""

    index: Tensor
    columns: Tensor
    kind = "columns"

    def values(self) -> Tensor:
        return self.columns

    def add_to(self, total: Tensor) -> None:
        part = self.part_of(total)
        part.index_add_(1, self.index.to(part.device), self.columns.to(part.device, part.dtype))

    def _check(self, shape: torch.Size) -> None:
        if len(shape) != 2 or self.columns.shape != (shape[0], self.index.numel()):
            raise DeltaMismatch(
                f"columns of shape {tuple(self.columns.shape)} do not fit a parameter of {tuple(shape)}"
            )
        _index_fits(self.index, shape[1], "column")


@dataclass(frozen=True, eq=False, kw_only=True)
class Entries(Change):
    """values (n) added at the places `index` (n), counted row by row through the parameter (or its region)."""

    index: Tensor
    entries: Tensor
    kind = "entries"

    def values(self) -> Tensor:
        return self.entries

    def add_to(self, total: Tensor) -> None:
        part = self.part_of(total)
        where = torch.unravel_index(self.index.to(part.device), part.shape)
        part.index_put_(where, self.entries.to(part.device, part.dtype), accumulate=True)

    def _check(self, shape: torch.Size) -> None:
        if self.entries.shape != self.index.shape:
            raise DeltaMismatch(f"{self.entries.numel()} entries at {self.index.numel()} places")
        _index_fits(self.index, math.prod(shape), "entry")


@dataclass(frozen=True, eq=False, kw_only=True)
class Dense(Change):
    """values of the parameter's own shape."""

    full: Tensor
    kind = "dense"

    def values(self) -> Tensor:
        return self.full

    def add_to(self, total: Tensor) -> None:
        part = self.part_of(total)
        part += self.full.to(part.device, part.dtype)

    def _check(self, shape: torch.Size) -> None:
        if self.full.shape != shape:
            raise DeltaMismatch(f"a dense change of shape {tuple(self.full.shape)} does not fit {tuple(shape)}")


KINDS: dict[str, type[Change]] = {k.kind: k for k in (LowRank, Rows, Columns, Entries, Dense)}


@dataclass(frozen=True, eq=False)
class Delta:
    """Which parameters change and by how much, with the record of how that came about.

    Deltas compare by `id`, a hash of the changes, base and edits. `delta.save(path)` and `Delta.load(path)` are exact.
    """

    changes: Mapping[str, tuple[Change, ...]]
    """Changes by parameter name, added in order."""
    base: str
    """Fingerprint of the unedited model it was made for."""
    parents: tuple[str, ...] = ()
    """Ids of the deltas that were applied when it was proposed, in order of application."""
    report: tuple[EditReport, ...] = ()
    """Per edit: probability reached, steps, why the search stopped."""
    state: Mapping[str, Tensor] | None = None
    """What the next call of a sequential method takes as `state`."""
    edits: tuple[Edit, ...] = ()
    """What it writes, in the order of the report."""
    contexts: tuple[str, ...] = ()
    """Prefixes that were put before the prompts."""
    values: Mapping[str, Tensor] | None = None
    """What was searched, where that was asked for (`keep_values`): by number of the search, site and part."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Method, settings, moments' keys, seed, versions: enough to repeat the run. JSON values only."""
    supersedes: tuple[str, ...] = ()
    """Ids of deltas that this one replaces: applying takes them off, reverting puts them back."""

    def __post_init__(self) -> None:
        kept = {name: own for name, c in self.changes.items() if (own := tuple(c))}
        object.__setattr__(self, "changes", FrozenDict(kept))
        # Kept as JSON gives it back, so that a saved delta equals the one in memory (tuples become lists).
        object.__setattr__(self, "provenance", FrozenDict(as_json(self.provenance, "provenance")))

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()  # the copies of frozen dicts are plain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Delta) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        method = self.provenance.get("method", "unknown method")
        return (
            f"Delta({self.id}: {method}, {plural(len(self.report), 'edit')}, {plural(len(self.changes), 'parameter')}, "
            f"{self.nbytes():,} B)"
        )

    @cached_property
    def id(self) -> str:
        """Hash of changes, base, parents and edit ids: the delta's identity (16 hexadecimal digits)."""
        head = [self.base, list(self.parents), [r.id for r in self.report], list(self.supersedes)]
        return digest_of(json.dumps(head), self._change_tensors())[:16]

    def _change_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self.changes):
            for i, change in enumerate(self.changes[name]):
                region = change.region
                place = "" if region is None else f"[{region.axis},{region.start},{region.stop}]"
                for tensor_name, tensor in change.tensors().items():
                    yield f"{name}/{i}/{change.kind}{place}/{tensor_name}", tensor

    def nbytes(self) -> int:
        """Return the bytes that the changes take."""
        return sum(c.nbytes() for changes in self.changes.values() for c in changes)

    def dense(self, name: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the whole change of one parameter of that shape, written out."""
        return sum_of(self.changes[name], shape, dtype)

    def norms(self) -> dict[str, float]:
        """Return the Frobenius norm of the change, per parameter."""
        return {name: _norm(changes) for name, changes in self.changes.items()}

    def ranks(self) -> dict[str, int | None]:
        """Return an upper bound of the change's rank, per parameter; None: a vector, a scattered or a dense change."""
        return {name: _rank_bound(changes) for name, changes in self.changes.items()}

    # --- what attachments of other kinds do beside the weights; a delta does nothing there ------------------------

    def hooks(self) -> Sequence[Hook]:
        """Return nothing: it acts in the weights."""
        return ()

    def prompt(self, text: str) -> str:
        """Return the prompt as it is."""
        return text

    def cost(self) -> Cost:
        """Return nothing: an edited model runs as the unedited one does."""
        return Cost()

    # --- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; a crash leaves the old file or the new, never a part."""
        tensors = {f"change/{name}": t for name, t in self._change_tensors()}
        tensors |= {f"state/{name}": t for name, t in (self.state or {}).items()}
        tensors = for_file(tensors | {f"values/{name}": t for name, t in (self.values or {}).items()})
        record: dict[str, Any] = {
            "format": FORMAT,
            "id": self.id,
            "base": self.base,
            "parents": list(self.parents),
            "supersedes": list(self.supersedes),
            "report": [asdict(r) for r in self.report],
            "edits": [edit_record(e) for e in self.edits],
            "contexts": list(self.contexts),
            "has_values": self.values is not None,
            "has_state": self.state is not None,
            "provenance": dict(self.provenance),
        }
        record["check"] = checksum(record, tensors)
        write_atomically(path, save(tensors, metadata={"retcon": json.dumps(record)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Delta":
        """Read a delta as `save` wrote it.

        Raises:
            MalformedFile: not a safetensors file, not a delta, or its content does not match what its record says.
        """
        check_exists(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            record = json.loads(metadata["retcon"])
            if "kind" in record:
                raise MalformedFile(
                    f"{path}: holds {record['kind']!r}, not a delta; retcon.attachment.load reads attachments"
                )
            if record["format"] != FORMAT:
                raise MalformedFile(
                    f"{path}: delta format {record['format']!r}, this version reads {FORMAT!r}; make the edit again"
                )
            if record.pop("check") != checksum(record, tensors):
                raise MalformedFile(f"{path}: damaged; its content does not match its checksum")
            _check_record(record)
            delta = cls(
                changes=_changes_from(tensors),
                base=record["base"],
                parents=tuple(record["parents"]),
                report=tuple(EditReport(**r) for r in record["report"]),
                state=under("state/", tensors) if record["has_state"] else None,
                edits=tuple(Edit(**e) for e in record["edits"]),
                contexts=tuple(record["contexts"]),
                values=under("values/", tensors) if record["has_values"] else None,
                provenance=record["provenance"],
                supersedes=tuple(record["supersedes"]),
            )
        except (SafetensorError, OSError) as error:
            raise MalformedFile(f"{path}: not a readable safetensors file ({error})") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MalformedFile(f"{path}: a safetensors file, but not a retcon delta ({error!r})") from None
        if delta.id != record["id"]:
            raise MalformedFile(f"{path}: damaged; its content gives id {delta.id}, its record says {record['id']}")
        return delta


def only_deltas(attachments: Sequence[Attachment], what: str) -> tuple[Delta, ...]:
    """Return the same, where all of them are in the weights.

    Raises:
        InvalidSetting: one acts beside the weights, which `what` knows nothing of.
    """
    for each in attachments:
        if not isinstance(each, Delta):
            kind = getattr(each, "kind", type(each).__name__)
            raise InvalidSetting(
                f"{what} deals with weights only, and attachment {each.id} ({kind}) acts beside them; revert it first, "
                "or keep its own file and attach it where the model runs"
            )
    return tuple(each for each in attachments if isinstance(each, Delta))


def _check_record(record: Mapping[str, Any]) -> None:
    """Raise TypeError where a delta's record holds something of another type than `save` writes."""
    for name in ("parents", "supersedes", "contexts"):
        if not isinstance(record[name], list) or not all(isinstance(each, str) for each in record[name]):
            raise TypeError(f"{name} must be a list of texts, found {record[name]!r:.60}")
    for name, kind in (("base", str), ("id", str), ("provenance", dict), ("report", list), ("edits", list)):
        if not isinstance(record[name], kind):
            raise TypeError(f"{name} must be {kind.__name__}, found {record[name]!r:.60}")


def sum_of(
    changes: Sequence[Change],
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the sum of changes to one parameter of that shape, written out; by default as the first change is."""
    like = changes[0].values()
    found = torch.zeros(shape, dtype=dtype or like.dtype, device=device or like.device)
    for change in changes:
        change.add_to(found)
    return found


def smallest(left: Tensor, right: Tensor) -> Change:
    """Return the change left @ right in its smaller exact form: factors, or the product where that takes less room."""
    rows, rank = left.shape
    columns = right.shape[1]
    if rank * (rows + columns) < rows * columns:
        return LowRank(left=left.contiguous(), right=right.contiguous())
    return Dense(full=left @ right)


def _norm(changes: Sequence[Change]) -> float:
    if len(changes) == 1:
        change = changes[0]
        if isinstance(change, LowRank):  # ||LR||^2 = tr(LᵀL RRᵀ)
            left, right = change.left.double(), change.right.double()
            return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))
        return float(change.values().double().norm())
    if all(isinstance(c, LowRank) and c.region is None for c in changes):
        left = torch.cat([c.left for c in changes if isinstance(c, LowRank)], dim=1)
        right = torch.cat([c.right for c in changes if isinstance(c, LowRank)], dim=0)
        return _norm([LowRank(left=left, right=right)])
    if all(isinstance(c, Entries) and c.region is None for c in changes):
        places = torch.cat([c.index.cpu() for c in changes if isinstance(c, Entries)])
        values = torch.cat([c.values().cpu().double() for c in changes])
        where, inverse = places.unique(return_inverse=True)
        return float(torch.zeros(len(where), dtype=torch.float64).index_add_(0, inverse, values).norm())
    if (regions := disjoint_regions(changes)) is not None:
        parts = [[replace(c, region=None) for c in changes if c.region == region] for region in regions]
        return math.sqrt(sum(_norm(part) ** 2 for part in parts))
    return float(sum_of(changes, _extent_of_all(changes), torch.float64, "cpu").norm())


def disjoint_regions(changes: Sequence[Change]) -> list[Region] | None:
    """Return the regions of the changes, where all have one, along one axis, and no two overlap."""
    regions = list(dict.fromkeys(c.region for c in changes))
    if any(r is None for r in regions) or len({r.axis for r in regions if r is not None}) > 1:
        return None
    known = sorted((r for r in regions if r is not None), key=lambda r: r.start)
    overlap = any(one.stop > other.start for one, other in pairwise(known))
    return None if overlap else known


def _extent_of_all(changes: Sequence[Change]) -> tuple[int, ...]:
    """Return the smallest shape that holds all the changes of one parameter; beyond it they are zero."""
    extents = [_extent(c) for c in changes if not isinstance(c, Entries)]
    known = any(c.region is None and isinstance(c, LowRank | Dense) for c in changes)
    if len(extents) < len(changes) and not known:  # entries are counted through the whole shape
        raise DeltaMismatch("the parameter's shape is not known from its changes; use delta.dense(name, shape).norm()")
    return tuple(map(max, zip(*extents, strict=True)))


def _extent(change: Change) -> list[int]:
    if isinstance(change, LowRank):
        extent = [change.left.shape[0], change.right.shape[1]]
    else:
        extent = list(change.values().shape)
    if isinstance(change, Rows | Columns):
        extent[0 if isinstance(change, Rows) else 1] = int(change.index.max()) + 1 if len(change.index) else 0
    if change.region is not None:
        extent[change.region.axis] = change.region.stop
    return extent


def _rank_bound(changes: Sequence[Change]) -> int | None:
    bounds = [
        c.left.shape[1] if isinstance(c, LowRank) else len(c.index)
        for c in changes
        if isinstance(c, LowRank | Rows | Columns)
    ]
    return sum(bounds) if len(bounds) == len(changes) else None


def _changes_from(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Change, ...]]:
    """Return changes from the tensor names that `_change_tensors` gives: parameter/number/kind[region]/field."""
    parts: dict[tuple[str, int], tuple[str, dict[str, Tensor]]] = {}
    for name, tensor in under("change/", tensors).items():
        parameter, number, kind, tensor_name = name.rsplit("/", 3)
        parts.setdefault((parameter, int(number)), (kind, {}))[1][tensor_name] = tensor
    changes: dict[str, list[Change]] = {}
    for (parameter, _), (kind, own) in sorted(parts.items(), key=lambda item: item[0]):
        name, _, place = kind.partition("[")
        region = Region(*map(int, place.rstrip("]").split(","))) if place else None
        changes.setdefault(parameter, []).append(KINDS[name](region=region, **own))
    return {name: tuple(c) for name, c in changes.items()}
