"""Text to token rows: the one place where prompts and targets are tokenised, positions found and rows padded.

Prompt and target are tokenised together and split where the prompt's own tokens end; token positions are found by
character offsets. Rows are padded on the right, whatever the tokenizer says, and nothing is ever found by comparing ids
with a pad id.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from retcon.arguments import check_choice
from retcon.boundary import separator_between
from retcon.chat import Chat, opened_reasoning
from retcon.edits import Edit
from retcon.errors import InvalidEdit, InvalidSetting, PositionNotFound, RetconWarning, UnsupportedModel
from retcon.lm.refusals import refuse_slow

Where = Literal["subject_last", "prediction"]
"""Token positions that methods read and write: the subject's last token, and the last token of the prompt."""
Side = Literal["left", "right"]


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
    def n_needed(self) -> int:
        """Tokens that a context must hold: the prompt and the answer, one token of it where none is given."""
        return max(len(self.ids), self.n_prompt + 1)

    @property
    def prediction(self) -> int:
        """Index of the last prompt token: where the first target token is predicted."""
        return self.n_prompt - 1

    def position(self, where: Where) -> int:
        """Return the token index of a named position.

        Raises:
            PositionNotFound: the row has no subject.
        """
        if where == "prediction":
            return self.prediction
        if self.subject_last is None:
            raise PositionNotFound("this row was tokenised without a subject, so it has no subject position")
        return self.subject_last

    def until(self, where: Where) -> "Row":
        """Return the row up to a named position, which is then its prediction position; the answer is left out.

        Raises:
            PositionNotFound: the row has no subject.
        """
        end = self.position(where) + 1
        return Row(self.ids[:end], end, self.subject_last)


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
    chat: Chat | None = None,
    known: Row | None = None,
) -> Row:
    """Tokenise `prompt`, and the `target` after it where one is given.

    Args:
        tokenizer: a fast transformers tokenizer; it is not changed.
        prompt: text up to the answer, tokenised as it is.
        target: the answer; surrounding whitespace is stripped.
        subject_span: (start, end) characters of the subject in `prompt`.
        separator: what is written between prompt and target; None: `retcon.edits.separator_between` the two, or in a
            chat what the template writes there.
        chat: makes the prompt the user's turn in the tokenizer's template.
        known: a row of the same prompt with another target, whose prompt need not be tokenised again.

    The prompt's ids are those of the prompt alone, which is what a model is sent that is asked for the answer. If the
    joint encoding does not start with them (a merge crossed the boundary), the target is tokenised after a neutral text
    instead, and the row says so (`boundary_merge`).

    Raises:
        InvalidEdit: the target is empty, or gives no token.
        PositionNotFound: no token covers the subject's last character.
        UnsupportedModel: the tokenizer is a slow one, without character offsets.
    """
    if chat is not None:
        turn = render(tokenizer, chat, [prompt])
        if subject_span is not None:
            subject_span = turn.span(prompt, subject_span)
        if target is not None and separator is None and (opened := opened_reasoning(turn.text)):
            warnings.warn(
                f"the chat template begins a reasoning part ({opened}) before the answer, and answers are trained and "
                "measured inside it; have the template leave it out, by its argument enable_thinking=false, say, or "
                "end it in the separator of the facts",
                RetconWarning,
                stacklevel=2,
            )
        prompt, separator = turn.text, turn.separator if separator is None else separator
    if known is not None:
        prompt_ids, subject_last = list(known.prompt_ids), known.subject_last
    else:
        prompt_ids, offsets = _encode_with_offsets(tokenizer, prompt, chat is None)
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
    joint_ids, _ = _encode_with_offsets(tokenizer, prompt + separator + target, chat is None)
    merged = joint_ids[: len(prompt_ids)] != prompt_ids
    target_ids = _target_alone(tokenizer, target, separator) if merged else joint_ids[len(prompt_ids) :]
    if not target_ids:
        raise InvalidEdit(f"the target {target!r} gives no token in this vocabulary")
    return Row(tuple(prompt_ids) + tuple(target_ids), len(prompt_ids), subject_last, merged)


def encode_edit(tokenizer: Any, edit: Edit, prefix: str = "", *, answer: str | None = None) -> Row:
    """Tokenise the edit's prompt after a context prefix (already ending in its separator), with its subject located.

    Everything that reads, trains or measures an edit's prompt goes through here, so that all see the same tokens.

    Args:
        prefix: goes before the prompt, in a chat inside the user's turn.
        answer: an answer to put after the prompt (`edit.target_new`, `edit.target_true`); None: the prompt alone.

    Raises:
        InvalidEdit: the subject does not occur in the prompt.
        PositionNotFound: no token covers the subject's last character.
    """
    span = None
    if edit.subject is not None:
        start, end = edit.require_subject_span()
        span = (start + len(prefix), end + len(prefix))
    return encode(tokenizer, prefix + edit.text, answer, subject_span=span, separator=edit.separator, chat=edit.chat)


