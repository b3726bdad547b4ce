"""RippleEdits: an edit, and tests of what should follow from it on six axes (Cohen et al. 2023, arXiv:2307.12976).

Labels of subject and object are not stored: both are recovered from the edit's sentence by its relation's wording, and
a row that cannot be split is dropped and counted. Which queries make up a test, and which must hold before the edit,
is kept in `case.meta["tests"]`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retcon.errors import MalformedFile
from retcon.evaluation.datasets.fields import AnswerGroups, objects
from retcon.evaluation.datasets.rows import Draft, draft
from retcon.files import require
from retcon.spelling import fold

AXES = {
    "Relation_Specificity": "relation_specificity",
    "Relation_Specifity": "relation_specificity",
    "Logical_Generalization": "logical_generalization",
    "Subject_Aliasing": "subject_aliasing",
    "Compositionality_I": "compositionality_1",
    "Compositionality_II": "compositionality_2",
    "Forgetfulness": "forgetfulness",
}
"""The file's names (one is spelt in two ways) and ours."""

_PERSON = (
    "mother of {}",
    "father of {}",
    "brother of {}",
    "sister of {}",
    "spouse of {}",
    "uncle of {}",
    "aunt of {}",
    "child of {}",
    "stepfather of {}",
    "stepmother of {}",
    "country which {} is associated with",
    "country of citizenship of {}",
    "position held by {}",
    "sports team which {} is a member of",
    "alma mater of {}",
    "employer of {}",
    "league which {} plays in",
    "field of work of {}",
    "award {} won",
    "ethnic group which {} is associated with",
    "religion which {} is associated with",
    "head of government of {}",
    "head of state of {}",
    "continent which {} is part of",
    "capital city of {}",
    "currency in {}",
    "anthem of {}",
    "anthem that is most likely to be performed in {}",
    "country which {} is the capital of",
    "author of {}",
    "editor of {}",
    "director of {}",
    "screenwriter of {}",
    "architect of {}",
    "composer of {}",
    "founder of {}",
)
_WORDINGS = (
    *(f"The name of the {part} is" for part in _PERSON),
    "The names of the siblings of {} are",
    "The names of the cast members of {} are",
    "The number of children {} has is",
    "The gender of {} is",
    "The place of birth of {} is",
    "The place of death of {} is",
    "The place of burial of {} is",
    "The sexual orientation of {} is",
    "The occupation of {} is",
    "The mother tongue of {} is",
    "The eye color of {} is",
    "The date of birth of {} is",
    "The date of death of {} is",
    "The official language of {} is",
    "{} is followed by",
    "{} follows",
)


def ripple(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """Read one row. Its own fact is on `rewrite`, tests on `ripple.<axis>`, their conditions on `ripple.condition`."""
    made = draft(record, where, row, "ripple")
    edit = require(record, "edit", dict, where)
    sentence, original = require(edit, "prompt", str, f"{where}, edit"), _original_sentence(edit)
    found = split_sentence(sentence, [*_prompts(record, where), original or ""])
    made.meta |= {"example_type": record.get("example_type"), "relation_id": edit.get("relation")}
    if found is None:
        made.drop("sentence_not_split", f"no known wording splits {sentence!r} into subject and object")
    template, subject, target = found
    old = None if original is None else _after(template.replace("{}", subject), original)
    taken = made.edit(template, subject, target, old, template=True, relation=edit.get("relation"))
    made.ask_fact(taken, ())
    asked: dict[tuple[str, str, AnswerGroups], str] = {}
    tests = []
    for name, axis in AXES.items():
        inside = f"{where}, {name}"
        for test in objects(record.get(name), inside):
            queries = _ask(made, asked, f"ripple.{axis}", require(test, "test_queries", list, inside), inside)
            conditions = _ask(made, asked, "ripple.condition", test.get("condition_queries"), inside)
            if not queries:
                made.dropped_queries.append("test_without_queries")
                continue
            rule = test.get("test_condition") or "OR"
            if rule not in ("OR", "AND"):
                raise MalformedFile(f"{inside}: test_condition must be OR or AND, found {rule!r}")
            tests.append({"axis": axis, "rule": rule, "queries": queries, "conditions": conditions})
    made.meta["tests"] = tests
    return made


def split_sentence(sentence: str, prompts: Sequence[str] = ()) -> tuple[str, str, str] | None:
    """Return (template, subject, object) of an edit's sentence, by the wording of its relation; None where none fits.

    Args:
        prompts: the row's others. A wording may fit at several places ("This is Spinal Tap is ..."); the longest
            subject that one of these names is it then, and with none of them the sentence is not split.
    """
    sentence = sentence.strip()
    for wording in _WORDINGS:
        begin, end = wording.split("{}")
        rest = sentence[len(begin) :] if sentence.startswith(begin) else ""
        begun = [rest[: found.start()] for found in re.finditer(f"(?={re.escape(end)} )", rest)]
        objects_of = {subject.strip(): _after(subject + end, rest) for subject in begun if subject.strip()}
        subjects = [subject for subject, found in objects_of.items() if found]
        if len(subjects) > 1:
            subjects = [subject for subject in subjects if any(subject in prompt for prompt in prompts)]
            if not subjects:
                return None
        if subjects:
            subject = max(subjects, key=len)
            return wording, subject, objects_of[subject] or ""
    return None


def _after(begin: str, sentence: str) -> str | None:
    """Return what a sentence ends in after such a beginning, without the period; None where it has another."""
    if not sentence.startswith(begin + " "):
        return None
    return sentence[len(begin) :].strip().removesuffix(".").strip() or None


def _original_sentence(edit: Mapping[str, Any]) -> str | None:
    """Return the sentence of the fact that the edit replaces."""
    original = edit.get("original_fact")
    sentence = original.get("prompt") if isinstance(original, dict) else None
    return sentence.strip() if isinstance(sentence, str) else None


def _prompts(record: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield the prompts of all tests and conditions."""
    for name in AXES:
        for test in objects(record.get(name), f"{where}, {name}"):
            for kind in ("test_queries", "condition_queries"):
                for query in objects(test.get(kind), f"{where}, {name}"):
                    yield str(query.get("prompt"))


def _ask(
    made: Draft, asked: dict[tuple[str, str, AnswerGroups], str], axis: str, queries: Any, where: str
) -> list[str]:
    """Return the ids of the queries, each asked once per axis; those without an answer are dropped and counted."""
    ids = []
    for query in objects(queries, where):
        prompt, answers = require(query, "prompt", str, where), _answers(query.get("answers"), where)
        if not prompt.strip():
            made.dropped_queries.append("empty_prompt")
        elif not answers:
            made.dropped_queries.append("empty_target")
        else:
            key = (axis, prompt, answers)
            if key not in asked:
                asked[key] = f"{axis}/{sum(a == axis for a, _, _ in asked)}"
                if any(fold(a) in fold(prompt) for group in answers for a in group):
                    made.flags.add("answer_in_prompt")
                made.ask_at(asked[key], axis, prompt, None, answers, mode="all")
            ids.append(asked[key])
    return ids


def _answers(entries: Any, where: str) -> AnswerGroups:
    """Return one group of aliases per answer; single characters that are no digit, and empty groups, are left out."""
    groups = []
    for entry in objects(entries, f"{where}, answers"):
        aliases = entry.get("aliases")
        names = [entry.get("value"), *(aliases if isinstance(aliases, list) else [aliases])]
        usable = [n.strip() for n in names if isinstance(n, str) and (len(n.strip()) > 1 or n.strip().isdigit())]
        if usable:
            groups.append(tuple(dict.fromkeys(usable)))
    return tuple(groups)
