"""Recorded states, and how they enter the model's own forward."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.lm.model import LM

if TYPE_CHECKING:
    from transformers import Cache


@runtime_checkable
class Replayable(Protocol):
    """States that a replay starts from."""

    @property
    def first(self) -> int:
        """First block that runs, counted from 0; the number of blocks where only the final norm and the head run."""

    @property
    def states(self) -> Float[Tensor, "rows columns d_model"]:
        """What enters block `first`."""

    def cache(self, lm: LM) -> "Cache":
        """Return the earlier tokens as the model's forward takes them, for one pass."""

    def arguments(self, lm: LM, cache: "Cache") -> dict[str, Any]:
        """Return the arguments of the model's forward: stand-ins for embeddings, positions, mask, earlier tokens."""


@dataclass(frozen=True)
class ReplayState:
    """What a replay takes as given, for rows aligned at their first token that runs (column 0).

    Tensors are on the devices of the model's blocks, in its dtype.
    """

    first: int
    """First block that runs, counted from 0; the number of blocks where only the final norm and the head run."""
    states: Float[Tensor, "rows columns d_model"]
    """What enters block `first`; columns after a row's end hold anything finite."""
    keys: tuple[Float[Tensor, "rows _ prefix _"], ...]
    """Per block that runs, the attention keys of tokens before column 0, padded on the left."""
    values: tuple[Float[Tensor, "rows _ prefix _"], ...]
    """The same for the attention values."""
    starts: tuple[int, ...]
    """Token index of column 0, per row."""
    lengths: tuple[int, ...]
    """Tokens that run, per row."""
    prefix: int | None = None
    """Tokens that keys and values have; None: as many as the longest past."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        """Memory that the recorded tensors take."""
        return sum(t.nbytes for t in (self.states, *self.keys, *self.values))

    def select(self, rows: Sequence[int], *, columns: int | None = None, prefix: int | None = None) -> "ReplayState":
        """Return some of the rows, with no more padding than they need, or with so many columns and earlier tokens."""
        starts, lengths = tuple(self.starts[r] for r in rows), tuple(self.lengths[r] for r in rows)
        columns, prefix = columns or max(lengths), max(starts) if prefix is None else prefix
        states = self.states[:, :columns].index_select(0, torch.tensor(rows, device=self.states.device))
        keys, values = (tuple(tail(x, rows, prefix) for x in part) for part in (self.keys, self.values))
        return replace(self, states=states, keys=keys, values=values, starts=starts, lengths=lengths, prefix=prefix)

    def cache(self, lm: LM) -> "Cache":
        """Return the earlier tokens as the model's forward takes them, for one pass."""
        return suffix_cache(lm, self.first, self.keys, self.values, self._past)

    def arguments(self, lm: LM, cache: "Cache") -> dict[str, Any]:
        """Return the arguments of the model's forward: stand-ins for embeddings, positions, mask, earlier tokens."""
        if lm.device not in self._given:
            columns = self.states.shape[1]
            self._given[lm.device] = row_arguments(lm, self.starts, self.lengths, cache, self._past, columns)
        given = self._given[lm.device]
        if "past_key_values" in given:
            given = {**given, "past_key_values": cache}
        return dict(inputs_embeds=stand_in(lm, self.states), **given)

    @property
    def _past(self) -> int:
        return max(self.starts) if self.prefix is None else self.prefix

    @functools.cached_property
    def _given(self) -> dict[torch.device, dict[str, Any]]:
        """Mask and positions, made once: a step that made them from Python's numbers would wait for their copy."""
        return {}


