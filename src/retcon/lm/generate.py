"""Generation, written once: what a model writes after given prompts, for `LM.complete` and all generative metrics.

Rows that have ended leave their batch (`decoding.write_tokens`). Models in which more than attention keys and values
reaches later tokens write by transformers' `generate`, padded on the left, without the shipped generation settings.
Only newly written tokens are decoded. Sampled text is drawn from a generator per prompt, so that it depends on nothing
else in the batch.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retcon.arguments import list_of_texts
from retcon.chat import REASONING, Chat, opened_reasoning
from retcon.errors import InvalidSetting
from retcon.lm.batches import MAX_BATCH_TOKENS, shared_in_batches
from retcon.lm.capacity import key_value_bytes, planned_bytes
from retcon.lm.decoding import Prompts, pads, remembers, write_tokens
from retcon.lm.forward import unplanned_attention
from retcon.lm.model import LM
from retcon.lm.prompts import Row, decode, pad

WRITTEN_OVER_PASS = 2
"""Padded tokens of a batch, prompts and longest continuations together, over those of one forward pass; most texts end
before they are that long."""
WRITTEN_OVER_PASS_ON_ACCELERATOR = 16
"""There a pass of one token takes as long for a thousand rows as for one."""
SHARE_OF_MEMORY = 0.25
"""Of what is planned with (`planned_bytes`), for the attention's memory of such a batch."""


