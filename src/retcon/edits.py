"""What is asked of a model: `Edit` (the request), `Query` (what is measured), `Case` (both), and their files.

Prompts are raw text. Dataset text is never passed through `str.format`: the subject is put in by position, so braces in
prompts and subjects are harmless.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from retcon.errors import ConflictingEdits, InvalidEdit, MalformedFile
from retcon.files import read_json_rows, require, write_atomically

MARKER = "{}"
"""Where the subject goes in a prompt template."""

ConflictRule = Literal["error", "drop", "last", "keep"]


@dataclass(frozen=True)
class Edit:
    """One fact to write: after `prompt` about `subject`, the model shall say `target_new`.

    Raises:
        InvalidEdit: a field is empty or not text, or the prompt holds more than one `{}`.
    """

    prompt: str
    """Text up to the answer, with one `{}` for the subject; without a marker, the subject is looked up in the text."""
    subject: str
    """The entity the fact is about, as it stands in the prompt."""
    target_new: str
    """The answer to write, without surrounding whitespace (it is stripped)."""
    target_true: str | None = None
    """The answer the model gives now, where known; used for measuring only."""
    id: str = ""
    """Identity in reports; a short hash of prompt, subject and target where none is given."""
    relation_id: str | None = None
    """The relation (Wikidata property) the fact belongs to; decides what counts as a conflict."""
    subject_start: int | None = None
    """Character where the subject starts in a prompt without marker, if it is not its first occurrence."""

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InvalidEdit(f"{self._named()}: {name} must be text, found {type(value).__name__} ({value!r})")
        for name in ("target_new", "subject"):
            object.__setattr__(self, name, getattr(self, name).strip())
        if isinstance(self.target_true, str):
            object.__setattr__(self, "target_true", self.target_true.strip() or None)
        if not self.prompt.strip():
            raise InvalidEdit(f"{self._named()}: the prompt is empty; give the text up to the answer")
        if not self.subject:
            raise InvalidEdit(f"{self._named()}: the subject is empty; name the entity the fact is about")
        if not self.target_new:
            raise InvalidEdit(f"{self._named()}: target_new is empty; give the answer the model shall say")
        if (markers := self.prompt.count(MARKER)) > 1:
            raise InvalidEdit(f"{self._named()}: {markers} markers '{{}}' in the prompt, expected one: {self.prompt!r}")
        if not self.id:
            text = "\x1f".join((self.prompt, self.subject, self.target_new))
            object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:12])

    def _named(self) -> str:
        return f"edit {self.id!r}" if self.id else f"edit of {self.subject!r}"

    @property
    def text(self) -> str:
        """The complete prompt, subject put in, trailing whitespace off.

        The template's own whitespace goes, never the subject's: a subject at the end is stripped already.
        """
        if MARKER in self.prompt:
            before, after = self.prompt.split(MARKER)
            return (before + self.subject + after).rstrip()
        return self.prompt.rstrip()

    @property
    def subject_span(self) -> tuple[int, int] | None:
        """(start, end) characters of the subject in `text`, or None where it does not occur.

        Looked up exactly, then as NFC, then case-folded (evaluation spec 1.9); the text itself is never rewritten.
        """
        if MARKER in self.prompt:
            start = self.prompt.index(MARKER)
            return start, start + len(self.subject)
        if self.subject_start is not None:
            end = self.subject_start + len(self.subject)
            return (self.subject_start, end) if self.text[self.subject_start : end] == self.subject else None
        return _find(self.text, self.subject)

    def require_subject_span(self) -> tuple[int, int]:
        """`subject_span`, or an error that says what to do.

        Raises:
            InvalidEdit: the subject does not occur in the prompt.
        """
        span = self.subject_span
        if span is None:
            raise InvalidEdit(
                f"{self._named()}: subject {self.subject!r} does not occur in the prompt {self.prompt!r}; "
                "put '{}' where the subject stands, or give the subject as the prompt spells it"
            )
        return span


@dataclass(frozen=True)
class Query:
    """One thing to measure (the evaluation spec calls it a probe; here "probe" means a diagnostic)."""

    id: str
    """Stable inside its case: `axis/index`."""
    axis: str
    """`rewrite`, `paraphrase`, `neighborhood`, `two_hop`, `locality.<key>`, `portability.<key>`, `generation`, ..."""
    prompt: str
    """Complete text: no answer, no trailing whitespace."""
    target: str | None = None
    """The answer scored with teacher forcing."""
    contrast: str | None = None
    """Its rival, where there is one (CounterFact)."""
    answers: tuple[tuple[str, ...], ...] = ()
    """Answers accepted from generated text: outer = distinct answers, inner = aliases of one."""
    answers_mode: Literal["any", "all"] = "any"
    """`any`: one alias of one answer is enough; `all`: one alias of every answer."""


@dataclass(frozen=True)
class Case:
    """Edits and the queries that measure them."""

    id: str
    edits: tuple[Edit, ...]
    queries: tuple[Query, ...]
    dataset: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Relation, row index, flags the loader raised, and whatever else the file held."""