def row_arguments(
    lm: LM,
    begins: Sequence[int],
    lengths: Sequence[int],
    cache: "Cache",
    prefix: int | None = None,
    columns: int | None = None,
) -> dict[str, Any]:
    """Return mask and positions for rows whose tokens [begin, begin + length) are run after their past.

    Args:
        prefix: tokens that keys and values of the past have; as many as the longest past.
        columns: tokens that are run of every row; those of the longest row.
    """
    prefix, columns = max(begins) if prefix is None else prefix, columns or max(lengths)
    if lm.layout.earlier != "attention":  # every token is run, right-padded as in `Inputs.of`, and nothing is before
        assert prefix == 0
        return dict(
            attention_mask=torch.ones(len(begins), columns, dtype=torch.long, device=lm.device), use_cache=False
        )
    begin, length = torch.tensor(begins)[:, None], torch.tensor(lengths)[:, None]
    # a mask that hides nothing is none: transformers would read it back to find out
    mask = None if min(begins) == prefix else (torch.arange(prefix + columns) >= prefix - begin).long().to(lm.device)
    return dict(
        attention_mask=mask,
        position_ids=(begin + torch.arange(columns).minimum(length - 1)).to(lm.device),  # padding stays in the context
        past_key_values=cache,
        use_cache=True,
    )


def stand_in(lm: LM, states: Float[Tensor, "rows columns d_model"]) -> Tensor:
    """Return embeddings that nothing reads."""
    embedding = lm.model.get_submodule(lm.layout.embedding).weight
    return embedding.new_zeros(1, device=lm.device).expand(*states.shape[:2], embedding.shape[1])


def suffix_starts(lm: LM, starts: Sequence[int]) -> tuple[int, ...]:
    """Return the first tokens from which rows can be replayed: `starts`, or 0 where earlier tokens do not enter through
    attention keys and values alone."""
    return tuple(starts) if lm.layout.earlier == "attention" else (0,) * len(starts)


def tokens_at(x: Tensor, tokens: Int[Tensor, "rows n"]) -> Tensor:
    """Return tokens of each row of x (rows, tokens, ...), as (rows, n, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], tokens.to(x.device)]


def tail(x: Tensor, rows: Sequence[int], length: int) -> Tensor:
    """Return the last `length` tokens of some rows of x (rows, heads, tokens, d_head)."""
    return x[:, :, x.shape[2] - length :].index_select(0, torch.tensor(rows, device=x.device))


@functools.cache
def _layer_class() -> Any:
    """Return a layer of transformers' `Cache`, defined on first use, since importing that takes seconds."""
    from transformers.cache_utils import DynamicLayer

    class Earlier(DynamicLayer):
        """One block's past for one pass: returns it with the new tokens after it, and remembers the whole."""

        def __init__(self, keys: Tensor | None, values: Tensor | None, length: int) -> None:
            super().__init__()
            self.past, self.length = (keys, values), length
            self.whole: tuple[Tensor, Tensor] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            keys, values = self.past
            if keys is not None and values is not None:
                key_states, value_states = _appended(keys, key_states), _appended(values, value_states)
            if not torch.is_grad_enabled():
                self.whole = key_states, value_states
            return key_states, value_states

        def all_of_it(self) -> tuple[Tensor, Tensor]:
            """Return the keys and values of the past and of the tokens that were run, if any were."""
            found = self.whole or self.past
            assert found[0] is not None
            assert found[1] is not None
            return found[0], found[1]

        def get_seq_length(self) -> int:
            return self.length

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.length + query_length, 0

    return Earlier


def _appended(past: Tensor, new: Tensor) -> Tensor:
    """Return `past` followed by `new`, token after token; `past` is repeated where `new` has n times its rows."""
    times = len(new) // len(past)
    return torch.cat([past.expand(times, *past.shape), new.unflatten(0, (times, len(past)))], 3).flatten(0, 1)


def suffix_cache(lm: LM, first: int, keys: Sequence[Tensor], values: Sequence[Tensor], length: int) -> "Cache":
    """Do as `cache_of`, with keys and values given for the blocks from `first` on."""
    none: list[Tensor | None] = [None] * lm.n_layers
    if not length:
        return cache_of(none, none, 0)
    of_all = [(none[:first] + list(part) + none)[: lm.n_layers] for part in (keys, values)]
    return cache_of(of_all[0], of_all[1], length)


def cache_of(keys: Sequence[Tensor | None], values: Sequence[Tensor | None], length: int) -> "Cache":
    """Return `length` earlier tokens of every block, as the model's forward takes them."""
    from transformers import Cache

    return Cache(layers=[_layer_class()(k, v, length) for k, v in zip(keys, values, strict=True)])
