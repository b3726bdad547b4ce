"""Text to token rows: the one place where prompts and targets are tokenised, positions found and rows padded.

Prompt and target are tokenised together and split where the prompt's own tokens end; token positions are found by
character offsets. Rows are padded on the right, whatever the tokenizer says, and nothing is ever found by comparing ids
with a pad id.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from retcon.edits import Edit, separator_between
from retcon.errors import InvalidEdit, PositionNotFound, RetconWarning, UnsupportedModel

Where = Literal["subject_last", "prediction"]
"""Token positions that methods read and write: the subject's last token, and the last token of the prompt."""


@dataclass(frozen=True)
class Row:
    """One tokenised prompt, with or without a target after it."""

    ids: tuple[int, ...]
    """Prompt tokens (BOS included where the tokenizer adds one), then target tokens."""
    n_prompt: int
    """How many of them are the prompt's."""
    subject_last: int | None = None
    """Index of the subject's last token, where a subject was given."""
    boundary_merge: bool = False
    """A token crossed the boundary between prompt and target, so the two were tokenised apart."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.ids[: self.n_prompt]

    @property
    def target_ids(self) -> tuple[int, ...]:
        return self.ids[self.n_prompt :]

    @property
    def prediction(self) -> int:
        """Index of the last prompt token: where the first target token is predicted."""
        return self.n_prompt - 1

    def position(self, where: Where) -> int:
        """Token index of a named position.

        Raises:
            PositionNotFound: the row has no subject.
        """
        if where == "prediction":
            return self.prediction
        if self.subject_last is None:
            raise PositionNotFound("this row was tokenised without a subject, so it has no subject position")
        return self.subject_last


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length."""

    ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    tokenizer: Any,
    prompt: str,
    target: str | None = None,
    *,
    subject_span: tuple[int, int] | None = None,
    separator: str | None = None,
) -> Row:
    """Tokenise `prompt`, and the `target` after it where one is given.

    Args:
        tokenizer: a fast transformers tokenizer; it is not changed.
        prompt: text up to the answer, tokenised as it is.
        target: the answer; surrounding whitespace is stripped.
        subject_span: (start, end) characters of the subject in `prompt`.
        separator: what is written between prompt and target; None: `retcon.edits.separator_between` the two.

    The prompt's ids are those of the prompt alone, which is what a model is sent that is asked for the answer. If the
    joint encoding does not start with them (a merge crossed the boundary), the target is tokenised after a neutral text
    instead, and the row says so (`boundary_merge`).

    Raises:
        InvalidEdit: the target is empty, or gives no token.
        PositionNotFound: no token covers the subject's last character.
        UnsupportedModel: the tokenizer is a slow one, without character offsets.
    """
    prompt_ids, offsets = _encode_with_offsets(tokenizer, prompt)
    if not prompt_ids:
        raise InvalidEdit(f"the prompt {prompt!r} gives no token; give at least one character of text")
    subject_last = None
    if subject_span is not None:
        subject_last = _last_token_covering(prompt, offsets, subject_span)
    if target is None:
        return Row(tuple(prompt_ids), len(prompt_ids), subject_last)

    target = target.strip()
    if not target:
        raise InvalidEdit(f"the target after {prompt!r} is empty; give the answer the model shall say")
    if separator is None:
        separator = separator_between(prompt, target)
    joint_ids, _ = _encode_with_offsets(tokenizer, prompt + separator + target)
    merged = joint_ids[: len(prompt_ids)] != prompt_ids
    target_ids = _target_alone(tokenizer, target, separator) if merged else joint_ids[len(prompt_ids) :]
    if not target_ids:
        raise InvalidEdit(f"the target {target!r} gives no token in this vocabulary")
    return Row(tuple(prompt_ids) + tuple(target_ids), len(prompt_ids), subject_last, merged)


