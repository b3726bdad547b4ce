"""The live deltas of a model, and the base values under them: applying, reverting, scopes.

Per touched parameter the ledger holds the base values (only the touched rows, columns or entries where the kinds of
change allow it) on the CPU in the stored dtype, and one running sum in at least float32, in order of application:
weight = cast(base + sum), written in place. Appending a delta costs one delta. Removing one from the middle replays the
rest. Removing all puts the base's own bytes back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retcon.delta import Change, Columns, Delta, Entries, Rows
from retcon.errors import DeltaNotApplied

_BLOCK = 2**22  # values written at a time: no second copy of a large matrix is ever made


@dataclass
class _Touched:
    """Base and running sum over the touched part of one parameter."""

    kind: str
    """`whole`, or the kind of change whose places `index` lists: rows, columns, entries."""
    index: Tensor | None
    """Sorted places (on the parameter's device), None for the whole."""
    base: Tensor
    """Base values there: CPU, stored dtype."""
    total: Tensor
    """Sum of the live changes there: parameter's device, at least float32."""


@dataclass(frozen=True)
class Snapshot:
    """The ledger before a delta, as far as that delta will change it."""

    log: tuple[str, ...]
    """Ids of the deltas below."""
    touched: dict[str, _Touched | None]
    """The records of the delta's parameters, sums copied; None where nothing touched it."""


class Ledger:
    """Ordered deltas over the parameters that `parameter(name)` gives."""

    def __init__(self, parameter: Callable[[str], Tensor]) -> None:
        self._parameter = parameter
        self._log: dict[str, Delta] = {}  # by id, in order of application
        self._touched: dict[str, _Touched] = {}
        self.suspended = False

    @property
    def applied(self) -> tuple[Delta, ...]:
        """Deltas in force, in order of application; those that a later live delta supersedes are left out."""
        replaced = {i for delta in self._log.values() for i in delta.supersedes}
        return tuple(d for i, d in self._log.items() if i not in replaced)

    @torch.inference_mode(False)  # what is made here and in _add is updated in place later, in whatever mode
    @torch.no_grad()
    def snapshot(self, delta: Delta) -> Snapshot:
        """What `pop` needs to take `delta`, pushed next, off again without replaying the rest."""
        known = {name: self._touched.get(name) for name in delta.changes}
        copies = {name: None if old is None else replace(old, total=old.total.clone()) for name, old in known.items()}
        return Snapshot(tuple(self._log), copies)

    def push(self, delta: Delta) -> None:
        """Apply `delta` on top. On any failure the weights are as they were.

        Raises:
            DeltaNotApplied: it is applied already, it supersedes one that is not live, or the ledger is suspended.
        """
        self._refuse_while_off()
        if delta.id in self._log:
            raise DeltaNotApplied(f"delta {delta.id} is applied already; revert it first")
        if delta.supersedes and (missing := set(delta.supersedes) - {d.id for d in self.applied}):
            raise DeltaNotApplied(f"delta {delta.id} supersedes {', '.join(sorted(missing))}, which is not live")
        touches = self._reach(delta)
        self._log[delta.id] = delta
        try:
            if delta.supersedes:
                self._replay(touches)
            else:
                for name, changes in delta.changes.items():
                    self._add(name, changes)
        except BaseException:
            del self._log[delta.id]
            self._replay(touches)
            raise

    def pop(self, delta: Delta, before: Snapshot) -> None:
        """Take `delta` off again (`before` is its snapshot): cheaply where it is the last one, else by replaying.

        Nothing is left to do where the scope's own body has taken it off already.
        """
        if delta.id not in self._log:
            return
        self._refuse_while_off()
        if delta.supersedes or tuple(self._log) != (*before.log, delta.id):
            self._take_out(delta)
            return
        del self._log[delta.id]
        for name, old in before.touched.items():
            self._restore(name)
            if old is not None:
                self._touched[name] = old
                self._write(name, old)

    def remove(self, delta: Delta) -> None:
        """Take `delta` out, wherever it stands; what remains is the base plus the other live deltas.

        Raises:
            DeltaNotApplied: it is not applied, a later delta supersedes it, or the ledger is suspended.
        """
        self._refuse_while_off()
        self.find(delta.id)
        later = next((d for d in self._log.values() if delta.id in d.supersedes), None)
        if later is not None:  # or what `delta` superseded would come back beside `later`
            raise DeltaNotApplied(f"delta {delta.id} is superseded by {later.id}; revert that one first")
        self._take_out(delta)

    def clear(self) -> None:
        """Take every delta off: the base, bit for bit.

        Raises:
            DeltaNotApplied: the ledger is suspended.
        """
        self._refuse_while_off()
        self._log.clear()
        self._replay(set(self._touched))

    def find(self, delta_id: str) -> Delta:
        """The applied delta of that id.

        Raises:
            DeltaNotApplied: there is none.
        """
        if delta_id not in self._log:
            raise DeltaNotApplied(f"delta {delta_id} is not applied; applied: {', '.join(self._log) or 'none'}")
        return self._log[delta_id]

    def _refuse_while_off(self) -> None:
        if self.suspended:
            raise DeltaNotApplied(
                "the live deltas are off for the moment (lm.without_deltas()); apply and revert after that scope ends"
            )

    def _take_out(self, delta: Delta) -> None:
        touches = self._reach(delta)
        del self._log[delta.id]
        self._replay(touches)

    def _reach(self, delta: Delta) -> set[str]:
        """Parameters that change when `delta` comes or goes: its own, and those of what it supersedes."""
        return set(delta.changes).union(*(self._log[i].changes for i in delta.supersedes if i in self._log))

    @contextmanager
    def without_deltas(self) -> Iterator[None]:
        """The base's own weights while the scope lasts; the live deltas come back after it."""
        if self.suspended:
            yield
            return
        self.suspended = True
        try:
            for name, touched in self._touched.items():
                self._put(name, touched, touched.base)
            yield
        finally:
            for name, touched in self._touched.items():
                self._write(name, touched)
            self.suspended = False

    def base_values(self, name: str) -> Tensor:
        """The unedited parameter: itself where no delta touches it, else rebuilt from the kept base (a copy)."""
        weight = self._parameter(name)
        if name not in self._touched:
            return weight.detach()
        copy, touched = weight.detach().clone(), self._touched[name]
        _assign(copy, touched, touched.base.to(copy.device))
        return copy

    def nbytes(self) -> int:
        """Bytes held for undoing: base values and running sums."""
        return sum(t.numel() * t.element_size() for x in self._touched.values() for t in (x.base, x.total))

    # --- the arithmetic ------------------------------------------------------------------------------------------

    def _replay(self, names: set[str]) -> None:
        live = self.applied
        for name in names:
            if name in self._touched:
                self._restore(name)
            changes = [change for delta in live for change in delta.changes.get(name, ())]
            if changes:
                self._add(name, changes)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _add(self, name: str, changes: Sequence[Change]) -> None:
        touched = self._cover(name, changes)
        for change in changes:
            _accumulate(touched, change)
        self._write(name, touched)

    def _cover(self, name: str, changes: Sequence[Change]) -> _Touched:
        """The parameter's record, made or widened so that it covers the changes."""
        weight, old = self._parameter(name).detach(), self._touched.get(name)
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
        if index is not None and len(index) * 4 > _places(kind, weight.shape):
            kind, index = "whole", None
        on_device = None if index is None else index.to(weight.device)
        new = _Touched(kind, on_device, torch.empty(0), torch.empty(0))
        new.base = _view(weight, new).cpu().clone()
        new.total = torch.zeros(new.base.shape, dtype=_sum_dtype(weight.dtype), device=weight.device)
        if old is not None:
            _assign_within(new, old)
        self._touched[name] = new
        return new

    def _restore(self, name: str) -> None:
        touched = self._touched.pop(name)
        self._put(name, touched, touched.base)

    def _write(self, name: str, touched: _Touched) -> None:
        weight = self._parameter(name)
        base, total = touched.base, touched.total
        if touched.kind == "whole" and total.dim():
            rows = max(1, _BLOCK * len(total) // max(1, total.numel()))
            with torch.no_grad():
                for i in range(0, len(total), rows):
                    block = base[i : i + rows].to(total.device, total.dtype) + total[i : i + rows]
                    weight.data[i : i + rows] = block.to(weight.dtype)
        else:
            self._put(name, touched, (base.to(total.device, total.dtype) + total).to(weight.dtype))

    def _put(self, name: str, touched: _Touched, values: Tensor) -> None:
        weight = self._parameter(name)
        with torch.no_grad():
            _assign(weight.data, touched, values.to(weight.device))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _footprint(changes: Sequence[Change], shape: torch.Size) -> tuple[str, Tensor | None]:
    places = [c.index.cpu() for c in changes if isinstance(c, Rows | Columns | Entries) and c.region is None]
    if len(places) == len(changes) and len({c.kind for c in changes}) == 1:
        return changes[0].kind, torch.cat(places).unique()
    return "whole", None


def _places(kind: str, shape: torch.Size) -> int:
    return shape.numel() if kind == "entries" else shape[0 if kind == "rows" else 1]


def _view(weight: Tensor, touched: _Touched) -> Tensor:
    if touched.index is None:
        return weight
    if touched.kind == "rows":
        return weight[touched.index]
    if touched.kind == "columns":
        return weight[:, touched.index]
    return weight.reshape(-1)[touched.index]


def _assign(weight: Tensor, touched: _Touched, values: Tensor) -> None:
    if touched.index is None:
        weight.copy_(values)
    elif touched.kind == "rows":
        weight[touched.index] = values
    elif touched.kind == "columns":
        weight[:, touched.index] = values
    else:
        weight[torch.unravel_index(touched.index, weight.shape)] = values


def _assign_within(new: _Touched, old: _Touched) -> None:
    """Carry the base and the sum of a narrower record over into a wider one."""
    if new.index is None:
        _assign(new.base, _on_cpu(old), old.base)
        _assign(new.total, old, old.total)
        return
    assert old.index is not None
    where = torch.searchsorted(new.index, old.index)
    inner = _Touched("columns" if new.kind == "columns" else "rows", where, old.base, old.total)
    _assign(new.base, _on_cpu(inner), old.base)
    _assign(new.total, inner, old.total)


def _on_cpu(touched: _Touched) -> _Touched:
    index = None if touched.index is None else touched.index.cpu()
    return _Touched(touched.kind, index, touched.base, touched.total)


def _accumulate(touched: _Touched, change: Change) -> None:
    if touched.index is None:
        change.add_to(touched.total)
        return
    places = torch.searchsorted(touched.index, change.index.to(touched.index.device))  # type: ignore[attr-defined]
    values = change.values().to(touched.total.device, touched.total.dtype)
    touched.total.index_add_(1 if touched.kind == "columns" else 0, places, values)
