"""Datasets as cases: CounterFact (native and flat), zsRE (MEND's format) and our own JSON lines of cases.

Every loader returns `(cases, LoadReport)`. What is unusual about a row is flagged in `case.meta["flags"]`, what cannot
be used is dropped, and the report counts both. Text that a model will read is kept byte for byte, but for whitespace at
the end of prompts and around targets.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from retcon.edits import MARKER, Case, ConflictRule, Edit, Query, case_from, resolve_conflicts, same_question
from retcon.edits import conflicts as contradictions
from retcon.errors import InvalidEdit, InvalidSetting, MalformedFile
from retcon.evaluation.metrics import is_locality
from retcon.files import read_json_rows, require

Format = Literal["counterfact", "counterfact-flat", "zsre", "cases"]
Target = Literal["answers", "alt"]
PromptStyle = Literal["loc.nq_q", "loc.nq", "loc.plain_q"]

NQ_PREFIX = "nq question: "
"""What zsRE's locality prompts begin with."""


@dataclass(frozen=True)
class LoadReport:
    """What was read, dropped and flagged, and how; part of any result made from the cases."""

    path: str
    format: Format
    sha256: str
    """Of the file's bytes."""
    rows: int
    """Rows read: those of the file from `start` on, at most `limit`."""
    cases: int
    """Cases kept."""
    dropped: Mapping[str, int]
    """Rows left out, by reason."""
    dropped_queries: Mapping[str, int]
    """Queries left out of cases that were kept, by reason."""
    flags: Mapping[str, int]
    """Cases kept that carry a flag, by flag."""
    options: Mapping[str, Any]
    """The loader's settings."""

    def __str__(self) -> str:
        def counted(name: str, counts: Mapping[str, int]) -> str:
            return f"; {name}: " + ", ".join(f"{k} {v:,}" for k, v in sorted(counts.items())) if counts else ""

        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return (
            f"{self.path} ({self.format}, {options}, sha256 {self.sha256[:12]}): "
            f"{self.cases:,} of {self.rows:,} rows kept"
            + counted("dropped", self.dropped)
            + counted("queries dropped", self.dropped_queries)
            + counted("flagged", self.flags)
        )


Loaded = tuple[list[Case], LoadReport]


def load(
    path: str | os.PathLike[str],
    format: Format | None = None,
    *,
    start: int = 0,
    limit: int | None = None,
    conflicts: ConflictRule = "drop",
    target: Target = "answers",
    prompt_style: PromptStyle = "loc.nq_q",
) -> Loaded:
    """Cases from a file of any known format; `format=None` tells the format by the fields of the first row.

    `target` and `prompt_style` are zsRE's and ignored for other formats; see `load_zsre`.

    Raises:
        MalformedFile: no known format, or a row that is not what the format promises.
        ConflictingEdits: rows contradict each other and `conflicts="error"`.
    """
    rows = read_json_rows(path)
    options = _Options(start, limit, conflicts)
    format = format or _recognise(rows, path)
    if format == "zsre":
        return _from_zsre_rows(path, rows, options, target, prompt_style)
    if format not in _PARSERS:
        raise InvalidSetting(f"unknown format {format!r}; known: {', '.join(get_args(Format))}")
    return _from_rows(path, rows, format, _PARSERS[format], options)


def load_counterfact(
    path: str | os.PathLike[str], *, start: int = 0, limit: int | None = None, conflicts: ConflictRule = "drop"
) -> Loaded:
    """CounterFact or Multi-CounterFact in ROME's nested format, or EasyEdit's flat one (one paraphrase, one neighbour).

    The two are told apart by their fields. In both, neighbours are on the axis `neighborhood`, target the true answer
    and contrast the new one. Attribute and generation prompts become queries without target: they are not scored.

    Args:
        start: rows of the file to pass over.
        limit: rows of the file to read; the cases may be fewer.
        conflicts: which rows to keep when some contradict each other (`retcon.edits.resolve_conflicts`).

    Raises:
        MalformedFile: names file, row and field.
        ConflictingEdits: rows contradict each other and `conflicts="error"`.
    """
    rows = read_json_rows(path)
    format = _recognise(rows, path)
    if format not in ("counterfact", "counterfact-flat"):
        raise MalformedFile(f"{path}: expected CounterFact rows, these look like {format}")
    return _from_rows(path, rows, format, _PARSERS[format], _Options(start, limit, conflicts))


