"""Facts from a file: the edits to make and the cases that measure them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retcon.chat import Chat
from retcon.edits import Case, Edit, in_chat
from retcon.errors import InvalidSetting, RetconWarning

Conflicts = Literal["error", "drop", "last"]
OnError = Literal["stop", "skip"]
CaseTarget = Literal["new", "alt"]


@dataclass(frozen=True)
class Facts:
    """The edits of a file, and the cases that measure them."""

    edits: tuple[Edit, ...]
    cases: tuple[Case, ...]
    about: str
    """One line: the file, its format, how many facts were read and left out."""


def read_facts(
    path: str | Path,
    *,
    start: int = 0,
    limit: int | None = None,
    conflicts: Conflicts = "error",
    file_format: str | None = None,
    on_error: OnError = "stop",
    case_target: CaseTarget = "new",
    chat: Chat | None = None,
) -> Facts:
    """Facts from a file of any format; what was left out, and fields that nobody knows, are warned of.

    Args:
        case_target: `alt` takes the rows' alternative answers, their field `alt`, as the new ones.
        chat: puts all prompts as turns of a chat; None: as the file has them.

    Raises:
        MalformedFile, ConflictingEdits: the message names file, row and field.
        InvalidSetting: nothing is left to edit.
    """
    from retcon.evaluation import read_cases

    cases, report = read_cases(
        path,
        file_format,  # type: ignore[arg-type]  # an unknown one is refused by name
        start=start,
        limit=limit,
        conflicts=conflicts,
        on_error=on_error,
        case_target=case_target,
    )
    for hint in report.hints():
        warnings.warn(f"{path}: {hint}; kept, and not used", RetconWarning, stacklevel=2)
    if report.refused:
        warnings.warn(f"{path}: left out {report.refusals()}", RetconWarning, stacklevel=2)
    if chat is not None:
        cases = in_chat(cases, chat)
    facts = Facts(tuple(e for c in cases for e in c.edits), tuple(cases), report.summary())
    if not facts.edits:
        raise InvalidSetting(f"nothing to edit: {report}")
    return facts
