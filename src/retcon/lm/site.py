"""`Site`: one matrix of one block, and how a change of it is stored."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from retcon.delta import Change, Columns, Dense, Entries, Region, Rows, smallest
from retcon.errors import NotEditable
from retcon.lm.packed import PackedMatrix

SiteName = Literal["down_proj", "up_proj", "gate_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
Unit = Literal["row", "column", "entry"]
"""Part of a matrix W (out x in) that is scored, or trained, by itself: an output unit, an input unit, a single weight
(counted row by row)."""


@dataclass(frozen=True, eq=False)
class Site:
    """One matrix of one block, seen in math orientation (out x in) whatever the family stores."""

    layer: int
    kind: str
    """Which of its matrices (a `SiteName`), or a module's path inside the block."""
    name: str
    """Name of the parameter that holds it."""
    module: nn.Module
    transposed: bool
    """Stored as (in, out)."""
    rows: Int[Tensor, " rows"] | None = None
    """Output rows of a fused matrix that are this site's; None is all of them."""
    expert: int | None = None
    """Which routed expert's; its matrix is one slice of the parameter."""
    packed: PackedMatrix | None = None
    """Of a matrix that is kept quantised: how it is read."""

    @property
    def id(self) -> str:
        """The parameter's name, with the expert's number where it is one of several: unique in a model."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The current weight in math orientation (a view where the site is the whole matrix)."""
        stored = self._stored.detach()
        matrix = stored.T if self.transposed else stored
        return matrix if self.rows is None else matrix[self.rows.to(matrix.device)]

    @property
    def shape(self) -> torch.Size:
        """Outputs and inputs of the matrix."""
        out, into = reversed(self._stored_shape) if self.transposed else self._stored_shape
        return torch.Size((out if self.rows is None else len(self.rows), into))

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return (self.packed or self._parameter).device

    @property
    def dtype(self) -> torch.dtype:
        """The matrix's dtype."""
        return (self.packed or self._parameter).dtype

    @property
    def _stored_shape(self) -> torch.Size:
        return (self.packed or self._parameter).shape[-2:]

    @property
    def _parameter(self) -> Tensor:
        """The parameter that holds the matrix."""
        if self.packed is not None:
            return self.packed.weight()
        return self.module.weight if self.expert is None else getattr(self.module, self.name.rpartition(".")[2])  # type: ignore[return-value]

    @property
    def _stored(self) -> Tensor:
        return self._parameter if self.expert is None else self._parameter[self.expert]

    def in_parameter(self, change: Change) -> Change:
        """Return the change of a stored matrix as one of the parameter that holds it, as with experts."""
        return change if self.expert is None else replace(change, region=Region(0, self.expert, self.expert + 1))

    def stored(self, left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"]) -> Change:
        """Return the update left @ right (math orientation) as a change in stored orientation, the smaller form."""
        if self.rows is None:
            return self.in_parameter(smallest(right.T, left.T) if self.transposed else smallest(left, right))
        if self.expert is not None:  # its region is the expert's matrix already
            return self.stored_rows(torch.arange(len(self.rows)), left @ right)
        first, last = int(self.rows[0]), int(self.rows[-1]) + 1
        if last - first != len(self.rows):  # alternating heads: no region, but whole rows
            if self.transposed:
                raise NotEditable(f"{self.name}: alternating columns of a transposed matrix have no layout yet")
            return Rows(index=self.rows.clone(), rows=left @ right)
        region = Region(1 if self.transposed else 0, first, last)
        change = smallest(right.T, left.T) if self.transposed else smallest(left, right)
        return type(change)(region=region, **change.tensors())

    def outputs(self, index: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the places of output units of this site among the module's outputs."""
        return index if self.rows is None else self.rows.to(index.device)[index]

    def stored_rows(self, index: Int[Tensor, " n"], values: Float[Tensor, "n in"]) -> Change:
        """Return values added to rows (output units) of the math-oriented matrix, as a change in stored orientation."""
        if self.transposed:
            return self.in_parameter(Columns(index=self.outputs(index), columns=values.T.contiguous()))
        return self.in_parameter(Rows(index=self.outputs(index), rows=values))

    def stored_columns(self, index: Int[Tensor, " n"], values: Float[Tensor, "out n"]) -> Change:
        """Return values added to columns (input units) of the math-oriented matrix, as a stored change."""
        region = None
        if self.rows is not None:
            first, last = int(self.rows[0]), int(self.rows[-1]) + 1
            if last - first != len(self.rows) or self.expert is not None:  # no region holds them
                width = self.shape[1]
                places = torch.arange(len(self.rows), device=index.device)[:, None] * width + index
                return self.stored_entries(places.reshape(-1), values.reshape(-1))
            region = Region(1 if self.transposed else 0, first, last)
        if self.transposed:
            return self.in_parameter(Rows(index=index, rows=values.T.contiguous(), region=region))
        return self.in_parameter(Columns(index=index, columns=values, region=region))

    def stored_entries(self, index: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> Change:
        """Return values added at places counted row by row through the matrix in math orientation."""
        full_out, full_in = reversed(self._stored_shape) if self.transposed else self._stored_shape
        row, column = self.outputs(index // full_in), index % full_in
        place = column * full_out + row if self.transposed else row * full_in + column
        return self.in_parameter(Entries(index=place, entries=values))

    def stored_dense(self, full: Float[Tensor, "out in"]) -> Change:
        """Return a change of the whole matrix in math orientation, as a change in stored orientation."""
        if self.rows is not None:
            return self.stored_rows(torch.arange(len(self.rows)), full)
        return self.in_parameter(Dense(full=full.T.contiguous() if self.transposed else full))

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        """The bias of this site's outputs, None where the module has none."""
        whole = getattr(self.module, "bias", None)
        if whole is None:
            return None
        return whole.detach() if self.rows is None else whole.detach()[self.rows.to(whole.device)]

    @property
    def bias_name(self) -> str:
        """Name of the parameter that holds the bias, where there is one."""
        return self.name.removesuffix("weight") + "bias"