def load_zsre(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    limit: int | None = None,
    conflicts: ConflictRule = "drop",
    target: Target = "answers",
    prompt_style: PromptStyle = "loc.nq_q",
) -> Loaded:
    """zsRE in MEND's evaluation format. There is no rival answer, so `target_true` is None throughout.

    Args:
        target: `answers` writes the first correct answer (ROME, MEMIT, JEEP), `alt` a wrong one (EasyEdit).
        prompt_style: locality prompt with prefix and question mark (`loc.nq_q`: ROME, MEMIT, JEEP), as stored
            (`loc.nq`: EasyEdit), or without prefix (`loc.plain_q`). Numbers differ between them.

    The other arguments and errors are those of `load_counterfact`.
    """
    options = _Options(start, limit, conflicts)
    return _from_zsre_rows(path, read_json_rows(path), options, target, prompt_style)


def load_cases(
    path: str | os.PathLike[str], *, start: int = 0, limit: int | None = None, conflicts: ConflictRule = "drop"
) -> Loaded:
    """Cases as `retcon.edits.write_cases` wrote them; a case goes when any of its edits does.

    Flags that speak of other rows are raised anew, for this may be a part of the cases they were raised for.

    The arguments and errors are those of `load_counterfact`.
    """
    return _from_rows(path, read_json_rows(path), "cases", _own, _Options(start, limit, conflicts))


def contaminated(cases: Iterable[Case]) -> dict[str, list[str]]:
    """Ids of the neighbour queries, by case id, whose prompt is the prompt of an edit.

    Once that edit is made, the neighbour's "correct" answer is no longer what the model shall say.
    """
    cases = list(cases)
    edited = {_nfc(edit.text) for case in cases for edit in case.edits}

    def is_edited(query: Query) -> bool:
        return is_locality(query.axis) and _nfc(query.prompt.rstrip()) in edited

    found = {case.id: [query.id for query in case.queries if is_edited(query)] for case in cases}
    return {case_id: ids for case_id, ids in found.items() if ids}


# --- from rows to cases ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    start: int
    limit: int | None
    conflicts: ConflictRule

    def __post_init__(self) -> None:
        if self.start < 0 or (self.limit is not None and self.limit < 0):
            raise InvalidSetting(f"start and limit must not be negative, found {self.start} and {self.limit}")

    @property
    def rows(self) -> slice:
        return slice(self.start, None if self.limit is None else self.start + self.limit)


@dataclass
class _Draft:
    """A row on its way to a case."""

    where: str
    id: str
    meta: dict[str, Any]
    flags: set[str] = field(default_factory=set)
    edits: tuple[Edit, ...] = ()
    queries: list[Query] = field(default_factory=list)
    dataset: str = ""
    """The file's name where the row does not say."""
    dropped: str | None = None
    """Why the row is left out."""
    dropped_queries: list[str] = field(default_factory=list)

    def edit(
        self,
        prompt: str,
        subject: str,
        target_new: str,
        target_true: str | None,
        *,
        template: bool = False,
        relation: str | None = None,
    ) -> Edit | None:
        """Take the row's edit; None, with the reason noted, where it cannot be used.

        Args:
            template: `{}` in the prompt is where the subject goes, not text.
        """
        if not subject.strip():
            raise MalformedFile(f"{self.where}: field 'subject' is empty")
        if not template and MARKER in prompt and (prompt.count(MARKER) > 1 or subject in prompt):
            self.dropped = "marker_in_prompt"  # it is text, but an Edit would put the subject there
            return None
        if not target_new.strip():
            self.dropped = "empty_target"
            return None
        if any(t is not None and t != t.strip() for t in (target_new, target_true)):
            self.flags.add("target_whitespace")
        try:
            edit = Edit(prompt, subject, target_new, target_true, id=self.id, relation_id=relation)
        except InvalidEdit as error:
            raise MalformedFile(f"{self.where}: {error}") from None
        self.edits = (edit,)
        self.flags |= _edit_flags(edit)
        return edit

    def ask(
        self,
        axis: str,
        prompts: Iterable[str],
        target: str | None,
        contrast: str | None = None,
        answers: tuple[tuple[str, ...], ...] = (),
    ) -> None:
        """Add one query per prompt, blank ones and those with a blank target left out; ids keep the file's places."""
        for place, prompt in enumerate(prompts):
            if not prompt.strip():
                self.dropped_queries.append("empty_prompt")
            else:
                self.add(Query(f"{axis}/{place}", axis, prompt, target, contrast, answers))

    def add(self, query: Query) -> None:
        if query.target is not None and not query.target.strip():
            self.dropped_queries.append("empty_target")
            return
        self.flags |= _query_flags(query.axis, query.prompt, self.edits)
        target = query.target.strip() if query.target is not None else None
        self.queries.append(replace(query, prompt=query.prompt.rstrip(), target=target))

    def case(self, dataset: str) -> Case:
        meta = {**self.meta, "flags": sorted(self.flags)}
        return Case(self.id, self.edits, tuple(self.queries), self.dataset or dataset, meta)


