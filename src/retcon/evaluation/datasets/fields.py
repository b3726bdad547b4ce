"""Fields of a row, in the shapes in which they are published."""

from collections.abc import Iterator, Mapping
from typing import Any

from retcon.errors import MalformedFile
from retcon.files import require

AnswerGroups = tuple[tuple[str, ...], ...]
"""Answers, each with its aliases."""


def present(record: Mapping[str, Any], name: str, where: str) -> Any:
    return require(record, name, object, where)


def given(record: Mapping[str, Any], *names: str) -> str:
    """Return which of several names of one field a row goes by: the first that holds something, else the first that is
    there, else the first. A table, and rows of several sources put together, have all of them."""
    held = [name for name in names if record.get(name) is not None] or [name for name in names if name in record]
    return (held or names)[0]


def labelled(record: Mapping[str, Any], name: str, where: str) -> tuple[str, str | None]:
    """Return a target written as {"str": ..., "id": ...}, or plainly."""
    value = present(record, name, where)
    if isinstance(value, dict):
        return require(value, "str", str, f"{where}, {name}"), value.get("id")
    return first(value, name, where) or "", None


def texts(value: Any, name: str, where: str) -> list[str]:
    """Return the strings in a string, a list of them, a nested list, or nothing."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts(item, name, where)]
    raise MalformedFile(f"{where}: field {name!r} must be text or a list of texts, found {type(value).__name__}")


def objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a list of objects; None is an empty one."""
    if value is None or value == []:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        odd = value if not isinstance(value, list) else next(item for item in value if not isinstance(item, dict))
        raise MalformedFile(f"{where}: expected a list of objects, found {type(odd).__name__} ({odd!r:.60})")
    return value


def first(value: Any, name: str, where: str) -> str | None:
    """Return the first text that is not blank."""
    return next((text for text in texts(value, name, where) if text.strip()), None)


def answers_of(value: Any, name: str, where: str) -> AnswerGroups:
    """Return answers with their aliases: a string is one answer; a list of strings, or of lists, one answer per entry.

    Blank strings go, and so do answers without any string left. Numbers and booleans are written out.
    """
    items = value if isinstance(value, list) else [value]
    groups = (tuple(t.strip() for t in _written(item, name, where) if t.strip()) for item in items)
    return tuple(group for group in groups if group)


def _written(value: Any, name: str, where: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _written(item, name, where)
    elif isinstance(value, bool | int | float):
        yield str(value)
    else:
        yield from texts(value, name, where)


def text_or_none(record: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return a text that may be missing."""
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise MalformedFile(f"{where}: field {name!r} must be text, found {type(value).__name__} ({value!r:.60})")
    return value


def pairs(prompts: Any, answers: Any, name: str, where: str) -> list[tuple[str, Any]]:
    """Return each prompt of the field `name` with what answers it: all answers where there is one prompt; of several,
    one for each in their order, or one for all. Answers to no prompt are passed over.

    Raises:
        MalformedFile: there are neither as many answers as prompts nor one.
    """
    asked = texts(prompts, name, where)
    if len(asked) < 2:
        return [(prompt, answers) for prompt in asked]
    each = answers if isinstance(answers, list) and answers else [answers]
    if len(each) == 1:
        each = each * len(asked)
    if len(each) != len(asked):
        raise MalformedFile(
            f"{where}, {name}: {len(asked)} prompts and {len(each)} answers; give one for each, or one for all"
        )
    return list(zip(asked, each, strict=True))


_ANSWER_FIELDS = ("ground_truth", "answer", "answers")


def asked_in(item: Mapping[str, Any], where: str) -> list[tuple[str, AnswerGroups]]:
    """Return the prompts of an item, a blank one where it has none, and the answers to each, whichever field they are
    in."""
    name = given(item, *_ANSWER_FIELDS)
    found = pairs(item.get("prompt"), item.get(name), "prompt", where)
    return [(prompt, answers_of(answers, name, where)) for prompt, answers in found] or [("", ())]
