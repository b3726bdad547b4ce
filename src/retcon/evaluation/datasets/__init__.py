"""Files of facts as cases: `read_cases` reads every known format and returns `(cases, LoadReport)`.

What is unusual about a row is flagged in `case.meta["flags"]`, and the report counts it. Text that a model will read is
kept byte for byte, but for whitespace at the end of prompts and around targets.
"""

import os
from collections import Counter

from retcon.arguments import check_choice
from retcon.edits import ConflictRule
from retcon.errors import InvalidSetting, MalformedFile
from retcon.evaluation.datasets import hub
from retcon.evaluation.datasets.formats import CHOICES, FORMATS, check_case_target, likely_fields, reader, recognise
from retcon.evaluation.datasets.mquake import Prompting
from retcon.evaluation.datasets.own import embedded, without_partial_rivals
from retcon.evaluation.datasets.report import LeftOut, LoadReport
from retcon.evaluation.datasets.rows import (
    Answers,
    CaseTarget,
    FormatName,
    Loaded,
    OnError,
    Options,
    Order,
    contaminated,
    finish,
    read_drafts,
    sha256_of_rows,
)
from retcon.evaluation.datasets.tables import is_table, json_or_text, read_rows
from retcon.evaluation.datasets.zsre import PromptStyle
from retcon.files import NumberedRow

__all__ = [
    "FORMATS",
    "Answers",
    "CaseTarget",
    "FormatName",
    "LeftOut",
    "LoadReport",
    "Loaded",
    "OnError",
    "Order",
    "PromptStyle",
    "Prompting",
    "contaminated",
    "read_cases",
]

WORLD = "world"
"""Names the embedded world where a path is expected."""


def read_cases(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    start: int = 0,
    limit: int | None = None,
    order: Order = "file",
    seed: int = 0,
    conflicts: ConflictRule = "drop",
    on_error: OnError = "stop",
    case_target: CaseTarget = "new",
    prompt_style: PromptStyle = "loc.nq_q",
    answers: Answers = "all",
    prompting: Prompting = "standard",
) -> Loaded:
    """Read a file of facts of any known format, a dataset on the hub, or the embedded world.

    Args:
        path: a file (JSON, JSON lines, CSV, TSV); `hub:owner/name/file.json` (or a short name of `datasets.hub.NAMED`
            after `hub:`); or `world`.
        format: None finds the format by all fields of the file; docs/data.md has an example of each. One of your own
            is "module:function", or a name that a package announces (`retcon.datasets`): the function takes a row, an
            object as it is in the file, and returns the fields of our own facts.
        start: rows to pass over.
        limit: rows to read; the cases may be fewer.
        order: `file`, or `shuffle`: rows in an order drawn by `seed`, of which `start` and `limit` then take a part.
        seed: of the shuffle, and of the embedded world's draw.
        conflicts: which rows to keep when some contradict each other (`retcon.edits.resolve_conflicts`).
        on_error: `stop` refuses the file for the first row that cannot be used; `skip` leaves such rows out, and the
            report lists them with the reason.
        case_target: `alt` writes the row's alternative answer, its field `alt`, in formats that have one.
        prompt_style: how zsRE's locality prompt is put; numbers differ between the styles.
        answers: KnowEdit's accepted answers, `all` strings or, as in EasyEdit's reader, the `first`.
        prompting: what precedes MQuAKE's questions.

    The last three are ignored for other formats.

    Raises:
        MalformedFile: no known format, or a file that cannot be read.
        UnusableRow: a row that is not what the format promises, and `on_error="stop"`.
        ConflictingEdits: rows contradict each other and `conflicts="error"`.
        InvalidSetting: a setting that does not exist, or that the format or the embedded world does not have.
    """
    own = dict(case_target=case_target, prompt_style=prompt_style, answers=answers, prompting=prompting)
    for name, known in CHOICES.items():
        check_choice(own[name], known, name)
    options = Options(start, limit, conflicts, on_error, order, seed)
    if str(path) == WORLD:
        _check_for_the_world(format, order, case_target)
        return embedded(options)
    bad: list[tuple[int, str]] = []
    rows = _rows(path, None if on_error == "stop" else bad)
    if bad and not rows:
        row, problem = bad[0]
        raise MalformedFile(f"{path}, row {row}: {problem}; no other row can be read either")
    table = is_table(path)
    guessed = [(n, {k: json_or_text(cell) for k, cell in row.items()}) for n, row in rows] if table else rows
    chosen = format or recognise(guessed, path)
    unknown: Counter[str] = Counter()
    parse, settings = reader(chosen, own, unknown, table=table)
    drafts = read_drafts(path, rows, bad, parse, chosen, options)
    if chosen not in FORMATS or chosen == "edits":
        without_partial_rivals(drafts)
    present = list(dict.fromkeys(name for _, record in rows for name in record))
    return finish(
        path,
        chosen,
        drafts,
        options,
        sha256_of_rows(path, rows),
        settings,
        dict(unknown),
        likely_fields(chosen, list(unknown), present),
    )


def _check_for_the_world(format: str | None, order: str, case_target: str) -> None:
    """Refuse what is said of files."""
    if format not in (None, WORLD):
        raise InvalidSetting(f"format {format!r}: the embedded world ({WORLD}) is no file; leave the format out")
    if order != "file":
        raise InvalidSetting(f"order {order!r}: the embedded world's cases are drawn by the seed; leave the order out")
    check_case_target(WORLD, case_target)


def _rows(path: str | os.PathLike[str], bad: list[tuple[int, str]] | None) -> list[NumberedRow]:
    address = str(path)
    if not address.startswith(hub.PREFIX):
        return read_rows(path, bad)
    return hub.read_hub_rows(hub.NAMED.get(address.removeprefix(hub.PREFIX), address), bad)
