"""What every format's reader shares: a row on its way to a case, and what is flagged and left out."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from retcon.arguments import check_choice
from retcon.chat import Chat
from retcon.edits import MARKER, Case, ConflictRule, Edit, Query, list_of_cases, resolve_conflicts, same_question
from retcon.edits import conflicts as contradictions
from retcon.errors import InvalidEdit, InvalidSetting, MalformedFile, unusable_row
from retcon.evaluation.datasets.fields import AnswerGroups, first, given
from retcon.evaluation.datasets.report import LeftOut, LoadReport
from retcon.evaluation.metrics import is_locality
from retcon.files import NumberedRow, sha256_of
from retcon.spelling import fold, mentions, nfc

FormatName = Literal[
    "mquake",
    "counterfact",
    "ripple",
    "wikibigedit",
    "zsre",
    "knowedit",
    "qaedit",
    "cknowedit",
    "unke",
    "fastedit",
    "cases",
    "edits",
    "counterfact-flat",
    "world",
]
"""Kinds of file; docs/data.md has an example of each."""

Family = Literal["counterfact", "zsre", "easyedit", "mquake", "ripple"]
"""Which published way of scoring a dataset's numbers belong to."""

OnError = Literal["stop", "skip"]
"""What to do with a row that cannot be used: refuse the file, or leave the row out and count it."""
Order = Literal["file", "shuffle"]
CaseTarget = Literal["new", "alt"]
"""The answer to write: the one that the format is published with, or the row's alternative one (field `alt`)."""

Answers = Literal["all", "first"]
"""Which strings of KnowEdit's `ground_truth` count as right in generated text."""

Loaded = tuple[list[Case], LoadReport]
Item = TypeVar("Item")


def contaminated(cases: Iterable[Case]) -> dict[str, list[str]]:
    """Return the ids of the neighbour queries, by case id, whose prompt is the prompt of an edit.

    Once that edit is made, the neighbour's "correct" answer is no longer what the model shall say.
    """
    cases = list_of_cases(cases)
    edited = {nfc(edit.text.rstrip()) for case in cases for edit in case.edits}

    def is_edited(query: Query) -> bool:
        return is_locality(query.axis) and nfc(query.prompt.rstrip()) in edited

    found = {case.id: [query.id for query in case.queries if is_edited(query)] for case in cases}
    return {case_id: ids for case_id, ids in found.items() if ids}


