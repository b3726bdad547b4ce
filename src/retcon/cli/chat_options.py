"""What the options of a chat become, and text that no tokenizer takes."""

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retcon.errors import InvalidEdit, InvalidSetting
from retcon.escaping import is_text

if TYPE_CHECKING:
    from retcon.chat import Chat
    from retcon.edits import Edit


def chat_of(
    as_chat: bool, system: str | None, template_args: Sequence[str] | None, train_end: bool = False
) -> "Chat | None":
    """Return the chat that the options ask for, or None.

    Raises:
        InvalidSetting: a template argument is not NAME=VALUE.
    """
    from retcon.chat import Chat

    if not as_chat and system is None and not template_args and not train_end:
        return None
    given = []
    for text in template_args or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InvalidSetting(f"--template-arg {text}: expected NAME=VALUE, such as enable_thinking=false")
        try:
            given.append((name.strip(), json.loads(value)))
        except ValueError:  # plain text needs no quotes
            given.append((name.strip(), value))
    try:
        return Chat(system, tuple(given), train_end)
    except InvalidEdit as error:
        raise InvalidSetting(str(error)) from None


def check_is_text(text: str, what: str) -> None:
    """Refuse an argument or a line whose bytes are not UTF-8, which Python hands on as halves of surrogate pairs.

    Raises:
        InvalidEdit: no tokenizer takes it. `what` names it in the message.
    """
    if not is_text(text):
        broken = next(i for i, c in enumerate(text, 1) if not is_text(c))
        raise InvalidEdit(f"{what} is not UTF-8 text (character {broken}); give it in UTF-8")


def chat_options(edits: "Sequence[Edit]") -> str:
    """Return the options that put a prompt as all of these are put, to be repeated in a command that is suggested."""
    frames = {edit.chat for edit in edits}
    frame = frames.pop() if len(frames) == 1 else None
    if frame is None:
        return ""
    given = [] if frame.system is None else [f"--system {shlex.quote(frame.system)}"]
    given += [f"--template-arg {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in frame.template_args]
    return "".join(f" {option}" for option in given or ["--chat"])
