"""Read activations of many rows layer by layer while the layers are being changed from the bottom up.

A write at layer l leaves what enters l as it was. So the states that enter the layer read last are kept, and the next
reading starts there instead of at the tokens. Text that rows begin with in common is run once for all of them, and rows
that are read low are run no further than that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.lm.batches import MAX_BATCH_TOKENS, buckets
from retcon.lm.forward import Hook, Point, run
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.lm.replay import ReplayState, common_beginnings, embedded_states, replaying, suffix_starts, tail, tokens_at

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class Reading:
    """One activation per row, weighted and added up."""

    tokens: Sequence[int]
    """At which token of each row."""
    sums: Sequence[int]
    """To which sum each row belongs, counted from 0."""
    weights: Sequence[float]
    """By how much each row counts; rows of weight 0 are not read."""


@dataclass
class _Group:
    """Rows that are run together."""

    rows: list[Row]
    starts: list[int]
    """Tokens that are not run here but with the common beginnings."""
    index: list[int]
    """The rows' places among all."""
    beginning: list[int]
    """Each row's place among the common beginnings."""
    states: ReplayState | None = None
    """What enters the block reached, without the past; None: not yet run, or not kept."""


class LayerwiseReader:
    """Rows of text whose states follow the layer that is being read.

    Args:
        rows: texts, with a subject or without; read at the subject's last or the prediction token, or later.
        prefix_group: a number per row; rows of one number begin with the same text, which is run once for all of them.
        keep_bytes: states are kept up to this much memory; with more rows every reading starts at the tokens.
        deep: whether each row is read at the deepest point of a reading; such rows are run together, the others only as
            far as they are read. All of them by default.
    """

    def __init__(
        self,
        lm: LM,
        rows: Sequence[Row],
        prefix_group: Sequence[int],
        *,
        keep_bytes: float,
        deep: Sequence[bool] | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        self.lm, self.n_rows = lm, len(rows)
        limits = suffix_starts(
            lm, [r.prediction if r.subject_last is None else min(r.subject_last, r.prediction) for r in rows]
        )
        ends, place = common_beginnings([r.ids for r in rows], limits, prefix_group)
        self.starts = [ends[p] for p in place]
        lengths = [len(r.ids) - s for r, s in zip(rows, self.starts, strict=True)]
        depths = [True] * len(rows) if deep is None else deep
        self.groups = [
            _Group([rows[i] for i in group], [self.starts[i] for i in group], group, [place[i] for i in group])
            for depth in (True, False)
            for group in buckets(lengths, max_batch_tokens, [i for i, d in enumerate(depths) if d == depth])
        ]
        first_with = {p: r for r, p in reversed(list(enumerate(place)))}
        beginnings = [Row(rows[first_with[p]].ids[: max(end, 1)], 1) for p, end in enumerate(ends)]
        nothing = [0] * len(ends)
        self.beginnings = _Group(beginnings, nothing, list(range(len(ends))), nothing)
        self.ends = torch.tensor(ends)
        width = lm.d_model
        self.keeps = sum(lengths) * width * lm.dtype.itemsize <= keep_bytes
        self.reached = 0
        self.applied: tuple[str, ...] = ()

    def read(self, readings: Mapping[Point, Reading], keep: int) -> dict[Point, Float[Tensor, "sums width"]]:
        """Return the activations on the weights as they are now; on the CPU, in at least float32.

        Args:
            keep: block whose entering states are kept: nothing below it may be changed before the next reading, or
                that starts at the tokens again.
        """
        if not self._cache_valid() or min(keep, *(p.layer for p in readings)) < self.reached:
            self._forget()
        deepest = max(p.layer for p in readings)
        found: dict[Point, Tensor] = {}
        with self.lm.frozen_eval(), torch.no_grad():
            past = self._past(deepest, keep)
            for group in self.groups:
                hooks = {
                    point: self._adder(found, point, group, reading)
                    for point, reading in readings.items()
                    if any(reading.weights[i] for i in group.index)
                }
                if hooks or (self.keeps and keep > self.reached):
                    self._run(group, hooks, past, keep)
        if self.keeps:
            self.reached = keep
        self.applied = tuple(d.id for d in self.lm.applied)
        return found

    def _adder(self, found: dict[Point, Tensor], point: Point, group: _Group, reading: Reading) -> Hook:
        """Add what a group's rows hold at a point to the sums."""
        chosen = [(j, i) for j, i in enumerate(group.index) if reading.weights[i]]
        columns = torch.tensor([reading.tokens[i] - self.starts[i] for _, i in chosen])
        rows = torch.tensor([j for j, _ in chosen])
        dtype = torch.promote_types(self.lm.dtype, torch.float32)
        weights = torch.tensor([reading.weights[i] for _, i in chosen], dtype=dtype)[:, None]
        sums = torch.tensor([reading.sums[i] for _, i in chosen], dtype=torch.long)

        def add(value: Tensor) -> None:
            if point not in found:
                found[point] = torch.zeros(max(reading.sums) + 1, value.shape[2], dtype=dtype)
            if chosen:
                read = value[rows.to(value.device), columns.to(value.device)]
                found[point].index_add_(0, sums, read.to("cpu", dtype) * weights)

        return add

    def _past(self, deepest: int, keep: int) -> list[tuple[Tensor, Tensor]]:
        """Return the attention keys and values of common beginnings, per block from the one reached to `deepest`."""
        if not int(self.ends.max()):
            return []
        frozen = self._entering(self.beginnings)
        cache = frozen.cache(self.lm)
        self._run(self.beginnings, {Point(deepest, "attn_key"): lambda _: None}, [], keep, cache=cache)
        column = (self.ends[:, None] + torch.arange(-int(self.ends.max()), 0)).clamp(min=0)
        layers: list[Any] = cache.layers[self.reached : deepest + 1]
        aligned = [[tokens_at(x.transpose(1, 2), column).transpose(1, 2) for x in e.all_of_it()] for e in layers]
        return [(keys, values) for keys, values in aligned]

    def _run(
        self,
        group: _Group,
        hooks: dict[Point, Hook],
        past: list[tuple[Tensor, Tensor]],
        keep: int,
        cache: "Cache | None" = None,
    ) -> None:
        """Run a group from the block reached on, and keep what enters block `keep` if states are kept."""
        frozen = self._entering(group)
        states = frozen.states
        if past and any(group.starts):
            longest = max(group.starts)  # the group may hold none of the rows that share most
            keys, values = (tuple(tail(pair[i], group.beginning, longest) for pair in past) for i in (0, 1))
            frozen = replace(frozen, keys=keys, values=values)
        entering: list[Tensor] = []
        if keep > self.reached:
            at = Point(keep - 1, "block")
            inner = hooks.get(at)

            def record(value: Tensor) -> None:
                entering.append(value)
                if inner is not None:
                    inner(value)

            hooks = {**hooks, at: record}
        with replaying(self.lm, frozen, cache=cache) as inputs:
            run(self.lm, inputs, hooks)
        if self.keeps:
            group.states = replace(frozen, first=keep, states=entering[0] if entering else states, keys=(), values=())

    def _entering(self, group: _Group) -> ReplayState:
        if group.states is not None:
            return group.states
        return embedded_states(self.lm, group.rows, group.starts)

    def _cache_valid(self) -> bool:
        """Return whether the weights below the block reached are those that the kept states came from."""
        now = self.lm.applied
        if tuple(d.id for d in now[: len(self.applied)]) != self.applied:
            return False
        below = tuple(self.lm.layout.block.format(layer) + "." for layer in range(self.reached))
        return not any(name.startswith(below) for delta in now[len(self.applied) :] for name in delta.changes)

    def _forget(self) -> None:
        self.reached = 0
        for group in (self.beginnings, *self.groups):
            group.states = None