# --- conflicts and duplicates ------------------------------------------------------------------------------------


def same_question(edit: Edit) -> tuple[str, str]:
    """Two edits with equal keys ask the same question: subject and relation (or template) agree once normalised."""
    if edit.relation_id:
        return _fold(edit.subject), f"relation {edit.relation_id}"
    span = edit.subject_span
    template = edit.text if span is None else edit.text[: span[0]] + MARKER + edit.text[span[1] :]
    return _fold(edit.subject), _fold(template)


def conflicts(edits: Sequence[Edit]) -> list[tuple[Edit, ...]]:
    """Groups of edits that ask the same question and want different answers."""
    return [group for group in _groups(edits) if len({_nfc(e.target_new) for e in group}) > 1]


def duplicates(edits: Sequence[Edit]) -> list[tuple[Edit, ...]]:
    """Groups of edits that ask the same question and want the same answer."""
    return [group for group in _groups(edits) if len({_nfc(e.target_new) for e in group}) == 1]


def resolve_conflicts(edits: Sequence[Edit], rule: ConflictRule = "error") -> list[Edit]:
    """The edits to keep when some contradict each other.

    `error` refuses, `drop` keeps the first of each contradicting group, `last` keeps the last, `keep` keeps all.

    Raises:
        ConflictingEdits: rule is `error` and two edits contradict each other.
    """
    groups = conflicts(edits)
    if rule == "keep" or not groups:
        return list(edits)
    if rule == "error":
        first, second = _contradiction(groups[0])
        raise ConflictingEdits(
            f"edits {first.id!r} and {second.id!r} contradict each other: {first.subject!r} shall become both "
            f"{first.target_new!r} and {second.target_new!r} (question {same_question(first)[1]!r}); "
            f"{len(groups)} such group(s). Take one out, or load with conflicts='drop' or 'last'."
        )
    if rule not in ("drop", "last"):
        raise InvalidEdit(f"unknown conflict rule {rule!r}; known: error, drop, last, keep")
    keep = {same_question(g[0]): _nfc((g[0] if rule == "drop" else g[-1]).target_new) for g in groups}
    return [e for e in edits if keep.get(same_question(e), _nfc(e.target_new)) == _nfc(e.target_new)]


def check_edits(edits: Sequence[Edit]) -> None:
    """What every method checks before it starts: subjects present, identities unique, no contradictions.

    Raises:
        InvalidEdit: a subject is missing from its prompt, or two edits share an id.
        ConflictingEdits: two edits contradict each other.
    """
    seen: dict[str, Edit] = {}
    for edit in edits:
        edit.require_subject_span()
        if edit.id in seen and seen[edit.id] != edit:
            raise InvalidEdit(f"two different edits share the id {edit.id!r}; ids must be unique")
        seen[edit.id] = edit
    resolve_conflicts(edits, "error")


