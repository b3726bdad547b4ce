"""CounterFact and Multi-CounterFact: ROME's nested format, and EasyEdit's flat one.

Neighbours are on the axis `neighborhood` in both, target the true answer and contrast the new one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from retcon.edits import Edit
from retcon.evaluation.datasets.fields import first, labelled, pairs, present, texts
from retcon.evaluation.datasets.related import ask_related
from retcon.evaluation.datasets.rows import CaseTarget, Draft, draft
from retcon.files import require


def native(record: Mapping[str, Any], where: str, row: int, target: CaseTarget) -> Draft:
    """Read one row of the nested format; attribute and generation prompts have no target and are not scored."""
    made = draft(record, where, row, "counterfact")
    rewrite = require(record, "requested_rewrite", dict, where)
    inside = f"{where}, requested_rewrite"
    new, new_id = labelled(rewrite, "target_new", inside)
    true, true_id = labelled(rewrite, "target_true", inside) if "target_true" in rewrite else (None, None)
    if target == "alt":
        new, new_id = made.alternative({"alt": rewrite.get("alt", record.get("alt"))}), None
    relation = rewrite.get("relation_id")
    made.meta |= {"relation_id": relation, "target_new_id": new_id, "target_true_id": true_id}
    prompt, subject = require(rewrite, "prompt", str, inside), require(rewrite, "subject", str, inside)
    edit = made.edit(prompt, subject, new, true, template=True, relation=relation)
    _ask(
        made,
        edit,
        texts(record.get("paraphrase_prompts"), "paraphrase_prompts", where),
        [(p, edit.target_true) for p in texts(record.get("neighborhood_prompts"), "neighborhood_prompts", where)],
    )
    wanted = ((edit.target_new,),)
    made.ask("attribute", texts(record.get("attribute_prompts"), "attribute_prompts", where), None, answers=wanted)
    made.ask("generation", texts(record.get("generation_prompts"), "generation_prompts", where), None)
    ask_related(made, record.get("portability") or rewrite.get("portability"), "portability", where)
    return made


def flat(record: Mapping[str, Any], where: str, row: int, target: CaseTarget) -> Draft:
    """Read one row of the flat format: one paraphrase, one neighbour, the subject already in the prompt."""
    made = draft(record, where, row, "counterfact")
    true = first(record.get("ground_truth"), "ground_truth", where)
    new = first(present(record, "target_new", where), "target_new", where) or ""
    if target == "alt":
        new = made.alternative(record)
    prompt, subject = require(record, "prompt", str, where), require(record, "subject", str, where)
    edit = made.edit(prompt, subject, new, true)
    neighbours = pairs(record.get("locality_prompt"), record.get("locality_ground_truth"), "locality_prompt", where)
    _ask(
        made,
        edit,
        texts(record.get("rephrase_prompt"), "rephrase_prompt", where),
        [(prompt, first(kept, "locality_ground_truth", where)) for prompt, kept in neighbours],
    )
    asked = record.get("portability_prompt")
    beside = {"plain": {"prompt": asked, "ground_truth": record.get("portability_ground_truth")}} if asked else None
    ask_related(made, record.get("portability") or beside, "portability", where)
    return made


def _ask(made: Draft, edit: Edit, paraphrases: Sequence[str], neighbours: Sequence[tuple[str, str | None]]) -> None:
    """Rewrite, paraphrases, and neighbours, each with the answer that holds for it before and after."""
    made.ask_fact(edit, paraphrases, contrast=edit.target_true)
    for place, (prompt, kept) in enumerate(neighbours):
        answers = ((kept.strip(),),) if kept else ()
        made.ask_at(f"neighborhood/{place}", "neighborhood", prompt, kept or "", answers, contrast=edit.target_new)
