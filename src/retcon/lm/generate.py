"""Generation, written once: what a model writes after given prompts, for `LM.complete` and all generative metrics.

Rows are padded on the left with their mask, decoding is the model's own `generate` with nothing of the shipped
generation settings, and only newly written tokens are decoded. Sampled text is drawn from a generator per prompt, so
that it depends on nothing else in the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retcon.chat import Chat
from retcon.errors import InvalidSetting
from retcon.lm.batches import MAX_BATCH_TOKENS, in_batches
from retcon.lm.model import LM
from retcon.lm.prompts import Row, decode, pad

WRITTEN_BATCH_TOKENS = 2 * MAX_BATCH_TOKENS
"""Padded tokens of a batch, prompts and longest continuations together; most end before they are that long."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How text is generated."""

    max_new_tokens: int = 32
    """Tokens at most; a length per prompt, where one is given, stands above it."""
    stops: tuple[str, ...] = ("\n",)
    """Texts that end a continuation; they are cut off with all that follows."""
    sample_top_k: int | None = None
    """Draw from the k likeliest tokens at temperature 1; None is greedy."""
    total_tokens: int | None = None
    """Prompt and continuation together at most (ROME's fluency); stands above `max_new_tokens`."""
    chat: Chat | None = None
    """Put the prompt as the user's turn of the chat template."""
    after: str | None = None
    """Keep only what follows the last occurrence of this (the answer after a chain of thought)."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "sample_top_k", "total_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidSetting(f"{name} must be at least 1, found {value}")
        if any(not stop for stop in self.stops):
            raise InvalidSetting("a stop text is empty; it would cut everything")


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote after one prompt."""

    text: str
    """New text only, up to the first stop text, special tokens left out."""
    n_tokens: int
    """Tokens written before the end-of-text token or the limit, the stop text's included."""
    cut: bool
    """The limit ended it, neither a stop text nor the end-of-text token."""


