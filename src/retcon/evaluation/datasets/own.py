"""Our own files: cases as `write_cases` wrote them, plain lists of edits, and the embedded world."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from retcon import world
from retcon.edits import Case, Query, case_from
from retcon.evaluation.datasets.rows import FLAGS_ACROSS, Draft, Loaded, Options, edit_flags, finish, texts


def own(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """A case of our own, flagged like any other."""
    return _draft(case_from(record, where), where)


def plain(record: Mapping[str, Any], where: str, row: int) -> Draft:
    """One edit with the fields of `Edit`, measured by nothing but its own prompt, against the old answer if known."""
    (edit,) = case_from({"id": "", "edits": [dict(record)], "queries": []}, where).edits
    asked = Query("rewrite/0", "rewrite", edit.text, edit.target_new, edit.target_true, ((edit.target_new,),))
    return _draft(Case(edit.id, (edit,), (asked,), "", {"row": row}), where)


def embedded(options: Options, seed: int) -> Loaded:
    """Cases of the embedded world, drawn by `seed`."""
    cases = world.cases(None if options.limit is None else options.start + options.limit, seed=seed)[options.start :]
    drafts = [_draft(case, f"world, case {case.id}") for case in cases]
    known = json.dumps([asdict(case) for case in cases])
    return finish("world", "world", drafts, options, hashlib.sha256(known.encode()).hexdigest(), {"seed": seed})


def _draft(case: Case, where: str) -> Draft:
    """Flags that speak of other rows are raised anew, for this may be a part of the cases they were raised for."""
    meta = {name: value for name, value in case.meta.items() if name not in ("flags", "contaminated")}
    flags = set(texts(case.meta.get("flags"), "flags", where)) - FLAGS_ACROSS
    made = Draft(where, case.id, meta, flags, case.edits, dataset=case.dataset)
    for edit in case.edits:
        made.flags |= edit_flags(edit)
    for query in case.queries:
        made.add(query)
    return made
