"""Tidy records: one number each, one JSON object per line in files that are read and written at disk speed."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from retcon.atomic import write_atomically
from retcon.errors import MalformedFile
from retcon.evaluation.metrics.names import is_locality
from retcon.files import read_json_rows, require

SCHEMA = 1
"""Version of the record's columns."""

When = Literal["pre", "immediate", "checkpoint", "final"]
"""The unedited model (`pre`); right after the case's own edit (`immediate`); with all edits so far (`checkpoint`); with
all edits there are (`final`)."""
NO_TARGET = "no target"
"""Why a query that only asks for text is not scored."""
Status = Literal["ok", "skipped", "error"]

_CHUNK = 20_000  # lines parsed at a time


class Record(NamedTuple):
    """One number; what holds for the whole run is in `Evaluation.context`.

    A tuple, for there are hundreds of thousands of them; make it by keyword.
    """

    when: When
    case_id: str | None
    """None for what belongs to a whole run (perplexity, tasks)."""
    subject: str | None
    """Whom the case's first edit is about: the bootstrap draws cases by it."""
    axis: str | None
    query_id: str | None
    """The query's id; None where several queries were needed."""
    metric: str
    variant: str
    value: float | None
    """0 to 1 (magnitudes -1 to 1, fluency in bits, divergence in nats); None unless status is `ok`."""
    n: int
    """Target tokens (for `gen.*`, words written) that the value is the mean of."""
    status: Status = "ok"
    detail: str | None = None
    """Notes joined by "; ": `tie`, `contaminated`, `boundary_merge`, or the reason of a status that is not ok."""
    step: int = 0
    """Index of the unit or step after which this was measured."""

    def noted(self, note: str) -> bool:
        return self.detail is not None and note in self.detail.split("; ")


def passed(record: Record) -> bool | None:
    """Return whether what is wanted (on locality prompts: what was there) is the model's own choice, as the record
    says that decides its query; None for other records. A prompt that broke has failed."""
    if record.status == "skipped" or record.axis is None or record.query_id is None:
        return None
    deciding = ("ee.loc.argmax",) if is_locality(record.axis) else ("cf.all_correct", "zsre.seq")
    return (record.value or 0.0) >= 1 if record.variant in deciding else None


def whole_model_record(
    when: When, metric: str, variant: str, value: float | None, n: int, step: int, detail: str | None = None
) -> Record:
    """Return the record of a number that belongs to no case; NaN and infinity are errors, None was left out."""
    finite = value is None or math.isfinite(value)
    return Record(
        when=when,
        case_id=None,
        subject=None,
        axis=None,
        query_id=None,
        metric=metric,
        variant=variant,
        value=value if finite else None,
        n=n,
        status="skipped" if value is None else "ok" if finite else "error",
        detail=detail if finite else f"{variant} is {value}",
        step=step,
    )


_OWN = Record._fields
_FIRST = '"when":'
_Part = tuple[int, list[dict[str, Any]], dict[str, Any] | None]
"""Number of the first row, rows, their context where it is known to be the same for all of them."""


def encode_records(records: Iterable[Record], context: Mapping[str, Any]) -> bytes:
    """Return lines of JSON, the schema's version and the context in front of each."""
    head = json.dumps({"schema": SCHEMA, **context}, ensure_ascii=False, allow_nan=False)[:-1]
    text: dict[Any, str] = {}  # what repeats is turned into JSON once

    def shown(value: Any) -> str:
        if value not in text:
            text[value] = json.dumps(value, ensure_ascii=False)
        return text[value]

    lines = []
    for r in records:
        value = r.value
        if value is None:
            number = "null"
        elif value - value == 0:
            number = repr(float(value))
        else:
            raise ValueError(f"case {r.case_id!r}, {r.metric} {r.variant}: {value} is no JSON; record it as an error")
        lines.append(
            f'{head}, {_FIRST} "{r.when}", "case_id": {shown(r.case_id)}, "subject": {shown(r.subject)}, '
            f'"axis": {shown(r.axis)}, "query_id": {shown(r.query_id)}, "metric": {shown(r.metric)}, '
            f'"variant": {shown(r.variant)}, "value": {number}, "n": {r.n}, "status": "{r.status}", '
            f'"detail": {shown(r.detail)}, "step": {r.step}}}\n'
        )
    return "".join(lines).encode()


def write_records(path: str | os.PathLike[str], records: Iterable[Record], context: Mapping[str, Any]) -> None:
    """Write `encode_records` so that a crash leaves the old file or the new one."""
    write_atomically(path, encode_records(records, context))


def read_records(path: str | os.PathLike[str]) -> tuple[list[Record], dict[str, Any]]:
    """Read records as `write_records` wrote them, and their context.

    Raises:
        MalformedFile: a column is missing or of another type, or the records are of another schema or of several runs.
    """
    return _read(_parts(path), path)


