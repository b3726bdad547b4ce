"""zsRE in its shapes: MEND's evaluation format, and those of MALMEN, UltraEdit and UltraEditBench.

There is no rival answer, so `target_true` is None throughout.
"""

from collections.abc import Mapping
from typing import Any, Literal

from retcon.evaluation.datasets.rows import Draft, draft, first, fold, present, texts
from retcon.files import require

Target = Literal["answers", "alt"]
"""`answers`: the first correct answer (ROME, MEMIT, JEEP); `alt`: a wrong one (EasyEdit)."""
PromptStyle = Literal["loc.nq_q", "loc.nq", "loc.plain_q"]
"""Locality prompt: prefix and question mark (ROME, MEMIT, JEEP), as stored (EasyEdit), or without prefix."""

NQ_PREFIX = "nq question: "
"""What MEND's locality prompts begin with."""
_FIELDS = [
    *("case_id", "id", "subject", "src", "prompt", "rephrase", "rephrase_prompt", "pred", "alt", "answers", "ans"),
    *("loc", "loc_ans", "cond", "portability"),
]


def zsre(record: Mapping[str, Any], where: str, row: int, target: Target, style: PromptStyle) -> Draft:
    """One row. The shapes differ in names only: `src` or `prompt`, `answers` or one `ans`, a subject or none."""
    made = draft(record, where, row, _FIELDS, "zsre")
    field = "answers" if "answers" in record or "ans" not in record else "ans"
    correct = [a for a in texts(present(record, field, where), field, where) if a.strip()]
    if target == "alt":
        new = first(present(record, "alt", where), "alt", where) or ""
        answers: tuple[tuple[str, ...], ...] = ((new.strip(),),)
        if fold(new) in map(fold, correct):
            made.flags.add("noop_edit")
    else:
        new = correct[0] if correct else ""
        answers = tuple((a.strip(),) for a in correct)
    if len(correct) > 1:
        made.flags.add("several_answers")
    prompt = require(record, "prompt" if "prompt" in record and "src" not in record else "src", str, where)
    named = "subject" in record or "ans" not in record
    subject = require(record, "subject", str, where) if named else ""
    edit = made.edit(prompt, subject, new, None, subject_named=named)
    if edit is None:
        return made
    rephrase = "rephrase" if "rephrase" in record else "rephrase_prompt"
    made.ask("rewrite", [edit.text], edit.target_new, answers=answers)
    made.ask("paraphrase", texts(record.get(rephrase), rephrase, where), edit.target_new, answers=answers)
    kept = first(record.get("loc_ans"), "loc_ans", where) or ""
    unrelated = [_locality_prompt(loc, style) for loc in texts(record.get("loc"), "loc", where)]
    made.ask("locality.nq", unrelated, kept, answers=((kept.strip(),),))
    hop = record.get("portability")
    if isinstance(hop, dict):  # EasyEdit's zsre_mend_eval_portability_gpt4.json
        reached = first(hop.get("New Answer"), "portability, New Answer", where) or ""
        asked = texts(hop.get("New Question"), "portability, New Question", where)
        made.ask("portability.one_hop", asked, reached, answers=((reached.strip(),),))
    return made


def _locality_prompt(loc: str, style: PromptStyle) -> str:
    if style == "loc.nq" or not loc.strip():
        return loc
    text = loc.strip().removeprefix(NQ_PREFIX).strip() if style == "loc.plain_q" else loc
    return text if text.rstrip().endswith("?") else text.rstrip() + "?"
