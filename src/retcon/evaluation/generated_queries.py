"""Paraphrases and neighbours for facts that come without: generated from the file's own facts and plain text."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from retcon import world
from retcon.edits import MARKER, Case, Edit, Query, list_of_cases, same_question
from retcon.evaluation.metrics import is_locality
from retcon.world.facts import fill

N_PARAPHRASES = 2
N_NEIGHBOURS = 3
GENERATED = "made"
"""In the ids of queries that were generated here."""

WriteAnswers = Callable[[Sequence[Query]], list[str]]
"""Writes the unedited model's answers to queries."""


def with_generated_queries(
    cases: Sequence[Case], write: WriteAnswers | None, *, seed: int = 0
) -> tuple[list[Case], list[str]]:
    """Return the cases, with paraphrases where none has any, and neighbours likewise; and what was generated from what,
    a line each.

    A paraphrase is the fact in another wording that the file has for its relation (`relation_id`), else its own prompt
    after a plain sentence. A neighbour is another of the file's questions about the subject, else a question about
    something else, from the embedded world; its answer is what the unedited model writes.

    Args:
        write: None generates no neighbours.
    """
    axes = {query.axis for case in cases for query in case.queries}
    found, notes = list_of_cases(cases), []
    if not any(axis.split(".")[0] == "paraphrase" for axis in axes):
        reworded = {t for case in cases for edit in case.edits for t in _wordings(cases, edit)}
        found = [_with(case, _paraphrases(cases, case, seed)) for case in found]
        source = "the file's other wordings, and in another context" if reworded else "its prompts after a sentence"
        notes.append(f"no paraphrases are given; asked are {source}")
    if write is not None and not any(map(is_locality, axes)):
        asked = {case.id: _neighbours(cases, case, seed) for case in found}
        queries = [query for own in asked.values() for query in own]
        answers = dict(zip(queries, write(queries), strict=True))
        found = [
            _with(case, [replace(q, target=answers[q].strip()) for q in asked[case.id] if answers[q].strip()])
            for case in found
        ]
        notes.append("no neighbours are given; asked are the subjects' other facts and unrelated ones")
    return found, notes


def _with(case: Case, queries: Sequence[Query]) -> Case:
    return replace(case, queries=(*case.queries, *queries))


def _template(edit: Edit) -> str | None:
    span = edit.subject_span
    return None if span is None else edit.text[: span[0]] + MARKER + edit.text[span[1] :]


def _wordings(cases: Sequence[Case], edit: Edit) -> list[str]:
    """Return other templates that the file has for the edit's relation."""
    if edit.relation_id is None or edit.subject is None:
        return []
    others = (e for case in cases for e in case.edits if e.relation_id == edit.relation_id)
    found = dict.fromkeys(t for e in others if (t := _template(e)) is not None and t.count(MARKER) == 1)
    return [template for template in found if template != _template(edit)]


def _paraphrases(cases: Sequence[Case], case: Case, seed: int) -> list[Query]:
    found = []
    for n, edit in enumerate(case.edits):
        rng = random.Random(f"made/{seed}/{case.id}/{n}")
        prompts = [fill(t, edit.subject or "") for t in _wordings(cases, edit)][:N_PARAPHRASES]
        sentences = world.text(N_PARAPHRASES - len(prompts), seed=rng.randrange(2**31))
        prompts += [f"{paragraph.split('. ')[0].rstrip('.')}. {edit.text}" for paragraph in sentences]
        for place, prompt in enumerate(prompts):
            found.append(
                Query(
                    f"paraphrase/{GENERATED}/{n}/{place}",
                    "paraphrase",
                    prompt,
                    edit.target_new,
                    None,
                    ((edit.target_new,),),
                    separator=edit.separator,
                    chat=edit.chat,
                )
            )
    return found


def _neighbours(cases: Sequence[Case], case: Case, seed: int) -> list[Query]:
    edits = [edit for each in cases for edit in each.edits]
    edited = {same_question(edit) for edit in edits}
    texts = {" ".join(edit.text.split()) for edit in edits}
    rng = random.Random(f"neighbours/{seed}/{case.id}")
    prompts = []
    for edit in case.edits:
        for other in edits:
            template = _template(other)
            if edit.subject is None or template is None or template.count(MARKER) != 1:
                continue
            about = replace(other, prompt=template, subject=edit.subject, subject_start=None, id="")
            if same_question(about) not in edited and other.subject != edit.subject:
                prompts.append(fill(template, edit.subject))
    prompts = list(dict.fromkeys(prompts))
    rng.shuffle(prompts)
    drawn = world.cases(4 * N_NEIGHBOURS, seed=rng.randrange(2**31))
    prompts = prompts[:1] + [c.edits[0].text for c in drawn if c.edits[0].text not in texts]
    chat = case.edits[0].chat if case.edits else None
    return [
        Query(f"locality.{GENERATED}/{place}", f"locality.{GENERATED}", prompt, chat=chat)
        for place, prompt in enumerate(prompts[:N_NEIGHBOURS])
    ]
