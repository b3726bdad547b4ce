"""What may change, and nothing else: trainable pieces of a matrix, added where its module puts out its result.

A part holds compact values (float32 or wider) for rows, columns, entries, low-rank factors or the whole of one matrix
in math orientation, W (out x in). While parts are `attached`, forward hooks add what they contribute; the weights
themselves are never touched, so that autograd computes activation gradients and the gradient of the parts' values
only.
`changes` gives the same change as data, in stored orientation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from retcon.arguments import check_choice
from retcon.delta import Change, Dense, Entries, LowRank
from retcon.lm.experts import ExpertChange, Tokens, changed
from retcon.lm.site import Site, Unit

_BLOCK = 2**22  # token x entry products formed at a time


@runtime_checkable
class Part(Protocol):
    """One trainable piece."""

    @property
    def module(self) -> nn.Module:
        """The module at whose output it is added; a part of a routed expert's matrix inside the experts' module."""

    @property
    def parameter(self) -> str:
        """Name of the parameter that it changes."""

    def trained(self) -> list[Tensor]:
        """Return its tensors, for an optimiser."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the module's output `y` (..., out) with the piece's part at the input `x` (..., in), out of place."""

    def change(self) -> tuple[str, Change]:
        """Return parameter name and change, in stored orientation, detached and on the CPU."""


@dataclass(frozen=True, eq=False)
class _OnSite:
    """A piece that changes the matrix of a site."""

    site: Site

    @property
    def module(self) -> nn.Module:
        return self.site.module

    @property
    def parameter(self) -> str:
        return self.site.name


@dataclass(frozen=True, eq=False)
class _Units(_OnSite):
    """A row of values for each of some units of one matrix; what a unit is, its kinds below say."""

    index: Int[Tensor, " n"]
    values: Float[Tensor, "n ..."]
    scale: float = 1.0

    def trained(self) -> list[Tensor]:
        return [self.values]

    def _added(self) -> tuple[Int[Tensor, " n"], Float[Tensor, "n ..."]]:
        """Return the units, and scale * values."""
        return self.index.cpu(), self.scale * self.values.detach().cpu()