def encode_trained(tokenizer: Any, edit: Edit, prefix: str = "", *, end: bool = False) -> Row:
    """Tokenise the edit's prompt and new answer as they are trained: with the token that ends the turn, where the
    edit's chat asks for it (`Chat.train_end`).

    Args:
        prefix: goes before the prompt, as in `encode_edit`.
        end: whatever the chat says, and outside of one with the tokenizer's end-of-text token.

    Raises:
        InvalidEdit, PositionNotFound: as `encode_edit`.
    """
    return ended(tokenizer, encode_edit(tokenizer, edit, prefix, answer=edit.target_new), edit.chat, end=end)


def ended(tokenizer: Any, row: Row, chat: Chat | None, *, end: bool = False) -> Row:
    """Return a prompt and its answer with the token that ends the turn, if the chat asks for it (`Chat.train_end`).

    Args:
        end: whatever the chat says, and outside of one with the tokenizer's end-of-text token.

    Raises:
        InvalidSetting: the chat asks for it, and its template ends a turn with no token.
    """
    token = end_of_turn(tokenizer) if chat is not None and (chat.train_end or end) else None
    if end and token is None:
        token = tokenizer.eos_token_id
    if chat is not None and chat.train_end and token is None:
        raise InvalidSetting(
            "the chat template ends an answer with no special token, so the end of a turn cannot be trained; leave ",
            python="Chat(train_end=True) out",
            option="--train-end, or train_end of the facts, out",
            page="train_end of the facts out",
        )
    return row if token is None or row.ids[-1] == token else replace(row, ids=(*row.ids, token))


def subject_tokens(tokenizer: Any, edit: Edit) -> range:
    """Return the tokens of the subject in the edit's bare prompt: from its first character's first to its last one's.

    Raises:
        InvalidEdit: the subject does not occur in the prompt.
        PositionNotFound: no token covers the subject's first or last character.
    """
    span, text = edit.require_subject_span(), edit.text
    if edit.chat is not None:
        turn = render(tokenizer, edit.chat, [text])
        span, text = turn.span(text, span), turn.text
    _, offsets = _encode_with_offsets(tokenizer, text, edit.chat is None)
    covering = [t for t, (first, stop) in enumerate(offsets) if first <= span[0] < stop]
    if not covering:
        raise PositionNotFound(f"no token covers the start of the subject {edit.subject!r} in {text!r}")
    return range(covering[0], _last_token_covering(text, offsets, span) + 1)


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as a chat model reads it, up to where its answer begins."""

    text: str
    start: int
    """Character where the last question starts in it."""
    separator: str
    """Whitespace that the template writes before an answer."""

    def span(self, question: str, span: tuple[int, int]) -> tuple[int, int]:
        """Return where a part of the last question is in the rendered text."""
        stripped = len(question) - len(question.lstrip())  # templates take off what surrounds a turn
        return span[0] - stripped + self.start, span[1] - stripped + self.start


def render(tokenizer: Any, chat: Chat, turns: Sequence[str]) -> RenderedChat:
    """Render a conversation by the tokenizer's chat template.

    Args:
        turns: the user's and the assistant's, in turn; the last is a question.

    Raises:
        InvalidSetting: there is no template, or it refuses the conversation.
        UnsupportedModel: the question cannot be found in what the template writes: it changes it, say.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidSetting(
            "the tokenizer has no chat template, so it is no chat model's; ",
            python="ask without a chat, or give the template as tokenizer.chat_template",
            option="leave out --chat, the options that imply it and chat in the facts",
            page="ask without 'as a chat message'",
        )

    for name in chat.arguments:
        if name not in str(tokenizer.chat_template):
            warnings.warn(
                f"the chat template knows no {name!r}, so that it changes nothing", RetconWarning, stacklevel=2
            )

    def apply(messages: list[dict[str, str]], asking: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asking, **chat.arguments
            )
        except Exception as error:  # templates raise what they like, for a system turn, say
            raise InvalidSetting(f"the chat template refuses this conversation ({error})") from None
        return text

    text = apply(chat.turns(turns), True)
    if chat.system and chat.system not in text and text == apply(replace(chat, system=None).turns(turns), True):
        warnings.warn(
            "the chat template writes no system turn, so that it changes nothing", RetconWarning, stacklevel=2
        )
    question = turns[-1].strip()
    start = _question_start(text, question, apply(chat.turns([*turns[:-1], _STAND_IN]), True))
    if start is None:
        raise UnsupportedModel(
            f"the place of the question {question!r} cannot be found in what the chat template writes: the question "
            "must be there once, as it is"
        )
    answered = apply(chat.turns([*turns, _STAND_IN]), False)
    before = answered[len(text) : answered.rfind(_STAND_IN)] if answered.startswith(text) else ""
    return RenderedChat(text, start, before if before.isspace() else "")