# --- from rows to cases ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Options common to all readers."""

    start: int = 0
    """Rows to pass over."""
    limit: int | None = None
    """Rows to read."""
    conflicts: ConflictRule = "drop"
    on_error: OnError = "stop"
    order: Order = "file"
    """`shuffle`: rows are drawn by `seed` before any are passed over."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("on_error", OnError), ("order", Order)):
            check_choice(getattr(self, name), kind, name)
        if self.start < 0 or (self.limit is not None and self.limit < 0):
            raise InvalidSetting(f"start and limit must not be negative, found {self.start} and {self.limit}")

    def choose(self, rows: Sequence[Item]) -> list[Item]:
        """Return the rows asked for."""
        chosen = list(rows)
        if self.order == "shuffle":
            random.Random(self.seed).shuffle(chosen)
        return chosen[self.start : None if self.limit is None else self.start + self.limit]

    def shown(self) -> dict[str, Any]:
        """Return the choice as the report names it."""
        drawn = {"order": self.order, "seed": self.seed} if self.order == "shuffle" else {}
        shown = {"start": self.start, "limit": self.limit, "conflicts": self.conflicts}
        return shown | {"on_error": self.on_error} | drawn


class RowDropped(Exception):
    """Ends the reader of a row that gives no case; its draft says why."""

    def __init__(self, draft: "Draft") -> None:
        super().__init__(draft.detail)
        self.draft = draft


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
    number: int = 0
    """The row's number in the file."""
    dropped: str | None = None
    """Why the row is left out, as it is counted."""
    detail: str = ""
    """Why, in words."""
    dropped_queries: list[str] = field(default_factory=list)
    keeps_ends: bool = False
    """Whitespace at the end of a prompt is the user's own; in published files it is a slip."""

    def leave_out(self, reason: str, detail: str) -> None:
        """Note why the row gives no case."""
        self.dropped, self.detail = reason, detail

    def drop(self, reason: str, detail: str) -> NoReturn:
        """Leave the row out, and end its reader."""
        self.leave_out(reason, detail)
        raise RowDropped(self)

    def edit(
        self,
        prompt: str,
        subject: str | None,
        target_new: str,
        target_true: str | None,
        *,
        template: bool = False,
        relation: str | None = None,
        subject_start: int | None = None,
        edit_id: str | None = None,
        separator: str | None = None,
    ) -> Edit:
        """Take an edit of the row.

        Args:
            subject: None where the format names none.
            template: `{}` in the prompt is where the subject goes, not text.
            edit_id: instead of the row's; "" for a hash of the edit.

        Raises:
            RowDropped: it cannot be used.
        """
        if subject is not None and not subject.strip():
            raise MalformedFile(f"{self.where}: field 'subject' is empty; name the entity the fact is about")
        if subject and not template and MARKER in prompt and (prompt.count(MARKER) > 1 or subject in prompt):
            # it is text, but an Edit would put the subject there
            self.drop("marker_in_prompt", f"the prompt {prompt!r} holds '{{}}' as text beside the subject")
        if not target_new.strip():
            self.drop("empty_target", "the answer to write is empty")
        if any(t is not None and t != t.strip() for t in (target_new, target_true)):
            self.flags.add("target_whitespace")
        self.flags |= end_flags(prompt)
        if not self.keeps_ends:
            prompt = prompt.rstrip()
        number = len(self.edits)
        own = f"{self.id}/{number}" if number else self.id
        try:
            edit = Edit(
                prompt,
                subject,
                target_new,
                target_true,
                id=own if edit_id is None else edit_id,
                relation_id=relation,
                subject_start=subject_start,
                separator=separator,
            )
        except InvalidEdit as error:
            raise MalformedFile(f"{self.where}: {error}") from None
        if edit.subject is not None and edit.subject_span is None:
            self.drop("subject_missing", missing_subject(edit))
        self.edits = (*self.edits, edit)
        self.flags |= edit_flags(edit)
        return edit

    def alternative(self, record: Mapping[str, Any]) -> str:
        """Return the row's alternative answer, for `case_target="alt"`.

        Raises:
            RowDropped: it has none.
        """
        if record.get("alt") is None:
            self.drop("no_alternative", "it has no alternative answer (field 'alt')")
        return first(record["alt"], "alt", self.where) or ""

    def ask_fact(
        self, edit: Edit, paraphrases: Iterable[str], answers: AnswerGroups = (), contrast: str | None = None
    ) -> None:
        """Ask for an edit in its own words and in others; right are `answers`, by default the new one."""
        for axis, prompts in (("rewrite", [edit.text]), ("paraphrase", paraphrases)):
            self.ask(axis, prompts, edit.target_new, contrast, answers or ((edit.target_new,),))

    def ask(
        self,
        axis: str,
        prompts: Iterable[str],
        target: str | None,
        contrast: str | None = None,
        answers: AnswerGroups = (),
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
        answers: AnswerGroups,
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
        prompt = query.prompt if self.keeps_ends else query.prompt.rstrip()
        self.queries.append(replace(query, prompt=prompt, target=target))

    def put_in_chat(self, chat: Chat | None) -> None:
        """Put what is edited and asked as turns of a chat."""
        self.edits = tuple(replace(edit, chat=chat) for edit in self.edits)
        self.queries = [replace(query, chat=chat) for query in self.queries]

    def case(self, dataset: str) -> Case:
        meta = {**self.meta, "flags": sorted(self.flags)}
        return Case(self.id, self.edits, tuple(self.queries), self.dataset or dataset, meta)


def _own_id(record: Mapping[str, Any]) -> Any:
    return record.get(given(record, "case_id", "id"))


def draft(record: Mapping[str, Any], where: str, row: int, family: Family | None = None) -> Draft:
    """Return a draft with the file's own identity, else the row's index."""
    own = _own_id(record)
    return Draft(where, str(row if own is None else own), {"row": row, **({"family": family} if family else {})})


def missing_subject(edit: Edit) -> str:
    """Return what is wrong with an edit whose subject is not in its prompt."""
    at = "" if edit.subject_start is None else f" at character {edit.subject_start}"
    return f"its subject {edit.subject!r} does not occur in its prompt {edit.prompt!r}{at}"


Parser = Callable[[Mapping[str, Any], str, int], Draft]
"""From an object, where it is (file and row, for errors) and its index to a draft."""


def read_drafts(
    path: str | os.PathLike[str],
    rows: Sequence[NumberedRow],
    bad: Sequence[tuple[int, str]],
    parse: Parser,
    format: str,
    options: Options,
) -> list[Draft]:
    """Return drafts of the rows asked for, unusable ones among them where `on_error` is `skip`.

    Args:
        bad: (row, problem) of what could not even be read as an object.

    Raises:
        MalformedFile: a row is not what the format promises, and `on_error` is `stop`.
    """
    everything: list[tuple[int, Mapping[str, Any] | str]] = sorted([*rows, *bad], key=itemgetter(0))
    taken = {str(_own_id(record)) for _, record in rows}
    made = []
    for index, (number, record) in options.choose(list(enumerate(everything))):
        where = f"{path}, row {number}"
        try:
            if isinstance(record, str):
                raise MalformedFile(f"{where}: {record}")
            if _own_id(record) is None and str(index) in taken:  # its index would be another row's id
                record = {**record, "case_id": f"row {number}"}
            found = parse(record, where, index)
        except (MalformedFile, InvalidEdit) as error:
            problem = str(error) if where in str(error) else f"{where}: {error}"
            if options.on_error == "stop":
                raise unusable_row(f"{problem} (read as {format})") from None
            found = Draft(where, f"row {number}", {})
            found.leave_out("malformed", problem.replace(where, "", 1).lstrip(":, "))
        if found.dropped is not None and options.on_error == "stop":
            raise unusable_row(f"{where}: {found.detail}")
        found.number = number
        made.append(found)
    return made


def finish(
    path: str | os.PathLike[str],
    format: str,
    drafts: Sequence[Draft],
    options: Options,
    sha256: str,
    more: Mapping[str, Any],
    unknown: Mapping[str, int] | None = None,
    likely: Mapping[str, str] | None = None,
) -> Loaded:
    """Check and flag what takes more than one row: identities, contradictions, repetitions, contamination, counts."""
    seen: dict[str, Draft] = {}
    for draft in drafts:
        if draft.dropped is not None:
            continue
        earlier = seen.setdefault(draft.id, draft)
        if earlier is draft:
            continue
        if (earlier.edits, earlier.queries) == (draft.edits, draft.queries):
            draft.leave_out("duplicate", f"repeats row {earlier.number}")
            continue
        if earlier.edits == draft.edits:
            twice = (
                f"the same fact as row {earlier.number} (id {draft.id!r}), with other queries; put them into one row"
            )
        else:
            twice = f"case id {draft.id!r} occurs twice (first in {earlier.where}); ids must be unique"
        if options.on_error == "stop":
            raise unusable_row(f"{draft.where}: {twice}")
        draft.leave_out("duplicate_id", twice)

    usable = [d for d in drafts if d.dropped is None]
    edits = [edit for draft in usable for edit in draft.edits]
    survivors = set(map(id, resolve_conflicts(edits, options.conflicts)))
    for draft in usable:
        if not all(id(edit) in survivors for edit in draft.edits):
            draft.leave_out("conflict", "contradicts another row")
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
        options={**options.shown(), **more},
        left_out=tuple(LeftOut(d.number, d.id, d.dropped, d.detail) for d in drafts if d.dropped is not None),
        unknown=unknown or {},
        likely=likely or {},
    )
    return cases, report


