"""What is asked of a model: `Edit` (the request), `Query` (what is measured), `Case` (both), and how they are written.

`retcon.evaluation.read_cases` reads files of any format, those written here included.

Prompts are raw text. Dataset text is never passed through `str.format`: the subject is put in by position, so braces in
prompts and subjects are harmless.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import MISSING, asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from retcon.arguments import check_choice
from retcon.atomic import write_atomically
from retcon.boundary import separator_between as separator_between
from retcon.chat import Chat, chat_from
from retcon.errors import ConflictingEdits, InvalidEdit, MalformedFile
from retcon.escaping import is_text
from retcon.files import as_json, require
from retcon.plural import plural
from retcon.spelling import fold, mentions, nfc

MARKER = "{}"
"""Where the subject goes in a prompt template."""

_Kind = TypeVar("_Kind", "Edit", "Query", "Case")
_OPTIONAL_TEXTS = ("subject", "target_true", "relation_id", "separator")
ConflictRule = Literal["error", "drop", "last", "keep"]
AnswersMode = Literal["any", "all"]


@dataclass(frozen=True)
class Edit:
    """One fact to write: after `prompt` about `subject`, the model shall say `target_new`.

    Raises:
        InvalidEdit: a field is empty or not text, the prompt holds more than one `{}`, or one beside `subject_start`.
    """

    prompt: str
    """Text up to the answer, with one `{}` for the subject; without a marker, the subject is looked up in the text."""
    subject: str | None
    """The entity the fact is about, as the prompt spells it. None: the fact names no entity, and `{}` in the prompt is
    text; methods that write at the subject refuse the edit."""
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
    separator: str | None = None
    """What is written between prompt and answer; None: `separator_between` the two, or as the chat template has it."""
    chat: Chat | None = None
    """Put the prompt to a chat model, as the user's turn in its template (True: a plain one); None: as text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chat", chat_from(self.chat))
        _check_texts(self, self._named(), ("id", "prompt", "target_new"), _OPTIONAL_TEXTS)
        object.__setattr__(self, "target_new", self.target_new.strip())
        if self.subject is not None:
            object.__setattr__(self, "subject", self.subject.strip())
        if isinstance(self.target_true, str):
            object.__setattr__(self, "target_true", self.target_true.strip() or None)
        if not self.prompt.strip():
            raise InvalidEdit(f"{self._named()}: the prompt is empty; give the text up to the answer")
        if self.subject == "":
            raise InvalidEdit(f"{self._named()}: the subject is empty; name the entity the fact is about")
        if not self.target_new:
            raise InvalidEdit(f"{self._named()}: target_new is empty; give the answer the model shall say")
        if (markers := 0 if self.subject is None else self.prompt.count(MARKER)) > 1:
            raise InvalidEdit(f"{self._named()}: {markers} markers '{{}}' in the prompt, expected one: {self.prompt!r}")
        if self.subject_start is not None:
            start = self.subject_start
            if not isinstance(start, int) or isinstance(start, bool) or start < 0:
                raise InvalidEdit(f"{self._named()}: subject_start must be a character's index from 0, found {start!r}")
            if markers:
                raise InvalidEdit(f"{self._named()}: '{{}}' says where the subject is; leave subject_start out")
            if self.subject is None:
                raise InvalidEdit(f"{self._named()}: subject_start is given, but no subject; give both or neither")
        if not self.id:
            text = "\x1f".join((self.prompt, self.subject or "", self.target_new))
            object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:12])

    def _named(self) -> str:
        if self.id:
            return f"edit {self.id!r}"
        return f"edit of {self.prompt!r}" if self.subject is None else f"edit of {self.subject!r}"

    @property
    def text(self) -> str:
        """The complete prompt, subject put in; whitespace at its end is the prompt's own and is kept."""
        if self.subject is not None and MARKER in self.prompt:
            before, after = self.prompt.split(MARKER)
            return before + self.subject + after
        return self.prompt

    @property
    def statement(self) -> str:
        """The prompt with the new answer after it."""
        separator = separator_between(self.text, self.target_new) if self.separator is None else self.separator
        return self.text + separator + self.target_new

    @property
    def subject_span(self) -> tuple[int, int] | None:
        """(start, end) characters of the subject in `text`, or None where it does not occur or there is none.

        Looked up exactly, then as NFC, then case-folded with any space for any other, each time as a word by itself
        before as a part of a longer one; the text is never rewritten.
        """
        if self.subject is None:
            return None
        if MARKER in self.prompt:
            start = self.prompt.index(MARKER)
            return start, start + len(self.subject)
        if self.subject_start is not None:
            end = self.subject_start + len(self.subject)
            return (self.subject_start, end) if self.text[self.subject_start : end] == self.subject else None
        return next(iter(mentions(self.text, self.subject)), None)

    def require_subject_span(self) -> tuple[int, int]:
        """Return `subject_span`, or an error that says what to do.

        Raises:
            InvalidEdit: the edit names no subject, or the subject does not occur in the prompt.
        """
        span = self.subject_span
        if self.subject is None:
            raise InvalidEdit(f"{self._named()}: names no subject, and one is needed here; give Edit(subject=...)")
        if span is None:
            at = "" if self.subject_start is None else f" at character {self.subject_start}"
            raise InvalidEdit(
                f"{self._named()}: subject {self.subject!r} does not occur in the prompt {self.prompt!r}{at}; "
                "put '{}' where the subject is, or give the subject as the prompt spells it"
            )
        return span