_NATIVE_FIELDS = [
    "case_id",
    "requested_rewrite",
    "paraphrase_prompts",
    "neighborhood_prompts",
    "attribute_prompts",
    "generation_prompts",
]
_FLAT_FIELDS = [
    "case_id",
    "prompt",
    "subject",
    "target_new",
    "ground_truth",
    "rephrase_prompt",
    "locality_prompt",
    "locality_ground_truth",
]
_ZSRE_FIELDS = ["case_id", "subject", "src", "rephrase", "pred", "alt", "answers", "loc", "loc_ans", "cond"]


def _draft(record: Mapping[str, Any], where: str, row: int, known: Sequence[str]) -> _Draft:
    """Identity (the file's own, else the row's index) and meta, where fields of no known meaning are kept."""
    extra = {name: value for name, value in record.items() if name not in known}
    own = record.get("case_id")
    return _Draft(where, str(row if own is None else own), {"row": row, **({"extra": extra} if extra else {})})


def _native(record: Mapping[str, Any], where: str, row: int) -> _Draft:
    draft = _draft(record, where, row, _NATIVE_FIELDS)
    rewrite = require(record, "requested_rewrite", dict, where)
    inside = f"{where}, requested_rewrite"
    new, new_id = _labelled(rewrite, "target_new", inside)
    true, true_id = _labelled(rewrite, "target_true", inside) if "target_true" in rewrite else (None, None)
    relation = rewrite.get("relation_id")
    draft.meta |= {"relation_id": relation, "target_new_id": new_id, "target_true_id": true_id}
    prompt, subject = require(rewrite, "prompt", str, inside), require(rewrite, "subject", str, inside)
    edit = draft.edit(prompt, subject, new, true, template=True, relation=relation)
    if edit is None:
        return draft
    _ask_counterfact(
        draft,
        edit,
        _texts(record.get("paraphrase_prompts"), "paraphrase_prompts", where),
        _texts(record.get("neighborhood_prompts"), "neighborhood_prompts", where),
        edit.target_true,
    )
    wanted = ((edit.target_new,),)
    draft.ask("attribute", _texts(record.get("attribute_prompts"), "attribute_prompts", where), None, answers=wanted)
    draft.ask("generation", _texts(record.get("generation_prompts"), "generation_prompts", where), None)
    return draft


def _flat(record: Mapping[str, Any], where: str, row: int) -> _Draft:
    draft = _draft(record, where, row, _FLAT_FIELDS)
    true = _first(record.get("ground_truth"), "ground_truth", where)
    new = _first(_present(record, "target_new", where), "target_new", where) or ""
    prompt, subject = require(record, "prompt", str, where), require(record, "subject", str, where)
    edit = draft.edit(prompt, subject, new, true)
    if edit is None:
        return draft
    _ask_counterfact(
        draft,
        edit,
        _texts(record.get("rephrase_prompt"), "rephrase_prompt", where),
        _texts(record.get("locality_prompt"), "locality_prompt", where),
        _first(record.get("locality_ground_truth"), "locality_ground_truth", where),
    )
    return draft


def _ask_counterfact(
    draft: _Draft, edit: Edit, paraphrases: Sequence[str], neighbours: Sequence[str], kept: str | None
) -> None:
    """Rewrite, paraphrases and neighbours; `kept` is the answer that holds for the neighbours, before and after."""
    new = ((edit.target_new,),)
    draft.ask("rewrite", [edit.text], edit.target_new, edit.target_true, new)
    draft.ask("paraphrase", paraphrases, edit.target_new, edit.target_true, new)
    draft.ask("neighborhood", neighbours, kept or "", edit.target_new, ((kept.strip(),),) if kept else ())


