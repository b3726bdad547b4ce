"""`Chat`: how a question is put to a chat model, by the template of its tokenizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from retcon.errors import InvalidEdit
from retcon.escaping import is_text
from retcon.plural import plural

Argument = str | int | float | bool | None
REASONING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)
"""What chat models put around what they write to themselves before they answer."""


@dataclass(frozen=True)
class Chat:
    """A conversation's frame: the prompt is the user's turn, the answer the assistant's.

    Raises:
        InvalidEdit: the system text is not text, a template argument is not a plain value under a name, or `train_end`
            is neither true nor false.
    """

    system: str | None = None
    """Text of the system turn; None: as the template has it."""
    template_args: tuple[tuple[str, Argument], ...] = ()
    """What the template is given beside the turns, such as `enable_thinking=False`; a mapping is taken, too."""
    train_end: bool = False
    """Train an edit's answer with the token that ends the turn, for a model that goes on after it; one that ends its
    turns with a full stop of its own needs that written into the answer instead. Nothing else reads this; methods that
    train no token after another (`kn`, `prompt_last` of fine-tuning) refuse it."""

    def __post_init__(self) -> None:
        if not isinstance(self.system, str | None):
            raise InvalidEdit(f"chat: system must be text, found {type(self.system).__name__} ({self.system!r})")
        if not isinstance(self.train_end, bool):
            raise InvalidEdit(f"chat: train_end must be true or false, found {self.train_end!r}")
        given: Any = self.template_args
        try:
            pairs = dict(given)
        except (TypeError, ValueError):
            raise InvalidEdit(f"chat: template_args must be values under names, found {given!r}") from None
        for name, value in pairs.items():
            if not isinstance(name, str) or not isinstance(value, Argument):
                raise InvalidEdit(
                    f"chat: template argument {name!r} must be text, a number, true, false or null under a name, "
                    f"found {value!r}"
                )
        for text in (self.system, *pairs, *pairs.values()):
            if isinstance(text, str) and not is_text(text):
                raise InvalidEdit(f"chat: {text!r} holds half a surrogate pair, which is no text")
        object.__setattr__(self, "template_args", tuple(sorted(pairs.items())))

    @property
    def arguments(self) -> dict[str, Argument]:
        """The template arguments by name."""
        return dict(self.template_args)

    def turns(self, questions_and_answers: Iterable[str]) -> list[dict[str, str]]:
        """Return the messages of a conversation: the system's, then the user's and the assistant's in turn."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        roles = ("user", "assistant")
        return messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(questions_and_answers)]


FIELDS = tuple(field.name for field in fields(Chat))


def chat_from(value: "Chat | Mapping[str, Any] | bool | None") -> Chat | None:
    """Return the `Chat` that a field or an argument means: True is one without anything of its own, False is none.

    Raises:
        InvalidEdit: it is none of these, or an object with other fields.
    """
    if value is None or value is False:
        return None
    if value is True:
        return Chat()
    if isinstance(value, Chat):
        return value
    if not isinstance(value, Mapping):
        raise InvalidEdit(f"chat must be true, false or an object with {', '.join(FIELDS)}, found {value!r}")
    if unknown := sorted(map(str, value.keys() - set(FIELDS))):
        raise InvalidEdit(
            f"chat: {plural(len(unknown), 'unknown field')} ({', '.join(unknown)}); known: {', '.join(FIELDS)}"
        )
    return Chat(value.get("system"), value.get("template_args") or (), value.get("train_end", False))


def opened_reasoning(prompt: str) -> str | None:
    """Return the mark with which a prompt begins the reasoning part itself, as some templates do."""
    return next((begin for begin, _ in REASONING if prompt.rstrip().endswith(begin)), None)


def without_reasoning(text: str) -> str:
    """Return the answer in what a served chat model said, "" where the reasoning part before it has not ended.

    Where the template opens that part, the text holds its end alone.
    """
    for begin, end in REASONING:
        opened = text.lstrip().startswith(begin)
        if end in text and (opened or begin not in text):
            return text.partition(end)[2]
        if opened:
            return ""
    return text