@dataclass(frozen=True)
class Query:
    """One thing to measure. (Others call it a probe; here "probe" means a diagnostic.)

    Raises:
        InvalidEdit: a field is not text, the prompt is empty, or `answers` is not a sequence of sequences of texts.
    """

    id: str
    """Stable inside its case: `axis/index`."""
    axis: str
    """`rewrite`, `paraphrase`, `neighborhood`, `two_hop`, `locality.<key>`, `portability.<key>`, `generation`, ..."""
    prompt: str
    """Complete text, without the answer."""
    target: str | None = None
    """The answer scored with teacher forcing."""
    contrast: str | None = None
    """Its rival, where there is one (CounterFact); a blank one is none."""
    answers: tuple[tuple[str, ...], ...] = ()
    """Answers accepted from generated text: outer = distinct answers, inner = aliases of one; without blank ones."""
    answers_mode: AnswersMode = "any"
    """`any`: one alias of one answer is enough; `all`: one alias of every answer."""
    separator: str | None = None
    """What is written between prompt and answer; None: `separator_between` the two, or as the chat template has it."""
    chat: Chat | None = None
    """Put the prompt to a chat model, as the user's turn in its template (True: a plain one); None: as text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chat", chat_from(self.chat))
        named = f"query {self.id!r}"
        _check_texts(self, named, ("id", "axis", "prompt"), ("target", "contrast", "separator"))
        if not self.prompt.strip():
            raise InvalidEdit(f"{named}: the prompt is empty; give the text up to the answer")
        answers = self.answers
        if not _is_sequence(answers) or not all(_is_sequence(aliases) for aliases in answers):
            raise InvalidEdit(f"{named}: answers must be a list of answers, each a list of aliases; found {answers!r}")
        if odd := [alias for aliases in answers for alias in aliases if not isinstance(alias, str)]:
            raise InvalidEdit(f"{named}: answers must be text, found {type(odd[0]).__name__} ({odd[0]!r})")
        written = (tuple(alias for alias in aliases if alias.strip()) for aliases in answers)
        object.__setattr__(self, "answers", tuple(filter(None, written)))
        if self.contrast is not None and not self.contrast.strip():
            object.__setattr__(self, "contrast", None)
        if self.answers_mode not in ("any", "all"):
            raise InvalidEdit(f"{named}: answers_mode must be 'any' or 'all', found {self.answers_mode!r}")


@dataclass(frozen=True)
class Case:
    """Edits and the queries that measure them.

    Raises:
        InvalidEdit: the id is not text, edits or queries are no lists, or two queries share their id.
    """

    id: str
    edits: tuple[Edit, ...]
    queries: tuple[Query, ...]
    dataset: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Relation, row index, flags the loader raised, and whatever else the file held."""

    def __post_init__(self) -> None:
        _check_texts(self, f"case {self.id!r}", ("id", "dataset"), ())
        for name, kind in (("edits", Edit), ("queries", Query)):
            if isinstance(getattr(self, name), kind):
                raise InvalidEdit(f"case {self.id!r}: {name} must be a list of them, found one {kind.__name__}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        ids = [query.id for query in self.queries]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise InvalidEdit(f"case {self.id!r}: two queries share the id {twice!r}; ids must be unique within a case")


def in_chat(cases: Iterable[Case], chat: Chat | bool | None) -> list[Case]:
    """Return the cases with every edit and query put in this chat; in none where it is None or False."""
    frame = chat_from(chat)
    return [
        replace(
            case,
            edits=tuple(replace(edit, chat=frame) for edit in case.edits),
            queries=tuple(replace(query, chat=frame) for query in case.queries),
        )
        for case in list_of_cases(cases)
    ]


def _check_texts(item: object, named: str, needed: Iterable[str], optional: Iterable[str]) -> None:
    for name in (*needed, *optional):
        value = getattr(item, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, str):
            raise InvalidEdit(f"{named}: {name} must be text, found {type(value).__name__} ({value!r})")
        if not is_text(value):
            raise InvalidEdit(f"{named}: {name} holds half a surrogate pair, which is no text ({value!r})")


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


# --- conflicts ---------------------------------------------------------------------------------------------------


def same_question(edit: Edit) -> tuple[str, str]:
    """Two edits with equal keys ask the same question: subject and relation (or template) agree once normalised."""
    if edit.subject is None:
        return "", fold(edit.text)
    if edit.relation_id:
        return fold(edit.subject), f"relation {edit.relation_id}"
    span = edit.subject_span
    template = edit.text if span is None else edit.text[: span[0]] + MARKER + edit.text[span[1] :]
    return fold(edit.subject), fold(template)


def conflicts(edits: Sequence[Edit]) -> list[tuple[Edit, ...]]:
    """Return the groups of edits that ask the same question and want different answers."""
    by_question: dict[tuple[str, str], list[Edit]] = {}
    for edit in edits:
        by_question.setdefault(same_question(edit), []).append(edit)
    return [tuple(group) for group in by_question.values() if len({nfc(e.target_new) for e in group}) > 1]


def resolve_conflicts(edits: Iterable[Edit], rule: ConflictRule = "error") -> list[Edit]:
    """Return the edits to keep when some contradict each other.

    `error` refuses, `drop` keeps the first of each contradicting group, `last` keeps the last, `keep` keeps all.

    Raises:
        ConflictingEdits: rule is `error` and two edits contradict each other.
        InvalidEdit: one edit in place of several, or something that is no edit.
        InvalidSetting: no such rule.
    """
    check_choice(rule, ConflictRule, "conflict rule")
    edits = list_of_edits(edits)
    groups = conflicts(edits)
    if rule == "keep" or not groups:
        return edits
    if rule == "error":
        first, second = _contradiction(groups[0])
        raise ConflictingEdits(
            f"edits {first.id!r} and {second.id!r} contradict each other: {first.subject!r} shall become both "
            f"{first.target_new!r} and {second.target_new!r} (question {same_question(first)[1]!r}); "
            f"{plural(len(groups), 'such group')}. Take one out",
            python=", or load with conflicts='drop' or 'last'.",
            option=", or keep one of them: --conflicts drop or last.",
            page=".",
        )
    keep = {same_question(g[0]): nfc((g[0] if rule == "drop" else g[-1]).target_new) for g in groups}
    return [e for e in edits if keep.get(same_question(e), nfc(e.target_new)) == nfc(e.target_new)]


def check_edits(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Return the edits, checked as for every method: subjects present, identities unique, no contradictions.

    Edits without a subject pass; `retcon.methods.common.registry.check_subjects` refuses them where one is needed.

    Raises:
        InvalidEdit: a subject is missing from its prompt, two edits share an id, or something is no edit.
        ConflictingEdits: two edits contradict each other.
    """
    seen: dict[str, Edit] = {}
    edits = tuple(list_of_edits(edits))
    for edit in edits:
        if edit.subject is not None:
            edit.require_subject_span()
        if edit.id in seen and seen[edit.id] != edit:
            raise InvalidEdit(f"two different edits share the id {edit.id!r}; ids must be unique")
        seen[edit.id] = edit
    resolve_conflicts(edits, "error")
    return edits


def list_of_edits(edits: Iterable[Edit]) -> list[Edit]:
    """Return the edits.

    Raises:
        InvalidEdit: one edit in place of several, or something that is no edit.
    """
    return list_of(edits, Edit)


def list_of_cases(cases: Iterable[Case]) -> list[Case]:
    """Return the cases.

    Raises:
        InvalidEdit: one case in place of several, or something that is no case.
    """
    return list_of(cases, Case)


def list_of(given: Any, *kinds: type[Edit] | type[Case]) -> list[Any]:
    """Return edits, cases or either of them as a list.

    Raises:
        InvalidEdit: one in place of several, or something that is none of these kinds.
    """
    wanted = " or ".join(kind.__name__ for kind in kinds)
    article = "an" if wanted.startswith("E") else "a"
    if isinstance(given, Edit | Case) and isinstance(given, kinds):
        what = type(given).__name__.lower()
        raise InvalidEdit(f"one {what} given where a list of them is wanted: [{what}] ({what} {given.id!r})")
    found = list(given) if isinstance(given, Iterable) else [given]
    for item in found:
        if not isinstance(item, kinds):
            hint = "; a case's own are case.edits" if isinstance(item, Case) else ""
            hint = ", edits with the queries that measure them" if kinds == (Case,) else hint
            raise InvalidEdit(f"{type(item).__name__} given where {article} {wanted} is wanted{hint}")
    return found


def _contradiction(group: Sequence[Edit]) -> tuple[Edit, Edit]:
    return group[0], next(e for e in group if nfc(e.target_new) != nfc(group[0].target_new))


# --- files -------------------------------------------------------------------------------------------------------


def write_edits(path: str | os.PathLike[str], edits: Iterable[Edit]) -> None:
    """Write edits as JSON lines, fields that are None left out."""
    _write_lines(path, map(edit_record, list_of_edits(edits)))


def case_from(record: Mapping[str, Any], where: str) -> Case:
    """Read a case from one object of a cases file.

    Raises:
        MalformedFile: `where` names file and row; the message adds the field.
    """
    edits = enumerate(require(record, "edits", list, where))
    queries = enumerate(require(record, "queries", list, where))
    parts = {
        "edits": [_made(Edit, item, f"{where}, edits[{place}]") for place, item in edits],
        "queries": [_made(Query, item, f"{where}, queries[{place}]") for place, item in queries],
    }
    if "meta" in record:
        require(record, "meta", dict, where)
    return _made(Case, {**record, **parts}, where)


def write_cases(path: str | os.PathLike[str], cases: Iterable[Case]) -> None:
    """Write cases as JSON lines, fields of edits and queries that are None left out.

    Raises:
        InvalidSetting: a case's `meta` is more than JSON holds.
    """
    _write_lines(path, map(case_record, list_of_cases(cases)))


def case_record(case: Case) -> dict[str, Any]:
    """Return the case's fields as `write_cases` writes them, one JSON object."""
    return _case_fields(case) | {"meta": as_json(case.meta, f"case {case.id!r}: meta")}


def _case_fields(case: Case) -> dict[str, Any]:
    return {
        "id": case.id,
        "edits": [edit_record(edit) for edit in case.edits],
        "queries": [_without_none(asdict(query)) for query in case.queries],
        "dataset": case.dataset,
        "meta": case.meta,
    }


def cases_hash(cases: Iterable[Case]) -> str:
    """Return the SHA-256 of all that the cases hold, as `write_cases` writes it; what JSON lacks counts as text."""

    def as_text(value: Any) -> Any:
        return sorted(map(repr, value)) if isinstance(value, Set) else str(value)  # a set has no order to hash

    fields = [_case_fields(case) for case in cases]
    return hashlib.sha256(json.dumps(fields, default=as_text, skipkeys=True).encode()).hexdigest()


def edit_record(edit: Edit) -> dict[str, Any]:
    """Return the edit's fields, those that are None left out, but for a subject that is missing on purpose."""
    return _without_none(asdict(edit)) | ({"subject": None} if edit.subject is None else {})


def _without_none(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}


def _made(kind: type[_Kind], record: Any, where: str) -> _Kind:
    """Return an `Edit`, `Query` or `Case` from its fields."""
    if not isinstance(record, dict):
        raise MalformedFile(f"{where}: expected an object, found {type(record).__name__}")
    for name, declared in kind.__dataclass_fields__.items():
        if declared.default is MISSING and declared.default_factory is MISSING:
            require(record, name, object, where)
    if unknown := sorted(set(record) - set(kind.__dataclass_fields__)):
        known = ", ".join(kind.__dataclass_fields__)
        raise MalformedFile(f"{where}: {plural(len(unknown), 'unknown field')} ({', '.join(unknown)}); known: {known}")
    try:
        return kind(**record)
    except InvalidEdit as error:
        raise MalformedFile(f"{where}: {error}") from None


def _write_lines(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    write_atomically(path, text.encode())
