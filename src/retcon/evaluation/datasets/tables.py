"""Rows of a file, whatever it is: a JSON list, JSON lines, or a table (CSV, TSV)."""

import csv
import io
import json
import os
from typing import Any

from retcon.errors import MalformedFile
from retcon.files import NumberedRow, read_json_rows, read_text

ENDINGS = (".csv", ".tsv")
"""How the names of tables end; every other file is JSON."""
NESTED = ("chat", "paraphrases", "neighbors", "neighbours", "portability", "locality", "queries", "answers")
"""Columns whose cells may hold JSON, for a list or an object in a single cell."""


def read_rows(path: str | os.PathLike[str], bad: list[tuple[int, str]] | None = None) -> list[NumberedRow]:
    """(row number, object) of a file; a table's rows are numbered as a spreadsheet does, its header being row 1.

    Args:
        bad: gets (row number, what is wrong) of the rows that cannot be read; None refuses the file for the first.

    Raises:
        MalformedFile: the file, or one of its rows, cannot be read.
    """
    if not str(path).lower().endswith(ENDINGS):
        return read_json_rows(path, bad)
    text = read_text(path)
    head = text.lstrip().split("\n", 1)[0]
    delimiter = "\t" if str(path).lower().endswith(".tsv") else max(",;\t", key=head.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[NumberedRow] = []
    names: list[str] = []
    number = 0
    longest_cell = csv.field_size_limit(len(text) + 1)
    try:
        for cells in lines:
            number += 1
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = _names(path, cells)
            elif len(cells) > len(names):
                problem = (
                    f"{len(cells)} cells under {len(names)} columns; put quotes around text that holds {delimiter!r}"
                )
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


def _cell(name: str, text: str) -> Any:
    """None for an empty cell; the list, object or truth value where one may be and is."""
    if not text.strip():
        return None
    if name == "chat" and text.strip().lower() in ("true", "false"):  # as a spreadsheet writes them
        return text.strip().lower() == "true"
    if name in NESTED and text.lstrip()[0] in "[{":
        try:
            return json.loads(text)
        except (RecursionError, ValueError):
            return text
    return text
