"""Only what a restoration can change.

Nothing below the block where it is made, and nothing before its token. In that block only the token itself changes, for
attention there reads the other tokens' inputs; in the blocks above, every token from it on; of the topmost one, only
the last token is read. So cells climb in three strides, side by side in rows of one length; and of what they run,
modules leave out the tokens whose output is known.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retcon.lm.model import LM, SiteName
from retcon.lm.replay import Packed, Partly, replay
from retcon.lm.trace import Point
from retcon.locate.tracing.cells import Cell, taps_of
from retcon.locate.tracing.prompt import Prompt, projections


@dataclass(frozen=True)
class Strips:
    """Rows in which cells stand side by side, each with its tokens up to some last one; each row once per sample."""

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
    def of(cls, cells: Sequence[Cell], samples: int, last: int | None = None) -> "Strips":
        """Each cell's tokens from its own to `last`, or its own alone, in rows of about one length."""
        starts = torch.tensor([cell.token for cell in cells])
        lengths = [1 if last is None else last + 1 - cell.token for cell in cells]
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
    def rank(self) -> Int[Tensor, " cells"]:
        """How many cells stand before each in its row."""
        return ((self.row[:, None] == self.row) & (self.column < self.column[:, None])).sum(1)

    @property
    def earlier(self) -> Bool[Tensor, "cells earlier"]:
        """Tokens that each cell sees in the disturbed run."""
        return torch.arange(int(self.starts.max())) < self.starts[:, None]

    def spread(self, values: Float[Tensor, "samples tokens width"]) -> Float[Tensor, "all_rows columns width"]:
        """Every token's values at its places."""
        return values[:, self.token].transpose(0, 1).flatten(0, 1)

    def packed(self, prompt: Prompt, layers: range, states: Float[Tensor, "all_rows columns d_model"]) -> Packed:
        """A replay of these layers on them: each token sees its cell's tokens up to itself, and those before."""
        inside = (self.cell[:, :, None] == self.cell[:, None]) & (self.token[:, None] <= self.token[:, :, None])
        seen = torch.cat([self.earlier[self.cell], inside], 2)
        keys, values = (
            tuple(part[layer][:, :, : seen.shape[2] - seen.shape[1]] for layer in layers)
            for part in (prompt.keys, prompt.values)
        )
        return Packed(layers.start, states, keys, values, self.token, seen)


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
    last, top, samples = len(prompt.row.ids) - 1, lm.n_layers - 1, len(prompt.noise)
    changed = _changed(lm, prompt, cells)
    if cells[0].first > top:
        rows, columns = torch.arange(samples).expand(len(cells), -1), torch.arange(len(cells))[:, None]
        tokens, itself = torch.full((1, len(cells)), last), torch.eye(len(cells)).bool()
        given = Packed(top + 1, changed, (), (), tokens, itself[None])
    else:
        strips = Strips.of(cells, samples, last)
        states, keys, values = _climbed(lm, prompt, cells, strips, changed)
        rows, columns = strips.rows, strips.rank[:, None]
        n_rows, n_columns = len(strips.cell), int(strips.rank.max()) + 1
        ends = states.new_zeros(len(states), n_columns, states.shape[2])
        ends[rows, columns] = states[rows, (strips.column + last - strips.starts)[:, None]]
        own = (strips.cell[strips.row] == torch.arange(len(cells))[:, None]) & (strips.token[strips.row] < last)
        seen = torch.zeros(n_rows, n_columns, keys.shape[2]).bool()
        seen[strips.row, strips.rank] = torch.cat([strips.earlier, own], 1)
        seen = torch.cat([seen, torch.eye(n_columns).bool().expand(n_rows, -1, -1)], 2)
        given = Packed(top, ends, (keys,), (values,), torch.full((n_rows, n_columns), last), seen)
    taps = taps_of(prompt, cells, rows, columns, range(given.first, top + 1))
    logits = replay(lm, given, taps, (rows.flatten(), columns.expand_as(rows).flatten()))
    assert logits is not None
    return logits


def _changed(lm: LM, prompt: Prompt, cells: Sequence[Cell]) -> Float[Tensor, "samples cells d_model"]:
    """What leaves the block where the cell makes its lowest change, at the cell's token."""
    layer, samples = cells[0].first - 1, len(prompt.noise)
    put = Point(layer, "block")
    out = prompt.clean[put][[cell.token for cell in cells]].repeat(samples, 1, 1)
    inside = [i for i, cell in enumerate(cells) if put not in cell.clean]
    added = [i for i in inside if _is_summand(lm, min(cells[i].clean))]
    for i in added:
        point, token = min(cells[i].clean), cells[i].token
        out[:, i] = prompt.disturbed[put][:, token] + (prompt.clean[point][token] - prompt.disturbed[point][:, token])
    if run := [i for i in inside if i not in added]:
        some = [cells[i] for i in run]
        strips = Strips.of(some, samples)
        entering = strips.spread(prompt.disturbed[Point(layer - 1, "block")])
        found: list[Tensor] = []
        taps = taps_of(prompt, some, *strips.own, range(layer, layer + 1))
        given = strips.packed(prompt, range(layer, layer + 1), entering)
        replay(lm, given, {**taps, put: found.append}, partly=_unasked(lm, prompt, some, strips, layer))
        out[:, run] = found[0][strips.own].transpose(0, 1)
    return out


