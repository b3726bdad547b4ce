"""Quantised matrices that stay packed: floats for the length of a product, and plain ones only while they are edited.

A packed module multiplies by its dequantised matrix, which exists for that product alone, forwards and backwards. So
gradients pass through, and the model computes bit for bit what the dequantised one does, whatever the quantiser's own
kernels would round besides (bitsandbytes' round activations to 8 bits, or scales to bfloat16, and those in place).
"""

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from retcon.errors import UnsupportedModel

_OWN = "_retcon_matrix"
"""Where a packed module finds its `PackedMatrix`."""


class _NotPickled:
    """What is copied like any other object, and not pickled: quantisers' pickles lose what their codes mean."""

    def __copy__(self) -> Any:
        made = self.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = self.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedModel(
            "a packed model cannot be pickled: its quantiser's pickles lose what the codes mean; load it where it is "
            "wanted, retcon.load(..., packed=True), and apply its deltas there (Delta.load)"
        )


class PackedMatrix(_NotPickled):
    """One quantised matrix of a model: packed, and a plain `nn.Linear` of floats while it shows an edit.

    The module stays the same object in both states, with its hooks; its class and its weight are exchanged. The packed
    weight is kept as it is meanwhile, and is what comes back.
    """

    def __init__(self, module: Any, packing: str, dtype: torch.dtype) -> None:
        self.module = module
        self.packing = packing
        """Which quantiser packed it, and in how many bits."""
        self.dtype = dtype
        """Of the dequantised matrix."""
        self.shape = torch.Size((module.out_features, module.in_features))
        self.stored: Tensor = module.weight
        """The packed weight."""
        given: Any = type(module)
        self._given = given
        self._values: nn.Parameter | None = None
        module.__dict__[_OWN] = self
        self._exchange(_multiplying(self._given), None)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.stored.device

    @property
    def shows_floats(self) -> bool:
        """Whether the float weight is in place."""
        return self.module._parameters["weight"] is not self.stored

    def floats(self) -> Tensor:
        """Return the packed weight dequantised, (out, in): a new tensor at every call."""
        return dequantised(self.stored, self.module).to(self.dtype)

    def weight(self) -> Tensor:
        """Return the current matrix (out, in): the float weight while there is one, else the dequantised."""
        return self.floats() if self._values is None else self._values

    def tensors(self) -> Iterator[Tensor]:
        """Yield what is in memory for the packed weight: codes, and what scales them."""
        yield from _tensors(self.stored, self.module)

    def hold(self) -> None:
        """Make the float weight, which edits are written to, unless it is there. The module does not show it yet."""
        if self._values is None:
            self._values = nn.Parameter(self.floats(), requires_grad=False)

    def bring(self, *, held: bool, shown: bool) -> None:
        """Put the float weight in place, or the packed one, and drop the float one unless `held`. Repeatable."""
        values = self._values if shown else None
        self._exchange(_multiplying(self._given) if values is None else nn.Linear, values)
        if not held:
            self._values = None

    def give_back(self) -> None:
        """Leave the module as it was found."""
        self._exchange(self._given, None)
        self._values = None
        self.module.__dict__.pop(_OWN, None)

    def _exchange(self, kind: Any, values: nn.Parameter | None) -> None:
        module: Any = self.module
        wanted = self.stored if values is None else values
        if type(module) is not kind or module._parameters["weight"] is not wanted:
            module._parameters["weight"] = wanted
            module.__class__ = kind  # one object in both states, so that hooks and whoever holds it stay right


class _Product(torch.autograd.Function):
    """x W^T + b, W dequantised for this product alone and again for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: PackedMatrix) -> Tensor:
        ctx.matrix = matrix
        return nn.functional.linear(x, matrix.floats(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (of_output,) = gradients
        of_input = of_output @ ctx.matrix.floats() if ctx.needs_input_grad[0] else None
        of_bias = of_output.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return of_input, of_bias, None


@cache
def _multiplying(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the quantiser's class with `_Product` as its forward pass; all else, saving above all, is its own."""

    def forward(self: Any, x: Tensor) -> Any:
        return _Product.apply(x, self.bias, self.__dict__[_OWN])

    return type(kind.__name__, (_NotPickled, kind), {"forward": forward, "__module__": kind.__module__, "given": kind})


def packed_matrices(model: nn.Module, dtype: torch.dtype) -> dict[str, PackedMatrix]:
    """Return a model's packed matrices by the names of their parameters; their modules multiply by floats from now on.

    Args:
        dtype: of the floats.

    Raises:
        UnsupportedModel: a matrix has been run already in a way that changed what it holds.
    """
    modules = {path: (module, packing) for path, module in model.named_modules() if (packing := packing_of(module))}
    for path, (module, _) in modules.items():
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModel(
                f"{path} has run on this CPU, and bitsandbytes rounded its scales to bfloat16 in place; load the model "
                "again and give it to retcon before it runs (retcon.load(..., packed=True) does)"
            )
    found: dict[str, PackedMatrix] = {}
    for path, (module, packing) in modules.items():
        if own := module.__dict__.get(_OWN):  # an LM that is gone left it, or it was copied with its model
            own.give_back()
        found[f"{path}.weight"] = PackedMatrix(module, packing, dtype)
    return found


def packing_of(module: nn.Module) -> str | None:
    """Return how a module's matrix is packed, None where it is not, or not in a way that can be undone here."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None:
        return None
    if type(weight).__name__ == "Params4bit":
        return "bitsandbytes 4-bit" if getattr(weight, "quant_state", None) is not None else None
    if type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8:
        return "bitsandbytes 8-bit"
    if _is_torchao(weight):
        return f"torchao {type(weight).__name__}"
    return None


def _is_torchao(weight: Tensor) -> bool:
    return is_traceable_wrapper_subclass(weight) and type(weight).__module__.partition(".")[0] == "torchao"


def dequantised(weight: Tensor, module: Any) -> Tensor:
    """Return a packed weight as floats, as transformers dequantises it."""
    if _is_torchao(weight):
        with torch.no_grad():  # in inference mode its `detach` fails
            return weight.dequantize()
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, getattr(module, "state", None))


def _tensors(weight: Any, module: Any) -> Iterator[Tensor]:
    if _is_torchao(weight):
        yield from (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
        return
    yield weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        scales = [state.absmax, state.code]
        if state.nested:  # the scales are quantised, too
            scales += [state.offset, state.state2.absmax, state.state2.code]
    else:
        scales = [weight.SCB if weight.SCB is not None else module.state.SCB]
    yield from scales


class Parameters(Mapping[str, Tensor]):
    """A model's parameters by name, packed ones as floats: those in place, or new ones at every look."""

    def __init__(self, model: nn.Module, packed: Mapping[str, PackedMatrix]) -> None:
        self._own = dict(model.named_parameters(remove_duplicate=False))  # a tied name is known, and refused
        self._packed = packed

    def __getitem__(self, name: str) -> Tensor:
        return self._packed[name].weight() if name in self._packed else self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def __contains__(self, name: object) -> bool:
        return name in self._own

    def stored(self, name: str) -> list[Tensor]:
        """Return what is in memory for a parameter while nothing is applied."""
        return list(self._packed[name].tensors()) if name in self._packed else [self._own[name]]
