"""Routed experts as transformers stores and runs them: one tensor per projection, (experts, ., .), tokens flattened.

Their output is sum_e g_e (W_e k_e + b_e) over the experts that a token is routed to, g_e the router's weight. So they
are one linear map of the keys g_e k_e, and writing to several of them at once is one linear problem.

What is trained or scaled in some of them is an `ExpertChange` of what an expert computes: the experts' module runs as
ever, and a hook on it adds what the change makes of the expert's output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Tokens(NamedTuple):
    """Some of the tokens that enter the experts."""

    numbers: Int[Tensor, " n"]
    total: int
    """How many tokens enter."""


Step = Callable[[Tensor, Tensor, Tokens], Tensor]
"""(inputs of a matrix, its outputs without bias, the tokens that these are of) -> other outputs."""


def expert_key(
    module: nn.Module,
    expert: int,
    states: Float[Tensor, "tokens d_model"],
    index: Int[Tensor, "tokens top_k"],
    weights: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens d_ff"]:
    """Return g_e k_e: what enters the expert's down-projection times the router's weight, 0 where it is not asked.

    Args:
        states: what enters the experts.
        index: which experts each token is routed to.
        weights: the router's weights of these.
    """
    experts: Any = module
    tokens, weight = _routed(expert, index, weights)
    product, bias = _inner(experts, expert, states[tokens])
    key = _key(experts, product + bias, weight)
    return key.new_zeros(len(states), key.shape[1]).index_copy_(0, tokens, key)


def expert_matrix(module: nn.Module, kind: str) -> tuple[str | None, Int[Tensor, " rows"] | None]:
    """Return the parameter that holds the experts' matrices of a kind, and which of its output rows are theirs.

    None for the parameter: these experts have no such matrix. None for the rows: all.
    """
    experts: Any = module
    if kind == "down_proj":
        return "down_proj", None
    if not experts.has_gate:
        return ("up_proj", None) if kind == "up_proj" else (None, None)
    width = experts.gate_up_proj.shape[2 if experts.is_transposed else 1]
    second = kind == "up_proj"
    if getattr(experts, "is_concatenated", True):
        return "gate_up_proj", torch.arange(width // 2) + (width // 2 if second else 0)
    return "gate_up_proj", torch.arange(width // 2) * 2 + int(second)


@dataclass(frozen=True)
class ExpertChange:
    """What is done otherwise in one routed expert."""

    expert: int
    step: Step
    down: bool
    """Whether it changes what the down-projection puts out, whose inputs are g_e k_e, or what enters the activation."""


_CHANGES: WeakKeyDictionary[nn.Module, list[ExpertChange]] = WeakKeyDictionary()
"""What is in force on each module that holds experts, in order."""


@contextmanager
def changed(module: nn.Module, changes: Sequence[ExpertChange]) -> Iterator[None]:
    """Change the experts while the scope lasts, after those that are in force already."""
    active = _CHANGES.setdefault(module, [])
    handle = None
    try:
        if not active:
            handle = module.register_forward_hook(_changed_output, with_kwargs=True)
        active.extend(changes)
        yield
    finally:
        for change in changes:
            active[:] = [other for other in active if other is not change]
        if handle is not None:
            handle.remove()


def _changed_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    states, index, weights = (*args, *kwargs.values())
    active = _CHANGES[module]
    for expert in sorted({change.expert for change in active}):
        tokens, weight = _routed(expert, index, weights)
        if not len(tokens):
            continue
        here = [change for change in active if change.expert == expert]
        added = _difference(module, expert, states[tokens], weight, Tokens(tokens, len(states)), here)
        output = output.index_add(0, tokens, added.to(output.dtype))
    return output


def _difference(
    module: Any, expert: int, states: Tensor, weight: Tensor, tokens: Tokens, changes: Sequence[ExpertChange]
) -> Tensor:
    """Return what an expert puts out with the changes, less what it does without, for the tokens it gets."""
    wide = torch.promote_types(states.dtype, torch.float32)
    product, bias = _inner(module, expert, states)
    before, inner = product + bias, product.to(wide)
    for change in changes:
        if not change.down:
            inner = change.step(states.to(wide), inner, tokens)
    inner = inner + bias
    down = module.down_proj[expert] if module.is_transposed else module.down_proj[expert].T
    old = (_key(module, before, weight) @ down).to(wide)
    key = _key(module, inner, weight)
    new = old if all(change.down for change in changes) else (key.to(down.dtype) @ down).to(wide)
    for change in changes:
        if change.down:
            new = change.step(key, new, tokens)
    return new - old


def _routed(
    expert: int, index: Int[Tensor, "tokens top_k"], weights: Float[Tensor, "tokens top_k"]
) -> tuple[Int[Tensor, " routed"], Float[Tensor, " routed"]]:
    """Return the numbers of the tokens that are routed to an expert, and the router's weights of it."""
    chosen = index == expert
    tokens = chosen.any(-1).nonzero()[:, 0]
    return tokens, (weights * chosen).sum(-1)[tokens]


def _inner(
    experts: Any, expert: int, states: Float[Tensor, "tokens d_model"]
) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, " width"]]:
    """Return what enters the activation, in two terms: the first matrix's outputs, and its bias."""
    first = (experts.gate_up_proj if experts.has_gate else experts.up_proj)[expert]
    inner = states @ (first if experts.is_transposed else first.T)
    if experts.has_bias:
        return inner, (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias)[expert]
    return inner, inner.new_zeros(inner.shape[-1])


def _key(
    experts: Any, inner: Float[Tensor, "tokens width"], weight: Float[Tensor, " tokens"]
) -> Float[Tensor, "tokens d_ff"]:
    """Return g_e k_e of the tokens that are routed to the expert."""
    key: Tensor = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return key * weight.to(key.dtype)[:, None]


def routing_similarity(
    before: Int[Tensor, "tokens top_k"], after: Int[Tensor, "tokens top_k"]
) -> Float[Tensor, " tokens"]:
    """Return |S and S'| / |S or S'| of the experts that each token is routed to before and after a change."""
    shared = (before[:, :, None] == after[:, None, :]).any(-1).sum(-1)
    return shared / (before.shape[1] + after.shape[1] - shared)