def written_batch(lm: LM, max_batch_tokens: int) -> dict[str, int]:
    """Return how batches are cut in which the model writes, as `shared_in_batches` takes it.

    Args:
        max_batch_tokens: padded tokens of one forward pass.
    """
    least = WRITTEN_OVER_PASS * max_batch_tokens
    if lm.device.type == "cpu":
        return dict(max_tokens=least)
    room = int(SHARE_OF_MEMORY * planned_bytes(lm) / key_value_bytes(lm))
    most = max(min(WRITTEN_OVER_PASS_ON_ACCELERATOR * max_batch_tokens, room), least)
    return dict(max_tokens=most, least=most)  # padding costs less than a batch of its own


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How text is generated."""

    max_new_tokens: int = 32
    """Tokens at most; a length per prompt, where one is given, overrides it."""
    stops: tuple[str, ...] = ("\n",)
    """Texts that end a continuation; they are cut off with all that follows."""
    sample_top_k: int | None = None
    """Draw from the k likeliest tokens; None is greedy."""
    temperature: float = 1.0
    """Divides the logits that are drawn by; only with `sample_top_k`."""
    top_p: float = 1.0
    """Of those k, draw from the likeliest that have this share of the probability; only with `sample_top_k`."""
    total_tokens: int | None = None
    """Prompt and continuation together at most (ROME's fluency); overrides `max_new_tokens`."""
    chat: Chat | None = None
    """Put the prompt as the user's turn of the chat template."""
    skip_newlines: bool = False
    """Look for stop texts only from the first character on that is no whitespace; always so in a chat."""
    after: str | None = None
    """Keep only what follows the last occurrence of this (the answer after a chain of thought)."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "sample_top_k", "total_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidSetting(f"{name} must be at least 1, found {value}")
        if not 0 < self.temperature < math.inf or not 0 < self.top_p <= 1:
            found = f"{self.temperature:g} and {self.top_p:g}"
            raise InvalidSetting(f"temperature must be above 0 and finite, and top_p in (0, 1], found {found}")
        if self.sample_top_k is None and (self.temperature != 1 or self.top_p != 1):
            raise InvalidSetting(
                f"temperature and top_p ({self.temperature:g} and {self.top_p:g}) are of drawing, and "
                "sample_top_k=None is greedy; give sample_top_k, of any size, or leave them out"
            )
        object.__setattr__(self, "stops", list_of_texts(self.stops, "stops"))
        if any(not stop for stop in self.stops):
            raise InvalidSetting("a stop text is empty; it would cut everything")


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote after one prompt."""

    text: str
    """New text only, up to the first stop text, special tokens left out."""
    n_tokens: int
    """Tokens written before an end token or the limit, the stop text's and a reasoning part's included."""
    cut: bool
    """The limit ended it, neither a stop text nor an end token."""
    reasoning: str = ""
    """What a chat model wrote to itself before the answer; not part of `text`."""


def generate(
    lm: LM,
    prompts: Sequence[str | Row],
    how: Writing | None = None,
    *,
    lengths: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Continue every prompt, in the order given, by no more than the room that the model's context leaves.

    A text ends at any of the model's end tokens (`LM.end_tokens`). What a chat model writes to itself first
    (`REASONING`) is kept apart, and stop texts do not apply inside it.

    Args:
        prompts: texts, or rows already tokenised (a conversation of several turns).
        how: `Writing()` by default.
        lengths: most tokens to write, one per prompt (`gold_length`); None: as `how` says.
        seeds: one per prompt; needed for sampling.
        max_batch_tokens: padded tokens of one forward pass; a batch of prompts and texts has some times as many
            (`written_batch`), and half of them where memory runs out.
        on_progress: called after every batch with the prompts done and the prompts in all.

    Raises:
        InvalidEdit: a prompt gives no token, or is a text that leaves no room for an answer in the model's context.
        InvalidSetting: sampling without seeds, or a chat without a template.
        torch.OutOfMemoryError: a single row does not fit.
    """
    how = how or Writing()
    if how.sample_top_k is not None and seeds is None:
        raise InvalidSetting("sampled text needs a seed per prompt")
    with lm.frozen_eval():  # prompts are read in this turn, too: what is attached may act on them
        rows = [p if isinstance(p, Row) else _row_of(lm, p, how.chat) for p in prompts]
        limits = [most_tokens(lm, row, how, None if lengths is None else lengths[i]) for i, row in enumerate(rows)]
        results = {i: Written("", 0, True) for i, limit in enumerate(limits) if limit < 1}
        asked = [i for i in range(len(rows)) if i not in results]

        def report(done: int, _: int) -> None:
            if on_progress is not None:
                on_progress(len(rows) - len(asked) + done, len(rows))

        found = shared_in_batches(
            lm,
            WriteBatch(how),
            [(rows[i], limits[i], None if seeds is None else seeds[i]) for i in asked],
            [len(rows[i].ids) + limits[i] for i in asked],
            **written_batch(lm, max_batch_tokens),
            kinds=_kinds(lm, [rows[i] for i in asked], [limits[i] for i in asked]),
            on_progress=report,
        )
    results |= zip(asked, found, strict=True)
    return [results[i] for i in range(len(rows))]


def texts_after(lm: LM, asked: Sequence[tuple[str, Chat | None]], how: Writing) -> list[str]:
    """Return what the model writes after prompts of which each has a chat of its own, or none; outer space removed."""
    found: dict[int, Written] = {}
    with lm.scope():
        for chat in dict.fromkeys(chat for _, chat in asked):
            here = [i for i, (_, own) in enumerate(asked) if own == chat]
            found |= zip(here, generate(lm, [asked[i][0] for i in here], replace(how, chat=chat)), strict=True)
    return [found[i].text.strip() for i in range(len(asked))]


def _kinds(lm: LM, rows: Sequence[Row], limits: Sequence[int]) -> Sequence[int] | None:
    """Return what rows of a batch must have in common; None: nothing."""
    if remembers(lm):
        return None if pads(lm) else [len(row.ids) for row in rows]
    return limits  # a batch goes on to the largest limit in it


def _row_of(lm: LM, prompt: str, chat: Chat | None) -> Row:
    """Return a prompt's tokens, which fit into the context; a text that cannot fit is not tokenised."""
    lm.check_length(prompt, what="the prompt")
    row = lm.encode(prompt, chat=chat)
    lm.check_length(prompt, row, what="the prompt")
    return row


class own_settings:
    """The model without its shipped generation settings, which `generate` would fill gaps from, while in scope."""

    def __init__(self, lm: LM) -> None:
        self.model = lm.model

    def __enter__(self) -> None:
        from transformers import GenerationConfig

        self.shipped = self.model.generation_config
        self.model.generation_config = GenerationConfig()

    def __exit__(self, *_: object) -> None:
        self.model.generation_config = self.shipped


def save_model(lm: LM, folder: str | Path, **options: Any) -> None:
    """Write a model's checkpoint, with its shipped generation settings as they are: transformers refuses to save some
    that it loads (`temperature` without `do_sample`)."""
    with own_settings(lm):
        lm.model.save_pretrained(folder, **options)
    path = Path(folder) / "generation_config.json"
    if path.exists():
        lm.model.generation_config.to_json_file(path)


def most_tokens(lm: LM, row: Row, how: Writing, given: int | None) -> int:
    """Return the most tokens to write: as asked, and no more than the context has room for."""
    room = math.inf if lm.context_length is None else lm.context_length - len(row.ids)
    if given is None:
        given = how.max_new_tokens if how.total_tokens is None else how.total_tokens - len(row.ids)
    return int(min(given, room))


@dataclass(frozen=True)
class WriteBatch:
    """What a model writes after a batch of prompts, as work that can be sent elsewhere."""

    how: Writing

    def __call__(self, lm: LM, items: Sequence[tuple[Row, int, int | None]]) -> list[Written]:
        """Return a text per item (prompt, most tokens to write, seed)."""
        rows, limits, seeds = (list(column) for column in zip(*items, strict=True))
        draw = None if self.how.sample_top_k is None else _Draw(self.how, seeds)
        with lm.frozen_eval(), torch.inference_mode():
            if not remembers(lm):
                return _write_by_transformers(lm, rows, limits, self.how, draw)
            prompts = Prompts(lm, [row.ids for row in rows])
            return write_after(prompts, rows, limits, [self.how] * len(rows), sorted(lm.end_tokens), draw)


def write_after(
    prompts: Prompts,
    rows: Sequence[Row],
    limits: Sequence[int],
    hows: Sequence[Writing],
    ends: Sequence[int],
    draw: "_Draw | None" = None,
) -> list[Written]:
    """Return what the model writes after prompts that were run; their memory is used up.

    Args:
        limits: most tokens to write, at least 1.
        draw: chooses the tokens; None: the likeliest.
    """
    tokenizer = prompts.lm.tokenizer
    parts = [
        _Parts(tokenizer, how, _opened(tokenizer, row) if how.chat else None)
        for row, how in zip(rows, hows, strict=True)
    ]
    over = _Over(parts, limits, ends)

    def likeliest(logits: Tensor, active: Sequence[int]) -> list[int]:
        found: list[int] = logits.argmax(-1).tolist()
        return found

    written = write_tokens(prompts, likeliest if draw is None else draw.chosen, over)
    return [_read(part, new, ends) for part, new in zip(parts, written, strict=True)]


class _Over:
    """Whether a text is over: by an end token, its limit, or a stop text."""

    def __init__(self, parts: Sequence["_Parts"], limits: Sequence[int], ends: Sequence[int]) -> None:
        self.parts, self.limits, self.ends = parts, limits, set(ends)
        self._may_stop: dict[tuple[int, tuple[str, ...]], bool] = {}

    def __call__(self, row: int, written: Sequence[int]) -> bool:
        if written[-1] in self.ends or len(written) >= self.limits[row]:
            return True
        parts = self.parts[row]
        return bool(parts.how.stops) and self._may(parts, written[-1]) and parts.ended(written)

    def _may(self, parts: "_Parts", token: int) -> bool:
        """Return whether a stop text may end in a token: nearly always it does not, and no text has to be made."""
        how = parts.how
        if how.chat is not None or any(stop[-1] == " " for stop in how.stops):
            return True
        key = token, how.stops
        if key not in self._may_stop:
            text = parts.tokenizer.decode([token])
            self._may_stop[key] = "\ufffd" in text or any(stop[-1] in text for stop in how.stops)
        return self._may_stop[key]


def _write_by_transformers(
    lm: LM, rows: Sequence[Row], limits: Sequence[int], how: Writing, draw: "_Draw | None"
) -> list[Written]:
    """Return the texts of a model with a recurrent state, of which transformers' `generate` takes care."""
    from transformers import GenerationConfig

    batch, ends = pad(rows, lm.device, side="left"), sorted(lm.end_tokens)
    start = batch.ids.shape[1]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(limits),
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    parts = [_Parts(lm.tokenizer, how, _opened(lm.tokenizer, row) if how.chat else None) for row in rows]
    more: dict[str, Any] = {"stopping_criteria": [_Stop(parts, start)]} if how.stops else {}
    if draw is not None:
        more["logits_processor"] = [draw]
    with own_settings(lm), unplanned_attention():
        out = lm.model.generate(batch.ids, attention_mask=batch.mask.long(), generation_config=settings, **more)
    written = zip(parts, out[:, start:], limits, strict=True)
    return [_read(part, new[:limit].tolist(), ends) for part, new, limit in written]


def _opened(tokenizer: Any, row: Row) -> str | None:
    return opened_reasoning(tokenizer.decode(list(row.ids[-16:]), skip_special_tokens=False))


@dataclass(frozen=True)
class _Parts:
    """What belongs to what in the tokens that a model writes after one prompt."""

    tokenizer: Any
    how: Writing
    opened: str | None

    def n_reasoning(self, ids: Sequence[int]) -> int | None:
        """Return how many of the first tokens are a reasoning part; None where it has not ended."""
        if self.how.chat is None:
            return 0

        def raw(n: int) -> str:
            text: str = self.tokenizer.decode(list(ids[:n]), skip_special_tokens=False)
            return text

        whole = raw(len(ids))
        for begin, end in REASONING:
            if self.opened == begin or whole.lstrip().startswith(begin):
                if end not in whole:
                    return None
                return bisect_left(range(len(ids) + 1), True, key=lambda n: end in raw(n))
        return 0

    def first(self, answer: str) -> int:
        """Return the character from which on stop texts count."""
        leading = self.how.skip_newlines or self.how.chat is not None
        return len(answer) - len(answer.lstrip()) if leading else 0

    def stopped_at(self, answer: str) -> int | None:
        """Return the character where the earliest stop text begins."""
        first = self.first(answer)
        return min((at for stop in self.how.stops if (at := answer.find(stop, first)) >= 0), default=None)

    def ended(self, ids: Sequence[int]) -> bool:
        """Return whether the newest of these tokens completes a stop text."""
        if not (self.how.skip_newlines or self.how.chat is not None):  # else what comes first decides
            ids = ids[-max(map(len, self.how.stops)) - 4 :]  # tokens that can hold the end of one, and then some
        n_reasoning = self.n_reasoning(ids)
        answer = "" if n_reasoning is None else decode(self.tokenizer, ids[n_reasoning:])
        return self.stopped_at(answer) is not None


def _read(parts: _Parts, new: Sequence[int], ends: Sequence[int]) -> Written:
    end = next((i for i, token in enumerate(new) if token in ends), None)
    kept = new if end is None else new[:end]
    n_reasoning = parts.n_reasoning(kept)
    if n_reasoning is None:
        return Written("", len(kept), True, decode(parts.tokenizer, kept))
    answer = kept[n_reasoning:]
    text, n_tokens = decode(parts.tokenizer, answer), len(kept)
    stopped = parts.stopped_at(text)
    if stopped is not None:  # other rows of the batch may have gone on
        shown = (decode(parts.tokenizer, answer[:n]) for n in range(1, len(answer) + 1))
        n_tokens = n_reasoning + next(n for n, t in enumerate(shown, 1) if parts.stopped_at(t) is not None)
        text = text[:stopped]
    after = parts.how.after
    if after is not None and after in text:
        text = text[text.rindex(after) + len(after) :].strip()
    cut = end is None and stopped is None
    return Written(text, n_tokens, cut, decode(parts.tokenizer, kept[:n_reasoning]))


class _Stop:
    """Ends a row once its continuation holds a stop text; saves time, the cutting is done on the decoded text."""

    def __init__(self, parts: Sequence[_Parts], start: int) -> None:
        self.parts, self.start = parts, start
        self.ended: list[bool] = []

    def __call__(self, ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        self.ended = self.ended or [False] * len(ids)
        for i, (row, parts) in enumerate(zip(ids[:, self.start :].tolist(), self.parts, strict=True)):
            self.ended[i] = self.ended[i] or parts.ended(row)
        return torch.tensor(self.ended, device=ids.device)


class _Draw:
    """Leaves one token per row: drawn from the likeliest, by a generator of the row's own."""

    def __init__(self, how: Writing, seeds: Sequence[int | None]) -> None:
        assert how.sample_top_k is not None
        self.k, self.temperature, self.top_p = how.sample_top_k, how.temperature, how.top_p
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds if seed is not None]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.tensor(self.chosen(scores, range(len(scores))), device=scores.device)[:, None]
        return torch.full_like(scores, -math.inf).scatter(1, chosen, 0.0)

    def chosen(self, scores: Tensor, rows: Sequence[int]) -> list[int]:
        """Return a token for each of these rows."""
        top = scores.float().topk(min(self.k, scores.shape[-1]), dim=-1)
        shares = (top.values.double() / self.temperature).softmax(-1).cumsum(-1)
        within = shares.roll(1, -1)
        within[:, 0] = 0.0  # the likeliest is always among them
        last = (within < self.top_p).sum(-1, keepdim=True) - 1
        shares = shares.minimum(shares.gather(1, last)).cpu()
        u = torch.stack([torch.rand((), generator=self.generators[i], dtype=torch.float64) for i in rows])
        place = (shares < u[:, None] * shares[:, -1:]).sum(-1, keepdim=True).clamp_max(shares.shape[1] - 1)
        found: list[int] = top.indices.gather(1, place.to(scores.device))[:, 0].tolist()
        return found
