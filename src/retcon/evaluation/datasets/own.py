"""Our own files: cases as `write_cases` wrote them, facts with their queries on one line, and the embedded world."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from retcon import world
from retcon.chat import chat_from
from retcon.edits import MARKER, Case, Edit, case_from
from retcon.errors import InvalidEdit, MalformedFile
from retcon.evaluation.datasets.fields import AnswerGroups, asked_in, first, given, present, text_or_none, texts
from retcon.evaluation.datasets.related import ask_related
from retcon.evaluation.datasets.rows import (
    FLAGS_ACROSS,
    CaseTarget,
    Draft,
    Loaded,
    Options,
    draft,
    edit_flags,
    finish,
    missing_subject,
)
from retcon.world.facts import fill

CASE_FIELDS = ("id", "edits", "queries", "dataset", "meta")


def own(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """Return a case of our own, flagged like any other."""
    return _draft(case_from({name: record[name] for name in CASE_FIELDS if name in record}, where), where)


def plain(record: Mapping[str, Any], where: str, row: int, target: CaseTarget) -> Draft:
    """Read one fact with the fields of `Edit`, and the queries that measure it where the row has any."""
    made = draft(record, where, row)
    made.keeps_ends = True
    if "subject" not in record:
        present(record, "subject", where)  # a fact without one says so: null, or an empty cell
    new = first(present(record, "target_new", where), "target_new", where) or ""
    if target == "alt":
        new = made.alternative(record)
    start = record.get("subject_start")
    edit = made.edit(
        text_or_none(record, "prompt", where) or present(record, "prompt", where) or "",
        text_or_none(record, "subject", where),
        new,
        first(record.get("target_true"), "target_true", where),
        template=True,
        relation=text_or_none(record, "relation_id", where),
        subject_start=int(start) if isinstance(start, str) and start.strip().isdecimal() else start,
        edit_id=_name(record, where),
        separator=text_or_none(record, "separator", where),
    )
    made.id = edit.id
    reworded = [_filled(prompt, edit) for prompt in texts(record.get("paraphrases"), "paraphrases", where)]
    made.ask_fact(edit, reworded, contrast=edit.target_true)
    for place, (prompt, kept) in enumerate(_neighbors(record, edit, where)):
        if not kept:
            made.dropped_queries.append("neighbor_without_answer")
            continue
        made.ask_at(f"neighborhood/{place}", "neighborhood", prompt, kept[0][0], kept, contrast=edit.target_new)
    ask_related(made, record.get("portability"), "portability", where)
    ask_related(made, record.get("locality"), "locality", where)
    made.queries = [replace(query, separator=edit.separator) for query in made.queries]
    if record.get("chat") is not None:
        try:
            made.put_in_chat(chat_from(record["chat"]))
        except InvalidEdit as error:
            raise MalformedFile(f"{where}: {error}") from None
    return made


def _name(record: Mapping[str, Any], where: str) -> str:
    """Return the fact's own id, which may be a number; "" where it has none."""
    name = given(record, "id", "case_id")
    own = record.get(name)
    return str(own) if isinstance(own, int) and not isinstance(own, bool) else text_or_none(record, name, where) or ""


def _filled(prompt: str, edit: Edit) -> str:
    """Return a paraphrase with the subject put in where it is a template."""
    return prompt if edit.subject is None or prompt.count(MARKER) != 1 else fill(prompt, edit.subject)


def _neighbors(record: Mapping[str, Any], edit: Edit, where: str) -> list[tuple[str, AnswerGroups]]:
    """Return (prompt, accepted answers) of what names its own, or shares the old one."""
    spelt = [name for name in ("neighbors", "neighbours") if record.get(name) is not None]
    if len(spelt) == 2:
        raise MalformedFile(f"{where}: both 'neighbors' and 'neighbours' are given; give one of them")
    found = []
    shared = ((edit.target_true,),) if edit.target_true else ()
    value = record[spelt[0]] if spelt else []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            found += [(prompt, answers or shared) for prompt, answers in asked_in(item, f"{where}, {spelt[0]}")]
        else:
            found += [(prompt, shared) for prompt in texts(item, spelt[0], where)]
    return found


def without_partial_rivals(drafts: Sequence[Draft]) -> None:
    """Compare with the old answers only where all facts name theirs: one file is measured in one way."""
    edits = [edit for made in drafts for edit in made.edits]
    if not all(edit.target_true for edit in edits):
        for made in drafts:
            made.queries = [replace(query, contrast=None) for query in made.queries]


def embedded(options: Options) -> Loaded:
    """Return cases of the embedded world, drawn by the seed; as many as there are where more are wanted."""
    n_facts = len(world.load_world().facts)
    start = min(options.start, n_facts)
    limit = None if options.limit is None else min(options.limit, n_facts - start)
    cases = world.cases(limit, start=start, seed=options.seed)
    drafts = [_draft(case, f"world, case {case.id}") for case in cases]
    known = json.dumps([asdict(case) for case in cases])
    sha256 = hashlib.sha256(known.encode()).hexdigest()
    return finish("world", "world", drafts, options, sha256, {"seed": options.seed})


def _draft(case: Case, where: str) -> Draft:
    """Read a case without its flags about other rows: it may be a part of its file."""
    meta = {name: value for name, value in case.meta.items() if name not in ("flags", "contaminated")}
    flags = set(texts(case.meta.get("flags"), "flags", where)) - FLAGS_ACROSS
    made = Draft(where, case.id, meta, flags, case.edits, dataset=case.dataset, keeps_ends=True)
    for edit in case.edits:
        if edit.subject is not None and edit.subject_span is None:
            made.leave_out("subject_missing", missing_subject(edit))
        made.flags |= edit_flags(edit)
    for query in case.queries:
        made.add(query)
    return made
