"""Running a model, written once: hidden states and hooks, logits at places, log-probabilities of answers.

A hook is a function at a `Point`; it sees the activation as (batch, seq, width) and may return a replacement. Nothing
is changed in place, and every hook is gone when the pass ends, whether it ends well or not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from retcon.lm.experts import expert_key
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, Row, pad

TensorName = Literal["key", "mlp", "attn_key", "attn", "block"]
"""`key` and `mlp` are input and output of the down-projection, `attn_key` and `attn` of the attention out-projection
(all before any post-norm), `block` is the block's output, the residual stream."""

Hook = Callable[[Float[Tensor, "batch seq width"]], Float[Tensor, "batch seq width"] | None]


@dataclass(frozen=True, order=True)
class Point:
    """An activation: which tensor of which block, counted from 0."""

    layer: int
    tensor: TensorName
    expert: int | None = None
    """With `key`: of this routed expert, times the router's weight, 0 where a token is not routed to it; read only."""


Places = tuple[Int[Tensor, " n"], Int[Tensor, " n"]]
"""(rows, positions) of a batch."""


@dataclass(frozen=True)
class Inputs:
    """What one pass of a model's own forward is given."""

    shape: tuple[int, int]
    """(rows, tokens)."""
    arguments: Mapping[str, Any]
    """Of the model's forward."""
    first: int = 0
    """First block that is run; of those below, only the output of the last one can be hooked."""
    planned: bool = False
    """Whether many passes have these shapes."""

    @classmethod
    def of(cls, batch: Batch) -> "Inputs":
        """Take right-padded rows, which are run without a padding mask.

        Right padding comes after every token that attention lets a token see, and a mask would leave padded rows of
        sliding-window models with nothing to attend to, which is NaN and spreads.
        """
        rows, tokens = batch.ids.shape
        mask = torch.ones_like(batch.ids)
        return cls((rows, tokens), dict(input_ids=batch.ids, attention_mask=mask, use_cache=False))


class StopForward(Exception):
    """Ends a forward pass after the last hook."""


def run(lm: LM, inputs: Batch | Inputs, hooks: Mapping[Point, Hook]) -> None:
    """Run one forward pass of the model's own code, as far as the deepest hooked point.

    Args:
        hooks: what to do at each point; several points of one pass do not disturb each other.
    """
    waiting = set(hooks)

    def seen(point: Point) -> None:
        waiting.discard(point)
        if not waiting:
            raise StopForward

    try:
        _forward(lm, inputs, hooks, seen)
    except StopForward:
        return
    if waiting:
        raise AssertionError(f"the forward pass never reached {sorted(waiting)}")


def logits_at(
    lm: LM, inputs: Batch | Inputs, places: Places, hooks: Mapping[Point, Hook] | None = None
) -> Float[Tensor, "n vocab"]:
    """Return the next-token logits at (row, position) pairs, in the model's dtype, from one forward pass.

    The vocabulary projection is computed there and nowhere else. They are on `lm.device`, wherever the head is.
    """
    waiting = set(hooks or {})
    with lm.head.register_forward_pre_hook(_gather_hook(*places)):
        output = _forward(lm, inputs, hooks or {}, waiting.discard)
    if waiting:
        raise AssertionError(f"the forward pass never reached {sorted(waiting)}")
    logits: Tensor = output.logits[0]
    return logits.to(lm.device)


def _forward(lm: LM, inputs: Batch | Inputs, hooks: Mapping[Point, Hook], seen: Callable[[Point], None]) -> Any:
    """Run the model's own forward with hooks; `seen` is called with every point whose hook has run."""
    if isinstance(inputs, Batch):
        inputs = Inputs.of(inputs)
    shape, first = inputs.shape, inputs.first
    if below := [p for p in hooks if p.layer < first and p != Point(first - 1, "block")]:
        raise ValueError(f"a pass from block {first} on does not run {below}")

    def call(point: Point, value: Tensor) -> Tensor | None:
        flat = value.dim() == 2  # OPT's fc2 sees (batch x seq, width)
        new = hooks[point](value.view(*shape, -1) if flat else value)
        seen(point)
        return new.reshape(value.shape) if new is not None and flat else new

    with ExitStack() as stack:
        if not inputs.planned:
            stack.enter_context(unplanned_attention())
        for point in hooks:
            stack.enter_context(_hook(lm, point, call))
        return lm.model(**inputs.arguments)