_STAND_IN = "qzxjvkwqzxjv"
"""Text that no template holds, put in a turn's place to see what the template writes around it."""


def _question_start(text: str, question: str, other: str) -> int | None:
    """Return the character where a question starts in a rendered conversation; None where it is not there as it is.

    A search could find it in what the template writes itself: "user", say, or the end of "<|assistant|>".

    Args:
        other: the conversation with `_STAND_IN` in the question's place.
    """
    head, found, tail = other.rpartition(_STAND_IN)
    if not found:
        return None
    if text.endswith(tail):
        asked = text[: len(text) - len(tail)].rstrip()
        if asked.endswith(question):
            return len(asked) - len(question)
    if text.startswith(head):  # what follows depends on the question
        asked = text[len(head) :].lstrip()
        if asked.startswith(question):
            return len(text) - len(asked)
    once = question not in other and text.find(question) == text.rfind(question)  # both sides depend on it
    return text.find(question) if once and question in text else None


def encode_turns(tokenizer: Any, chat: Chat, turns: Sequence[str]) -> Row:
    """Tokenise a conversation, up to where the answer to its last turn begins.

    Args:
        turns: the user's and the assistant's, in turn; the last is a question.

    Raises:
        InvalidSetting, UnsupportedModel: as `render`.
    """
    ids, _ = _encode_with_offsets(tokenizer, render(tokenizer, chat, turns).text, False)
    return Row(tuple(ids), len(ids))


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token that the chat template writes after an answer; None without a template or such a token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text: str = tokenizer.apply_chat_template(Chat().turns(["question", _STAND_IN]), tokenize=False)
    except Exception:  # a template that needs something else says nothing about ends
        return None
    _, found, end = text.rpartition(_STAND_IN)
    if not found:
        return None
    after = tokenizer(end, add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return next((i for i in after if i in added and added[i].special), None)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens, as it is: without special tokens, spaces left alone."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def n_common(texts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all texts have in common."""
    columns = zip(*texts, strict=False)
    return next((t for t, column in enumerate(columns) if len(set(column)) > 1), min(map(len, texts)))


def pad(rows: Sequence[Row], device: torch.device | str = "cpu", *, side: Side = "right") -> Batch:
    """Put rows side by side, padded on one side; the pad id is 0 and only the mask tells padding from text."""
    check_choice(side, Side, "side to pad on")
    lengths = [len(row.ids) for row in rows]
    longest = max(lengths)
    fill, left = [(0,) * (longest - n) for n in lengths], side == "left"
    filled = [(*none, *row.ids) if left else (*row.ids, *none) for row, none in zip(rows, fill, strict=True)]
    ids = torch.tensor(filled, dtype=torch.long)
    column, length = torch.arange(longest), torch.tensor(lengths)[:, None]
    mask = column >= longest - length if left else column < length
    return Batch(ids.to(device), mask.to(device))


def _encode_with_offsets(tokenizer: Any, text: str, add_special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids and character spans: special tokens in front are kept (span (0, 0)), those at the end dropped.

    A chat template writes the special tokens itself, so none are added to what it made; and where a text begins with
    the token that the tokenizer puts before every text, that is not put there again.
    """
    refuse_slow(tokenizer)
    ids, offsets, special = _encoded(tokenizer, text or "a", add_special)
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2 and offsets[0] != offsets[1]:
        ids, offsets, special = ids[1:], offsets[1:], special[1:]  # a template wrote it already
    n = len(ids)
    if not text:  # the special tokens in front of any text are all there is
        n = special.index(0) if 0 in special else 0
    while text and n and special[n - 1] and offsets[n - 1] == (0, 0):
        n -= 1
    return list(ids[:n]), [(0, 0) if s else (o[0], o[1]) for o, s in zip(offsets[:n], special[:n], strict=True)]


def _encoded(tokenizer: Any, text: str, add_special: bool) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Return a text's ids, their character spans, and which of them are special.

    Where the tokenizer would do no more than ask its backend, the backend is asked, which takes a third of the time.
    """
    from transformers import PreTrainedTokenizerFast as Fast

    backend, kind = tokenizer.backend_tokenizer, type(tokenizer)
    settings = backend.truncation, backend.padding, backend.encode_special_tokens
    if settings == (None, None, tokenizer.split_special_tokens) and (kind.__call__, kind._encode_plus) == (
        Fast.__call__,
        Fast._encode_plus,
    ):
        found = backend.encode(text, add_special_tokens=add_special)
        return found.ids, found.offsets, found.special_tokens_mask
    encoded = tokenizer(
        text,
        add_special_tokens=add_special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"]


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
    return plain(target)


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
            f"the token that ends the subject {text[start:end]!r} in {text!r} also covers text after it",
            RetconWarning,
            stacklevel=2,
        )
    return covering[-1]
