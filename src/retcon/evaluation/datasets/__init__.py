"""Datasets as cases: every loader returns `(cases, LoadReport)`.

What is unusual about a row is flagged in `case.meta["flags"]`, what cannot be used is dropped, and the report counts
both. Text that a model will read is kept byte for byte, but for whitespace at the end of prompts and around targets.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

from retcon.edits import ConflictRule
from retcon.errors import InvalidSetting, MalformedFile
from retcon.evaluation.datasets import hub
from retcon.evaluation.datasets.counterfact import flat, native
from retcon.evaluation.datasets.easyedit import Answers, knowedit, qaedit
from retcon.evaluation.datasets.mquake import Prompting, mquake
from retcon.evaluation.datasets.own import embedded, own, plain
from retcon.evaluation.datasets.ripple import ripple
from retcon.evaluation.datasets.rows import (
    Format,
    Loaded,
    LoadReport,
    Options,
    Parser,
    Row,
    contaminated,
    from_rows,
)
from retcon.evaluation.datasets.zsre import PromptStyle, Target, zsre
from retcon.files import read_json_rows

__all__ = [
    "Answers",
    "Format",
    "LoadReport",
    "Loaded",
    "PromptStyle",
    "Prompting",
    "Target",
    "contaminated",
    "load",
    "load_cases",
    "load_counterfact",
    "load_zsre",
]

WORLD = "world"
"""Names the embedded world where a path is expected."""


def load(
    path: str | os.PathLike[str],
    format: Format | None = None,
    *,
    start: int = 0,
    limit: int | None = None,
    conflicts: ConflictRule = "drop",
    target: Target = "answers",
    prompt_style: PromptStyle = "loc.nq_q",
    answers: Answers = "all",
    prompting: Prompting = "standard",
    seed: int = 0,
) -> Loaded:
    """Cases from a file of any known format, from the hub, or of the embedded world.

    Args:
        path: a file; `hub:owner/name/file.json` (or a short name of `datasets.hub.NAMED` after `hub:`); or `world`.
        format: None tells the format by the fields of the first row.
        start: rows to pass over.
        limit: rows to read; the cases may be fewer.
        conflicts: which rows to keep when some contradict each other (`retcon.edits.resolve_conflicts`).
        target: zsRE's edit target, the first correct answer (`answers`) or a wrong one (`alt`).
        prompt_style: how zsRE's locality prompt is put; numbers differ between the styles.
        answers: KnowEdit's accepted answers, `all` strings or, as in EasyEdit's reader, the `first`.
        prompting: what stands before MQuAKE's questions.
        seed: of the embedded world's draw.

    The last five are ignored for other formats.

    Raises:
        MalformedFile: no known format, or a row that is not what the format promises.
        ConflictingEdits: rows contradict each other and `conflicts="error"`.
        InvalidSetting: a setting that does not exist.
    """
    options = Options(start, limit, conflicts)
    if str(path) == WORLD:
        return embedded(options, seed)
    rows = _rows(path)
    chosen = format or recognise(rows, path)
    parsers: Mapping[str, tuple[Parser, dict[str, Any]]] = {
        "counterfact": (native, {}),
        "counterfact-flat": (flat, {}),
        "zsre": (partial(zsre, target=target, style=prompt_style), {"target": target, "prompt_style": prompt_style}),
        "knowedit": (partial(knowedit, answers=answers), {"answers": answers}),
        "qaedit": (qaedit, {}),
        "mquake": (partial(mquake, prompting=prompting), {"prompting": prompting}),
        "ripple": (ripple, {}),
        "cases": (own, {}),
        "edits": (plain, {}),
    }
    if chosen not in parsers:
        raise InvalidSetting(f"unknown format {chosen!r}; known: {', '.join(parsers)}")
    parse, settings = parsers[chosen]
    for name, value in settings.items():
        if value not in get_args(_CHOICES[name]):
            known = ", ".join(get_args(_CHOICES[name]))
            raise InvalidSetting(f"unknown {chosen} {name.replace('_', ' ')} {value!r}; known: {known}")
    return from_rows(path, rows, chosen, parse, options, settings)


_CHOICES: Mapping[str, Any] = {
    "target": Target,
    "prompt_style": PromptStyle,
    "answers": Answers,
    "prompting": Prompting,
}


def load_counterfact(
    path: str | os.PathLike[str], *, start: int = 0, limit: int | None = None, conflicts: ConflictRule = "drop"
) -> Loaded:
    """CounterFact or Multi-CounterFact, nested or flat, told apart by their fields; see `load`.

    Raises:
        MalformedFile: also where the rows are of another format.
    """
    format = recognise(_rows(path), path)
    if format not in ("counterfact", "counterfact-flat"):
        raise MalformedFile(f"{path}: expected CounterFact rows, these look like {format}")
    return load(path, format, start=start, limit=limit, conflicts=conflicts)


def load_zsre(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    limit: int | None = None,
    conflicts: ConflictRule = "drop",
    target: Target = "answers",
    prompt_style: PromptStyle = "loc.nq_q",
) -> Loaded:
    """zsRE in any of its shapes; see `load`."""
    return load(path, "zsre", start=start, limit=limit, conflicts=conflicts, target=target, prompt_style=prompt_style)


def load_cases(
    path: str | os.PathLike[str], *, start: int = 0, limit: int | None = None, conflicts: ConflictRule = "drop"
) -> Loaded:
    """Cases as `retcon.edits.write_cases` wrote them; a case goes when any of its edits does. See `load`."""
    return load(path, "cases", start=start, limit=limit, conflicts=conflicts)


def _rows(path: str | os.PathLike[str]) -> Sequence[Row]:
    address = str(path)
    if not address.startswith(hub.PREFIX):
        return read_json_rows(path)
    return hub.read_hub_rows(hub.NAMED.get(address.removeprefix(hub.PREFIX), address))


def recognise(rows: Sequence[Row], path: str | os.PathLike[str]) -> Format:
    """The format, by the fields of the first row.

    Raises:
        MalformedFile: none that is known.
    """
    _, record = rows[0]
    has = record.keys().__contains__
    if has("requested_rewrite"):
        return "mquake" if isinstance(record["requested_rewrite"], list) else "counterfact"
    if has("edit") and any(map(has, ("Relation_Specificity", "Relation_Specifity", "Forgetfulness"))):
        return "ripple"
    if has("src") or (has("rephrase") and has("answers")) or (has("ans") and has("loc")):
        return "zsre"
    if has("edits") or has("queries"):
        return "cases"
    if (has("labels") and has("concept")) or any(isinstance(record.get(k), dict) for k in ("portability", "locality")):
        return "knowedit"
    if has("target") and isinstance(record.get("locality"), list):
        return "qaedit"
    if has("prompt") and has("target_new") and any(map(has, ("portability", "locality"))):
        return "knowedit"
    if any(map(has, ("ground_truth", "rephrase_prompt", "locality_prompt", "case_id"))) and has("target_new"):
        return "counterfact-flat"
    if has("prompt") and has("subject") and has("target_new"):
        return "edits"
    if has("prompt") or has("target_new"):
        return "counterfact-flat"
    raise MalformedFile(
        f"{path}: no known format; the first row has the fields {', '.join(map(str, record)) or '(none)'}. "
        "Known: CounterFact (requested_rewrite), flat CounterFact (prompt, subject, target_new, ground_truth), zsRE "
        "(src, rephrase, answers), KnowEdit (portability, locality), QAEdit (target, locality), MQuAKE (a list "
        "requested_rewrite), RippleEdits (edit, Forgetfulness), cases (edits, queries), edits (prompt, subject, "
        "target_new)"
    )
