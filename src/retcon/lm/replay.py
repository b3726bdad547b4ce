"""Replay: run only the layers from one on, and only the tokens from a column on, on recorded states.

While weights are fixed, nothing below an edited layer and nothing before an edited token changes. `record` computes
those parts once: the states that enter the first live block, and the keys and values of earlier tokens in the live
blocks. `replay` then is `trace.run` for the rest: the model's own forward, with the blocks below answering at once with
the recorded states. The block list keeps its length, since masks and rotary tables are looked up by place in it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retcon.lm.forward import Hook, Point, Stop, forward_with_hooks
from retcon.lm.model import LM, SiteName
from retcon.lm.prompts import Row, buckets, pad

if TYPE_CHECKING:
    from transformers import Cache

MAX_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class ReplayState:
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

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        """Memory that the recorded tensors take."""
        return sum(t.nbytes for t in (self.states, *self.keys, *self.values))

    def select(self, rows: Sequence[int]) -> "ReplayState":
        """Some of the rows, with no more padding than they need."""
        starts, lengths = tuple(self.starts[r] for r in rows), tuple(self.lengths[r] for r in rows)
        states = self.states[:, : max(lengths)].index_select(0, torch.tensor(rows, device=self.states.device))
        keys, values = (tuple(_tail(x, rows, max(starts)) for x in part) for part in (self.keys, self.values))
        return replace(self, states=states, keys=keys, values=values, starts=starts, lengths=lengths)

    def cache(self, lm: LM) -> "Cache":
        """The earlier tokens as the model's forward takes them, for one pass."""
        return _live_cache(lm, self.first, self.keys, self.values, max(self.starts))

    def inputs(self, lm: LM, cache: "Cache") -> dict[str, Any]:
        """Arguments of the model's forward: stand-ins for embeddings, positions, mask, and the earlier tokens."""
        return dict(inputs_embeds=_stand_in(lm, self.states), **_inputs(lm, self.starts, self.lengths, cache))


@dataclass(frozen=True)
class PackedState:
    """What a replay takes as given where variants of a text stand side by side in rows, so that little is padded.

    For attention without a window, or within it, in transformers' `eager` and `sdpa` forms (the others take no mask).
    """

    first: int
    """First live block, as in `ReplayState`."""
    states: Float[Tensor, "rows columns d_model"]
    """What enters block `first`."""
    keys: tuple[Float[Tensor, "some_rows heads earlier d_head"], ...]
    """Per live block, the attention keys of all that columns may see beside each other: of every row, or of the rows of
    one order, which then serve all."""
    values: tuple[Float[Tensor, "some_rows heads earlier d_head"], ...]
    """The same for the attention values."""
    tokens: Int[Tensor, "orders columns"]
    """Token index of every column. The rows of one order stand one behind the other, as many of each order."""
    seen: Bool[Tensor, "orders columns earlier_and_columns"]
    """What every column attends to; itself, at the least."""

    def cache(self, lm: LM) -> "Cache":
        """As `Frozen.cache`."""
        return _live_cache(lm, self.first, self.keys, self.values, self.seen.shape[2] - self.seen.shape[1])

    def inputs(self, lm: LM, cache: "Cache") -> dict[str, Any]:
        """As `Frozen.inputs`."""
        each, lowest = len(self.states) // len(self.tokens), torch.finfo(self.states.dtype).min
        hidden = torch.zeros(self.seen.shape, dtype=self.states.dtype).masked_fill(~self.seen, lowest)
        return dict(
            inputs_embeds=_stand_in(lm, self.states),
            attention_mask=hidden.to(lm.device).repeat_interleave(each, 0)[:, None],
            position_ids=self.tokens.to(lm.device).repeat_interleave(each, 0),
            past_key_values=cache,
            use_cache=True,
        )


