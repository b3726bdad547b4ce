"""Queries of `portability` and `locality`: what follows from an edit, and what does not."""

from typing import Any, Literal

from retcon.errors import MalformedFile
from retcon.evaluation.datasets.fields import AnswerGroups, asked_in
from retcon.evaluation.datasets.rows import Answers, Draft
from retcon.spelling import fold


def ask_related(
    made: Draft, value: Any, part: Literal["portability", "locality"], where: str, answers: Answers = "all"
) -> None:
    """Add the queries of `portability` or `locality`, in any of the shapes in which they are published.

    An object of lists by kind, a plain list, or {"New Question", "New Answer"}; an item is {prompt, ground_truth} (or
    `answer`, `answers`), and EasyEdit's requests have one item, of two parallel lists, in place of a list of them.
    """
    for key, items in _parts(value, f"{where}, {part}"):
        axis = f"{part}.{_axis(key)}"
        asked = [query for item in items for query in asked_in(item, f"{where}, {part}.{key}")]
        for place, (prompt, accepted) in enumerate(asked):
            _ask(made, f"{axis}/{place}", axis, prompt, accepted, answers)


def _parts(value: Any, where: str) -> list[tuple[str, list[dict[str, Any]]]]:
    if not value:
        return []
    if isinstance(value, list):
        value = {"plain": value}
    if not isinstance(value, dict):
        raise MalformedFile(f"{where}: expected an object of lists or a list, found {type(value).__name__}")
    if "New Question" in value:  # EasyEdit's counterfact_ and zsre_ ..._portability_gpt4.json
        value = {"one_hop": [{"prompt": value["New Question"], "ground_truth": value.get("New Answer")}]}
    found = []
    for key, items in value.items():
        if isinstance(items, dict):
            items = [items] if items.get("prompt") != [] else []
        if items is not None and not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
            raise MalformedFile(f"{where}.{key}: expected a list of objects with prompt and ground_truth")
        found.append((key, items or []))
    return found


def _axis(key: str) -> str:
    """Return the key as EasyEdit's reader names it."""
    return "reasoning" if key == "Reasoning" else "_".join(key.split())


def _ask(made: Draft, query_id: str, axis: str, prompt: str, accepted: AnswerGroups, answers: Answers) -> None:
    if answers == "first":
        accepted = accepted[:1] and (accepted[0][:1],)
    if not prompt.strip():
        made.dropped_queries.append("empty_prompt")
    elif not accepted:
        made.dropped_queries.append("empty_target")
    else:
        if any(fold(a) in fold(prompt) for group in accepted for a in group):
            made.flags.add("answer_in_prompt")
        made.ask_at(query_id, axis, prompt, accepted[0][0], accepted)
