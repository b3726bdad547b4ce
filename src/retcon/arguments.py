"""Checks of arguments that many functions take."""

from collections.abc import Iterable
from typing import Any, TypeVar, get_args

from retcon.errors import InvalidSetting

_Item = TypeVar("_Item")


def list_of_texts(given: Iterable[str], what: str) -> tuple[str, ...]:
    """Return texts as a tuple.

    Args:
        what: they are, for the message.

    Raises:
        InvalidSetting: one text, which would be taken for its characters, or something else than a list of texts.
    """
    if isinstance(given, Iterable) and not isinstance(given, str):
        found = tuple(given)
        if all(isinstance(text, str) for text in found):
            return found
    raise InvalidSetting(f"{what} must be a list of texts, found {given!r:.60}")


def check_choice(value: Any, known: Any, what: str) -> None:
    """Raise InvalidSetting where `value` is none of the `Literal` type `known`; `what` it is, for the message."""
    if value not in get_args(known):
        raise InvalidSetting(f"unknown {what} {value!r}; known: {', '.join(get_args(known))}")


def list_of_some(given: Iterable[_Item], what: str) -> list[_Item]:
    """Return what is given as a list, or raise InvalidSetting where it is none; `what` is wanted, for the message."""
    if found := list(given):
        return found
    raise InvalidSetting(f"no {what} were given; at least one is wanted")
