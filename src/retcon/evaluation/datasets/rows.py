"""What every loader shares: a row on its way to a case, what is flagged and dropped, and the report that counts it."""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from retcon.edits import MARKER, Case, ConflictRule, Edit, Query, resolve_conflicts, same_question
from retcon.edits import conflicts as contradictions
from retcon.errors import InvalidEdit, InvalidSetting, MalformedFile
from retcon.evaluation.metrics import is_locality
from retcon.files import require

Format = Literal[
    "counterfact",
    "counterfact-flat",
    "zsre",
    "qaedit",
    "knowedit",
    "mquake",
    "ripple",
    "cases",
    "edits",
    "world",
]
"""Kinds of file; see docs/evaluation.md."""

Family = Literal["counterfact", "zsre", "easyedit", "mquake", "ripple"]
"""Which published way of scoring a dataset's numbers belong to."""

NO_SUBJECT = "(no subject)"
"""Stands for the subject in formats that name none; it is found in no prompt, so such edits are skipped by methods."""

Row = tuple[int, dict[str, Any]]
"""A row's number in its file, counted from 1, and the object."""


@dataclass(frozen=True)
class LoadReport:
    """What was read, dropped and flagged, and how; part of any result made from the cases."""

    path: str
    format: Format
    sha256: str
    """Of the file's bytes; of the rows where there is no file."""
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
class Options:
    """What every loader can be told."""

    start: int = 0
    """Rows to pass over."""
    limit: int | None = None
    """Rows to read."""
    conflicts: ConflictRule = "drop"

    def __post_init__(self) -> None:
        if self.start < 0 or (self.limit is not None and self.limit < 0):
            raise InvalidSetting(f"start and limit must not be negative, found {self.start} and {self.limit}")

    @property
    def rows(self) -> slice:
        return slice(self.start, None if self.limit is None else self.start + self.limit)


@dataclass
class Draft:
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
        subject_named: bool = True,
    ) -> Edit | None:
        """Take an edit of the row; None, with the reason noted, where it cannot be used.

        Args:
            template: `{}` in the prompt is where the subject goes, not text.
            subject_named: the format names the subject; where it does not, no method that needs one can make the edit.
        """
        if not subject.strip():
            if subject_named:
                raise MalformedFile(f"{self.where}: field 'subject' is empty")
            subject = NO_SUBJECT
        if not template and MARKER in prompt and (prompt.count(MARKER) > 1 or subject in prompt):
            self.dropped = "marker_in_prompt"  # it is text, but an Edit would put the subject there
            return None
        if not target_new.strip():
            self.dropped = "empty_target"
            return None
        if any(t is not None and t != t.strip() for t in (target_new, target_true)):
            self.flags.add("target_whitespace")
        number = len(self.edits)
        try:
            edit = Edit(
                prompt,
                subject,
                target_new,
                target_true,
                id=f"{self.id}/{number}" if number else self.id,
                relation_id=relation,
            )
        except InvalidEdit as error:
            raise MalformedFile(f"{self.where}: {error}") from None
        self.edits = (*self.edits, edit)
        self.flags |= edit_flags(edit)
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
            self.ask_at(f"{axis}/{place}", axis, prompt, target, answers, contrast=contrast)

    def ask_at(
        self,
        query_id: str,
        axis: str,
        prompt: str,
        target: str | None,
        answers: tuple[tuple[str, ...], ...],
        *,
        contrast: str | None = None,
        mode: Literal["any", "all"] = "any",
    ) -> None:
        """Add one query, unless its prompt is blank."""
        if not prompt.strip():
            self.dropped_queries.append("empty_prompt")
        else:
            self.add(Query(query_id, axis, prompt, target, contrast, answers, mode))

    def add(self, query: Query) -> None:
        if query.target is not None and not query.target.strip():
            self.dropped_queries.append("empty_target")
            return
        self.flags |= query_flags(query.axis, query.prompt, self.edits)
        target = query.target.strip() if query.target is not None else None
        self.queries.append(replace(query, prompt=query.prompt.rstrip(), target=target))

    def case(self, dataset: str) -> Case:
        meta = {**self.meta, "flags": sorted(self.flags)}
        return Case(self.id, self.edits, tuple(self.queries), self.dataset or dataset, meta)