class TrainedRows(_Units):
    """dW[index] = scale * values (n, in): output units."""

    def add(self, x: Float[Tensor, "*rows in"], y: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        return y.index_add(-1, self.site.outputs(self.index), self.scale * (x @ self.values.T))

    def change(self) -> tuple[str, Change]:
        return self.site.name, self.site.stored_rows(*self._added())


class TrainedColumns(_Units):
    """dW[:, index] = scale * values.T, values (n, out): input units."""

    def add(self, x: Float[Tensor, "*rows in"], y: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        return _add_to_site(self.site, y, self.scale * (x[..., self.index] @ self.values))

    def change(self) -> tuple[str, Change]:
        index, values = self._added()
        return self.site.name, self.site.stored_columns(index, values.T.contiguous())


class TrainedEntries(_Units):
    """dW at the places `index`, counted row by row through W, = scale * values (n)."""

    def add(self, x: Float[Tensor, "*rows in"], y: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        width = x.shape[-1]
        rows = self.site.outputs(self.index // width)
        return y + self.scale * _Scattered.apply(x, self.values, rows, self.index % width, y.shape[-1])

    def change(self) -> tuple[str, Change]:
        return self.site.name, self.site.stored_entries(*self._added())


class TrainedBias(_Units):
    """The bias of output units `index` gets scale * values (n)."""

    @property
    def parameter(self) -> str:
        return self.site.bias_name

    def weight(self) -> Tensor:
        """Return what `values` are added to, in their precision."""
        bias = self.site.bias
        assert bias is not None
        return bias[self.index].to(self.values.dtype)

    def add(self, x: Float[Tensor, "*rows in"], y: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        contribution = (self.scale * self.values).expand(*y.shape[:-1], -1)
        return y.index_add(-1, self.site.outputs(self.index), contribution)

    def change(self) -> tuple[str, Change]:
        index, values = self._added()
        return self.site.bias_name, Entries(index=self.site.outputs(index), entries=values)


@dataclass(frozen=True, eq=False)
class TrainedLowRank(_OnSite):
    """dW = scale * left @ right."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    scale: float = 1.0

    def trained(self) -> list[Tensor]:
        return [self.left, self.right]

    def add(self, x: Float[Tensor, "*rows in"], y: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        return _add_to_site(self.site, y, self.scale * (x @ self.right.T @ self.left.T))

    def change(self) -> tuple[str, Change]:
        left, right = self.scale * self.left.detach().cpu(), self.right.detach().cpu()
        if self.site.rows is not None:
            return self.site.name, self.site.stored(left, right)
        if self.site.transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        factors = LowRank(left=left, right=right)  # kept as factors: adapters hold nothing else
        return self.site.name, self.site.in_parameter(factors)


@dataclass(frozen=True, eq=False)
class LowRankByRow(_OnSite):
    """A change of its own for each row of a batch: dW_b = left_b^T right_b. It exists in a forward pass only."""

    left: Float[Tensor, "batch rank out"]
    right: Float[Tensor, "batch rank in"]

    def trained(self) -> list[Tensor]:
        return [self.left, self.right]

    def add(self, x: Float[Tensor, "*rows in"], y: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        rows = x.reshape(len(self.left), -1, x.shape[-1])  # OPT's fc2 sees (batch x seq, width)
        added = rows @ self.right.mT @ self.left
        return _add_to_site(self.site, y, added.reshape(*y.shape[:-1], -1))

    def change(self) -> tuple[str, Change]:
        raise TypeError("a change by row of a batch is none of the weights")


@dataclass(frozen=True, eq=False)
class TrainedTriplets(_OnSite):
    """dW = scale * left @ diag(singular) @ right: factors that stay even where their singular value is 0."""

    left: Float[Tensor, "out rank"]
    singular: Float[Tensor, " rank"]
    right: Float[Tensor, "rank in"]
    scale: float = 1.0

    def trained(self) -> list[Tensor]:
        return [self.left, self.singular, self.right]

    def add(self, x: Float[Tensor, "*rows in"], y: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        return _add_to_site(self.site, y, self.scale * (x @ self.right.T * self.singular) @ self.left.T)

    def change(self) -> tuple[str, Change]:
        kept = self.singular.detach() != 0
        left = (self.left * self.singular).detach()[:, kept]
        return TrainedLowRank(self.site, left, self.right.detach()[kept], self.scale).change()


@dataclass(frozen=True, eq=False)
class TrainedDense(_OnSite):
    """dW = values."""

    values: Float[Tensor, "out in"]

    def trained(self) -> list[Tensor]:
        return [self.values]

    def weight(self) -> Tensor:
        """Return what `values` are added to, in their precision."""
        return self.site.weight.to(self.values.dtype)

    def add(self, x: Float[Tensor, "*rows in"], y: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        return _add_to_site(self.site, y, x @ self.values.T)

    def change(self) -> tuple[str, Change]:
        return self.site.name, self.site.stored_dense(self.values.detach().cpu())


@dataclass(frozen=True, eq=False)
class TrainedParameter:
    """A whole parameter of any module whose output is affine in it: a matrix, a bias, a norm's gain, an embedding."""

    module: nn.Module
    parameter: str
    """Its full name."""
    values: Tensor
    """What is added to it, in its own shape."""

    def trained(self) -> list[Tensor]:
        return [self.values]

    def weight(self) -> Tensor:
        """Return what `values` are added to, in their precision."""
        own: Tensor = getattr(self.module, self.parameter.rpartition(".")[2]).detach()
        return own.to(self.values.dtype)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        contribution = self._output(x, self.values)
        if self.values.dim() == 1:  # Gemma's norms multiply by 1 + w; a matrix's module adds nothing of its own
            contribution = contribution - self._output(x, torch.zeros_like(self.values))
        return y + contribution

    def change(self) -> tuple[str, Change]:
        return self.parameter, Dense(full=self.values.detach().cpu())

    def _output(self, x: Tensor, values: Tensor) -> Tensor:
        """Return the module's output with `values` in place of the parameter, and zeros in place of its others."""
        own = self.parameter.rpartition(".")[2]
        others = {n: values.new_zeros(()).expand(p.shape) for n, p in self.module.named_parameters() if n != own}
        named = {f"inner.{n}": tensor for n, tensor in (others | {own: values}).items()}
        found: Tensor = torch.func.functional_call(_WithoutHooks(self.module), named, (x,))
        return found


class _WithoutHooks(nn.Module):
    """A module's own computation, past the hooks that are on it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner.forward(x)


Whole = TrainedDense | TrainedBias | TrainedParameter
"""A part of a parameter of which every value is trained; `weight()` is what its values are added to."""


def trained_units(
    site: Site, unit: Unit, index: Int[Tensor, " n"], scale: float
) -> TrainedRows | TrainedColumns | TrainedEntries:
    """Return a part over some rows, columns or entries of a matrix, zero so far.

    Raises:
        InvalidSetting: no such unit.
    """
    check_choice(unit, Unit, "unit")
    index, n, (out, into) = index.to(site.device), len(index), site.shape
    if unit == "row":
        return TrainedRows(site, index, fresh(site, n, into), scale)
    if unit == "column":
        return TrainedColumns(site, index, fresh(site, n, out), scale)
    return TrainedEntries(site, index, fresh(site, n), scale)


def whole(site: Site, *, bias: bool = True) -> list[Whole]:
    """Return all of a matrix, unchanged so far, and of its bias where it has one and that is wanted too."""
    out, into = site.shape
    parts: list[Whole] = [TrainedDense(site, fresh(site, out, into))]
    if bias and site.bias is not None:
        parts.append(TrainedBias(site, torch.arange(out, device=site.device), fresh(site, out)))
    return parts


def whole_parameter(module: nn.Module, name: str) -> TrainedParameter:
    """Return a parameter of `module`, by its full name, unchanged so far."""
    own: Tensor = getattr(module, name.rpartition(".")[2])
    dtype = torch.promote_types(own.dtype, torch.float32)
    return TrainedParameter(module, name, torch.zeros(own.shape, dtype=dtype, device=own.device, requires_grad=True))


def fresh(site: Site, *shape: int) -> Tensor:
    """Return zeros to be trained, on the site's device, in float32 or the weight's dtype where that is wider."""
    dtype = torch.promote_types(site.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype, device=site.device, requires_grad=True)


@contextmanager
def attached(parts: Iterable[Part]) -> Iterator[None]:
    """Add the parts' contributions to the model while the scope lasts; several parts of one module add up in order."""
    by_module: dict[nn.Module, list[Part]] = {}
    for part in parts:
        by_module.setdefault(part.module, []).append(part)
    with ExitStack() as stack:
        for module, here in by_module.items():
            if _expert(here[0]) is None:
                stack.enter_context(module.register_forward_hook(_adding(here)))
            else:
                stack.enter_context(changed(module, [_expert_change(part) for part in here]))
        yield


def changes(parts: Iterable[Part]) -> dict[str, list[Change]]:
    """Return what the parts add to the weights, by parameter, in stored orientation; what adds nothing is left out."""
    found: dict[str, list[Change]] = {}
    for part in parts:
        if not all(bool(tensor.detach().any()) for tensor in part.trained()):
            continue
        name, change = part.change()
        found.setdefault(name, []).append(change)
    return found


def _adding(parts: Sequence[Part]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    wide = parts[0].trained()[0].dtype

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].to(wide) if args[0].is_floating_point() else args[0]  # an embedding reads token ids
        y = output.to(wide)
        for part in parts:
            y = part.add(x, y)
        return y.to(output.dtype)

    return hook


def _expert(part: Part) -> int | None:
    site: Site | None = getattr(part, "site", None)
    return None if site is None else site.expert


def _expert_change(part: Any) -> ExpertChange:
    def step(x: Tensor, y: Tensor, _: Tokens) -> Tensor:
        wide = part.trained()[0].dtype
        added: Tensor = part.add(x.to(wide), y.to(wide))
        return added

    return ExpertChange(part.site.expert, step, down=part.site.kind == "down_proj")


def _add_to_site(
    site: Site, y: Float[Tensor, "*rows out"], contribution: Float[Tensor, "*rows of_site"]
) -> Float[Tensor, "*rows out"]:
    if site.rows is None:
        return y + contribution
    return y.index_add(-1, site.rows.to(y.device), contribution)


class _Scattered(torch.autograd.Function):
    """x @ dW.T for a dW given by scattered entries, with neither dW nor its gradient ever formed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(x, values, rows, columns)
        flat = x.reshape(-1, x.shape[-1])
        total = flat.new_zeros(len(flat), width)
        for here in _blocks(len(values), len(flat)):
            total.index_add_(1, rows[here], flat[:, columns[here]] * values[here])
        return total.view(*x.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values, rows, columns = ctx.saved_tensors
        g, flat = grads[0].reshape(-1, grads[0].shape[-1]), x.reshape(-1, x.shape[-1])
        to_x, to_values = torch.zeros_like(flat), torch.empty_like(values)
        for here in _blocks(len(values), len(flat)):
            there = g[:, rows[here]]
            to_x.index_add_(1, columns[here], there * values[here])
            to_values[here] = (there * flat[:, columns[here]]).sum(0)
        return to_x.view_as(x), to_values, None, None, None


def _blocks(n: int, n_tokens: int) -> Iterator[slice]:
    size = max(1, _BLOCK // max(1, n_tokens))
    return (slice(first, min(first + size, n)) for first in range(0, n, size))