@dataclass(frozen=True)
class PartialModule:
    """Modules that treat every token by itself, run at some places only."""

    live: Bool[Tensor, "rows columns"]
    """Where they run."""
    entries: Sequence[nn.Module]
    """Modules that read the input."""
    end: nn.Module
    """The module whose output counts; an entry, or what the entries' outputs lead to."""
    fill_values: Float[Tensor, "rows columns width"]
    """What the end gives elsewhere; at the live places it is written over."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the modules run so."""
        places = self.live.flatten().nonzero()[:, 0].to(self.fill_values.device)
        shapes: list[tuple[int, ...]] = []  # OPT's MLP sees (rows x columns, width)

        def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            shapes.append(args[0].shape[:-1])
            return (args[0].reshape(-1, args[0].shape[-1]).index_select(0, places), *args[1:])

        def widen(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            whole = self.fill_values.view(-1, output.shape[-1]).index_copy_(0, places, output)
            return whole.view(*shapes[-1], output.shape[-1])

        with ExitStack() as stack:
            for module in self.entries:
                stack.callback(module.register_forward_pre_hook(narrow).remove)
            stack.callback(self.end.register_forward_hook(widen).remove)
            yield


def capture_states(
    lm: LM,
    rows: Sequence[Row],
    starts: Sequence[int],
    first: int,
    reads: Mapping[Point, Sequence[int | None]] | None = None,
    *,
    prefix_group: Sequence[int] | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> tuple[ReplayState, dict[Point, Float[Tensor, "reads width"]]]:
    """What a replay of `rows` from block `first` and from `starts` on needs, each token run once and no further up than
    it is asked for: tokens before the start to the last attention, the others to block `first`.

    Args:
        reads: activations below block `first` wanted beside, at one live token per row (None: not of this row).
        alike: rows of one number begin with the same text; the tokens they share are run once for all.

    Returns:
        The frozen parts, and per point the activations of the rows that were read, in order of rows.
    """
    with torch.no_grad():
        texts = [r.ids for r in rows]
        past = _shared(lm, texts, starts, prefix_group or [-1] * len(rows), max_batch_tokens)
        past = _extended(lm, texts, past, starts, max_batch_tokens)
        return _frozen(lm, texts, past, first, reads or {}, max_batch_tokens)


def embedded(
    lm: LM, rows: Sequence[Row], starts: Sequence[int], *, max_batch_tokens: int = MAX_BATCH_TOKENS
) -> ReplayState:
    """What enters the first block from `starts` on, without the earlier tokens' attention keys and values."""
    with torch.no_grad():
        return _frozen(lm, [r.ids for r in rows], _Past(tuple(starts)), 0, {}, max_batch_tokens)[0]


@dataclass(frozen=True)
class _Past:
    """Attention keys and values of each row's first tokens, for every block, padded on the left."""

    ends: tuple[int, ...]
    """How many tokens of each row are here."""
    keys: tuple[Float[Tensor, "rows heads prefix d_head"], ...] = ()
    values: tuple[Float[Tensor, "rows heads prefix d_head"], ...] = ()

    def of(self, rows: Sequence[int]) -> "_Past":
        """Some of the rows, with no more padding than they need; rows may repeat."""
        ends = tuple(self.ends[r] for r in rows)
        if not self.keys:
            return _Past(ends)
        keys, values = ([_tail(x, rows, max(ends)) for x in part] for part in (self.keys, self.values))
        return _Past(ends, tuple(keys), tuple(values))

    def cache(self, n_layers: int) -> "Cache":
        """The rows' past as the model's forward takes it."""
        none = [None] * n_layers
        return _cache(self.keys, self.values, max(self.ends)) if self.keys else _cache(none, none, 0)


def _tail(x: Tensor, rows: Sequence[int], length: int) -> Tensor:
    """The last `length` tokens of some rows of x (rows, heads, tokens, d_head)."""
    return x[:, :, x.shape[2] - length :].index_select(0, torch.tensor(rows, device=x.device))


def _shared(
    lm: LM, texts: Sequence[tuple[int, ...]], starts: Sequence[int], prefix_group: Sequence[int], max_batch_tokens: int
) -> _Past:
    """The past of the tokens that each row shares with the rows of its number."""
    ends, place = common_beginnings(texts, starts, prefix_group)
    first_with = {p: r for r, p in reversed(list(enumerate(place)))}
    prefixes = [texts[first_with[p]] for p in range(len(ends))]
    past = _extended(lm, prefixes, _Past((0,) * len(prefixes)), ends, max_batch_tokens)
    return past.of(place)


def common_beginnings(
    texts: Sequence[tuple[int, ...]], limits: Sequence[int], prefix_group: Sequence[int]
) -> tuple[list[int], list[int]]:
    """How many tokens, at most each row's limit, the rows of each number have in common; and each row's place in that.

    Rows that are alone, or of number -1, have nothing in common with others.
    """
    members: dict[int, list[int]] = {}
    for row, number in enumerate(prefix_group):
        members.setdefault(number, []).append(row)
    ends: list[int] = []
    place = [0] * len(texts)
    for number, group in members.items():
        shortest = min(limits[r] for r in group) if number >= 0 and len(group) > 1 else 0
        columns = zip(*(texts[r][:shortest] for r in group), strict=True)
        for r in group:
            place[r] = len(ends)
        ends.append(next((t for t, column in enumerate(columns) if len(set(column)) > 1), shortest))
    return ends, place


def _extended(
    lm: LM, texts: Sequence[tuple[int, ...]], past: _Past, ends: Sequence[int], max_batch_tokens: int
) -> _Past:
    """The past up to `ends`: the tokens between are run through every block, as far as the last attention."""
    if tuple(ends) == past.ends:
        return past
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])

    def keep(rows: Sequence[int], layers: Sequence[Any]) -> None:
        begin = torch.tensor([past.ends[i] for i in rows])[:, None]
        token = torch.tensor([ends[i] for i in rows])[:, None] + torch.arange(-max(ends), 0)
        behind = int(begin.max())  # columns of the past come first, aligned on the right; then the new tokens
        column = torch.where(token < begin, behind - begin + token, behind + token - begin).clamp(min=0)
        for i, layer in enumerate(layers):
            for into, x in zip(kept, layer.all_of_it(), strict=True):
                part = tokens_at(x.transpose(1, 2), column).transpose(1, 2)
                if len(into) <= i:
                    into.append(part.new_zeros(len(texts), *part.shape[1:]))
                into[i][rows] = part

    running = [i for i, (e, begin) in enumerate(zip(ends, past.ends, strict=True)) if e > begin]
    for group in buckets([ends[i] - past.ends[i] for i in running], max_batch_tokens):
        rows = [running[g] for g in group]
        cache = past.of(rows).cache(lm.n_layers)
        live = [texts[i][past.ends[i] : ends[i]] for i in rows]
        inputs = _inputs(lm, [past.ends[i] for i in rows], [len(ids) for ids in live], cache)
        inputs["input_ids"] = pad([Row(ids, len(ids)) for ids in live], lm.device).ids
        forward_with_hooks(
            lm, inputs["input_ids"].shape, inputs, {Point(lm.n_layers - 1, "attn_key"): lambda _: None}, None
        )
        keep(rows, cache.layers)
    idle = [i for i, (e, begin) in enumerate(zip(ends, past.ends, strict=True)) if e == begin > 0]
    if idle:
        keep(idle, past.of(idle).cache(lm.n_layers).layers)
    return _Past(tuple(ends), tuple(kept[0]), tuple(kept[1]))


