"""EasyEdit's family: KnowEdit (all four parts and EasyEdit's own request dicts), and QAEdit.

`ground_truth` may be a string, a list of strings, a list of lists, empty or missing anywhere, and inner lists are
aliases in one place and alternatives in another. So all strings are accepted (`answers="all"`), or, as in EasyEdit's
reader, the first string of the first list is the answer (`answers="first"`).
"""

from collections.abc import Mapping
from typing import Any, Literal

from retcon.errors import MalformedFile
from retcon.evaluation.datasets.rows import Draft, answers_of, draft, first, fold, present, texts
from retcon.files import require

Answers = Literal["all", "first"]
"""Which strings of `ground_truth` count as right in generated text."""

_FIELDS = [
    *("case_id", "id", "subject", "concept", "prompt", "text", "target_new", "labels", "ground_truth"),
    *("rephrase_prompt", "rephrase", "portability", "locality", "cond"),
]
_QA_FIELDS = ["id", "source", "prompt", "target", "subject", "rephrase", "locality"]


def knowedit(record: Mapping[str, Any], where: str, row: int, answers: Answers) -> Draft:
    """One row of KnowEdit; WikiBio calls the prompt `text`, the target `labels`, the subject `concept`."""
    made = draft(record, where, row, _FIELDS, "easyedit")
    bio = "labels" in record
    prompt = require(record, "text" if bio else "prompt", str, where)
    subject = require(record, "concept" if bio else "subject", str, where)
    name = "labels" if bio else "target_new"
    new = first(present(record, name, where), name, where) or ""
    old = answers_of(record.get("ground_truth"), "ground_truth", where)
    edit = made.edit(prompt, subject, new, old[0][0] if old else None)
    if edit is None:
        return made
    wanted = ((edit.target_new,),)
    made.ask("rewrite", [edit.text], edit.target_new, answers=wanted)
    rephrase = "rephrase_prompt" if "rephrase_prompt" in record else "rephrase"
    made.ask("paraphrase", texts(record.get(rephrase), rephrase, where), edit.target_new, answers=wanted)
    for part in ("portability", "locality"):
        for key, items in _parts(record.get(part), f"{where}, {part}"):
            _ask(made, f"{part}.{_axis(key)}", items, f"{where}, {part}.{key}", answers)
    return made


def qaedit(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """One row of QAEdit: a question, and a list of unrelated ones."""
    made = draft(record, where, row, _QA_FIELDS, "easyedit")
    if "source" in record:
        made.meta["source"] = record["source"]
    new = first(present(record, "target", where), "target", where) or ""
    edit = made.edit(require(record, "prompt", str, where), require(record, "subject", str, where), new, None)
    if edit is None:
        return made
    wanted = ((edit.target_new,),)
    made.ask("rewrite", [edit.text], edit.target_new, answers=wanted)
    made.ask("paraphrase", texts(record.get("rephrase"), "rephrase", where), edit.target_new, answers=wanted)
    items = [
        {"prompt": require(item, "loc", str, where), "ground_truth": item.get("loc_ans")}
        for item in require(record, "locality", list, where)
    ]
    _ask(made, "locality.nq", items, f"{where}, locality", "all")
    return made


def _parts(value: Any, where: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(key, items) of `portability` or `locality`, where either may be missing, None or an empty list.

    An item is {prompt, ground_truth}; EasyEdit's request dicts have one object of two parallel lists instead.
    """
    if not value:
        return []
    if not isinstance(value, dict):
        raise MalformedFile(f"{where}: expected an object of lists, found {type(value).__name__}")
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
    """The key as EasyEdit's reader names it."""
    return "reasoning" if key == "Reasoning" else "_".join(key.split())


def _ask(made: Draft, axis: str, items: list[dict[str, Any]], where: str, answers: Answers) -> None:
    for place, item in enumerate(items):
        accepted = answers_of(item.get("ground_truth"), "ground_truth", where)
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
            made.ask_at(f"{axis}/{place}", axis, asked[0], accepted[0][0], accepted)