def draft(record: Mapping[str, Any], where: str, row: int, known: Sequence[str], family: Family) -> Draft:
    """Identity (the file's own, else the row's index) and meta, where fields of no known meaning are kept."""
    extra = {name: value for name, value in record.items() if name not in known}
    own = record.get("case_id", record.get("id"))
    meta = {"row": row, "family": family, **({"extra": extra} if extra else {})}
    return Draft(where, str(row if own is None else own), meta)


Parser = Callable[[Mapping[str, Any], str, int], Draft]
"""From an object, where it stands (file and row, for errors) and its index to a draft."""


def from_rows(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    format: Format,
    parse: Parser,
    options: Options,
    more: Mapping[str, Any] | None = None,
) -> Loaded:
    """Cases of the rows asked for. `more` are the loader's own settings, for the report."""
    numbered = list(enumerate(rows))[options.rows]
    drafts = [parse(record, f"{path}, row {number}", index) for index, (number, record) in numbered]
    return finish(path, format, drafts, options, _sha256(path, rows), more or {})


def finish(
    path: str | os.PathLike[str],
    format: Format,
    drafts: Sequence[Draft],
    options: Options,
    sha256: str,
    more: Mapping[str, Any],
) -> Loaded:
    """Everything that looks at more than one row: identities, contradictions, repetitions, contamination, counts."""
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


FLAGS_ACROSS = {"conflict", "repeated_question", "repeated_subject", "contaminated"}
"""Those that depend on the other rows."""


def _sha256(path: str | os.PathLike[str], rows: Sequence[Row]) -> str:
    """Of the file; of the rows where they come from elsewhere (a hub)."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _flag_repetitions(kept: Sequence[Draft]) -> None:
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


def edit_flags(edit: Edit) -> set[str]:
    flags = set()
    if edit.subject_span is None:
        flags.add("subject_missing")
    elif edit.text.count(edit.subject) > 1:
        flags.add("subject_twice")
    if edit.prompt != edit.prompt.rstrip():
        flags.add("trailing_whitespace")
    if edit.target_true and fold(edit.target_true) == fold(edit.target_new):
        flags.add("noop_edit")
    return flags


def query_flags(axis: str, prompt: str, edits: Sequence[Edit]) -> set[str]:
    tests = {
        "paraphrase_is_prompt": axis == "paraphrase" and any(prompt.rstrip() == edit.text for edit in edits),
        "trailing_whitespace": prompt != prompt.rstrip(),
        "braces": "{" in prompt or "}" in prompt,
        "newline": "\n" in prompt,
        "double_space": "  " in prompt,
    }
    return {name for name, holds in tests.items() if holds}


# --- fields ------------------------------------------------------------------------------------------------------


def present(record: Mapping[str, Any], name: str, where: str) -> Any:
    return require(record, name, object, where)


def labelled(record: Mapping[str, Any], name: str, where: str) -> tuple[str, str | None]:
    """A target written as {"str": ..., "id": ...}, or plainly."""
    value = present(record, name, where)
    if isinstance(value, dict):
        return require(value, "str", str, f"{where}, {name}"), value.get("id")
    return first(value, name, where) or "", None


def texts(value: Any, name: str, where: str) -> list[str]:
    """The strings in a string, a list of them, a nested list, or nothing."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts(item, name, where)]
    raise MalformedFile(f"{where}: field {name!r} must be text or a list of texts, found {type(value).__name__}")


def first(value: Any, name: str, where: str) -> str | None:
    """The first text that is not blank."""
    return next((text for text in texts(value, name, where) if text.strip()), None)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def fold(text: str) -> str:
    return " ".join(_nfc(text).casefold().split())


def answers_of(value: Any, name: str, where: str) -> tuple[tuple[str, ...], ...]:
    """Answers with their aliases: a string is one answer; a list of strings, or of lists, one answer per entry.

    Blank strings go, and so do answers without any string left. Numbers and booleans are written out.
    """
    items = value if isinstance(value, list) else [value]
    groups = (tuple(t.strip() for t in _written(item, name, where) if t.strip()) for item in items)
    return tuple(group for group in groups if group)


def _written(value: Any, name: str, where: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _written(item, name, where)
    elif isinstance(value, bool | int | float):
        yield str(value)
    else:
        yield from texts(value, name, where)