FLAGS_ACROSS = {"conflict", "repeated_question", "repeated_subject", "contaminated"}
"""Those that depend on the other rows."""


def sha256_of_rows(path: str | os.PathLike[str], rows: Sequence[NumberedRow]) -> str:
    """Return the checksum of the file; of the rows where they come from elsewhere (a hub)."""
    if Path(path).is_file():
        return sha256_of(path)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _flag_repetitions(kept: Sequence[Draft]) -> None:
    """Flag rows: `conflict`, which contradict another; `repeated_question`, `repeated_subject`, which repeat one."""
    contradicting = {id(e) for group in contradictions([e for d in kept for e in d.edits]) for e in group}
    subjects: set[str] = set()
    questions: set[tuple[str, str]] = set()
    for draft in kept:
        keys = [same_question(edit) for edit in draft.edits]
        if any(id(edit) in contradicting for edit in draft.edits):
            draft.flags.add("conflict")
        if not questions.isdisjoint(keys):
            draft.flags.add("repeated_question")
        about = {subject for subject, _ in keys if subject}
        if not subjects.isdisjoint(about):
            draft.flags.add("repeated_subject")
        questions.update(keys)
        subjects.update(about)


def _with_contamination(case: Case, queries: list[str]) -> Case:
    flags = sorted({*case.meta["flags"], "contaminated"})
    return replace(case, meta={**case.meta, "flags": flags, "contaminated": queries})


def edit_flags(edit: Edit) -> set[str]:
    flags = set()
    if edit.subject is None:
        flags.add("no_subject")
    elif len(mentions(edit.text, edit.subject)) > 1:
        flags.add("subject_twice")
    flags |= end_flags(edit.prompt)
    if edit.target_true and fold(edit.target_true) == fold(edit.target_new):
        flags.add("noop_edit")
    return flags


def end_flags(prompt: str) -> set[str]:
    """Return the flag of a prompt that ends in whitespace, where it does."""
    return {"trailing_whitespace"} if prompt != prompt.rstrip() else set()


def query_flags(axis: str, prompt: str, edits: Sequence[Edit]) -> set[str]:
    tests = {
        "paraphrase_is_prompt": axis == "paraphrase" and any(prompt.rstrip() == edit.text.rstrip() for edit in edits),
        "braces": "{" in prompt or "}" in prompt,
        "newline": "\n" in prompt,
        "double_space": "  " in prompt,
    }
    return {name for name, holds in tests.items() if holds} | end_flags(prompt)
