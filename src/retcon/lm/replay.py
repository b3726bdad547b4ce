"""Replay: run only the layers from one on, and only the tokens from a column on, on recorded states.

While weights are fixed, nothing below an edited layer and nothing before an edited token changes. `record` computes
those parts once: the states that enter the first live block, and the keys and values of earlier tokens in the live
blocks. `replay` then is `trace.run` for the rest: the model's own forward, with the blocks below answering at once with
the recorded states. The block list keeps its length, since masks and rotary tables are looked up by place in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from retcon.lm.model import LM
from retcon.lm.prompts import Row, buckets, pad
from retcon.lm.trace import Point, Tap, tapped

MAX_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Frozen:
    """What a replay takes as given, for rows aligned at their first live token (column 0).

    Tensors stand where the model's blocks stand, in its dtype.
    """

    first: int
    """First live block, counted from 0; the number of blocks where only the final norm and the head are live."""
    states: Float[Tensor, "rows columns d_model"]
    """What enters block `first`; columns behind a row's end hold anything finite."""
    keys: tuple[Float[Tensor, "rows heads prefix d_head"], ...]
    """Per live block, the attention keys of tokens before column 0, padded on the left."""
    values: tuple[Float[Tensor, "rows heads prefix d_head"], ...]
    """The same for the attention values."""
    starts: tuple[int, ...]
    """Token index of column 0, per row."""
    lengths: tuple[int, ...]
    """Live tokens, per row."""
    n_outputs: int | None
    """How many things a block returns in a tuple; None: it returns a tensor."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        """Memory that the recorded tensors take."""
        return sum(t.nbytes for t in (self.states, *self.keys, *self.values))

    def select(self, rows: Sequence[int]) -> "Frozen":
        """Some of the rows, with no more padding than they need."""
        starts, lengths = tuple(self.starts[r] for r in rows), tuple(self.lengths[r] for r in rows)
        columns, prefix = max(lengths), max(starts)

        def earlier(x: Tensor) -> Tensor:
            return x[:, :, x.shape[2] - prefix :].index_select(0, torch.tensor(rows, device=x.device))

        return Frozen(
            first=self.first,
            states=self.states[:, :columns].index_select(0, torch.tensor(rows, device=self.states.device)),
            keys=tuple(map(earlier, self.keys)),
            values=tuple(map(earlier, self.values)),
            starts=starts,
            lengths=lengths,
            n_outputs=self.n_outputs,
        )

    def inputs(self, lm: LM) -> dict[str, Any]:
        """Arguments of the model's forward: stand-ins for embeddings, positions, mask, and the earlier tokens."""
        rows, columns = self.states.shape[:2]
        start, length = torch.tensor(self.starts)[:, None], torch.tensor(self.lengths)[:, None]
        prefix = max(self.starts)
        column = torch.arange(prefix + columns)
        position = start + torch.arange(columns).minimum(length - 1)  # padding stays inside the context
        cache = Cache(layers=[_Earlier(*self._earlier(i), prefix) for i in range(lm.n_layers)])
        embedding = lm.model.get_submodule(lm.layout.embedding).weight
        return dict(
            inputs_embeds=embedding.new_zeros(1).expand(rows, columns, embedding.shape[1]),
            attention_mask=(column >= prefix - start).long().to(lm.device),
            position_ids=position.to(lm.device),
            past_key_values=cache,
            use_cache=True,
        )

    def _earlier(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        if layer < self.first or not max(self.starts):
            return None, None
        return self.keys[layer - self.first], self.values[layer - self.first]


def record(
    lm: LM,
    rows: Sequence[Row],
    starts: Sequence[int],
    first: int,
    reads: Mapping[Point, Sequence[int | None]] | None = None,
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> tuple[Frozen, dict[Point, Float[Tensor, "reads width"]]]:
    """One full forward pass over `rows`, keeping what a replay from block `first` and from `starts` on needs.

    Args:
        reads: activations wanted beside, at one token per row (None: not of this row), from the same passes.

    Returns:
        The frozen parts, and per point the activations of the rows that were read, in order of rows.
    """
    reads = reads or {}
    lengths = [len(r.ids) - s for r, s in zip(rows, starts, strict=True)]
    columns, prefix = max(lengths), max(starts)
    states: Tensor | None = None
    keys: list[Tensor] = []
    values: list[Tensor] = []
    n_outputs: int | None = None
    entering: list[Tensor] = []
    found: dict[Point, dict[int, Tensor]] = {point: {} for point in reads}

    def read_output(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal n_outputs
        n_outputs = len(output) if isinstance(output, tuple) else None
        if first > 0:
            entering.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack, torch.no_grad():
        stack.callback(lm.block(max(first - 1, 0)).register_forward_hook(read_output).remove)
        if first == 0:
            hook = _reading_input(entering)
            stack.callback(lm.block(0).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for group in buckets([len(r.ids) for r in rows], max_batch_tokens):
            batch = pad([rows[i] for i in group], lm.device)
            cache = Cache(layer_class_to_replicate=DynamicLayer)  # the sliding kind would forget
            inputs = dict(
                input_ids=batch.ids,
                attention_mask=torch.ones_like(batch.ids),
                past_key_values=cache,
                use_cache=True,
            )
            taps: dict[Point, Tap] = {p: _reader(found[p], at, group) for p, at in reads.items()}
            last = Point(lm.n_layers - 1, "attn_key" if first < lm.n_layers else "block")
            taps.setdefault(last, lambda _: None)  # nothing behind it is wanted
            entering.clear()
            tapped(lm, batch.ids.shape, inputs, taps, None)

            start, length = torch.tensor([starts[i] for i in group]), torch.tensor([lengths[i] for i in group])
            live = start[:, None] + torch.arange(columns).minimum(length[:, None] - 1)
            earlier = (start[:, None] + torch.arange(-prefix, 0)).clamp(min=0)
            live_states = _at(entering[0], live)
            if states is None:
                states = live_states.new_empty(len(rows), *live_states.shape[1:])
            states[group] = live_states
            for i, layer in enumerate(cache.layers[first:]):
                parts = _at(layer.keys.transpose(1, 2), earlier), _at(layer.values.transpose(1, 2), earlier)
                if len(keys) <= i:
                    for kept, part in zip((keys, values), parts, strict=True):
                        kept.append(part.new_empty(len(rows), part.shape[2], prefix, part.shape[3]))
                keys[i][group], values[i][group] = (part.transpose(1, 2) for part in parts)
    assert states is not None
    frozen = Frozen(first, states, tuple(keys), tuple(values), tuple(starts), tuple(lengths), n_outputs)
    return frozen, {p: torch.stack([v for _, v in sorted(by_row.items())]) for p, by_row in found.items()}


def _at(x: Tensor, tokens: Int[Tensor, "rows n"]) -> Tensor:
    """Tokens of each row of x (rows, tokens, ...), as (rows, n, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], tokens.to(x.device)]


def replay(
    lm: LM,
    frozen: Frozen,
    taps: Mapping[Point, Tap],
    logits_at: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None = None,
) -> Float[Tensor, "n vocab"] | None:
    """`trace.run` from block `frozen.first` and from column 0 on; taps and `logits_at` count columns.

    The output of block `first - 1` can be tapped: it is the recorded state. Points below cannot.
    """
    below = [p for p in taps if p.layer < frozen.first and p != Point(frozen.first - 1, "block")]
    if below:
        raise ValueError(f"a replay from block {frozen.first} does not run {below}")
    with _blocks_below_answer_with_states(lm, frozen):
        return tapped(lm, frozen.states.shape[:2], frozen.inputs(lm), taps, logits_at)


class _Earlier(DynamicLayer):
    """One block's frozen keys and values: gives them with the new ones behind, and keeps nothing."""

    def __init__(self, keys: Tensor | None, values: Tensor | None, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.length = keys, values, length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


@contextmanager
def _blocks_below_answer_with_states(lm: LM, frozen: Frozen) -> Iterator[None]:
    """Blocks below the first live one return the recorded states at once; hooks on them still work."""
    states = frozen.states
    answer = states if frozen.n_outputs is None else (states, *[None] * (frozen.n_outputs - 1))
    with ExitStack() as stack:
        for layer in range(frozen.first):
            stack.enter_context(_forward_as(lm.block(layer), lambda *_, **__: answer))
        if frozen.first == 0:  # no block to answer: what enters the first one is exchanged
            hook = _exchanging_input(states)
            stack.callback(lm.block(0).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate, for one, sets it on the instance
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _exchanging_input(states: Tensor) -> Callable[..., Any]:
    def exchange(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    return exchange


def _reading_input(into: list[Tensor]) -> Callable[..., None]:
    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.append(args[0] if args else kwargs["hidden_states"])

    return read


def _reader(into: dict[int, Tensor], at: Sequence[int | None], group: Sequence[int]) -> Tap:
    wanted = [(j, i, position) for j, i in enumerate(group) if (position := at[i]) is not None]

    def read(value: Tensor) -> None:
        if wanted:
            here, rows, positions = zip(*wanted, strict=True)
            into.update(zip(rows, value[list(here), list(positions)].detach(), strict=True))

    return read
