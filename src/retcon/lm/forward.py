"""Reading and changing activations: one forward pass with taps that exist only while it runs.

A tap is a function at a `Point`; it sees the activation as (batch, seq, width) and may return a replacement. Nothing is
changed in place, and every hook is gone when the pass ends, whether it ends well or not.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from retcon.lm.prompts import Batch

if TYPE_CHECKING:
    from retcon.lm.model import LM

TensorName = Literal["key", "mlp", "attn_key", "attn", "block"]
"""`key` and `mlp` are input and output of the down-projection, `attn_key` and `attn` of the attention out-projection
(all before any post-norm), `block` is the block's output, the residual stream."""

Hook = Callable[[Float[Tensor, "batch seq width"]], Float[Tensor, "batch seq width"] | None]


@dataclass(frozen=True, order=True)
class Point:
    """An activation: which tensor of which block, counted from 0."""

    layer: int
    tensor: TensorName


class Stop(Exception):
    """Ends a forward pass after the last tap."""


def run(
    lm: "LM",
    batch: Batch,
    hooks: Mapping[Point, Hook],
    logits_at: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None = None,
) -> Float[Tensor, "n vocab"] | None:
    """One forward pass of the model's own code over right-padded rows.

    Args:
        taps: what to do at each point; several points of one pass do not disturb each other.
        logits_at: (rows, positions) at which the vocabulary projection is computed, and only there. None: the pass ends
            after the deepest tapped point.

    Returns:
        The logits there, in the model's dtype, or None.
    """
    # No padding mask: right padding comes after every token that attention lets a token see, and a mask would
    # leave padded rows of sliding-window models with nothing to attend to, which is NaN and spreads.
    inputs = dict(input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), use_cache=False)
    return forward_with_hooks(lm, batch.ids.shape, inputs, hooks, logits_at)


def forward_with_hooks(
    lm: "LM",
    shape: tuple[int, ...],
    inputs: Mapping[str, Any],
    hooks: Mapping[Point, Hook],
    logits_at: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None,
) -> Float[Tensor, "n vocab"] | None:
    """`run` for any inputs of the model's forward; `shape` is (rows, tokens)."""
    waiting = set(hooks)

    def call(point: Point, value: Tensor) -> Tensor | None:
        flat = value.dim() == 2  # OPT's fc2 sees (batch x seq, width)
        seen = value.view(*shape, -1) if flat else value
        new = hooks[point](seen)
        waiting.discard(point)
        if logits_at is None and not waiting:
            raise Stop
        return new.reshape(value.shape) if new is not None and flat else new

    with ExitStack() as stack:
        for point in hooks:
            handle = _hook(lm, point, call)
            stack.callback(handle.remove)
        if logits_at is not None:
            rows, positions = logits_at
            gather = _gather_hook(rows, positions)
            stack.callback(lm.head.register_forward_pre_hook(gather).remove)
        try:
            output = lm.model(**inputs)
        except Stop:
            return None
    if waiting:
        raise AssertionError(f"the forward pass never reached {sorted(waiting)}")
    return output.logits[0] if logits_at is not None else None


def activations(
    lm: "LM", batch: Batch, positions: Mapping[Point, Int[Tensor, " batch"]]
) -> dict[Point, Float[Tensor, "batch width"]]:
    """The activation of each point at one position per row, in the model's dtype."""
    found: dict[Point, Tensor] = {}
    everyone = torch.arange(len(batch))

    def reader(point: Point, where: Tensor) -> Hook:
        def read(value: Tensor) -> None:
            found[point] = value[everyone.to(value.device), where.to(value.device)].detach()

        return read

    with torch.no_grad():
        run(lm, batch, {p: reader(p, w) for p, w in positions.items()})
    return found


def adding(rows: Int[Tensor, " n"], positions: Int[Tensor, " n"], vectors: Float[Tensor, "n width"]) -> Hook:
    """A tap that adds vectors (n, width) at (row, position), out of place, in the activation's dtype."""

    def add(value: Tensor) -> Tensor:
        where = rows.to(value.device), positions.to(value.device)
        return value.index_put(where, vectors.to(value.device, value.dtype), accumulate=True)

    return add


def _hook(lm: "LM", point: Point, call: Callable[[Point, Tensor], Tensor | None]) -> Any:
    module = _module(lm, point)
    if point.tensor in ("key", "attn_key"):

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            new = call(point, args[0])
            return None if new is None else (new, *args[1:])

        return module.register_forward_pre_hook(before)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output  # blocks return a tensor or (tensor, ...)
        new = call(point, first)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(after)


def _module(lm: "LM", point: Point) -> nn.Module:
    if point.tensor == "block":
        return lm.block(point.layer)
    return lm.site(point.layer, "down_proj" if point.tensor in ("key", "mlp") else "o_proj").module


def _gather_hook(rows: Tensor, positions: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A pre-hook that hands the head only the wanted positions, as one row: (1, n, d_model)."""

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), positions.to(hidden.device)][None], *args[1:])

    return gather