def _frozen(
    lm: LM,
    texts: Sequence[tuple[int, ...]],
    past: _Past,
    first: int,
    reads: Mapping[Point, Sequence[int | None]],
    max_batch_tokens: int,
) -> tuple[ReplayState, dict[Point, Tensor]]:
    """The tokens behind the past, run through the blocks below `first`."""
    lengths = [len(ids) - end for ids, end in zip(texts, past.ends, strict=True)]
    columns = max(lengths)
    states: Tensor | None = None
    entering: list[Tensor] = []
    found: dict[Point, dict[int, Tensor]] = {point: {} for point in reads}

    def read_output(_: nn.Module, __: Any, output: Any) -> None:
        entering.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        if first == 0:
            hook = _reading_input(entering)
            stack.callback(lm.block(0).register_forward_pre_hook(hook, with_kwargs=True).remove)
        else:
            stack.callback(lm.block(first - 1).register_forward_hook(read_output).remove)
        for group in buckets(lengths, max_batch_tokens):
            begins = [past.ends[i] for i in group]
            inputs = _inputs(lm, begins, [lengths[i] for i in group], past.of(group).cache(lm.n_layers))
            inputs["input_ids"] = pad([Row(texts[i][past.ends[i] :], 0) for i in group], lm.device).ids
            hooks: dict[Point, Hook] = {p: _reader(found[p], at, past.ends, group) for p, at in reads.items()}
            if first:
                hooks.setdefault(Point(first - 1, "block"), lambda _: None)
            entering.clear()
            forward_with_hooks(lm, inputs["input_ids"].shape, inputs, hooks, None)
            column = torch.arange(columns).minimum(torch.tensor([lengths[i] for i in group])[:, None] - 1)
            live = tokens_at(entering[0], column)
            if states is None:
                states = live.new_empty(len(texts), *live.shape[1:])
            states[group] = live
    assert states is not None
    frozen = ReplayState(first, states, past.keys[first:], past.values[first:], past.ends, tuple(lengths))
    return frozen, {p: torch.stack([v for _, v in sorted(by_row.items())]) for p, by_row in found.items()}