def _is_summand(lm: LM, point: Point) -> bool:
    """Whether the block's output is this one's output and something that does not depend on it."""
    return lm.layout.mlp_post_norm is None and (point.tensor == "mlp" or lm.layout.parallel)


def _climbed(
    lm: LM, prompt: Prompt, cells: Sequence[Cell], strips: Strips, changed: Float[Tensor, "samples cells d_model"]
) -> tuple[
    Float[Tensor, "all_rows columns d_model"],
    Float[Tensor, "all_rows heads earlier d_head"],
    Float[Tensor, "all_rows heads earlier d_head"],
]:
    """The states below the topmost block, and that block's attention keys and values of all the strips see and are."""
    first, top = cells[0].first, lm.n_layers - 1
    entering = strips.spread(prompt.disturbed[Point(first - 1, "block")])
    entering[strips.own] = changed.transpose(0, 1)
    given = strips.packed(prompt, range(first, top + 1), entering)
    cache = given.cache(lm)
    cache.layers[top].ends = True
    found: list[Tensor] = []
    taps = taps_of(prompt, cells, *strips.own, range(first, top))
    taps = {point: tap for point, tap in taps.items() if point.tensor != "mlp"}  # known before
    taps |= {Point(top - 1, "block"): found.append, Point(top, "attn_key"): lambda _: None}  # the pass ends between
    replay(lm, given, taps, cache=cache, partly=_unknown(lm, prompt, cells, strips, range(first, top)))
    return found[0], *cache.layers[top].all_of_it()


def _unknown(lm: LM, prompt: Prompt, cells: Sequence[Cell], strips: Strips, layers: range) -> Iterator[Partly]:
    """Modules of which something is known: MLP outputs that cells put back or keep; and in the lowest block, where only
    the cells' own tokens come in changed, the others' projections, and their MLP where it stands beside attention."""
    rows, columns = strips.own
    own = torch.zeros(len(strips.cell) * strips.samples, strips.cell.shape[1]).bool()
    own[rows, columns] = True
    lowest, top = projections(lm, layers.start), layers.stop
    for module, disturbed in zip(lowest, prompt.projected[layers.start], strict=True):
        yield Partly(own, [module], module, strips.spread(disturbed))
    if layers and len(asked := projections(lm, top)) == 3:  # in the topmost block nobody asks yet
        yield Partly(torch.zeros_like(own), asked[:1], asked[0], strips.spread(prompt.projected[top][0]))
    for layer in layers:
        point = Point(layer, "mlp")
        put = [i for i, cell in enumerate(cells) if point in cell.clean]
        kept = [i for i, cell in enumerate(cells) if point in cell.disturbed]
        live = own.clone() if layer == layers.start and lm.layout.parallel else torch.ones_like(own)
        live[rows[put + kept], columns[put + kept]] = False
        if not live.all():
            output = strips.spread(prompt.disturbed[point])
            output[rows[put], columns[put]] = prompt.clean[point][[cells[i].token for i in put], None]
            yield Partly(live, _mlp_entries(lm, layer), lm.site(layer, "down_proj").module, output)


def _unasked(lm: LM, prompt: Prompt, cells: Sequence[Cell], strips: Strips, layer: int) -> Iterator[Partly]:
    """Attention, where its output is put back for every cell: no projection is run."""
    if all(Point(layer, "attn") in cell.clean for cell in cells):
        none = torch.zeros(len(cells) * strips.samples, 1).bool()
        for module, disturbed in zip(projections(lm, layer), prompt.projected[layer], strict=True):
            yield Partly(none, [module], module, strips.spread(disturbed))
        last = lm.site(layer, "o_proj").module
        yield Partly(none, [last], last, strips.spread(prompt.disturbed[Point(layer, "attn")]))


def _mlp_entries(lm: LM, layer: int) -> list[nn.Module]:
    kinds: tuple[SiteName, ...] = ("up_proj", "gate_proj") if lm.layout.gate_proj else ("up_proj",)
    return list(dict.fromkeys(lm.site(layer, kind).module for kind in kinds))
