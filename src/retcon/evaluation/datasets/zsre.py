"""zsRE in its shapes: MEND's evaluation format, and those of MALMEN, UltraEdit and UltraEditBench.

There is no rival answer, so `target_true` is None throughout.
"""

from collections.abc import Mapping
from typing import Any, Literal

from retcon.evaluation.datasets.fields import AnswerGroups, first, given, pairs, present, texts
from retcon.evaluation.datasets.related import ask_related
from retcon.evaluation.datasets.rows import CaseTarget, Draft, draft
from retcon.files import require
from retcon.spelling import fold

PromptStyle = Literal["loc.nq_q", "loc.nq", "loc.plain_q"]
"""Locality prompt: prefix and question mark (ROME, MEMIT, JEEP), as stored (EasyEdit), or without prefix."""

NQ_PREFIX = "nq question: "
"""What MEND's locality prompts begin with."""
_QUESTION_MARKS = ("?", "\uff1f", "\u061f")
"""Of any script; the last two are the full-width and the Arabic one."""


def zsre(record: Mapping[str, Any], where: str, row: int, target: CaseTarget, style: PromptStyle) -> Draft:
    """Read one row. The shapes differ in names only: `src` or `prompt`, `answers` or one `ans`, a subject or none.

    The answer to write is the first correct one (ROME, MEMIT, JEEP), or the wrong one in `alt` (EasyEdit).
    """
    made = draft(record, where, row, "zsre")
    field = given(record, "answers", "ans")
    correct = [a for a in texts(present(record, field, where), field, where) if a.strip()]
    if target == "alt":
        new = made.alternative(record)
        answers: AnswerGroups = ((new.strip(),),)
        if fold(new) in map(fold, correct):
            made.flags.add("noop_edit")
    else:
        new = correct[0] if correct else ""
        answers = tuple((a.strip(),) for a in correct)
    if len(correct) > 1:
        made.flags.add("several_answers")
    prompt = require(record, given(record, "src", "prompt"), str, where)
    named = record.get("subject") is not None or record.get("ans") is None
    edit = made.edit(prompt, require(record, "subject", str, where) if named else None, new, None)
    rephrase = given(record, "rephrase", "rephrase_prompt")
    made.ask_fact(edit, texts(record.get(rephrase), rephrase, where), answers)
    for place, (loc, answer) in enumerate(pairs(record.get("loc"), record.get("loc_ans"), "loc", where)):
        kept = first(answer, "loc_ans", where) or ""
        made.ask_at(f"locality.nq/{place}", "locality.nq", _locality_prompt(loc, style), kept, ((kept.strip(),),))
    ask_related(made, record.get("portability"), "portability", where)
    return made


def _locality_prompt(loc: str, style: PromptStyle) -> str:
    if style == "loc.nq" or not loc.strip():
        return loc
    text = loc.strip().removeprefix(NQ_PREFIX).strip() if style == "loc.plain_q" else loc
    return text if text.rstrip().endswith(_QUESTION_MARKS) else text.rstrip() + "?"