def _groups(edits: Sequence[Edit]) -> list[tuple[Edit, ...]]:
    by_question: dict[tuple[str, str], list[Edit]] = {}
    for edit in edits:
        by_question.setdefault(same_question(edit), []).append(edit)
    return [tuple(group) for group in by_question.values() if len(group) > 1]


def _contradiction(group: Sequence[Edit]) -> tuple[Edit, Edit]:
    return group[0], next(e for e in group if _nfc(e.target_new) != _nfc(group[0].target_new))


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _fold(text: str) -> str:
    return " ".join(_nfc(text).casefold().split())


def _find(text: str, subject: str) -> tuple[int, int] | None:
    """First occurrence of `subject` in `text`: exactly, as NFC, case-folded; (start, end) in `text` as it stands."""
    start = text.find(subject)
    if start >= 0:
        return start, start + len(subject)
    for normal in (_nfc, lambda s: _nfc(s).casefold()):
        wanted = normal(subject)
        if wanted not in normal(text):
            continue
        shortest, longest = max(1, len(subject) // 2), 2 * len(subject) + 2  # decomposed forms are longer
        for start in range(len(text)):
            for end in range(start + shortest, min(len(text), start + longest) + 1):
                if normal(text[start:end]) == wanted:
                    return start, end
    return None


# --- files -------------------------------------------------------------------------------------------------------


def read_edits(path: str | os.PathLike[str]) -> list[Edit]:
    """Edits from JSON lines (or a JSON list) of objects with the fields of `Edit`.

    Raises:
        MalformedFile: names file, row and field; nothing is returned half read.
    """
    edits = []
    for row, record in read_json_rows(path):
        known = list(Edit.__dataclass_fields__)
        unknown = sorted(set(record) - set(known))
        if unknown:
            raise MalformedFile(f"{path}, row {row}: unknown field(s) {', '.join(unknown)}; known: {', '.join(known)}")
        edits.append(_edit_from(record, f"{path}, row {row}"))
    return edits


def write_edits(path: str | os.PathLike[str], edits: Iterable[Edit]) -> None:
    """Write edits as JSON lines, fields that are None left out."""
    _write_lines(path, (_without_none(asdict(e)) for e in edits))


def read_cases(path: str | os.PathLike[str]) -> list[Case]:
    """Cases as `write_cases` wrote them.

    Raises:
        MalformedFile: names file, row and field.
    """
    cases = []
    for row, record in read_json_rows(path):
        where = f"{path}, row {row}"
        edits = tuple(_edit_from(e, f"{where}, edits") for e in require(record, "edits", list, where))
        queries = tuple(_query_from(q, f"{where}, queries") for q in require(record, "queries", list, where))
        meta = record.get("meta") or {}
        cases.append(Case(str(require(record, "id", str, where)), edits, queries, record.get("dataset", ""), meta))
    return cases


def write_cases(path: str | os.PathLike[str], cases: Iterable[Case]) -> None:
    """Write cases as JSON lines."""
    _write_lines(path, (_without_none(asdict(c)) for c in cases))


def _edit_from(record: Mapping[str, Any], where: str) -> Edit:
    for name in ("prompt", "subject", "target_new"):
        require(record, name, str, where)
    try:
        return Edit(**record)
    except (InvalidEdit, TypeError) as error:
        raise MalformedFile(f"{where}: {error}") from None


def _query_from(record: Mapping[str, Any], where: str) -> Query:
    for name in ("id", "axis", "prompt"):
        require(record, name, str, where)
    answers = tuple(tuple(aliases) for aliases in record.get("answers", ()))
    try:
        return Query(**{**record, "answers": answers})
    except TypeError as error:
        raise MalformedFile(f"{where}: {error}") from None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value


def _write_lines(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    write_atomically(path, text.encode())
