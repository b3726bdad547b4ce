"""EasyEdit's family: KnowEdit (all four parts and EasyEdit's own request dicts), QAEdit, and what is like them.

`ground_truth` may be a string, a list of strings, a list of lists, empty or missing anywhere, and inner lists are
aliases in one place and alternatives in another. So all strings are accepted (`answers="all"`), or, as in EasyEdit's
reader, the first string of the first list is the answer (`answers="first"`).
"""

from collections.abc import Mapping
from typing import Any

from retcon.edits import MARKER
from retcon.errors import MalformedFile
from retcon.evaluation.datasets.fields import answers_of, first, given, objects, present, text_or_none, texts
from retcon.evaluation.datasets.related import ask_related
from retcon.evaluation.datasets.rows import Answers, Draft, draft
from retcon.files import require
from retcon.spelling import mentions


def knowedit(record: Mapping[str, Any], where: str, row: int, answers: Answers) -> Draft:
    """Read one row of KnowEdit; WikiBio calls the prompt `text`, the target `labels`, the subject `concept`."""
    made = draft(record, where, row, "easyedit")
    name = given(record, "target_new", "labels")
    bio = name == "labels"
    prompt = require(record, "text" if bio else "prompt", str, where)
    subject = require(record, "concept" if bio else "subject", str, where)
    new = first(present(record, name, where), name, where) or ""
    old = answers_of(record.get("ground_truth"), "ground_truth", where)
    start = None
    if bio and MARKER not in prompt and (found := mentions(prompt.rstrip(), subject, any_case=True)):
        start, end = found[-1]  # the passage ends with the name that the new text goes on from
        subject = prompt[start:end]
        made.flags |= {"subject_twice"} if len(found) > 1 else set()
    edit = made.edit(prompt, subject, new, old[0][0] if old else None, subject_start=start)
    rephrase = given(record, "rephrase_prompt", "rephrase")
    made.ask_fact(edit, texts(record.get(rephrase), rephrase, where))
    ask_related(made, record.get("portability"), "portability", where, answers)
    ask_related(made, record.get("locality"), "locality", where, answers)
    return made


def qaedit(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """Read one row of QAEdit: a question, and a list of unrelated ones."""
    made = draft(record, where, row, "easyedit")
    if "source" in record:
        made.meta["source"] = record["source"]
    new = first(present(record, "target", where), "target", where) or ""
    edit = made.edit(require(record, "prompt", str, where), require(record, "subject", str, where), new, None)
    made.ask_fact(edit, texts(record.get("rephrase"), "rephrase", where))
    ask_related(made, record.get("portability"), "portability", where)
    items = [
        {"prompt": require(item, "loc", str, where), "ground_truth": item.get("loc_ans")}
        for item in objects(present(record, "locality", where), f"{where}, locality")
    ]
    ask_related(made, {"nq": items}, "locality", where)
    return made


def wikibigedit(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """Read one row of WikiBigEdit: a question, its wordings (one by another speaker), a question two hops away."""
    made = draft(record, where, row, "easyedit")
    made.meta["tag"] = record.get("tag")
    new = first(present(record, "ans", where), "ans", where) or ""
    edit = made.edit(require(record, "update", str, where), require(record, "subject", str, where), new, None)
    made.ask_fact(edit, texts(record.get("rephrase"), "rephrase", where))
    wanted = ((edit.target_new,),)
    made.ask("paraphrase.persona", texts(record.get("personas"), "personas", where), edit.target_new, answers=wanted)
    ask_related(made, record.get("portability"), "portability", where)
    for part, key, asked, answer in (
        ("portability", "multi_hop", "mhop", "mhop_ans"),
        ("locality", "other", "loc", "loc_ans"),
    ):
        if record.get(asked) is not None:
            items = [{"prompt": record[asked], "ground_truth": record.get(answer)}]
            ask_related(made, {key: items}, part, where)  # type: ignore[arg-type]
    return made


def cknowedit(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """Read one row of CKnowEdit: Chinese text without a subject, and lists of what follows and what does not."""
    made = draft(record, where, row, "easyedit")
    new = first(present(record, "target_new", where), "target_new", where) or ""
    old = first(record.get("target_old"), "target_old", where)
    edit = made.edit(require(record, "prompt", str, where), text_or_none(record, "subject", where), new, old)
    made.ask_fact(edit, texts(record.get("rephrase"), "rephrase", where))
    ask_related(made, record.get("portability"), "portability", where)
    ask_related(made, record.get("locality"), "locality", where)
    return made


def unke(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """Read one row of UnKE: a question with a long answer and no subject, and questions about parts of the answer."""
    made = draft(record, where, row, "easyedit")
    new = first(present(record, "answer", where), "answer", where) or ""
    edit = made.edit(require(record, "question", str, where), text_or_none(record, "subject", where), new, None)
    made.ask_fact(edit, texts(record.get("para_question"), "para_question", where))
    parts, answers = (texts(record.get(name), name, where) for name in ("sub_question", "sub_answer"))
    if len(parts) != len(answers):
        raise MalformedFile(f"{where}: {len(parts)} sub_question and {len(answers)} sub_answer; give one for each")
    items = [{"prompt": q, "ground_truth": a} for q, a in zip(parts, answers, strict=True)]
    ask_related(made, record.get("portability"), "portability", where)
    ask_related(made, {"sub_question": items}, "portability", where)
    return made


def fastedit(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """Read one row of FastEdit: a template, and other wordings of it."""
    made = draft(record, where, row, "easyedit")
    new = first(present(record, "target", where), "target", where) or ""
    prompt, subject = require(record, "prompt", str, where), require(record, "subject", str, where)
    edit = made.edit(prompt, subject, new, None, template=True)
    made.ask_fact(edit, texts(record.get("queries"), "queries", where))
    ask_related(made, record.get("portability"), "portability", where)
    return made