def parse_records(data: bytes, path: str | os.PathLike[str]) -> list[Record]:
    """Return the records that `encode_records` encoded, which lie in the file of that path.

    Raises:
        MalformedFile: as `read_records`.
    """
    return _read(_parts_of(data.decode().split("\n"), path), path)[0]


def _read(parts: Iterator[_Part], path: str | os.PathLike[str]) -> tuple[list[Record], dict[str, Any]]:
    records: list[Record] = []
    context: dict[str, Any] | None = None
    keep = _Same()
    for number, rows, shared in parts:
        for offset, row in enumerate(rows[:1] if shared is not None else rows):
            where = f"{path}, row {number + offset}"
            own = shared if shared is not None else {k: v for k, v in row.items() if k not in _OWN}
            if require(own, "schema", int, where) != SCHEMA:
                raise MalformedFile(f"{where}: schema {own['schema']}, this version reads {SCHEMA}")
            if context is not None and own != context:
                differing = ", ".join(sorted(k for k in own | context if own.get(k) != context.get(k)))
                raise MalformedFile(
                    f"{where}: of another run than the rows above ({differing}); one file holds one run"
                )
            context = own
        records += _records_from(rows, number, path, keep)
    found = dict(context or {})
    found.pop("schema", None)
    return records, found


class _Same(dict[Any, Any]):
    """Equal texts, kept once."""

    def __missing__(self, value: Any) -> Any:
        self[value] = value
        return value


def _parts(path: str | os.PathLike[str]) -> Iterator[_Part]:
    try:
        lines = Path(path).read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError):
        lines = []
    if not lines or _FIRST not in lines[0]:  # not as we write it: a JSON list, other columns first, or no such file
        for number, row in read_json_rows(path):
            yield number, [row], None
        return
    yield from _parts_of(lines, path)


def _parts_of(lines: list[str], path: str | os.PathLike[str]) -> Iterator[_Part]:
    head = lines[0].partition(_FIRST)[0]
    while lines and not lines[-1]:
        lines.pop()
    shared = _parsed(head.rstrip(", ") + "}", path, 1)
    rest = len(head)
    for start in range(0, len(lines), _CHUNK):
        part = lines[start : start + _CHUNK]
        if all(line.startswith(head) for line in part):
            with suppress(json.JSONDecodeError):
                rows = json.loads("[{" + ",{".join([line[rest:] for line in part]) + "]")
                if len(rows) == len(part):
                    yield start + 1, rows, shared
                    continue
        for number, line in enumerate(part, start + 1):
            yield number, [_parsed(line, path, number)], None


def _parsed(line: str, path: str | os.PathLike[str], number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise MalformedFile(f"{path}, row {number}: not valid JSON ({error.msg})") from None


_REQUIRED = tuple(name for name in _OWN if name not in Record._field_defaults)
_WHENS, _STATUSES = get_args(When), get_args(Status)
_KINDS: dict[str, set[type]] = {
    **{name: {str} for name in ("when", "metric", "variant", "status")},
    **{name: {str, type(None)} for name in ("case_id", "subject", "axis", "query_id", "detail")},
    **{name: {int} for name in ("n", "step")},
    "value": {float, int, type(None)},
}


def _records_from(
    rows: list[dict[str, Any]], first: int, path: str | os.PathLike[str], keep: _Same
) -> Iterable[Record]:
    """Return rows as records, checked a column at a time."""
    try:
        table = list(map(itemgetter(*_OWN), rows))
    except KeyError:  # a column is missing: an error, or one that has a default
        for offset, row in enumerate(rows):
            for name in _REQUIRED:
                require(row, name, object, f"{path}, row {first + offset}")
        table = [tuple(row.get(name, Record._field_defaults.get(name)) for name in _OWN) for row in rows]
    columns = dict(zip(_OWN, zip(*table, strict=True), strict=True))
    known = {"when": _WHENS, "status": _STATUSES}
    if any(set(map(type, columns[name])) - kinds for name, kinds in _KINDS.items()) or any(
        set(columns[name]) - set(names) for name, names in known.items()
    ):
        for offset, values in enumerate(table):
            _check(dict(zip(_OWN, values, strict=True)), f"{path}, row {first + offset}")
    texts = [name for name, kinds in _KINDS.items() if str in kinds]
    columns |= {name: tuple(map(keep.__getitem__, columns[name])) for name in texts}
    return map(Record._make, zip(*(columns[name] for name in _OWN), strict=True))


def _check(row: Mapping[str, Any], where: str) -> None:
    for name, names in (("when", _WHENS), ("status", _STATUSES)):
        if row[name] not in names:
            raise MalformedFile(f"{where}: field {name!r} must be {' or '.join(names)}, found {row[name]!r}")
    for name, kinds in _KINDS.items():
        if type(row[name]) not in kinds:
            wanted = "a number or null" if name == "value" else min(k.__name__ for k in kinds if k is not type(None))
            raise MalformedFile(f"{where}: field {name!r} must be {wanted}, found {row[name]!r:.60}")
