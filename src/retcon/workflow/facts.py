"""Facts from a file: the edits to make and the cases that measure them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from retcon.chat import Chat
from retcon.edits import Case, Edit, in_chat
from retcon.errors import InvalidEdit, InvalidSetting, RetconWarning, unusable_row

if TYPE_CHECKING:
    from retcon.evaluation.datasets import CaseTarget, OnError
    from retcon.lm.model import LM

Conflicts = Literal["error", "drop", "last"]


@dataclass(frozen=True)
class Facts:
    """The edits of a file, and the cases that measure them."""

    edits: tuple[Edit, ...]
    cases: tuple[Case, ...]
    about: str
    """One line: the file, its format, how many facts were read and left out."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a file of facts is read."""

    start: int = 0
    """Rows to pass over."""
    limit: int | None = None
    """Rows to read; None: all."""
    conflicts: Conflicts = "error"
    """Which rows to keep where some contradict each other: none, the first or the last."""
    file_format: str | None = None
    """None: found by the file's fields."""
    on_error: "OnError" = "stop"
    """What happens where a row cannot be used: the file is refused, or the row left out."""
    case_target: "CaseTarget" = "new"
    """`alt` takes the rows' alternative answers, their field `alt`, as the new ones."""
    chat: Chat | None = None
    """Puts all prompts as turns of a chat; None: as the file has them."""
    seed: int = 0
    """Of the embedded world's draw."""


PLAIN = Reading()


def read_facts(path: str | Path, reading: Reading = PLAIN) -> Facts:
    """Read facts from a file of any format; what was left out, and fields that nobody knows, are warned of.

    Raises:
        MalformedFile, ConflictingEdits: the message names file, row and field.
        InvalidSetting: nothing is left to edit.
    """
    from retcon.evaluation import read_cases

    cases, report = read_cases(
        path,
        reading.file_format,
        start=reading.start,
        limit=reading.limit,
        conflicts=reading.conflicts,
        on_error=reading.on_error,
        case_target=reading.case_target,
        seed=reading.seed,
    )
    for hint in report.hints():
        warnings.warn(f"{path}: {hint}; kept, and not used", RetconWarning, stacklevel=2)
    if report.refused:
        warnings.warn(f"{path}: left out {report.refusals()}", RetconWarning, stacklevel=2)
    if reading.chat is not None:
        cases = in_chat(cases, reading.chat)
    facts = Facts(tuple(e for c in cases for e in c.edits), tuple(cases), report.summary())
    if not facts.edits:
        raise InvalidSetting(f"nothing to edit: {report}")
    return facts


def facts_that_fit(lm: "LM", facts: Facts, on_error: "OnError" = "stop") -> Facts:
    """Return the facts whose prompts and new answers the model can read at once.

    Args:
        on_error: `stop` refuses the first that is too long; `skip` leaves such facts out, with a warning.

    Raises:
        UnusableRow: a fact is too long, and `on_error="stop"`.
        InvalidSetting: nothing is left to edit.
    """
    too_long: dict[str, str] = {}
    for case in facts.cases:
        try:
            for edit in case.edits:
                lm.check_edit_length(edit)
        except InvalidEdit as error:
            if on_error == "stop":
                raise unusable_row(str(error)) from None
            too_long[case.id] = str(error)
    if not too_long:
        return facts
    shown = "; ".join(list(too_long.values())[:3]) + (" and more" if len(too_long) > 3 else "")
    if len(too_long) == len(facts.cases):
        raise InvalidSetting(f"nothing to edit: all of it is too long for the model: {shown}")
    warnings.warn(f"left out {len(too_long)} that the model cannot read: {shown}", RetconWarning, stacklevel=2)
    kept = tuple(case for case in facts.cases if case.id not in too_long)
    about = f"{facts.about}; too long for the model: {len(too_long)}"
    return Facts(tuple(edit for case in kept for edit in case.edits), kept, about)