def _stand_in(lm: LM, states: Float[Tensor, "rows columns d_model"]) -> Tensor:
    """Embeddings that nothing reads."""
    embedding = lm.model.get_submodule(lm.layout.embedding).weight
    return embedding.new_zeros(1).expand(*states.shape[:2], embedding.shape[1])


def _inputs(lm: LM, begins: Sequence[int], lengths: Sequence[int], cache: "Cache") -> dict[str, Any]:
    """Mask and positions of rows whose tokens [begin, begin + length) are run behind their past."""
    prefix, columns = max(begins), max(lengths)
    begin, length = torch.tensor(begins)[:, None], torch.tensor(lengths)[:, None]
    return dict(
        attention_mask=(torch.arange(prefix + columns) >= prefix - begin).long().to(lm.device),
        position_ids=(begin + torch.arange(columns).minimum(length - 1)).to(lm.device),  # padding stays in the context
        past_key_values=cache,
        use_cache=True,
    )


def tokens_at(x: Tensor, tokens: Int[Tensor, "rows n"]) -> Tensor:
    """Tokens of each row of x (rows, tokens, ...), as (rows, n, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], tokens.to(x.device)]


def mlp_entries(lm: LM, layer: int) -> list[nn.Module]:
    """The modules that read the input of a block's MLP; one where the matrices are fused."""
    kinds: tuple[SiteName, ...] = ("up_proj", "gate_proj") if lm.layout.gate_proj else ("up_proj",)
    return list(dict.fromkeys(lm.site(layer, kind).module for kind in kinds))


def _last_block_at(lm: LM, places: tuple[Int[Tensor, " n"], Int[Tensor, " n"]], states: Tensor) -> list[PartialModule]:
    """The last block's out-projection and MLP at these (row, column) only; elsewhere they put out 0, for nobody."""
    out, down = (lm.site(lm.n_layers - 1, kind).module for kind in ("o_proj", "down_proj"))
    device = lm.site(lm.n_layers - 1, "down_proj").weight.device
    live = torch.zeros(states.shape[:2], dtype=torch.bool, device=device)
    live[tuple(x.to(device) for x in places)] = True
    return [
        PartialModule(live, [out], out, torch.zeros_like(states, device=device)),
        PartialModule(live, mlp_entries(lm, lm.n_layers - 1), down, torch.zeros_like(states, device=device)),
    ]


