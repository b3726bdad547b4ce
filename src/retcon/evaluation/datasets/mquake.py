"""MQuAKE: one to four edits, three wordings of a multi-hop question that follows from them (arXiv:2305.14795).

Axes: `rewrite` (the cloze prompt of every edit), `singlehop` (questions after the edits), `unedited_hop` (those of them
that no edit touches), `multihop` (the three wordings). Questions follow demonstrations of our own; numbers made
with the authors' demonstrations differ.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from retcon.errors import MalformedFile
from retcon.evaluation.datasets.fields import AnswerGroups, first, labelled, objects, texts
from retcon.evaluation.datasets.rows import Draft, draft
from retcon.files import require

Prompting = Literal["standard", "cot", "bare"]
"""Few-shot questions and answers; few-shot with reasoning spelt out; or the question alone."""


def mquake(record: Mapping[str, Any], where: str, row: int, prompting: Prompting) -> Draft:
    """Read one instance."""
    made = draft(record, where, row, "mquake")
    made.meta["prompting"] = prompting
    rewrites = require(record, "requested_rewrite", list, where)
    if not rewrites:
        raise MalformedFile(f"{where}: field 'requested_rewrite' is empty; an instance has at least one edit")
    for place, rewrite in enumerate(objects(rewrites, f"{where}, requested_rewrite")):
        inside = f"{where}, requested_rewrite[{place}]"
        new, _ = labelled(rewrite, "target_new", inside)
        true, _ = labelled(rewrite, "target_true", inside) if rewrite.get("target_true") else (None, None)
        prompt, subject = require(rewrite, "prompt", str, inside), require(rewrite, "subject", str, inside)
        made.edit(prompt, subject, new, true, template=True, relation=rewrite.get("relation_id"))
    made.meta["relation_id"] = made.edits[0].relation_id
    for place, edit in enumerate(made.edits):
        made.ask_at(f"rewrite/{place}", "rewrite", edit.text, edit.target_new, ((edit.target_new,),))
    relations = _relations(record, made)
    before = _hops(record, "single_hops", where)
    for place, (question, answers) in enumerate(_hops(record, "new_single_hops", where)):
        if not answers:
            made.dropped_queries.append("empty_target")
            continue
        relation = relations[place] if place < len(relations) else None
        asked = _question(question, relation, prompting)
        made.ask_at(f"singlehop/{place}", "singlehop", asked, None, answers)
        if (question, answers) in before:
            made.ask_at(f"unedited_hop/{place}", "unedited_hop", asked, None, answers)
    answer = first(record.get("new_answer"), "new_answer", where)
    if answer is None:
        made.dropped_queries.append("empty_target")
        return made
    aliases = texts(record.get("new_answer_alias"), "new_answer_alias", where)
    accepted = (tuple(dict.fromkeys(a.strip() for a in (answer, *aliases) if a.strip())),)
    for place, question in enumerate(texts(record.get("questions"), "questions", where)):
        prompt = _several(question, prompting) if question.strip() else ""
        made.ask_at(f"multihop/{place}", "multihop", prompt, None, accepted)
    return made


def _hops(record: Mapping[str, Any], name: str, where: str) -> list[tuple[str, AnswerGroups]]:
    """Return (question, accepted answers) of every hop."""
    found: list[tuple[str, AnswerGroups]] = []
    for place, hop in enumerate(objects(record.get(name), f"{where}, {name}")):
        inside = f"{where}, {name}[{place}]"
        strings = texts(hop.get("answer"), "answer", inside) + texts(hop.get("answer_alias"), "answer_alias", inside)
        aliases = tuple(dict.fromkeys(s.strip() for s in strings if s.strip()))
        found.append((require(hop, "question", str, inside), (aliases,) if aliases else ()))
    return found


def _relations(record: Mapping[str, Any], made: Draft) -> list[str | None]:
    """Return the relation of every hop after the edits, from the instance's triples where it has them."""
    original = record.get("orig")
    triples = original.get("new_triples") if isinstance(original, dict) else None
    if isinstance(triples, list) and triples:
        return [t[1] if isinstance(t, list) and len(t) > 1 and isinstance(t[1], str) else None for t in triples]
    return [edit.relation_id for edit in made.edits]


def _question(question: str, relation: str | None, prompting: Prompting) -> str:
    """Return a single-hop question after demonstrations of its relation (of any, where we have none for it)."""
    if prompting == "bare":
        return question
    shown = _demonstrations()["relation"].get(relation or "") or _demonstrations()["any"]
    return "\n\n".join([*(f"Q: {q}\nA: {a}" for q, a in shown), f"Q: {question}\nA:"])


def _several(question: str, prompting: Prompting) -> str:
    """Return a multi-hop question after multi-hop demonstrations."""
    if prompting == "bare":
        return question
    shown = _demonstrations()["multihop"]
    if prompting == "standard":
        return "\n\n".join([*(f"Q: {q}\nA: {a}" for q, _, a in shown), f"Q: {question}\nA:"])
    parts = [f"Question: {q}\nThoughts: {why}\nAnswer: {a}" for q, why, a in shown]
    return "\n\n".join([*parts, f"Question: {question}\nThoughts:"])


@cache
def _demonstrations() -> Any:
    return tomllib.loads((files("retcon") / "evaluation" / "datasets" / "demonstrations.toml").read_text("utf-8"))
