"""The applied deltas of a model, and the base values under them.

Per touched parameter the ledger holds the base values (only the touched rows, columns or entries where the kinds of
change allow it) on the CPU in the stored dtype, and one running sum in at least float32, in order of application:
weight = cast(base + sum), written in place. Appending a delta costs one delta. Removing one from the middle replays the
rest. Removing all restores the base's own bytes.

Every change of state can be cut at any point. What shall be in force is one tuple (`_entries`), exchanged in one store;
`settle` then brings every parameter there, each step of it repeatable: a record exists before the first byte of its
parameter changes and is dropped after the last byte is back, and it says what its sum holds (`ids`) and what the
parameter shows (`shown`), None while that is being changed. Whatever interrupts it, the next call finishes the work.

A quantised parameter that is kept packed has floats to write to as long as it has a record, and they are in place while
the record shows deltas; else the packed weight is, untouched.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from retcon.attachment import Attachment
from retcon.delta import Change, Columns, Entries, Region, Rows
from retcon.errors import DeltaNotApplied, NonFinite, WeightsChanged
from retcon.lm.hooks import Hooks
from retcon.lm.packed import PackedMatrix
from retcon.lm.scopes import plain_modes

_BLOCK = 2**22
"""Values written at a time: no second copy of a large matrix is ever made."""
_N_SAMPLED = 64
"""Values of a parameter that are looked at to see whether something else has changed it."""
_N_TRACED = 4096
"""Values that are looked at for some that an edit has changed."""

Ids = tuple[str, ...]


@dataclass(eq=False)
class _Record:
    """Base and running sum over the touched part of one parameter."""

    kind: str
    """`whole`, or the kind of change whose places `index` lists: rows, columns, entries."""
    index: Tensor | None
    """Sorted places (on the parameter's device), None for the whole."""
    base: Tensor
    """Base values there: CPU, stored dtype."""
    total: Tensor
    """Sum of the changes of the deltas `ids` there: parameter's device, at least float32."""
    ids: Ids | None = ()
    """Deltas in the sum, in order; None while one is being added."""
    shown: Ids | None = ()
    """Deltas in the parameter's bytes; None while they are being written."""
    seen: "_Look | None" = None
    """What the parameter looked like when it was last written."""


@dataclass(frozen=True, eq=False)
class _Look:
    """Enough of a parameter to notice that something else has changed it."""

    pointer: int
    dtype: torch.dtype
    version: int
    sample: Tensor

    @classmethod
    def at(cls, weight: Tensor) -> "_Look":
        """Look at a parameter as it is now."""
        return cls(weight.data_ptr(), weight.dtype, weight._version, _sample(weight))


@dataclass(frozen=True, eq=False)
class EditTrace:
    """A few of the values that an edit has changed, to see later whether it is still in its parameter."""

    record: _Record
    """The part of the parameter that the edit touches; without values."""
    places: Tensor
    """Places in that part, flattened."""
    values: Tensor
    """What is there."""
    shape: torch.Size
    """The parameter's."""

    @classmethod
    def of(cls, record: _Record, weight: Tensor) -> "EditTrace":
        """Note what a parameter holds where it is edited."""
        part = replace(record, base=torch.empty(0), total=torch.empty(0))
        n = record.base.numel()
        places = torch.linspace(0, n - 1, min(n, _N_TRACED), dtype=torch.float64).long()
        values = _values_at(weight, part, places)
        changed = values != record.base.reshape(-1)[places]
        if changed.any():
            places, values = places[changed], values[changed]
        return cls(part, places, values, weight.shape)

    def is_in(self, weight: Tensor) -> bool:
        """Return whether the parameter holds these values still, in whatever dtype."""
        if weight.is_meta or weight.shape != self.shape:
            return False
        return torch.equal(_values_at(weight, self.record, self.places), self.values.to(weight.dtype))


def _values_at(weight: Tensor, part: _Record, places: Tensor) -> Tensor:
    flat = _view(weight.detach(), _on(part, weight.device)).reshape(-1)
    return flat[places.to(flat.device)].cpu()


@dataclass(frozen=True, eq=False)
class Entry:
    """A delta in force, until it is removed or the scope that it belongs to is gone."""

    delta: Attachment
    scope: "weakref.ref[Any] | None" = None
    before: Mapping[str, _Record | None] = field(default_factory=dict)
    """For a scope: the records of the delta's parameters before it, sums copied, so that leaving costs no replay."""

    @property
    def alive(self) -> bool:
        """Whether its scope, if it has one, is still there."""
        return self.scope is None or self.scope() is not None


class Ledger:
    """Ordered deltas over parameters.

    Args:
        parameters: by name; a delta changes no others.
        hooks: brings what attachments do beside the weights onto the model; None where it has no modules.
        packed: parameters that are floats only while a delta is on them.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        hooks: Hooks | None = None,
        packed: Mapping[str, PackedMatrix] | None = None,
    ) -> None:
        self._parameters = parameters
        self._hooks = hooks
        self._packed = packed or {}
        self._entries: tuple[Entry, ...] = ()  # what shall be in force, in order of application
        self._hiding: tuple[weakref.ref[Any], ...] = ()  # scopes during which the base shall show
        self._records: dict[str, _Record] = {}
        self._settled_at: tuple[object, bool] = (self._entries, False)

    # --- what shall be in force --------------------------------------------------------------------------------------

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries that shall be in force."""
        return tuple(entry for entry in self._entries if entry.alive)

    @property
    def applied(self) -> tuple[Attachment, ...]:
        """Deltas that shall be in force, in order of application, without those that a later one supersedes."""
        deltas = [entry.delta for entry in self.entries]
        replaced = {i for delta in deltas for i in delta.supersedes}
        return tuple(d for d in deltas if d.id not in replaced)

    @property
    def hidden(self) -> bool:
        """Whether the base shall show instead."""
        return any(scope() is not None for scope in self._hiding)

    @property
    def settled(self) -> bool:
        """Whether the parameters hold what shall be in force; False after an interrupt, until the next call."""
        entries, hidden = self._settled_at
        return entries is self._entries and all(e.alive for e in self._entries) and hidden == self.hidden

    # --- changing it -------------------------------------------------------------------------------------------------

    def push(self, delta: Attachment, scope: "weakref.ref[Any] | None" = None) -> Entry:
        """Apply `delta` on top, until it is removed or `scope` is gone. On any failure the weights are as they were.

        Raises:
            DeltaNotApplied: it is applied already, it supersedes one that is not applied, or the deltas are hidden.
            WeightsChanged: something else has changed a parameter under an applied delta.
        """
        self.settle()
        self._refuse_while_hidden()
        if any(entry.delta.id == delta.id for entry in self._entries):
            raise DeltaNotApplied(f"delta {delta.id} is applied already; revert it first")
        if delta.supersedes and (missing := set(delta.supersedes) - {d.id for d in self.applied}):
            raise DeltaNotApplied(f"delta {delta.id} supersedes {', '.join(sorted(missing))}, which is not applied")
        entry = Entry(delta, scope, self._copies(delta) if scope is not None else {})
        self._exchange((*self._entries, entry))
        return entry

    def leave(self, serial: int) -> None:
        """End the scope of that serial number and those that began inside it: their deltas, and what they hide."""

        def ends(scope: "weakref.ref[Any] | None") -> bool:
            return scope is not None and ((alive := scope()) is None or alive.serial >= serial)

        self._drop([e for e in self._entries if ends(e.scope)], [s for s in self._hiding if ends(s)])

    def _drop(self, entries: Sequence[Entry], hiding: "Sequence[weakref.ref[Any]]") -> None:
        gone = [entry for entry in self._entries if entry in entries]
        if not gone and not hiding:
            return
        self._hiding = tuple(s for s in self._hiding if not any(s is h for h in hiding))
        self._entries = tuple(e for e in self._entries if e not in gone)
        self.settle({name: old for entry in reversed(gone) for name, old in entry.before.items()})

    def remove(self, delta: Attachment) -> None:
        """Take `delta` out, wherever it is; what remains is the base plus the other applied deltas.

        Raises:
            DeltaNotApplied: it is not applied, a later delta supersedes it, or the deltas are hidden.
            WeightsChanged: something else has changed a parameter under an applied delta.
        """
        self.settle()
        self._refuse_while_hidden()
        self.find(delta.id)
        later = next((e.delta for e in self._entries if delta.id in e.delta.supersedes), None)
        if later is not None:  # or what `delta` superseded would come back beside `later`
            raise DeltaNotApplied(f"delta {delta.id} is superseded by {later.id}; revert that one first")
        self._exchange(tuple(e for e in self._entries if e.delta.id != delta.id))

    def clear(self, *, force: bool = False) -> None:
        """Take every delta off and end every scope, from whatever state: the base, bit for bit.

        Args:
            force: also where something else has changed the parameters since; its changes are lost.

        Raises:
            WeightsChanged: without `force`, something else has changed a parameter under an applied delta.
        """
        if not force:
            self.check_unchanged()
        self._entries = ()
        self._hiding = ()
        self.settle(force=force)

    def find(self, delta_id: str) -> Attachment:
        """Return the applied delta of that id.

        Raises:
            DeltaNotApplied: there is none.
        """
        known = {entry.delta.id: entry.delta for entry in self.entries}
        if delta_id not in known:
            raise DeltaNotApplied(f"delta {delta_id} is not applied; applied: {', '.join(known) or 'none'}")
        return known[delta_id]

    def hide(self, scope: "weakref.ref[Any]") -> None:
        """Show the base's own weights until `scope` is left, or is gone."""
        self.settle()
        self._hiding = (*self._hiding, scope)
        self.settle()

    def base_values(self, name: str) -> Tensor:
        """Return the unedited parameter, a copy."""
        copy, record = self._parameters[name].detach().clone(), self._records.get(name)
        if record is not None:
            _assign(copy, record, record.base.to(copy.device))
        return copy

    def nbytes(self) -> int:
        """Return the bytes held for undoing: base values, running sums, and floats in place of packed matrices."""
        floats = sum(self._packed[name].weight().nbytes for name in self._records if name in self._packed)
        return floats + sum(t.numel() * t.element_size() for r in self._records.values() for t in (r.base, r.total))

    @property
    def records(self) -> Mapping[str, _Record]:
        """What is held to undo the deltas, by parameter: empty when the base is in place. It refers to no model."""
        return self._records

    def touched(self) -> frozenset[str]:
        """Return the names of the parameters that an applied delta touches."""
        return frozenset(self._records)

    def _exchange(self, entries: tuple[Entry, ...]) -> None:
        """Bring these entries into force; on any failure those before them are."""
        before = self._entries
        try:
            self._entries = entries
            self.settle()
        except BaseException:
            self._entries = before
            self.settle()
            raise

    def _refuse_while_hidden(self) -> None:
        if self.hidden:
            raise DeltaNotApplied(
                "the applied deltas are off for the moment (lm.without_deltas()); apply and revert after that scope "
                "ends, or end it with revert_all()"
            )

    @torch.inference_mode(False)
    def _copies(self, delta: Attachment) -> dict[str, _Record | None]:
        known = {name: self._records.get(name) for name in delta.changes}
        return {name: None if old is None else _copy(old) for name, old in known.items()}

    # --- bringing it about -------------------------------------------------------------------------------------------

    @plain_modes()  # what is made here is updated in place later, in whatever mode
    @torch.no_grad()
    def settle(self, before: Mapping[str, _Record | None] | None = None, *, force: bool = False) -> None:
        """Bring every parameter to what shall be in force. Repeatable: what an interrupt left undone is done.

        Args:
            before: records with sums that may be the ones wanted now, which saves adding them up.
            force: overwrite what something else has changed.

        Raises:
            WeightsChanged: something else has changed a parameter that would be overwritten.
        """
        if self.settled:
            return
        entries, hidden, deltas = self.entries, self.hidden, self.applied
        names = dict.fromkeys([*self._records, *(n for delta in deltas for n in delta.changes)])
        wanted = {name: [delta for delta in deltas if name in delta.changes] for name in names}
        work = {name: own for name, own in wanted.items() if self._differs(name, own, hidden)}
        for name in work:
            self._check_unchanged(name, force=force)
        self._settled_at = (None, hidden)
        for name, own in work.items():
            self._bring(name, own, hidden, (before or {}).get(name))
        self.bring_packed()
        if self._hooks is not None:
            self._hooks.bring(() if hidden else deltas)
        self._entries = entries
        self._settled_at = (entries, hidden)

    def bring_packed(self) -> None:
        """Have floats in place of a packed parameter while it shows deltas, else what it was packed as. Repeatable."""
        for name, matrix in self._packed.items():
            record = self._records.get(name)
            matrix.bring(held=record is not None, shown=record is not None and record.shown != ())

    def _differs(self, name: str, deltas: Sequence[Attachment], hidden: bool) -> bool:
        """Return whether a parameter is not the base plus these deltas, or has a record for nothing."""
        record, ids = self._records.get(name), tuple(delta.id for delta in deltas)
        if record is None:
            return bool(ids) and not hidden
        return not ids or record.shown != (() if hidden else ids) or (record.ids != ids and not hidden)

    def _bring(self, name: str, deltas: Sequence[Attachment], hidden: bool, before: _Record | None) -> None:
        """Bring one parameter to the base plus these deltas, or to the base while they are hidden."""
        ids = tuple(delta.id for delta in deltas)
        record = self._records.get(name)
        if hidden or not ids:
            assert record is not None
            self._show_base(name, record)
            if not ids:
                del self._records[name]
            return
        record = self._summed(name, record, deltas, ids, before)
        self._check_finite(name, record)
        record.shown = None
        self._write(name, record)
        record.seen = _Look.at(self._parameters[name])
        record.shown = ids

    def _summed(
        self, name: str, record: _Record | None, deltas: Sequence[Attachment], ids: Ids, before: _Record | None
    ) -> _Record:
        """Return the parameter's record with the sum of these deltas, made from what there is at the least cost."""
        if record is not None and record.ids is not None and record.ids == ids[: len(record.ids)]:
            new = deltas[len(record.ids) :]
        else:
            new = deltas
            if record is not None:
                self._show_base(name, record)
                if before is not None and before.ids == ids:
                    # the copy says what the parameter showed before the scope; it shows the base now
                    fresh = replace(_copy(before), shown=(), seen=record.seen)
                    self._records[name] = fresh
                    return fresh
                del self._records[name]
        changes = [change for delta in new for change in delta.changes[name]]
        if changes:
            record = self._cover(name, changes)
            record.ids = None
            for change in changes:
                _accumulate(record, change)
            record.ids = ids
        assert record is not None
        return record

    def _cover(self, name: str, changes: Sequence[Change]) -> _Record:
        """Return the parameter's record, made or widened so that it covers the changes."""
        if name in self._packed:
            self._packed[name].hold()
        weight, old = self._parameters[name].detach(), self._records.get(name)
        kind, index = _footprint(changes, weight.shape)
        if old is not None:
            if old.kind == "whole":
                return old
            if kind == old.kind and index is not None and old.index is not None:
                index = torch.cat([old.index.cpu(), index]).unique()
                if len(index) == len(old.index):
                    return old
            else:
                kind, index = "whole", None
        if index is not None and len(index) * 4 > _extent(kind, weight.shape):
            kind, index = "whole", None
        on_device = None if index is None else index.to(weight.device)
        new = _Record(kind, on_device, torch.empty(0), torch.empty(0))
        new.base = _view(weight, new).cpu().clone()
        new.total = torch.zeros(new.base.shape, dtype=_sum_dtype(weight.dtype), device=weight.device)
        if old is not None:  # outside the old record's places the parameter holds the base
            _assign_within(new, old)
            new.ids, new.shown, new.seen = old.ids, old.shown, old.seen
        self._records[name] = new
        return new

    def _check_finite(self, name: str, record: _Record) -> None:
        """Raise NonFinite where base plus sum is NaN or infinite in the parameter's dtype."""
        dtype = self._parameters[name].dtype
        rows = max(1, _BLOCK * len(record.total) // max(1, record.total.numel())) if record.total.dim() else 1
        for i in range(0, len(record.total) if record.total.dim() else 1, rows):
            part = slice(i, i + rows) if record.total.dim() else ...
            base = record.base[part]
            if not torch.isfinite(_cast(base, record.total[part], dtype)).all():
                if not torch.isfinite(base).all():
                    raise NonFinite(f"{name}: the model's own weights hold NaN or infinity; it cannot be edited there")
                raise NonFinite(
                    f"{name}: with this change the weights would be NaN or infinite in "
                    f"{str(dtype).removeprefix('torch.')}; the change is too large for that, or its factors are"
                )

    def _show_base(self, name: str, record: _Record) -> None:
        if record.shown != ():
            record.shown = None
            self._put(name, record, record.base)
            record.seen = _Look.at(self._parameters[name])
            record.shown = ()

    def _write(self, name: str, record: _Record) -> None:
        weight = self._parameters[name]
        base, total = record.base, record.total
        if record.kind == "whole" and total.dim():
            rows = max(1, _BLOCK * len(total) // max(1, total.numel()))
            for i in range(0, len(total), rows):
                weight.data[i : i + rows] = _cast(base[i : i + rows], total[i : i + rows], weight.dtype)
        else:
            self._put(name, record, _cast(base, total, weight.dtype))

    def _put(self, name: str, record: _Record, values: Tensor) -> None:
        weight = self._parameters[name]
        _assign(weight.data, record, values.to(weight.device, weight.dtype))

    # --- changes from outside ----------------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Raise WeightsChanged where something else has changed a parameter under an applied delta."""
        for name in list(self._records):
            self._check_unchanged(name)

    def _check_unchanged(self, name: str, *, force: bool = False) -> None:
        """Raise WeightsChanged where something else has changed a parameter; brings its record to its device.

        A look at a few values and the version counter is enough where both are as they were; where the counter or the
        place in memory is another, all values are compared.
        """
        record, weight = self._records.get(name), self._parameters[name]
        if record is None:
            return
        if record.total.device != weight.device:  # model.to(device)
            record = self._records[name] = _on(record, weight.device)
        if force or record.shown is None or record.seen is None:
            return
        now, seen = _Look.at(weight), record.seen
        same = now.dtype == seen.dtype and _same_bytes(now.sample, seen.sample)
        if same and (now.pointer, now.version) != (seen.pointer, seen.version):
            same = self._holds_what_it_shows(weight, record)
        if not same:
            raise WeightsChanged(
                f"{name}: its weights were changed by something else while deltas are applied (a cast such as "
                "model.half(), an optimiser, an assignment), and the ledger will not overwrite that. Undo that change, "
                "or call lm.revert_all(force=True), which restores the base and loses it."
            )

    def _holds_what_it_shows(self, weight: Tensor, record: _Record) -> bool:
        values = record.base if record.shown == () else None
        if values is None:
            if record.ids != record.shown:  # the sum has moved on: there is nothing left to compare with
                return True
            values = _cast(record.base, record.total.cpu(), weight.dtype)
        return _same_bytes(_view(weight.detach(), record).cpu(), values)


def _copy(record: _Record) -> _Record:
    return replace(record, total=record.total.clone())


def _on(record: _Record, device: torch.device) -> _Record:
    index = None if record.index is None else record.index.to(device)
    return replace(record, index=index, total=record.total.to(device))


def _cast(base: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    return (base.to(total.device, total.dtype) + total).to(dtype)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    if not n:
        return flat.cpu().clone()
    places = torch.linspace(0, n - 1, min(n, _N_SAMPLED), dtype=torch.float64).long()
    return flat[places.to(flat.device)].cpu()


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one dtype hold the same bytes, NaN and signed zeros distinguished."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _footprint(changes: Sequence[Change], shape: torch.Size) -> tuple[str, Tensor | None]:
    regions = [c.region for c in changes if c.region is not None]
    if len(shape) == 3 and len(regions) == len(changes) and all(_is_one_matrix(r) for r in regions):
        return "rows", torch.tensor([r.start for r in regions]).unique()
    places = [c.index.cpu() for c in changes if isinstance(c, Rows | Columns | Entries) and c.region is None]
    if len(places) == len(changes) and len({c.kind for c in changes}) == 1:
        return changes[0].kind, torch.cat(places).unique()
    return "whole", None


def _is_one_matrix(region: Region) -> bool:
    """Return whether a region of a tensor of three axes is one expert's matrix."""
    return region.axis == 0 and region.stop == region.start + 1


def _extent(kind: str, shape: torch.Size) -> int:
    return shape.numel() if kind == "entries" else shape[0 if kind == "rows" else 1]


def _view(weight: Tensor, record: _Record) -> Tensor:
    if record.index is None:
        return weight
    if record.kind == "rows":
        return weight[record.index]
    if record.kind == "columns":
        return weight[:, record.index]
    return weight.reshape(-1)[record.index]


def _assign(weight: Tensor, record: _Record, values: Tensor) -> None:
    if record.index is None:
        weight.copy_(values)
    elif record.kind == "rows":
        weight[record.index] = values
    elif record.kind == "columns":
        weight[:, record.index] = values
    else:
        weight[torch.unravel_index(record.index, weight.shape)] = values


def _assign_within(new: _Record, old: _Record) -> None:
    """Carry the base and the sum of a narrower record over into a wider one."""
    if new.index is None:
        _assign(new.base, _on_cpu(old), old.base)
        _assign(new.total, old, old.total)
        return
    assert old.index is not None
    where = torch.searchsorted(new.index, old.index)
    inner = _Record("columns" if new.kind == "columns" else "rows", where, old.base, old.total)
    _assign(new.base, _on_cpu(inner), old.base)
    _assign(new.total, inner, old.total)


def _on_cpu(record: _Record) -> _Record:
    index = None if record.index is None else record.index.cpu()
    return _Record(record.kind, index, record.base, record.total)


def _accumulate(record: _Record, change: Change) -> None:
    if record.index is None:
        change.add_to(record.total)
        return
    if change.region is not None:  # one expert's matrix
        place = int(torch.searchsorted(record.index, change.region.start))
        replace(change, region=None).add_to(record.total[place])
        return
    places = torch.searchsorted(record.index, change.index.to(record.index.device))  # type: ignore[attr-defined]
    values = change.values().to(record.total.device, record.total.dtype)
    record.total.index_add_(1 if record.kind == "columns" else 0, places, values)
