"""How far a model has moved: perplexity of held-out text, divergence of next-token distributions, experts' routing."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.chat import Chat
from retcon.errors import InvalidSetting
from retcon.evaluation.score import score_rows
from retcon.lm.batches import MAX_BATCH_TOKENS, in_batches
from retcon.lm.experts import routing_similarity
from retcon.lm.forward import Point, next_log_probs, run
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, Row, encode, pad
from retcon.plural import plural

WINDOW = 1024
"""Tokens of a window at most; a model's context where that is shorter."""
STRIDE = 512
"""Tokens from one window to the next."""


@dataclass(frozen=True)
class Perplexity:
    """Of one text under one model."""

    nll: float
    """Mean negative log-likelihood in nats per scored token."""
    n_tokens: int
    """Tokens scored: all but the text's first."""

    @property
    def ppl(self) -> float:
        """exp(nll); infinite where that is beyond a float (from 709.8 nats on)."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


def windows(n_tokens: int, window: int = WINDOW, stride: int = STRIDE) -> list[tuple[int, int, int]]:
    """Return (start, end, first scored token) of every window; each token but the text's first is scored once.

    Raises:
        InvalidSetting: the stride leaves tokens out.
    """
    if not 0 < stride < window:
        raise InvalidSetting(f"stride {stride} and window {window}: the stride must be at least 1 and below the window")
    found, scored, start = [], 1, 0
    while scored < n_tokens:
        end = min(start + window, n_tokens)
        found.append((start, end, scored))
        scored, start = end, start + stride
    return found


def perplexity(
    lm: LM, text: str, *, window: int = WINDOW, stride: int | None = None, max_tokens: int | None = None
) -> Perplexity:
    """Return the perplexity of `text`, read in overlapping windows, so that all but the first have context.

    Args:
        stride: tokens from window to window; None: 512, or half of a window that is smaller than two of them.
        max_tokens: read no more of it; None reads all.

    Raises:
        InvalidSetting: fewer than two tokens, or a stride that is not below the window.
    """
    ids = encode(lm.tokenizer, text).ids[:max_tokens]
    if len(ids) < 2:
        raise InvalidSetting(f"a text of {plural(len(ids), 'token')} has no perplexity; give a longer one")
    window = min(window, lm.context_length or window)
    stride = min(STRIDE, window // 2) if stride is None else stride
    rows = [Row(ids[a:b], first - a) for a, b, first in windows(len(ids), window, stride)]
    scores = score_rows(lm, rows, max_batch_tokens=max(4096, window))
    n = sum(len(score.logp) for score in scores)
    return Perplexity(-math.fsum(p for score in scores for p in score.logp) / n, n)


Scope = Callable[[], AbstractContextManager[object]]
"""Puts the model into a state while it lasts."""


def next_token_divergence(
    lm: LM,
    prompts: Sequence[str],
    before: Scope,
    after: Scope,
    *,
    chats: Sequence[Chat | None] | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[float]:
    """Return KL(before || after) in nats of the next-token distribution after every prompt, float32, whole vocabulary.

    In each state the prompts are read as what is attached there makes them.

    Args:
        chats: one per prompt, for prompts that are a user's turn.
        max_batch_tokens: padded tokens per forward pass; halved when memory runs out.
    """
    frames = chats or [None] * len(prompts)

    def rows_here() -> list[Row]:
        return [lm.encode(prompt, chat=chat) for prompt, chat in zip(prompts, frames, strict=True)]

    def compare(group: list[int]) -> list[float]:
        with before():
            old = _next_logp(lm, [old_rows[i] for i in group])
        with after():
            new = _next_logp(lm, [new_rows[i] for i in group])
        found: list[float] = divergence(old, new).tolist()
        return found

    with lm.scope():  # prompts are read in the turn in which they are run
        with before():
            old_rows = rows_here()
        with after():
            new_rows = rows_here()
        lengths = [max(len(old.ids), len(new.ids)) for old, new in zip(old_rows, new_rows, strict=True)]
        return in_batches(lengths, compare, max_tokens=max_batch_tokens)


def routing_overlap(
    lm: LM, prompts: Sequence[str], before: Scope, after: Scope, *, max_batch_tokens: int = MAX_BATCH_TOKENS
) -> dict[int, float]:
    """Return, for each layer with routed experts, how many of a token's experts are the same in both states.

    Mean over the tokens of `prompts` of |S and S'| / |S or S'|, S the experts that the token is routed to: 1 where
    nothing changed. Empty for a model without routed experts.

    Args:
        max_batch_tokens: padded tokens per forward pass; halved when memory runs out.
    """
    layers = [layer for layer, kind in enumerate(lm.kinds) if kind.experts is not None]
    if not layers:
        return {}
    rows = sorted((encode(lm.tokenizer, prompt) for prompt in prompts), key=lambda row: len(row.ids))
    lengths = [len(row.ids) for row in rows]

    def compare(group: list[int]) -> list[dict[int, Tensor]]:
        batch = pad([rows[i] for i in group], lm.device)
        with before():
            old = _routes(lm, batch, layers)
        with after():
            new = _routes(lm, batch, layers)
        sizes = [lengths[i] for i in group]
        shares = [routing_similarity(old[layer], new[layer]).double().cpu().split(sizes) for layer in layers]
        return [dict(zip(layers, of_row, strict=True)) for of_row in zip(*shares, strict=True)]

    found = in_batches(lengths, compare, max_tokens=max_batch_tokens)
    return {layer: float(torch.cat([of_row[layer] for of_row in found]).mean()) for layer in layers}


def _routes(lm: LM, batch: Batch, layers: Sequence[int]) -> dict[int, Int[Tensor, "tokens top_k"]]:
    """Return which experts each token of the rows is routed to; padding left out."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, index, _ = (*args, *kwargs.values())
            found[layer] = index[batch.mask.flatten().to(index.device)]

        return hook

    with ExitStack() as hooks, lm.frozen_eval(), torch.inference_mode():
        for layer in layers:
            hooks.enter_context(lm.experts(layer).register_forward_pre_hook(keep(layer), with_kwargs=True))
        run(lm, batch, {Point(lm.n_layers - 1, "block"): lambda value: None})
    return found


def divergence(old: Float[Tensor, "n vocab"], new: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """Return KL(old || new) of log-probabilities, never below 0."""
    terms = torch.where(old.isneginf(), 0.0, old.exp() * (old - new))  # 0 log 0 is 0
    return terms.double().sum(-1).clamp_min(0.0)


def _next_logp(lm: LM, rows: Sequence[Row]) -> Float[Tensor, "n vocab"]:
    with lm.frozen_eval(), torch.inference_mode():
        return next_log_probs(lm, rows).float()