@contextmanager
def unplanned_attention() -> Iterator[None]:
    """Inside, attention on a card makes no plan for its shapes: one of cuDNN's takes milliseconds, and is of use to
    passes of exactly these shapes only."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# --- answers -------------------------------------------------------------------------------------------------------


def input_rows(rows: Sequence[Row]) -> list[Row]:
    """Drop the last answer token of each row: it is only predicted."""
    return [replace(row, ids=row.ids[:-1]) for row in rows]


def answer_places(rows: Sequence[Row]) -> Places:
    """Return the (row, position) of every position that predicts an answer token, row by row."""
    places = [(i, row.n_prompt - 1 + j) for i, row in enumerate(rows) for j in range(len(row.target_ids))]
    at, positions = zip(*places, strict=True)
    return torch.tensor(at), torch.tensor(positions)


def answer_log_probs(lm: LM, rows: Sequence[Row]) -> Float[Tensor, "n vocab"]:
    """Return log-probabilities at `answer_places(rows)`, from one pass in the surrounding gradient mode."""
    return log_probs(logits_at(lm, pad(input_rows(rows), lm.device), answer_places(rows)))


def next_log_probs(lm: LM, rows: Sequence[Row]) -> Float[Tensor, "n vocab"]:
    """Return log-probabilities of the token after each row's prompt, from one pass."""
    last = torch.tensor([row.prediction for row in rows])
    return log_probs(logits_at(lm, pad(rows, lm.device), (torch.arange(len(rows)), last)))


def log_probs(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Normalise logits, in float32 or wider, whatever the model's dtype."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def gold(
    log_p: Float[Tensor, "n vocab"], rows: Sequence[Row], labels: Sequence[Sequence[int]] | None = None
) -> Float[Tensor, " n"]:
    """Pick the answer tokens' own log-probabilities (or those of `labels`, one list of token ids per row)."""
    tokens = [t for row in rows for t in row.target_ids] if labels is None else [t for row in labels for t in row]
    return log_p.gather(1, torch.tensor(tokens, device=log_p.device)[:, None])[:, 0]


# --- activations ---------------------------------------------------------------------------------------------------


def activations(
    lm: LM, batch: Batch, positions: Mapping[Point, Int[Tensor, " batch"]]
) -> dict[Point, Float[Tensor, "batch width"]]:
    """Return the activation of each point at one position per row, in the model's dtype."""
    found: dict[Point, Tensor] = {}
    everyone = torch.arange(len(batch))

    def reader(point: Point, where: Tensor) -> Hook:
        def read(value: Tensor) -> None:
            found[point] = value[everyone.to(value.device), where.to(value.device)].detach()

        return read

    with torch.no_grad():
        run(lm, batch, {p: reader(p, w) for p, w in positions.items()})
    return found


def reading(
    into: dict[Any, Tensor], key: Any, pick: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], None]:
    """Return a hook that keeps an activation, or what `pick` takes of it, as `into[key]`."""

    def read(value: Tensor) -> None:
        into[key] = value if pick is None else pick(value)

    return read


def adding(rows: Int[Tensor, " n"], positions: Int[Tensor, " n"], vectors: Float[Tensor, "n width"]) -> Hook:
    """Return a hook that adds vectors (n, width) at (row, position), out of place, in the activation's dtype."""

    def add(value: Tensor) -> Tensor:
        where = rows.to(value.device), positions.to(value.device)
        return value.index_put(where, vectors.to(value.device, value.dtype), accumulate=True)

    return add


def _hook(lm: LM, point: Point, call: Callable[[Point, Tensor], Tensor | None]) -> Any:
    if point.expert is not None:
        return _expert_hook(lm, point, point.expert, call)
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
            if point.tensor != "mlp":
                return None
            new = first.clone()  # Falcon's block adds to its MLP's output in place, and the hook may keep what it saw
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(after)


def _expert_hook(lm: LM, point: Point, expert: int, call: Callable[[Point, Tensor], Tensor | None]) -> Any:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states, index, weights = (*args, *kwargs.values())
        if call(point, expert_key(module, expert, states, index, weights)) is not None:
            raise ValueError(f"{point} can be read, not replaced")

    return lm.experts(point.layer).register_forward_pre_hook(before, with_kwargs=True)


def _module(lm: LM, point: Point) -> nn.Module:
    if point.tensor == "block":
        return lm.block(point.layer)
    return lm.site(point.layer, "down_proj" if point.tensor in ("key", "mlp") else "o_proj").module


def _gather_hook(rows: Tensor, positions: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Return a pre-hook that hands the head only the wanted positions, as one row: (1, n, d_model)."""

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), positions.to(hidden.device)][None], *args[1:])

    return gather