def _zsre(record: Mapping[str, Any], where: str, row: int, target: Target, style: PromptStyle) -> _Draft:
    draft = _draft(record, where, row, _ZSRE_FIELDS)
    correct = [a for a in _texts(_present(record, "answers", where), "answers", where) if a.strip()]
    if target == "alt":
        new = _first(_present(record, "alt", where), "alt", where) or ""
        answers: tuple[tuple[str, ...], ...] = ((new.strip(),),)
        if _fold(new) in map(_fold, correct):
            draft.flags.add("noop_edit")
    else:
        new = correct[0] if correct else ""
        answers = tuple((a.strip(),) for a in correct)
    if len(correct) > 1:
        draft.flags.add("several_answers")
    prompt, subject = require(record, "src", str, where), require(record, "subject", str, where)
    edit = draft.edit(prompt, subject, new, None)
    if edit is None:
        return draft
    draft.ask("rewrite", [edit.text], edit.target_new, answers=answers)
    draft.ask("paraphrase", _texts(record.get("rephrase"), "rephrase", where), edit.target_new, answers=answers)
    kept = _first(record.get("loc_ans"), "loc_ans", where) or ""
    unrelated = [_locality_prompt(loc, style) for loc in _texts(record.get("loc"), "loc", where)]
    draft.ask("locality.nq", unrelated, kept, answers=((kept.strip(),),))
    return draft


def _locality_prompt(loc: str, style: PromptStyle) -> str:
    if style == "loc.nq" or not loc.strip():
        return loc
    text = loc.strip().removeprefix(NQ_PREFIX).strip() if style == "loc.plain_q" else loc
    return text if text.rstrip().endswith("?") else text.rstrip() + "?"


def _own(record: Mapping[str, Any], where: str, row: int) -> _Draft:
    """A case of our own, flagged like any other."""
    case = case_from(record, where)
    meta = {name: value for name, value in case.meta.items() if name not in ("flags", "contaminated")}
    flags = set(_texts(case.meta.get("flags"), "flags", where)) - _FLAGS_ACROSS
    draft = _Draft(where, case.id, meta, flags, case.edits, dataset=case.dataset)
    for edit in case.edits:
        draft.flags |= _edit_flags(edit)
    for query in case.queries:
        draft.add(query)
    return draft


_Parser = Callable[[Mapping[str, Any], str, int], _Draft]
_PARSERS: Mapping[Format, _Parser] = {"counterfact": _native, "counterfact-flat": _flat, "cases": _own}


def _from_rows(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[int, dict[str, Any]]],
    format: Format,
    parse: _Parser,
    options: _Options,
    more: Mapping[str, Any] | None = None,
) -> Loaded:
    numbered = list(enumerate(rows))[options.rows]
    drafts = [parse(record, f"{path}, row {number}", index) for index, (number, record) in numbered]
    return _finish(path, format, drafts, options, more or {})


def _from_zsre_rows(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[int, dict[str, Any]]],
    options: _Options,
    target: Target,
    style: PromptStyle,
) -> Loaded:
    if target not in get_args(Target):
        raise InvalidSetting(f"unknown zsRE target {target!r}; known: {', '.join(get_args(Target))}")
    if style not in get_args(PromptStyle):
        raise InvalidSetting(f"unknown prompt style {style!r}; known: {', '.join(get_args(PromptStyle))}")

    def parse(record: Mapping[str, Any], where: str, row: int) -> _Draft:
        return _zsre(record, where, row, target, style)

    return _from_rows(path, rows, "zsre", parse, options, {"target": target, "prompt_style": style})


