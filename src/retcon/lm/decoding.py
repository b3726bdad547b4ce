"""Prompts that are run once, and what comes after them: tokens that are given, or the model's own.

The attention's memory of a prompt serves every answer that is scored after it and the text that is written; that of a
long common beginning, as a chat's system prompt, serves all prompts. Rows that have ended leave, so that a batch
shrinks as its texts do.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retcon.lm.forward import Inputs, logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import n_common

if TYPE_CHECKING:
    from transformers import Cache

WORTH = 0.5
"""Share of all tokens from which running what prompts have in common once, in a pass of its own, saves time."""
LEAVE_AT = 1 / 8
"""Share of the rows that have to have ended for the others to be gathered anew, which copies their memory."""


def remembers(lm: LM) -> bool:
    """Return whether a prompt's attention keys and values are all that what comes after it needs of it."""
    return lm.layout.earlier == "attention"


def pads(lm: LM) -> bool:
    """Return whether prompts of different lengths can share a batch, padded on the left.

    Not where attention has windows or biases by distance: their padded rows have nothing to attend to, which is NaN.
    """
    config = lm.model.config.get_text_config(decoder=True)
    windows = getattr(config, "sliding_window", None) or getattr(config, "attention_types", None)
    return not windows and takes_positions(lm)


def takes_positions(lm: LM) -> bool:
    """Return whether the model's forward takes the positions of its tokens."""
    return "position_ids" in inspect.signature(lm.model.forward).parameters


class Prompts:
    """A batch of prompts that were run, and the tokens that were put after each since.

    Args:
        prompts: token ids, of one length where `pads` says no.
    """

    def __init__(self, lm: LM, prompts: Sequence[Sequence[int]]) -> None:
        from transformers import DynamicCache

        self.lm = lm
        lengths = [len(ids) for ids in prompts]
        first = common_beginning(prompts)
        width = max(lengths)
        self.length: Int[Tensor, " rows"] = torch.tensor(lengths, device=lm.device)
        """Tokens of each row so far, padding left out."""
        self.mask: Bool[Tensor, "rows columns"] | None = None
        """Which columns are no padding; None: all."""
        if min(lengths) < width:
            assert pads(lm), "prompts of different lengths for a model that cannot have them padded"
            column = torch.arange(width, device=lm.device)
            self.mask = (column < first) | (column - first >= width - self.length[:, None])
        self.cache: Cache = DynamicCache(config=lm.model.config.get_text_config(decoder=True))
        none = torch.zeros_like(self.length)
        if first:  # the same for all rows: run once
            self._run(
                torch.tensor([prompts[0][:first]], device=lm.device), none[:1], self.cache, None, none[:1], none[:1]
            )
            self.cache.layers = [_of_rows(layer, none) for layer in self.cache.layers]
        ids = torch.tensor([[0] * (width - len(row)) + list(row[first:]) for row in prompts], device=lm.device)
        start = none + first
        if self.mask is not None:
            start = start - (width - self.length)  # padding has earlier positions, 0 at least
        self.logits: Float[Tensor, "rows vocab"] = self._run(
            ids, start, self.cache, self.mask, self._everyone, torch.full_like(self.length, ids.shape[1] - 1)
        )
        """Of the token that comes next."""

    @property
    def _everyone(self) -> Int[Tensor, " rows"]:
        return torch.arange(len(self.length), device=self.length.device)

    @cached_property
    def _takes_positions(self) -> bool:
        return takes_positions(self.lm)

    def _run(
        self,
        ids: Int[Tensor, "rows new"],
        start: Int[Tensor, " rows"],
        cache: "Cache",
        mask: Bool[Tensor, "rows columns"] | None,
        at: Int[Tensor, " n"],
        column: Int[Tensor, " n"],
    ) -> Float[Tensor, "n vocab"]:
        """Return the logits at (row, column) of new tokens after what the cache remembers; it remembers them too."""
        arguments: dict[str, Any] = dict(input_ids=ids, past_key_values=cache, use_cache=True)
        if mask is not None:
            arguments["attention_mask"] = mask.long()
        if self._takes_positions:
            last = (self.lm.context_length or 1 << 30) - 1
            columns = torch.arange(ids.shape[1], device=ids.device)
            arguments["position_ids"] = (start[:, None] + columns).clamp(0, last)
        rows, new = ids.shape
        return logits_at(self.lm, Inputs((rows, new), arguments), (at, column))

    def after(self, which: Sequence[int], tokens: Sequence[Sequence[int]]) -> Float[Tensor, "n vocab"]:
        """Return the logits after each of these tokens, list by list, without taking them into the rows.

        Args:
            which: the row that each list of tokens comes after.
        """
        index = torch.tensor(list(which), device=self.length.device)
        cache = copy.copy(self.cache)
        cache.layers = [_of_rows(layer, index) for layer in self.cache.layers]
        width = max(map(len, tokens))
        ids = torch.tensor([[*new, *[0] * (width - len(new))] for new in tokens], device=self.length.device)
        mask = self.mask
        if mask is not None:
            mask = torch.cat([mask[index], mask.new_ones(len(index), width)], 1)
        places = torch.tensor([(j, t) for j, new in enumerate(tokens) for t in range(len(new))], device=ids.device)
        return self._run(ids, self.length[index], cache, mask, places[:, 0], places[:, 1])

    def take(self, tokens: Sequence[int]) -> None:
        """Put one token after each row; `logits` are of the next one then."""
        ids = torch.tensor(tokens, device=self.length.device)[:, None]
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        self.logits = self._run(ids, self.length, self.cache, self.mask, self._everyone, torch.zeros_like(self.length))
        self.length = self.length + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows leave."""
        index = torch.tensor(list(rows), device=self.length.device)
        self.cache.layers = [_of_rows(layer, index) for layer in self.cache.layers]
        self.length, self.logits = self.length[index], self.logits[index]
        self.mask = None if self.mask is None else self.mask[index]


def _of_rows(layer: Any, index: Int[Tensor, " n"]) -> Any:
    """Return a layer of a cache with these rows of it."""
    found = copy.copy(layer)
    if layer.get_seq_length() > 0:
        found.keys = layer.keys.index_select(0, index.to(layer.keys.device))
        found.values = layer.values.index_select(0, index.to(layer.values.device))
    return found


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts have in common; 0 where to run them apart saves too little."""
    n = min(n_common(prompts), min(map(len, prompts)) - 1)  # one is left to predict from
    return n if n * (len(prompts) - 1) >= WORTH * sum(map(len, prompts)) else 0


def write_tokens(
    prompts: Prompts,
    choose: Callable[[Float[Tensor, "active vocab"], Sequence[int]], Sequence[int]],
    over: Callable[[int, Sequence[int]], bool],
) -> list[list[int]]:
    """Return the tokens written after each prompt, the last one included; the prompts' memory is used up.

    Args:
        choose: from logits and the numbers of the prompts that are still written on to a token for each.
        over: whether a prompt's text is over, by its number and its tokens so far.
    """
    written: list[list[int]] = [[] for _ in prompts.length]
    active = list(range(len(written)))
    ended: set[int] = set()
    while True:
        tokens = list(choose(prompts.logits, active))
        for i, token in zip(active, tokens, strict=True):
            if i not in ended:
                written[i].append(token)
                if over(i, written[i]):
                    ended.add(i)
        going = [k for k, i in enumerate(active) if i not in ended]
        if not going:
            return written
        if len(active) - len(going) >= LEAVE_AT * len(active):
            prompts.keep(going)
            active, tokens = [active[k] for k in going], [tokens[k] for k in going]
        prompts.take(tokens)
