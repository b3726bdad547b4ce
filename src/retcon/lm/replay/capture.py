"""Recording what a replay starts from: each token is run once, and no further up than it is asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retcon.lm.batches import MAX_BATCH_TOKENS, buckets
from retcon.lm.forward import Hook, Inputs, Point, StopForward, run
from retcon.lm.model import LM
from retcon.lm.prompts import Row, n_common, pad
from retcon.lm.replay.states import ReplayState, cache_of, row_arguments, tail, tokens_at

if TYPE_CHECKING:
    from transformers import Cache


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
    """Return what a replay of `rows` from block `first` and from `starts` on needs, each token run once and no further
    up than it is asked for: tokens before the start to the last attention, the others to block `first`.

    Args:
        reads: activations below block `first` wanted beside, at one token that runs per row (None: not of this row).
        prefix_group: a number per row; rows of one number begin with the same text, which is run once for all of them.
            -1: the row is alone.

    Returns:
        The frozen parts, and per point the activations of the rows that were read, in order of rows.
    """
    with torch.no_grad():
        texts = [r.ids for r in rows]
        past = _shared(lm, texts, starts, prefix_group or [-1] * len(rows), max_batch_tokens)
        past = _extended(lm, texts, past, starts, max_batch_tokens)
        return _frozen(lm, texts, past, first, reads or {}, max_batch_tokens)


def embedded_states(lm: LM, rows: Sequence[Row], starts: Sequence[int]) -> ReplayState:
    """Return what enters the first block from `starts` on, without the earlier tokens' attention keys and values."""
    with torch.no_grad():
        return _frozen(lm, [r.ids for r in rows], _Past(tuple(starts)), 0, {}, MAX_BATCH_TOKENS)[0]


@dataclass(frozen=True)
class _Past:
    """Attention keys and values of each row's first tokens, for every block, padded on the left."""

    ends: tuple[int, ...]
    """How many tokens of each row are here."""
    keys: tuple[Float[Tensor, "rows _ prefix _"], ...] = ()
    values: tuple[Float[Tensor, "rows _ prefix _"], ...] = ()

    def of(self, rows: Sequence[int]) -> "_Past":
        """Return some of the rows, with no more padding than they need; rows may repeat."""
        ends = tuple(self.ends[r] for r in rows)
        if not self.keys:
            return _Past(ends)
        keys, values = ([tail(x, rows, max(ends)) for x in part] for part in (self.keys, self.values))
        return _Past(ends, tuple(keys), tuple(values))

    def cache(self, n_layers: int) -> "Cache":
        """Return the rows' past as the model's forward takes it."""
        none = [None] * n_layers
        return cache_of(self.keys, self.values, max(self.ends)) if self.keys else cache_of(none, none, 0)


def _shared(
    lm: LM, texts: Sequence[tuple[int, ...]], starts: Sequence[int], prefix_group: Sequence[int], max_batch_tokens: int
) -> _Past:
    """Return the past of the tokens that each row shares with the rows of its group."""
    ends, place = common_beginnings(texts, starts, prefix_group)
    first_with = {p: r for r, p in reversed(list(enumerate(place)))}
    prefixes = [texts[first_with[p]] for p in range(len(ends))]
    past = _extended(lm, prefixes, _Past((0,) * len(prefixes)), ends, max_batch_tokens)
    return past.of(place)


def after_common_beginnings(
    lm: LM, texts: Sequence[tuple[int, ...]], starts: Sequence[int], group: Sequence[int], max_batch_tokens: int
) -> Iterator[tuple[list[int], Inputs]]:
    """Give batches of texts, and what a pass over their tokens from `starts` on takes; those before are run once for
    all texts of a group, which have them in common."""
    with torch.no_grad():
        past = _shared(lm, texts, starts, group, max_batch_tokens)
    suffixes = [ids[start:] for ids, start in zip(texts, past.ends, strict=True)]
    for rows in buckets([len(ids) for ids in suffixes], max_batch_tokens):
        cache = past.of(rows).cache(lm.n_layers)
        yield rows, _inputs(lm, [suffixes[i] for i in rows], [past.ends[i] for i in rows], cache)