def _finish(
    path: str | os.PathLike[str], format: Format, drafts: list[_Draft], options: _Options, more: Mapping[str, Any]
) -> Loaded:
    """Everything that looks at more than one row: identities, contradictions, repetitions, contamination, counts."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    seen: dict[str, str] = {}
    for draft in drafts:
        if draft.id in seen:
            first = f"first in {seen[draft.id]}"
            raise MalformedFile(f"{draft.where}: case id {draft.id!r} occurs twice ({first}); ids must be unique")
        seen[draft.id] = draft.where

    usable = [d for d in drafts if d.dropped is None]
    edits = [edit for draft in usable for edit in draft.edits]
    survivors = set(map(id, resolve_conflicts(edits, options.conflicts)))
    for draft in usable:
        if not all(id(edit) in survivors for edit in draft.edits):
            draft.dropped = "conflict"
    kept = [d for d in drafts if d.dropped is None]
    _flag_repetitions(kept)

    dataset = Path(path).stem
    cases = [draft.case(dataset) for draft in kept]
    dirty = contaminated(cases)
    cases = [_with_contamination(case, dirty[case.id]) if case.id in dirty else case for case in cases]
    report = LoadReport(
        path=str(path),
        format=format,
        sha256=sha256,
        rows=len(drafts),
        cases=len(cases),
        dropped=dict(Counter(d.dropped for d in drafts if d.dropped is not None)),
        dropped_queries=dict(Counter(reason for d in kept for reason in d.dropped_queries)),
        flags=dict(Counter(flag for case in cases for flag in case.meta["flags"])),
        options={"start": options.start, "limit": options.limit, "conflicts": options.conflicts, **more},
    )
    return cases, report


_FLAGS_ACROSS = {"conflict", "repeated_question", "repeated_subject", "contaminated"}
"""Those that depend on the other rows."""


def _flag_repetitions(kept: Sequence[_Draft]) -> None:
    """`conflict`: contradicts another kept row. `repeated_question`, `repeated_subject`: an earlier row had it."""
    contradicting = {id(e) for group in contradictions([e for d in kept for e in d.edits]) for e in group}
    subjects: set[str] = set()
    questions: set[tuple[str, str]] = set()
    for draft in kept:
        keys = [same_question(edit) for edit in draft.edits]
        if any(id(edit) in contradicting for edit in draft.edits):
            draft.flags.add("conflict")
        if not questions.isdisjoint(keys):
            draft.flags.add("repeated_question")
        if not subjects.isdisjoint(subject for subject, _ in keys):
            draft.flags.add("repeated_subject")
        questions.update(keys)
        subjects.update(subject for subject, _ in keys)


def _with_contamination(case: Case, queries: list[str]) -> Case:
    flags = sorted({*case.meta["flags"], "contaminated"})
    return replace(case, meta={**case.meta, "flags": flags, "contaminated": queries})


def _edit_flags(edit: Edit) -> set[str]:
    flags = set()
    if edit.subject_span is None:
        flags.add("subject_missing")
    elif edit.text.count(edit.subject) > 1:
        flags.add("subject_twice")
    if edit.prompt != edit.prompt.rstrip():
        flags.add("trailing_whitespace")
    if edit.target_true and _fold(edit.target_true) == _fold(edit.target_new):
        flags.add("noop_edit")
    return flags


def _query_flags(axis: str, prompt: str, edits: Sequence[Edit]) -> set[str]:
    tests = {
        "paraphrase_is_prompt": axis == "paraphrase" and any(prompt.rstrip() == edit.text for edit in edits),
        "trailing_whitespace": prompt != prompt.rstrip(),
        "braces": "{" in prompt or "}" in prompt,
        "newline": "\n" in prompt,
        "double_space": "  " in prompt,
    }
    return {name for name, holds in tests.items() if holds}


# --- fields ------------------------------------------------------------------------------------------------------


def _recognise(rows: Sequence[tuple[int, dict[str, Any]]], path: str | os.PathLike[str]) -> Format:
    _, record = rows[0]
    if "requested_rewrite" in record:
        return "counterfact"
    if {"src", "rephrase"} & record.keys():
        return "zsre"
    if {"edits", "queries"} & record.keys():
        return "cases"
    if {"prompt", "target_new"} & record.keys():
        return "counterfact-flat"
    raise MalformedFile(
        f"{path}: no known format; the first row has the fields {', '.join(map(str, record)) or '(none)'}. "
        "Known: CounterFact (requested_rewrite), flat CounterFact (prompt, subject, target_new), "
        "zsRE (src, rephrase, answers), cases (edits, queries)"
    )


def _present(record: Mapping[str, Any], name: str, where: str) -> Any:
    return require(record, name, object, where)


def _labelled(record: Mapping[str, Any], name: str, where: str) -> tuple[str, str | None]:
    """A target written as {"str": ..., "id": ...}, or plainly."""
    value = _present(record, name, where)
    if isinstance(value, dict):
        return require(value, "str", str, f"{where}, {name}"), value.get("id")
    return _first(value, name, where) or "", None


def _texts(value: Any, name: str, where: str) -> list[str]:
    """The strings in a string, a list of them, a nested list, or nothing."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item, name, where)]
    raise MalformedFile(f"{where}: field {name!r} must be text or a list of texts, found {type(value).__name__}")


def _first(value: Any, name: str, where: str) -> str | None:
    """The first text that is not blank."""
    return next((text for text in _texts(value, name, where) if text.strip()), None)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _fold(text: str) -> str:
    return " ".join(_nfc(text).casefold().split())
