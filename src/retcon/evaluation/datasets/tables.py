"""Rows of a file, whatever it is: a JSON list, JSON lines, or a table (CSV, TSV)."""

import csv
import io
import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from retcon.errors import MalformedFile
from retcon.files import NumberedRow, read_json_rows, read_text
from retcon.plural import plural

ENDINGS = (".csv", ".tsv")
"""How the names of tables end; every other file is JSON."""
_LIKE_JSON = re.compile(r"\s*[\[{][\[{\s]*[\"'\u2018\u2019\u201c\u201d\u201e\u00ab]")
"""How a cell begins that is a list or an object, in JSON or in another notation: brackets, then a quote."""


def read_rows(path: str | os.PathLike[str], bad: list[tuple[int, str]] | None = None) -> list[NumberedRow]:
    """Return (row number, object) of a file; a table's rows are numbered as a spreadsheet does, its header being row 1.

    A table's cells are text, empty ones None; `with_lists` reads what they hold.

    Args:
        bad: gets (row number, what is wrong) of the rows that cannot be read; None refuses the file for the first.

    Raises:
        MalformedFile: the file, or one of its rows, cannot be read.
    """
    if not is_table(path):
        return read_json_rows(path, bad)
    text = read_text(path)
    head = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    delimiter = "\t" if str(path).lower().endswith(".tsv") else max(",;\t", key=head.count)
    # a space before the quotes of a cell is no text of it; quoted cells are passed over whole
    text = re.sub(rf'(^|[\r\n{delimiter}]) *((?:"[^"]*")+)(?= *(?:[\r\n{delimiter}]|$))', r"\1\2", text)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[NumberedRow] = []
    names: list[str] = []
    number = 0
    longest_cell = csv.field_size_limit(len(text) + 1)
    try:
        for cells in lines:
            number += 1
            while len(cells) > len(names) and not cells[-1].strip():
                cells.pop()
            if not any(cell.strip() for cell in cells):
                continue
            if not names and cells == ["sep="]:  # Excel's note of the delimiter, which it does not show as a row
                number -= 1
                continue
            if not names:
                names = _names(path, cells)
            elif len(cells) > len(names):
                under = f"{len(cells)} cells under {plural(len(names), 'column')}"
                problem = f"{under}; put quotes around text that holds {delimiter!r}"
                if bad is None:
                    raise MalformedFile(f"{path}, row {number}: {problem}")
                bad.append((number, problem))
            else:
                cells += [""] * (len(names) - len(cells))
                rows.append((number, {n: _cell(n, cell) for n, cell in zip(names, cells, strict=True)}))
    except csv.Error as error:
        raise MalformedFile(
            f"{path}, row {number + 1}: not a valid table ({error}); a quote inside a quoted cell is written twice"
        ) from None
    finally:
        csv.field_size_limit(longest_cell)
    if not rows and not bad:
        raise MalformedFile(f"{path}: holds no rows below its header")
    return rows


def _names(path: str | os.PathLike[str], cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((n for n in names if names.count(n) > 1), None)
    if "" in names:
        raise MalformedFile(f"{path}, row 1: column {names.index('') + 1} has no name; the first row names the columns")
    if twice is not None:
        raise MalformedFile(f"{path}, row 1: two columns are called {twice!r}")
    return names


def _cell(name: str, text: str) -> str | None:
    """Return None for an empty cell; whitespace fills none but a separator's."""
    return text if text.strip() or (text and name == "separator") else None


def is_table(path: str | os.PathLike[str]) -> bool:
    return str(path).lower().endswith(ENDINGS)


def with_lists(record: Mapping[str, Any], columns: Collection[str], where: str) -> dict[str, Any]:
    """Return a table's row with the lists, the objects and the truth values that the cells of `columns` hold as JSON.

    Raises:
        MalformedFile: a cell that is a list of texts or an object in another notation; `where` names file and row.
    """
    return {name: _opened(name, cell, where) if name in columns else cell for name, cell in record.items()}


def json_or_text(cell: str | None) -> Any:
    """Return the list or object that a cell holds as JSON, else the cell."""
    if cell is None or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell)
    except (RecursionError, ValueError):
        return cell


def _opened(name: str, cell: str | None, where: str) -> Any:
    if name == "chat" and cell and cell.strip().lower() in ("true", "false"):  # as a spreadsheet writes them
        return cell.strip().lower() == "true"
    found = json_or_text(cell)
    if isinstance(found, str) and _is_meant_as_json(found):
        raise MalformedFile(
            f"{where}: column {name!r} holds {found:.60}, which begins like a list or an object and is no JSON; write "
            "it as JSON, with straight double quotes"
        )
    return found


def _is_meant_as_json(cell: str) -> bool:
    """Return whether a cell is a list or an object in another notation, or cut off: no text goes on after it."""
    end = "]" if cell.lstrip().startswith("[") else "}"
    return _LIKE_JSON.match(cell) is not None and (end not in cell or cell.rstrip().rstrip(",;").endswith(end))
