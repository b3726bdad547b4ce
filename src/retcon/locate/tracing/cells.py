"""Cells: states that are restored, one at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from retcon.lm.forward import Hook, Point, TensorName
from retcon.lm.model import LM
from retcon.locate.tracing.prompt import Prompt
from retcon.locate.tracing.traces import RestoredKind, Tracing


@dataclass(frozen=True)
class Cell:
    """One state to restore."""

    kind: RestoredKind
    layer: int
    token: int
    clean: tuple[Point, ...]
    """Where the token gets its value of the clean run."""
    corrupted: tuple[Point, ...]
    """Where the token keeps its value of the corrupted run, of the row's sample."""

    @property
    def first(self) -> int:
        """The first block whose input differs from the corrupted run's."""
        return min(self.clean).layer + 1


def cell_of(lm: LM, kind: RestoredKind, layer: int, token: int, settings: Tracing) -> Cell:
    if kind == "mlp" or kind == "attn":
        low, high = layer - settings.window // 2, layer + math.ceil(settings.window / 2)
        inside = range(max(0, low), min(lm.n_layers, high))
        return Cell(kind, layer, token, tuple(Point(i, kind) for i in inside), ())
    kept: tuple[Point, ...] = ()
    if kind != "block":
        tensor: TensorName = "mlp" if kind == "severed_mlp" else "attn"
        kept = tuple(Point(i, tensor) for i in range(layer + 1, lm.n_layers))
    return Cell(kind, layer, token, (Point(layer, "block"),), kept)


def trimmed(lm: LM, cell: Cell, last: int) -> Cell:
    """Return the cell without outputs that nothing reads: those of the topmost block, but for the last token's."""
    if cell.token == last:
        return cell
    clean, corrupted = (
        tuple(p for p in points if p.layer < lm.n_layers - 1) for points in (cell.clean, cell.corrupted)
    )
    return replace(cell, clean=clean, corrupted=corrupted)


def restoring_hooks(
    prompt: Prompt,
    cells: Sequence[Cell],
    rows: Int[Tensor, "cells samples"],
    columns: Int[Tensor, "cells 1"],
    layers: range,
) -> dict[Point, Hook]:
    """Return hooks in these layers that put each cell's values into its rows, at its token's column."""
    tokens = torch.tensor([cell.token for cell in cells])

    def restoring(point: Point) -> Hook:
        clean = [i for i, cell in enumerate(cells) if point in cell.clean]
        corrupted = [i for i, cell in enumerate(cells) if point in cell.corrupted]
        into = rows[clean + corrupted], columns[clean + corrupted]

        def put(value: Tensor) -> Tensor:
            new = prompt.clean[point][tokens[clean].to(value.device)]
            new = new[:, None].expand(-1, rows.shape[1], -1)
            if corrupted:
                kept = prompt.corrupted[point][:, tokens[corrupted].to(value.device)]
                new = torch.cat([new, kept.transpose(0, 1)])
            return value.index_put(tuple(i.to(value.device) for i in into), new.to(value))

        return put

    points = {p for cell in cells for p in (*cell.clean, *cell.corrupted)}
    return {point: restoring(point) for point in points if point.layer in layers}