def generate(
    lm: LM,
    prompts: Sequence[str],
    how: Writing | None = None,
    *,
    lengths: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    max_batch_tokens: int = WRITTEN_BATCH_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Continue every prompt, in the order given, by no more than the room that the model's context leaves.

    Args:
        how: `Writing()` by default.
        lengths: most tokens to write, one per prompt (`gold_length`); None: as `how` says.
        seeds: one per prompt; needed for sampling.
        max_batch_tokens: halved when memory runs out.
        on_progress: called after every batch with the prompts done and the prompts in all.

    Raises:
        InvalidEdit: a prompt gives no token.
        InvalidSetting: sampling without seeds, or a chat without a template.
        torch.OutOfMemoryError: a single row does not fit.
    """
    how = how or Writing()
    if how.sample_top_k is not None and seeds is None:
        raise InvalidSetting("sampled text needs a seed per prompt")
    rows = [lm.encode(prompt, chat=how.chat) for prompt in prompts]
    limits = [_limit(lm, row, how, None if lengths is None else lengths[i]) for i, row in enumerate(rows)]
    results = {i: Written("", 0, True) for i, limit in enumerate(limits) if limit < 1}
    asked = [i for i in range(len(rows)) if i not in results]

    def work(group: list[int]) -> list[Written]:
        chosen = [asked[k] for k in group]
        drawn = [seeds[i] for i in chosen] if seeds is not None else None
        return _write_batch(lm, [rows[i] for i in chosen], [limits[i] for i in chosen], how, drawn)

    def hear(done: int, _: int) -> None:
        if on_progress is not None:
            on_progress(len(rows) - len(asked) + done, len(rows))

    with lm.frozen_eval(), _own_settings(lm), torch.inference_mode():
        found = in_batches(
            [len(rows[i].ids) + limits[i] for i in asked],
            work,
            max_tokens=max_batch_tokens,
            kinds=[limits[i] for i in asked],  # a batch goes on to the largest limit in it
            on_progress=hear,
        )
    results |= zip(asked, found, strict=True)
    return [results[i] for i in range(len(rows))]


class _own_settings:
    """The model without its shipped generation settings, which `generate` would fill gaps from, while in scope."""

    def __init__(self, lm: LM) -> None:
        self.model = lm.model

    def __enter__(self) -> None:
        from transformers import GenerationConfig

        self.shipped = self.model.generation_config
        self.model.generation_config = GenerationConfig()

    def __exit__(self, *_: object) -> None:
        self.model.generation_config = self.shipped


def _limit(lm: LM, row: Row, how: Writing, given: int | None) -> int:
    """Most tokens to write: as asked, and no more than the context has room for."""
    room = math.inf if lm.context_length is None else lm.context_length - len(row.ids)
    if given is None:
        given = how.max_new_tokens if how.total_tokens is None else how.total_tokens - len(row.ids)
    return int(min(given, room))


def _write_batch(
    lm: LM, rows: Sequence[Row], limits: Sequence[int], how: Writing, seeds: Sequence[int] | None
) -> list[Written]:
    from transformers import GenerationConfig

    batch = pad(rows, lm.device, side="left")
    start = batch.ids.shape[1]
    end = lm.tokenizer.eos_token_id
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max(limits), eos_token_id=end, pad_token_id=0 if end is None else end
    )
    stop = _Stop(lm, start, how.stops)
    more: dict[str, Any] = {"stopping_criteria": [stop]} if how.stops else {}
    if how.sample_top_k is not None and seeds is not None:
        more["logits_processor"] = [_Draw(how.sample_top_k, seeds)]
    out = lm.model.generate(batch.ids, attention_mask=batch.mask.long(), generation_config=settings, **more)
    return [_read(lm, new[:limit].tolist(), how, end) for new, limit in zip(out[:, start:], limits, strict=True)]


def _read(lm: LM, new: Sequence[int], how: Writing, end: int | None) -> Written:
    ended = end is not None and end in new
    kept = new[: new.index(end)] if ended and end is not None else new
    text = decode(lm.tokenizer, kept)
    cut_at = [text.index(stop) for stop in how.stops if stop in text]
    n_tokens = len(kept)
    if cut_at:  # other rows of the batch may have gone on
        n_tokens = next(
            n for n in range(1, n_tokens + 1) if any(s in decode(lm.tokenizer, kept[:n]) for s in how.stops)
        )
        text = text[: min(cut_at)]
    if how.after is not None and how.after in text:
        text = text[text.rindex(how.after) + len(how.after) :].strip()
    return Written(text, n_tokens, not ended and not cut_at)


class _Stop:
    """Ends a row once its continuation holds a stop text; saves time, the cutting is done on the decoded text."""

    def __init__(self, lm: LM, start: int, stops: Sequence[str]) -> None:
        self.lm, self.start, self.stops = lm, start, stops
        self.ended: list[bool] = []

    def __call__(self, ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        self.ended = self.ended or [False] * len(ids)
        window = max(map(len, self.stops)) + 4  # tokens that can hold the end of a stop text, and then some
        recent = ids[:, max(self.start, ids.shape[1] - window) :].tolist()
        for i, row in enumerate(recent):
            if not self.ended[i]:
                text = decode(self.lm.tokenizer, row)
                self.ended[i] = any(stop in text for stop in self.stops)
        return torch.tensor(self.ended, device=ids.device)


class _Draw:
    """Leaves one token per row: drawn from the k likeliest, by a generator of the row's own."""

    def __init__(self, k: int, seeds: Sequence[int]) -> None:
        self.k = k
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        top = scores.float().topk(min(self.k, scores.shape[-1]), dim=-1)
        shares = top.values.double().softmax(-1).cumsum(-1).cpu()
        u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self.generators])
        place = (shares < u[:, None] * shares[:, -1:]).sum(-1, keepdim=True).clamp_max(shares.shape[1] - 1)
        chosen = top.indices.gather(1, place.to(scores.device))
        return torch.full_like(scores, -math.inf).scatter(1, chosen, 0.0)
