"""Facts that were pasted into the page."""

from pathlib import Path
from tempfile import TemporaryDirectory

from retcon.edits import MARKER, Case, Edit, Query
from retcon.errors import InvalidEdit, InvalidSetting, RetconError
from retcon.evaluation import read_cases
from retcon.plural import plural

MAX_DRAFT = 2**22
"""Characters of pasted facts."""
_NO_SUBJECT = "the prompt has a {} for the subject, and none is given; name it, or write the prompt without {}"


def pasted_cases(text: str) -> tuple[list[Case], list[str]]:
    """Read JSON lines, a JSON list, CSV, or lines `prompt | subject | answer`.

    Returns:
        The cases, and what was left out or not understood.

    Raises:
        RetconError: the text cannot be read; the message calls it "the facts".
    """
    if len(text) > MAX_DRAFT:
        raise InvalidSetting(f"{len(text):,} characters of facts; put that many into a file (retcon edit)")
    rows = text.strip()
    if not rows:
        raise InvalidSetting("no facts were given")
    is_json = rows[0] == "[" or (rows[0] == "{" and rows[1:].lstrip().startswith('"'))  # not a prompt's {}
    if not is_json and "|" in rows.splitlines()[0]:
        return [_from_line(line, i) for i, line in enumerate(rows.splitlines(), 1) if line.strip()], []
    suffix = ".jsonl" if is_json else ".csv"
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"pasted{suffix}"
        path.write_text(rows + "\n", encoding="utf-8")
        try:
            cases, report = read_cases(path, conflicts="error")
        except RetconError as error:
            error.on_page = error.on_page.replace(str(path), "the facts")
            raise
    for case in [] if is_json else cases:  # JSON says null for no subject, and then {} is text
        if any(edit.subject is None and MARKER in edit.prompt for edit in case.edits):
            raise InvalidEdit(f"the facts, row {case.meta['row'] + 2}: {_NO_SUBJECT}")  # the first row is the header
    return cases, report.losses() + report.hints()


def _from_line(line: str, number: int) -> Case:
    """Read a fact from `prompt | subject | answer`."""
    parts = [part.strip() for part in line.split("|")]
    if len(parts) != 3:
        raise InvalidSetting(f"line {number}: expected prompt | subject | answer, found {plural(len(parts), 'part')}")
    if MARKER in parts[0] and not parts[1]:
        raise InvalidEdit(f"line {number}: {_NO_SUBJECT}")
    try:
        edit = Edit(parts[0], parts[1] or None, parts[2])
    except InvalidEdit as error:
        raise InvalidEdit(f"line {number}: {error}") from None
    return Case(edit.id, (edit,), (Query("rewrite/0", "rewrite", edit.text, edit.target_new),))
