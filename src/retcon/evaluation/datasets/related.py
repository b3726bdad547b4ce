"""Queries of `portability` and `locality`: what follows from an edit, and what does not."""

from collections.abc import Mapping
from typing import Any, Literal

from retcon.errors import MalformedFile
from retcon.evaluation.datasets.fields import item_answers, texts
from retcon.evaluation.datasets.rows import Answers, Draft
from retcon.spelling import fold


def ask_related(
    made: Draft, value: Any, part: Literal["portability", "locality"], where: str, answers: Answers = "all"
) -> None:
    """Add the queries of `portability` or `locality`, in any of the shapes in which they are published.

    An object of lists by kind, a plain list, or {"New Question", "New Answer"}; an item is {prompt, ground_truth} (or
    `answer`, `answers`), and EasyEdit's requests have one object of two parallel lists in place of a list of items.
    """
    for key, items in _parts(value, f"{where}, {part}"):
        axis = f"{part}.{_axis(key)}"
        for place, item in enumerate(items):
            _ask_item(made, f"{axis}/{place}", axis, item, f"{where}, {part}.{key}", answers)


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
            prompts, truths = texts(items.get("prompt"), "prompt", where), items.get("ground_truth")
            truths = truths if isinstance(truths, list) else [truths]
            if len(truths) != len(prompts):
                raise MalformedFile(f"{where}.{key}: {len(prompts)} prompts and {len(truths)} answers")
            items = [{"prompt": p, "ground_truth": t} for p, t in zip(prompts, truths, strict=True)]
        if items is not None and not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
            raise MalformedFile(f"{where}.{key}: expected a list of objects with prompt and ground_truth")
        found.append((key, items or []))
    return found


def _axis(key: str) -> str:
    """Return the key as EasyEdit's reader names it."""
    return "reasoning" if key == "Reasoning" else "_".join(key.split())


def _ask_item(made: Draft, query_id: str, axis: str, item: Mapping[str, Any], where: str, answers: Answers) -> None:
    accepted = item_answers(item, where)
    if answers == "first":
        accepted = accepted[:1] and (accepted[0][:1],)
    asked = texts(item.get("prompt"), "prompt", where)
    if not any(prompt.strip() for prompt in asked):
        made.dropped_queries.append("empty_prompt")
    elif not accepted:
        made.dropped_queries.append("empty_target")
    else:
        if any(fold(a) in fold(asked[0]) for group in accepted for a in group):
            made.flags.add("answer_in_prompt")
        made.ask_at(query_id, axis, asked[0], accepted[0][0], accepted)
