"""Rows and columns that join and leave training: each moves while it is chosen and keeps its change when it is not.

A matrix's nodes are in one compact tensor, so that those that no longer move still count in the forward pass.
`RowAdam` steps chosen rows of it: a row that is not stepped neither moves nor ages, which zeroing its gradient would
not achieve, since Adam moves any row with momentum left. `NodeAdam` does so for the chosen nodes of many matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retcon.lm.site import Site
from retcon.training.parts import Part, TrainedBias, TrainedColumns, TrainedRows, fresh

NodeKind = Literal["rows", "columns", "bias"]
"""What a node is: an output unit's weights and its bias entry, an input unit's weights, or a bias entry alone."""


class Nodes:
    """The nodes of one matrix that are or were trained, with their changes so far.

    The matrix may be one of every routed expert of a block; their nodes are numbered one expert after the other.
    """

    def __init__(self, sites: Sequence[Site], kind: NodeKind) -> None:
        site = sites[0]
        self.sites, self.kind = sites, kind
        out, into = site.shape
        self.of_each = into if kind == "columns" else out
        names = {"rows": [site.name], "columns": [site.name], "bias": [site.bias_name]}
        widths: dict[str, list[tuple[int, ...]]] = {"rows": [(into,)], "columns": [(out,)], "bias": [()]}
        if site.bias is not None:
            names["rows"].append(site.bias_name)
            widths["rows"].append(())
        self.parameter_names = names[kind]
        self.index: Int[Tensor, " n"] = torch.empty(0, dtype=torch.long, device=site.device)
        self.tensors = [fresh(site, 0, *width) for width in widths[kind]]
        """(n, width) values, and for rows with a bias (n) values of that."""

    def at_hand(self, units: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
        """Return these units on the nodes' device."""
        return units.to(self.index.device)

    def add(self, units: Int[Tensor, " k"]) -> None:
        """Take in those of `units` that are not here yet, unchanged so far."""
        units = self.at_hand(units)
        new = units[~torch.isin(units, self.index)]
        if not len(new):
            return
        self.index = torch.cat([self.index, new])
        grown = [torch.cat([t.detach(), fresh(self.sites[0], len(new), *t.shape[1:]).detach()]) for t in self.tensors]
        self.tensors = [t.requires_grad_() for t in grown]

    def chosen(self, units: Int[Tensor, " k"]) -> Bool[Tensor, " n"]:
        """Return which of the nodes here are among `units`."""
        return torch.isin(self.index, self.at_hand(units))

    def parts(self) -> list[Part]:
        """Return what the nodes add to the module's output."""
        return self._parts(self.index, self.tensors)

    def averaged(self, sources: Int[Tensor, " s"], units: Int[Tensor, " k"]) -> list[Part]:
        """Return the mean change of the nodes at places `sources`, put on each of `units` in their place.

        Gradients flow into the sources.
        """
        index = self.at_hand(units)
        return self._parts(index, [t[sources].mean(0).expand(len(index), *t.shape[1:]) for t in self.tensors])

    def _parts(self, index: Int[Tensor, " n"], tensors: Sequence[Tensor]) -> list[Part]:
        if len(self.sites) == 1:
            return self._parts_of(self.sites[0], index, tensors)
        found = []
        for expert in (index // self.of_each).unique().tolist():
            here = index // self.of_each == expert
            found += self._parts_of(self.sites[expert], index[here] % self.of_each, [t[here] for t in tensors])
        return found

    def _parts_of(self, site: Site, index: Int[Tensor, " n"], tensors: Sequence[Tensor]) -> list[Part]:
        if self.kind == "columns":
            return [TrainedColumns(site, index, tensors[0])]
        if self.kind == "bias":
            return [TrainedBias(site, index, tensors[0])]
        return [TrainedRows(site, index, tensors[0]), *(TrainedBias(site, index, t) for t in tensors[1:])]


@dataclass(frozen=True)
class RowState:
    """Adam's memory of one tensor."""

    first: Tensor
    second: Tensor
    steps: Float[Tensor, " n"]

    @classmethod
    def fresh(cls, tensor: Tensor, steps: int | float = 0) -> "RowState":
        """Return a state with nothing remembered; `steps` counted so far, without a gradient."""
        zero = torch.zeros_like(tensor, requires_grad=False)
        return cls(zero, zero.clone(), torch.full((len(tensor),), steps, dtype=zero.dtype, device=zero.device))

    def grown(self, tensor: Tensor, kept: Bool[Tensor, " n"], steps: int | float = 0) -> "RowState":
        """Return the state once rows are added at the end; those not `kept` start fresh, with `steps` counted."""
        new = RowState.fresh(tensor, steps)
        old = kept[: len(self.steps)]
        for mine, theirs in ((new.first, self.first), (new.second, self.second), (new.steps, self.steps)):
            mine[: len(old)][old] = theirs[old]
        return new


@dataclass(frozen=True, kw_only=True)
class RowAdam:
    """Adam (Kingma and Ba 2015, no weight decay) on chosen rows of a tensor, with the steps counted per row."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @torch.no_grad()
    def step(self, tensor: Tensor, gradient: Tensor, state: RowState, rows: Bool[Tensor, " n"]) -> None:
        """Move `rows` of `tensor`, in place. All are computed: picking some needs their number on the CPU."""
        g, (b1, b2) = gradient, self.betas
        m = b1 * state.first + (1 - b1) * g
        v = b2 * state.second + (1 - b2) * g * g
        steps = state.steps + 1
        t, here = (x.view(-1, *[1] * (tensor.dim() - 1)) for x in (steps, rows))
        moved = tensor - self.learning_rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
        for kept, new in ((state.first, m), (state.second, v), (tensor, moved)):
            kept.copy_(torch.where(here, new, kept))
        state.steps.copy_(torch.where(rows, steps, state.steps))


class NodeAdam:
    """Adam on the chosen nodes of several matrices; nodes that stay chosen keep their momentum."""

    def __init__(self, nodes: Sequence[Nodes], learning_rate: float) -> None:
        self.nodes, self.adam = nodes, RowAdam(learning_rate=learning_rate)
        self.chosen = [torch.zeros_like(n.index, dtype=torch.bool) for n in nodes]
        self.memory = [[RowState.fresh(tensor) for tensor in n.tensors] for n in nodes]
        self.adams = [self.adam for _ in nodes]

    def weigh(self, weights: Sequence[float]) -> None:
        """Multiply the learning rate by one weight per matrix."""
        rate = self.adam.learning_rate
        self.adams = [replace(self.adam, learning_rate=rate * weight) for weight in weights]

    def choose(self, units: Sequence[Int[Tensor, " k"]]) -> None:
        """Step these units of each matrix from now on.

        Nodes that were chosen before keep their momentum, others start without.
        """
        for t, (nodes, wanted) in enumerate(zip(self.nodes, units, strict=True)):
            now = nodes.chosen(wanted)
            kept = now.clone()
            kept[: len(self.chosen[t])] &= self.chosen[t]
            kept[len(self.chosen[t]) :] = False
            self.memory[t] = [s.grown(x, kept) for s, x in zip(self.memory[t], nodes.tensors, strict=True)]
            self.chosen[t] = now

    def step(self) -> None:
        """Move the chosen nodes against their gradients."""
        for adam, nodes, memory, chosen in zip(self.adams, self.nodes, self.memory, self.chosen, strict=True):
            for tensor, state in zip(nodes.tensors, memory, strict=True):
                adam.step(tensor, gradient_of(tensor), state, chosen)


def gradient_of(tensor: Tensor) -> Tensor:
    """Return the gradient of a tensor: zeros where no loss depended on it, as on an expert that no token reached."""
    return torch.zeros_like(tensor, requires_grad=False) if tensor.grad is None else tensor.grad