def common_beginnings(
    texts: Sequence[tuple[int, ...]], limits: Sequence[int], prefix_group: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return how many first tokens the rows of each group have in common, and which of these numbers is each row's.

    Rows that are alone, or of group -1, have none in common with others.

    Args:
        limits: of each row, tokens that may count at most.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(prefix_group):
        members.setdefault(group, []).append(row)
    ends: list[int] = []
    place = [0] * len(texts)
    for group, rows in members.items():
        shortest = min(limits[r] for r in rows) if group >= 0 and len(rows) > 1 else 0
        for r in rows:
            place[r] = len(ends)
        ends.append(n_common([texts[r][:shortest] for r in rows]))
    return ends, place


def _extended(
    lm: LM, texts: Sequence[tuple[int, ...]], past: _Past, ends: Sequence[int], max_batch_tokens: int
) -> _Past:
    """Return the past up to `ends`: the tokens between are run through every block, as far as the last attention."""
    if tuple(ends) == past.ends:
        return past
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])

    def keep(rows: Sequence[int], layers: Sequence[Any]) -> None:
        begin = torch.tensor([past.ends[i] for i in rows])[:, None]
        token = torch.tensor([ends[i] for i in rows])[:, None] + torch.arange(-max(ends), 0)
        n_past = int(begin.max())  # columns of the past come first, aligned on the right; then the new tokens
        column = torch.where(token < begin, n_past - begin + token, n_past + token - begin).clamp(min=0)
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
        suffixes = [texts[i][past.ends[i] : ends[i]] for i in rows]
        inputs = _inputs(lm, suffixes, [past.ends[i] for i in rows], cache)
        run(lm, inputs, {Point(lm.n_layers - 1, "attn_key"): lambda _: None})
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
    """Run the tokens after the past through the blocks below `first`, and return what enters that block."""
    lengths = [len(ids) - end for ids, end in zip(texts, past.ends, strict=True)]
    columns = max(lengths)
    states: Tensor | None = None
    entering: list[Tensor] = []
    found: dict[Point, dict[int, Tensor]] = {point: {} for point in reads}

    def read_output(_: nn.Module, __: Any, output: Any) -> None:
        entering.append(output[0] if isinstance(output, tuple) else output)

    if first == 0:
        hook = lm.block(0).register_forward_pre_hook(_reading_input(entering), with_kwargs=True)
    else:
        hook = lm.block(first - 1).register_forward_hook(read_output)
    with hook:
        for group in buckets(lengths, max_batch_tokens):
            begins = [past.ends[i] for i in group]
            suffixes = [texts[i][past.ends[i] :] for i in group]
            inputs = _inputs(lm, suffixes, begins, past.of(group).cache(lm.n_layers))
            hooks: dict[Point, Hook] = {p: _reader(found[p], at, past.ends, group) for p, at in reads.items()}
            if first:
                hooks.setdefault(Point(first - 1, "block"), lambda _: None)
            entering.clear()
            run(lm, inputs, hooks)
            column = torch.arange(columns).minimum(torch.tensor([lengths[i] for i in group])[:, None] - 1)
            recorded = tokens_at(entering[0], column)
            if states is None:
                states = recorded.new_empty(len(texts), *recorded.shape[1:])
            states[group] = recorded
    assert states is not None
    frozen = ReplayState(first, states, past.keys[first:], past.values[first:], past.ends, tuple(lengths))
    return frozen, {p: torch.stack([v for _, v in sorted(by_row.items())]) for p, by_row in found.items()}


def _inputs(lm: LM, suffixes: Sequence[tuple[int, ...]], begins: Sequence[int], cache: "Cache") -> Inputs:
    """Return the tokens of each row that follow its past, as the model's forward takes them."""
    arguments = row_arguments(lm, begins, [len(ids) for ids in suffixes], cache)
    arguments["input_ids"] = pad([Row(ids, len(ids)) for ids in suffixes], lm.device).ids
    rows, tokens = arguments["input_ids"].shape
    return Inputs((rows, tokens), arguments)


def _reading_input(into: list[Tensor]) -> Callable[..., None]:
    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.append(args[0] if args else kwargs["hidden_states"])
        raise StopForward

    return read


def _reader(into: dict[int, Tensor], at: Sequence[int | None], starts: Sequence[int], group: Sequence[int]) -> Hook:
    wanted = [(j, i, token - starts[i]) for j, i in enumerate(group) if (token := at[i]) is not None]

    def read(value: Tensor) -> None:
        if wanted:
            here, rows, columns = zip(*wanted, strict=True)
            into.update(zip(rows, value[list(here), list(columns)].detach(), strict=True))

    return read