def replay(
    lm: LM,
    frozen: ReplayState | PackedState,
    hooks: Mapping[Point, Hook],
    logits_at: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None = None,
    *,
    cache: "Cache | None" = None,
    partly: Iterable[PartialModule] = (),
    end_at_logits: bool = False,
) -> Float[Tensor, "n vocab"] | None:
    """`trace.run` from block `frozen.first` and from column 0 on; taps and `logits_at` count columns.

    The output of block `first - 1` can be tapped: it is the recorded state. Points below cannot. A caller who wants the
    attention keys and values of the live tokens passes `frozen.cache(lm)` and reads it afterwards. Taps see what the
    modules of `partly` give with the other places filled in.

    Args:
        end_at_logits: let the last block make something of the tokens of `logits_at` alone, for a caller who reads
            nothing else of it.
    """
    below = [p for p in hooks if p.layer < frozen.first and p != Point(frozen.first - 1, "block")]
    if below:
        raise ValueError(f"a replay from block {frozen.first} does not run {below}")
    with _blocks_below_answer_with_states(lm, frozen), ExitStack() as stack:
        if end_at_logits and logits_at is not None and frozen.first < lm.n_layers:
            partly = [*partly, *_last_block_at(lm, logits_at, frozen.states)]
        for part in partly:
            stack.enter_context(part.running())
        inputs = frozen.inputs(lm, cache or frozen.cache(lm))
        return forward_with_hooks(lm, frozen.states.shape[:2], inputs, hooks, logits_at)


@functools.cache
def _layer_class() -> Any:
    """A layer of transformers' `Cache`, defined on first use, since importing that takes seconds."""
    from transformers.cache_utils import DynamicLayer

    class Earlier(DynamicLayer):
        """One block's past for one pass: gives it with the new tokens behind, and remembers the whole."""

        def __init__(self, keys: Tensor | None, values: Tensor | None, length: int) -> None:
            super().__init__()
            self.past, self.length = (keys, values), length
            self.whole: tuple[Tensor, Tensor] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            keys, values = self.past
            if keys is not None and values is not None:
                key_states, value_states = _behind(keys, key_states), _behind(values, value_states)
            if not torch.is_grad_enabled():
                self.whole = key_states, value_states
            return key_states, value_states

        def all_of_it(self) -> tuple[Tensor, Tensor]:
            """Keys and values of the past and of the tokens that were run, if any were."""
            found = self.whole or self.past
            assert found[0] is not None
            assert found[1] is not None
            return found[0], found[1]

        def get_seq_length(self) -> int:
            return self.length

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.length + query_length, 0

    return Earlier


def _behind(past: Tensor, new: Tensor) -> Tensor:
    """Both one after the other; the rows of `past` serve those of `new` as often as they go into them."""
    times = len(new) // len(past)
    return torch.cat([past.expand(times, *past.shape), new.unflatten(0, (times, len(past)))], 3).flatten(0, 1)


def _live_cache(lm: LM, first: int, keys: Sequence[Tensor], values: Sequence[Tensor], length: int) -> "Cache":
    """`_cache` with keys and values given for the blocks from `first` on."""
    none: list[Tensor | None] = [None] * lm.n_layers
    if not length:
        return _cache(none, none, 0)
    of_all = [(none[:first] + list(part) + none)[: lm.n_layers] for part in (keys, values)]
    return _cache(of_all[0], of_all[1], length)


def _cache(keys: Sequence[Tensor | None], values: Sequence[Tensor | None], length: int) -> "Cache":
    """`length` earlier tokens of every block, as the model's forward takes them."""
    from transformers import Cache

    return Cache(layers=[_layer_class()(k, v, length) for k, v in zip(keys, values, strict=True)])


@contextmanager
def _blocks_below_answer_with_states(lm: LM, frozen: ReplayState | PackedState) -> Iterator[None]:
    """Blocks below the first live one return the recorded states at once; hooks on them still work."""
    states = frozen.states
    answer = states if lm.block_outputs is None else (states, *[None] * (lm.block_outputs - 1))
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
        raise Stop

    return read


def _reader(into: dict[int, Tensor], at: Sequence[int | None], starts: Sequence[int], group: Sequence[int]) -> Hook:
    wanted = [(j, i, token - starts[i]) for j, i in enumerate(group) if (token := at[i]) is not None]

    def read(value: Tensor) -> None:
        if wanted:
            here, rows, columns = zip(*wanted, strict=True)
            into.update(zip(rows, value[list(here), list(columns)].detach(), strict=True))

    return read
