"""A forward pass for many cells at once, in which only what a restoration can change is computed.

A restored state changes nothing in the blocks below its own and nothing at tokens before its own. In its own block only
its token changes, since attention there reads what entered the block; in later blocks, every token from it on. Of the
topmost block only the last token is read. So the pass begins at that block, several cells share a row (`Packing`), and
a module is run only for tokens whose output can change and is read (`PartialModule`).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retcon.lm.forward import Point, logits_at
from retcon.lm.model import LM
from retcon.lm.replay import mlp_entries, replaying, running_at
from retcon.lm.replay.states import stand_in, suffix_cache
from retcon.locate.tracing.cells import Cell, restoring_hooks
from retcon.locate.tracing.prompt import Prompt, attention_projections

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class PackedState:
    """The recorded part of a replay in which several variants of a text share a row, so that little is padded.

    For attention without a window, or within it, in transformers' `eager` and `sdpa` forms (the others take no mask).
    """

    first: int
    """First block that runs, as in `ReplayState`."""
    states: Float[Tensor, "rows columns d_model"]
    """What enters block `first`."""
    keys: tuple[Float[Tensor, "some_rows _ earlier _"], ...]
    """Per block that runs, attention keys of earlier tokens, which all columns may see: of every row, or of the rows of
    one order, which then serve all."""
    values: tuple[Float[Tensor, "some_rows _ earlier _"], ...]
    """The same for the attention values."""
    tokens: Int[Tensor, "orders columns"]
    """Token index of every column. Rows with the same tokens in the same order follow each other, equally many of each
    order."""
    seen: Bool[Tensor, "orders columns earlier_and_columns"]
    """What every column attends to; at least itself."""

    def cache(self, lm: LM) -> "Cache":
        """Do as `ReplayState.cache`."""
        return suffix_cache(lm, self.first, self.keys, self.values, self.seen.shape[2] - self.seen.shape[1])

    def arguments(self, lm: LM, cache: "Cache") -> dict[str, Any]:
        """Do as `ReplayState.arguments`."""
        each, lowest = len(self.states) // len(self.tokens), torch.finfo(self.states.dtype).min
        hidden = torch.zeros(self.seen.shape, dtype=self.states.dtype).masked_fill(~self.seen, lowest)
        return dict(
            inputs_embeds=stand_in(lm, self.states),
            attention_mask=hidden.to(lm.device).repeat_interleave(each, 0)[:, None],
            position_ids=self.tokens.to(lm.device).repeat_interleave(each, 0),
            past_key_values=cache,
            use_cache=True,
        )


@dataclass(frozen=True)
class PartialModule:
    """Modules that treat every token by itself, and the places at which they are run."""

    places: Bool[Tensor, "rows columns"]
    """Where they run."""
    entries: Sequence[nn.Module]
    """Modules that read the input."""
    end: nn.Module
    """The module whose output counts; an entry, or what the entries' outputs lead to."""
    fill_values: Float[Tensor, "rows columns width"]
    """Output of `end` at the other places; at theirs it is overwritten."""

    def running(self) -> AbstractContextManager[None]:
        """Have the modules run so while the scope lasts."""
        return running_at(self.places.flatten().nonzero()[:, 0], self.entries, self.end, self.fill_values)


@dataclass(frozen=True)
class Packing:
    """How cells share rows: each takes a run of columns, for its own token and all after it; each row comes once per
    sample."""

    starts: Int[Tensor, " cells"]
    """The cells' own tokens; earlier tokens are as in the corrupted run."""
    samples: int
    row: Int[Tensor, " cells"]
    """Each cell's row."""
    column: Int[Tensor, " cells"]
    """The column of each cell's own token."""
    cell: Int[Tensor, "rows columns"]
    """The cell that takes this place; -1 where none does."""
    token: Int[Tensor, "rows columns"]
    """Index of the token at this place."""

    @classmethod
    def of(cls, cells: Sequence[Cell], samples: int, last: int) -> "Packing":
        """Put each cell's tokens, from its own to `last`, into rows of about one length."""
        starts = torch.tensor([cell.token for cell in cells])
        lengths = [last + 1 - cell.token for cell in cells]
        rows = _rows_of(lengths)
        n_columns = max(sum(lengths[i] for i in row) for row in rows)
        cell = torch.full((len(rows), n_columns), -1)
        token, at, column = torch.zeros_like(cell), torch.zeros_like(starts), torch.zeros_like(starts)
        for r, row in enumerate(rows):
            free = 0
            for i in row:
                at[i], column[i] = r, free
                cell[r, free : free + lengths[i]] = i
                token[r, free : free + lengths[i]] = torch.arange(cells[i].token, cells[i].token + lengths[i])
                free += lengths[i]
        return cls(starts, samples, at, column, cell, token)

    @property
    def rows(self) -> Int[Tensor, "cells samples"]:
        """Each cell's row in every sample."""
        return self.row[:, None] * self.samples + torch.arange(self.samples)

    @property
    def own(self) -> tuple[Int[Tensor, "cells samples"], Int[Tensor, "cells 1"]]:
        """Rows and columns of the cells' own tokens."""
        return self.rows, self.column[:, None]

    @property
    def earlier(self) -> Bool[Tensor, "cells earlier"]:
        """Which earlier tokens each cell attends to: those before its own, as they are in the corrupted run."""
        return torch.arange(int(self.starts.max())) < self.starts[:, None]

    def spread(self, values: Float[Tensor, "samples tokens width"]) -> Float[Tensor, "all_rows columns width"]:
        """Return the values of every token at the places that it takes."""
        return values[:, self.token].transpose(0, 1).flatten(0, 1)

    def packed(self, prompt: Prompt, layers: range, states: Float[Tensor, "all_rows columns d_model"]) -> PackedState:
        """Return a replay of these layers on `states`.

        Each token attends to its cell's tokens up to itself, and to those before the cell.
        """
        inside = (self.cell[:, :, None] == self.cell[:, None]) & (self.token[:, None] <= self.token[:, :, None])
        seen = torch.cat([self.earlier[self.cell], inside], 2)
        keys, values = (
            tuple(part[layer][:, :, : seen.shape[2] - seen.shape[1]] for layer in layers)
            for part in (prompt.keys, prompt.values)
        )
        return PackedState(layers.start, states, keys, values, self.token, seen)


