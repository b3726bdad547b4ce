"""Only what a restoration can change.

Nothing below the block where it is made, and nothing before its token. In that block only the token itself changes, for
attention there reads the other tokens' inputs; in the blocks above, every token from it on; of the topmost one, only
the last token is read. So cells climb from there, side by side in rows of one length, and every module is run for the
tokens alone whose output can change and is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.lm.replay import PackedState, PartialModule, mlp_entries, replay
from retcon.locate.tracing.cells import Cell, taps_of
from retcon.locate.tracing.prompt import Prompt, projections


@dataclass(frozen=True)
class Strips:
    """Rows in which cells stand side by side, each with its tokens up to the last; each row once per sample."""

    starts: Int[Tensor, " cells"]
    """The cells' own tokens; what stands before them is as in the disturbed run."""
    samples: int
    row: Int[Tensor, " cells"]
    """In which row each cell stands."""
    column: Int[Tensor, " cells"]
    """Where in it."""
    cell: Int[Tensor, "rows columns"]
    """Whose place it is; -1 for nobody's."""
    token: Int[Tensor, "rows columns"]

    @classmethod
    def of(cls, cells: Sequence[Cell], samples: int, last: int) -> "Strips":
        """Each cell's tokens from its own to `last`, in rows of about one length."""
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
        """Tokens that each cell sees in the disturbed run."""
        return torch.arange(int(self.starts.max())) < self.starts[:, None]

    def spread(self, values: Float[Tensor, "samples tokens width"]) -> Float[Tensor, "all_rows columns width"]:
        """Every token's values at its places."""
        return values[:, self.token].transpose(0, 1).flatten(0, 1)

    def packed(self, prompt: Prompt, layers: range, states: Float[Tensor, "all_rows columns d_model"]) -> PackedState:
        """A replay of these layers on them: each token sees its cell's tokens up to itself, and those before."""
        inside = (self.cell[:, :, None] == self.cell[:, None]) & (self.token[:, None] <= self.token[:, :, None])
        seen = torch.cat([self.earlier[self.cell], inside], 2)
        keys, values = (
            tuple(part[layer][:, :, : seen.shape[2] - seen.shape[1]] for layer in layers)
            for part in (prompt.keys, prompt.values)
        )
        return PackedState(layers.start, states, keys, values, self.token, seen)


def _rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """Which stand in a row together: the longest first, each in the first row that has room. Rows are as long as the
    longest or by one longer (1 to n fill those for even n), whichever leaves less over."""
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
    """Logits behind the prompt for every cell and sample, cell by cell; all cells of one first block."""
    first, last = cells[0].first, len(prompt.row.ids) - 1
    strips = Strips.of(cells, len(prompt.noise), last)
    below = first - 1 if all(Point(first - 1, "block") in cell.clean for cell in cells) else first - 2
    states = strips.spread(prompt.disturbed[Point(below, "block")])
    if below == first - 1:
        states[strips.own] = prompt.clean[Point(below, "block")][strips.starts][:, None]
    layers = range(below + 1, lm.n_layers)
    hooks = taps_of(prompt, cells, *strips.own, layers)
    hooks = {point: tap for point, tap in hooks.items() if point.tensor == "block"}
    ends = (strips.column + last - strips.starts)[:, None].expand_as(strips.rows)
    given = strips.packed(prompt, layers, states)
    partly = (part for layer in layers for part in _needed(lm, prompt, cells, strips, layer, ends))
    logits = replay(lm, given, hooks, (strips.rows.flatten(), ends.flatten()), partly=partly)
    assert logits is not None
    return logits


def _needed(
    lm: LM, prompt: Prompt, cells: Sequence[Cell], strips: Strips, layer: int, ends: Int[Tensor, "cells samples"]
) -> Iterator[PartialModule]:
    """Where a block's modules are run: where what they read is not as in the disturbed run, what they give is read, and
    no cell puts back or keeps it."""
    none = torch.zeros(len(strips.cell) * strips.samples, strips.cell.shape[1]).bool()
    own, every, end = none.clone(), ~none, none.clone()
    own[strips.own] = True
    end[strips.rows, ends] = True
    first = cells[0].first
    entering = none if layer < first else own if layer == first else every
    read = end if layer == lm.n_layers - 1 else every

    if not (entering & read).all():
        asked = projections(lm, layer)
        for module, disturbed in zip(asked, prompt.projected[layer], strict=True):
            queries_alone = module is asked[0] and len(asked) == 3
            yield PartialModule(
                entering & read if queries_alone else entering, [module], module, strips.spread(disturbed)
            )
    put, held = _held(cells, strips, attn := Point(layer, "attn"))
    mixed = (none if layer < first else every) & read & ~held
    if not mixed.all():
        out = lm.site(layer, "o_proj").module
        yield PartialModule(mixed, [out], out, _held_outputs(prompt, cells, strips, attn))
    beside = entering if lm.layout.parallel else entering | mixed | put
    live = beside & read & ~_held(cells, strips, mlp := Point(layer, "mlp"))[1]
    if not live.all():
        down = lm.site(layer, "down_proj").module
        yield PartialModule(live, mlp_entries(lm, layer), down, _held_outputs(prompt, cells, strips, mlp))


def _held(
    cells: Sequence[Cell], strips: Strips, point: Point
) -> tuple[Bool[Tensor, "all_rows columns"], Bool[Tensor, "all_rows columns"]]:
    """Where a cell puts an output back; where one does, or keeps it."""
    put = torch.zeros(len(strips.cell) * strips.samples, strips.cell.shape[1]).bool()
    held = put.clone()
    for i, cell in enumerate(cells):
        if point in cell.clean or point in cell.disturbed:
            rows = slice(strips.row[i] * strips.samples, (strips.row[i] + 1) * strips.samples)
            held[rows, strips.column[i]] = True
            put[rows, strips.column[i]] = point in cell.clean
    return put, held


def _held_outputs(
    prompt: Prompt, cells: Sequence[Cell], strips: Strips, point: Point
) -> Float[Tensor, "all_rows columns d_model"]:
    """What stands at the point where no module need say it."""
    rows, columns = strips.own
    put = [i for i, cell in enumerate(cells) if point in cell.clean]
    output = strips.spread(prompt.disturbed[point])
    output[rows[put], columns[put]] = prompt.clean[point][strips.starts[put], None]
    return output