def encode_edit(tokenizer: Any, edit: Edit, prefix: str = "", *, answer: str | None = None) -> Row:
    """Tokenise the edit's prompt after a context prefix (already ending in its separator), with its subject located.

    Everything that reads, trains or measures an edit's prompt goes through here, so that all see the same tokens.

    Args:
        answer: an answer to put after the prompt (`edit.target_new`, `edit.target_true`); None: the prompt alone.

    Raises:
        InvalidEdit: the subject does not occur in the prompt.
        PositionNotFound: no token covers the subject's last character.
    """
    span = None
    if edit.subject is not None:
        start, end = edit.require_subject_span()
        span = (start + len(prefix), end + len(prefix))
    return encode(tokenizer, prefix + edit.text, answer, subject_span=span, separator=edit.separator)


def subject_tokens(tokenizer: Any, edit: Edit) -> range:
    """Tokens of the subject in the edit's bare prompt: from the first that covers its first character to its last one.

    Raises:
        InvalidEdit: the subject does not occur in the prompt.
        PositionNotFound: no token covers the subject's first or last character.
    """
    span = edit.require_subject_span()
    _, offsets = _encode_with_offsets(tokenizer, edit.text)
    covering = [t for t, (first, stop) in enumerate(offsets) if first <= span[0] < stop]
    if not covering:
        raise PositionNotFound(f"no token covers the start of the subject {edit.subject!r} in {edit.text!r}")
    return range(covering[0], _last_token_covering(edit.text, offsets, span) + 1)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, as it stands: without special tokens, spaces left alone."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def pad(rows: Sequence[Row], device: torch.device | str = "cpu", *, side: Literal["left", "right"] = "right") -> Batch:
    """Rows side by side, padded on one side; the pad id is 0 and only the mask tells padding from text."""
    longest = max(len(r.ids) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = longest - len(row.ids) if side == "left" else 0
        ids[i, start : start + len(row.ids)] = torch.tensor(row.ids)
        mask[i, start : start + len(row.ids)] = True
    return Batch(ids.to(device), mask.to(device))


def _encode_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans, special tokens in front kept (span (0, 0)), those at the end dropped."""
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell which characters a token covers; "
            "load the fast one (AutoTokenizer.from_pretrained(..., use_fast=True))"
        )
    encoded = tokenizer(
        text or "a",
        add_special_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    ids, offsets, special = encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"]
    n = len(ids)
    if not text:  # the special tokens in front of any text are all there is
        n = special.index(0) if 0 in special else 0
    while text and n and special[n - 1] and offsets[n - 1] == (0, 0):
        n -= 1
    return list(ids[:n]), [(0, 0) if s else tuple(o) for o, s in zip(offsets[:n], special[:n], strict=True)]


def _target_alone(tokenizer: Any, target: str, separator: str) -> list[int]:
    """Return the ids of the target after a neutral text that it does not merge with, or by itself where it always does.

    Without a separator that text is a newline: some tokenizers put a space before the first word of every text.
    """

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    for neutral in ("the",) if separator else ("\n", "the"):
        alone, both = plain(neutral), plain(neutral + separator + target)
        if both[: len(alone)] == alone and len(both) > len(alone):
            return both[len(alone) :]
    return plain(separator + target)


def _last_token_covering(text: str, offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> int:
    """i' = max {t : start_t <= e < end_t}, e the subject's last non-space character.

    The maximum matters: byte-level tokenizers give several tokens the span of one non-ASCII character, and the subject
    is complete only at the last of them.
    """
    start, end = span
    end = start + len(text[start:end].rstrip())
    covering = [t for t, (first, stop) in enumerate(offsets) if first <= end - 1 < stop]
    if not covering:
        raise PositionNotFound(f"no token covers the end of the subject {text[start:end]!r} in {text!r}")
    if offsets[covering[-1]][1] > end and text[end : offsets[covering[-1]][1]].strip():
        warnings.warn(
            f"the token that ends the subject {text[start:end]!r} in {text!r} also covers text behind it",
            RetconWarning,
            stacklevel=2,
        )
    return covering[-1]