def _rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """Return the cells of each row: the longest first, each in the first row that has room.

    Rows are as long as the longest cell, or longer by one (cells of lengths 1 to n fill those for even n), whichever
    leaves less room unused.
    """
    found: list[tuple[int, list[list[int]]]] = []
    for most in (max(lengths), max(lengths) + 1):
        rows: list[list[int]] = []
        room: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(most)
            rows[row].append(i)
            room[row] -= lengths[i]
        found.append((len(rows) * (most - min(room)), rows))
    return min(found, key=lambda f: f[0])[1]


def replayed_logits(lm: LM, prompt: Prompt, cells: Sequence[Cell]) -> Float[Tensor, "logits vocab"]:
    """Return logits after the prompt for every cell and sample, cell by cell; all cells have the same first block."""
    first, last = cells[0].first, len(prompt.row.ids) - 1
    packing = Packing.of(cells, len(prompt.noise), last)
    below = first - 1 if all(Point(first - 1, "block") in cell.clean for cell in cells) else first - 2
    states = packing.spread(prompt.corrupted[Point(below, "block")])
    if below == first - 1:
        states[packing.own] = prompt.clean[Point(below, "block")][packing.starts][:, None]
    layers = range(below + 1, lm.n_layers)
    hooks = restoring_hooks(prompt, cells, *packing.own, layers)
    hooks = {point: hook for point, hook in hooks.items() if point.tensor == "block"}
    ends = (packing.column + last - packing.starts)[:, None].expand_as(packing.rows)
    given = packing.packed(prompt, layers, states)
    with ExitStack() as stack:
        for layer in layers:
            for part in _needed(lm, prompt, cells, packing, layer, ends):
                stack.enter_context(part.running())
        inputs = stack.enter_context(replaying(lm, given))
        return logits_at(lm, inputs, (packing.rows.flatten(), ends.flatten()), hooks)


def _needed(
    lm: LM, prompt: Prompt, cells: Sequence[Cell], packing: Packing, layer: int, ends: Int[Tensor, "cells samples"]
) -> Iterator[PartialModule]:
    """Yield the modules of a block that need not run everywhere, with the places where they must.

    That is where their input differs from the corrupted run's, their output is read, and no cell fixes that output.
    """
    none = torch.zeros(len(packing.cell) * packing.samples, packing.cell.shape[1]).bool()
    own, every, end = none.clone(), ~none, none.clone()
    own[packing.own] = True
    end[packing.rows, ends] = True
    first = cells[0].first
    entering = none if layer < first else own if layer == first else every
    read = end if layer == lm.n_layers - 1 else every

    if not (entering & read).all():
        asked = attention_projections(lm, layer)
        for module, corrupted in zip(asked, prompt.projected[layer], strict=True):
            queries_alone = module is asked[0] and len(asked) == 3
            yield PartialModule(
                entering & read if queries_alone else entering, [module], module, packing.spread(corrupted)
            )
    put, held = _held(cells, packing, attn := Point(layer, "attn"))
    mixed = (none if layer < first else every) & read & ~held
    if not mixed.all():
        out = lm.site(layer, "o_proj").module
        yield PartialModule(mixed, [out], out, _held_outputs(prompt, cells, packing, attn))
    beside = entering if lm.layout.parallel else entering | mixed | put
    places = beside & read & ~_held(cells, packing, mlp := Point(layer, "mlp"))[1]
    if not places.all():
        down = lm.site(layer, "down_proj").module
        yield PartialModule(places, mlp_entries(lm, layer), down, _held_outputs(prompt, cells, packing, mlp))


def _held(
    cells: Sequence[Cell], packing: Packing, point: Point
) -> tuple[Bool[Tensor, "all_rows columns"], Bool[Tensor, "all_rows columns"]]:
    """Return where a cell restores an output, and where one fixes it (restores it, or holds it corrupted)."""
    put = torch.zeros(len(packing.cell) * packing.samples, packing.cell.shape[1]).bool()
    held = put.clone()
    for i, cell in enumerate(cells):
        if point in cell.clean or point in cell.corrupted:
            rows = slice(packing.row[i] * packing.samples, (packing.row[i] + 1) * packing.samples)
            held[rows, packing.column[i]] = True
            put[rows, packing.column[i]] = point in cell.clean
    return put, held


def _held_outputs(
    prompt: Prompt, cells: Sequence[Cell], packing: Packing, point: Point
) -> Float[Tensor, "all_rows columns d_model"]:
    """Return the output at the point where it need not be computed: restored values, elsewhere those corrupted."""
    rows, columns = packing.own
    put = [i for i, cell in enumerate(cells) if point in cell.clean]
    output = packing.spread(prompt.corrupted[point])
    output[rows[put], columns[put]] = prompt.clean[point][packing.starts[put], None]
    return output
