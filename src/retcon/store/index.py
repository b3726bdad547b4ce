"""What a store's facts say, in SQLite: quick to ask, never the truth, made again wherever the files have changed."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from threading import Lock
from typing import Any, NamedTuple

from retcon.edits import Case, case_from, case_record, same_question
from retcon.errors import InvalidEdit, MalformedFile
from retcon.store.history import json_lines

INDEX, FACTS = "index.sqlite", "facts"
VERSION = 2


class Line(NamedTuple):
    """One line of a file of facts: where it is, and enough of it to be listed. A tuple, for there can be many."""

    entry: str
    number: int
    fact: str
    delta: str
    prompt: str
    subject: str
    target: str
    questions: str
    """What its edits ask (`same_question`), one a line."""


class Index:
    """The facts of a store by entry and by name. Many may read it; who writes waits for the others."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._turn = Lock()  # the page asks from several threads
        self.connection = self._open()

    def _open(self) -> sqlite3.Connection:
        path = self.root / INDEX
        for again in (False, True):
            try:
                connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
                connection.execute("PRAGMA journal_mode=WAL")
                if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                    connection.executescript(f"DROP TABLE IF EXISTS files; DROP TABLE IF EXISTS facts;{_TABLES}")
                connection.execute("SELECT count(*) FROM facts").fetchone()
                return connection
            except sqlite3.DatabaseError as error:
                with suppress(sqlite3.Error, UnboundLocalError):
                    connection.close()
                if again or error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    break
                for name in (INDEX, f"{INDEX}-wal", f"{INDEX}-shm"):  # damaged: it is made again from the files
                    with suppress(OSError):
                        (self.root / name).unlink(missing_ok=True)
        # another process is long at it, or the disk cannot be written to
        memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        memory.executescript(_TABLES)
        return memory

    def _sync(self) -> None:
        """Read the files of facts that are new or have changed, by whichever process."""
        with self._turn:
            known = {name: (size, time) for name, size, time in self.connection.execute("SELECT * FROM files")}
            there = {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in (self.root / FACTS).glob("*.jsonl")}
            changed = sorted(name for name in known.keys() | there.keys() if known.get(name) != there.get(name))
            if not changed:
                return
            rows = {name: list(_lines(self.root / FACTS / name)) for name in changed if name in there}
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                for name in changed:
                    self.connection.execute("DELETE FROM facts WHERE entry = ?", (Path(name).stem,))
                    self.connection.execute("DELETE FROM files WHERE name = ?", (name,))
                    if name in there:
                        self.connection.executemany("INSERT INTO facts VALUES (?,?,?,?,?,?,?,?,?)", rows[name])
                        self.connection.execute("INSERT INTO files VALUES (?,?,?)", (name, *there[name]))
                self.connection.execute("COMMIT")
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def by_entry(self, fact: str | None = None) -> dict[str, list[Line]]:
        """Return all lines, those of each file in order; of one fact alone where it is named."""
        found: dict[str, list[Line]] = {}
        for line in self._found("ORDER BY entry, number") if fact is None else self.of_fact(fact):
            found.setdefault(line.entry, []).append(line)
        return found

    def of_entry(self, entry: str) -> list[Line]:
        """Return the lines of one file, in order."""
        return self._found("WHERE entry = ? ORDER BY number", entry)

    def of_fact(self, fact: str) -> list[Line]:
        """Return the lines of one fact, in whatever entry: by its id, or that of one of its edits."""
        return self._found("WHERE fact = ? ORDER BY entry, number", fact)

    def _found(self, which: str, *values: str) -> list[Line]:
        self._sync()
        return [Line(*row) for row in self.connection.execute(f"SELECT {_SHOWN} FROM facts {which}", values)]

    def counts(self) -> dict[str, int]:
        """Count the lines of each entry."""
        self._sync()
        return dict(self.connection.execute("SELECT entry, count(*) FROM facts GROUP BY entry"))

    def case(self, line: Line) -> Case:
        """Return the fact of a line, with its checks."""
        row = self.connection.execute(
            "SELECT record FROM facts WHERE entry = ? AND number = ?", (line.entry, line.number)
        ).fetchone()
        return _case(json.loads(row[0]), f"{self.root / FACTS / line.entry}.jsonl, line {line.number}")


_TABLES = f"""
CREATE TABLE files (name TEXT PRIMARY KEY, size INTEGER, time INTEGER);
CREATE TABLE facts (entry TEXT, number INTEGER, fact TEXT, delta TEXT, prompt TEXT, subject TEXT, target TEXT,
    questions TEXT, record TEXT, PRIMARY KEY (entry, number));
CREATE INDEX by_fact ON facts (fact);
PRAGMA user_version = {VERSION};
"""
_SHOWN = "entry, number, fact, delta, prompt, subject, target, questions"


def _lines(path: Path) -> Iterator[tuple[Any, ...]]:
    seen: dict[str, int] = {}
    for number, record in json_lines(path):
        where = f"{path}, line {number}"
        case = _case(record, where)
        if not case.edits:
            raise MalformedFile(f"{where}: a fact without an edit")
        if case.id in seen:
            raise MalformedFile(
                f"{where}: fact {case.id!r} is on line {seen[case.id]} already; take one of the two out"
            )
        seen[case.id] = number
        edit = case.edits[0]
        yield (
            *(path.stem, number, case.id, record["delta"], edit.text, edit.subject or ""),
            "; ".join(e.target_new for e in case.edits),
            "\n".join("\t".join(same_question(e)) for e in case.edits),
            json.dumps(record, ensure_ascii=False),
        )


def _case(record: dict[str, Any], where: str) -> Case:
    if not isinstance(record.get("delta"), str):
        raise MalformedFile(f"{where}: field 'delta' is missing; which delta holds the fact?")
    return case_from({k: v for k, v in record.items() if k != "delta"}, where)


def clashes(lines: Iterable[Line]) -> Iterator[tuple[Line, Line]]:
    """Yield every fact that has the id of an earlier one, or answers the same question, after that one."""
    ids: dict[str, Line] = {}
    questions: dict[str, Line] = {}
    for line in lines:
        asked = line.questions.split("\n")
        earlier = next(filter(None, (ids.get(line.fact), *map(questions.get, asked))), None)
        if earlier is not None:
            yield earlier, line
        ids.setdefault(line.fact, line)
        for question in asked:
            questions.setdefault(question, line)


def two_answers(one: Line, other: Line) -> str:
    """Return what to say of two facts in force that clash."""
    return (
        f"fact {one.fact!r} of entry {one.entry} ({one.target!r}) and fact {other.fact!r} of entry {other.entry} "
        f"({other.target!r}) are both in force and answer {one.prompt!r}; were two branches merged? Take one back: "
        f"retcon revert --fact {quote(other.fact)}, or a whole entry"
    )


def fact_line(case: Case, delta: str) -> str:
    """Return a fact as its file has it: one line."""
    return json.dumps({"delta": delta, **case_record(case)}, ensure_ascii=False)


def with_target(case: Case, target: str) -> Case:
    """Return the fact with another answer, in its edit and in its checks.

    Checks whose answers followed from the old one (portability, two hops) are left out: what follows now is not known.

    Raises:
        InvalidEdit: the fact consists of several edits, so one target does not say what each becomes.
    """
    from retcon.evaluation.metrics import is_locality, prompt_kind

    target = target.strip()
    if len(case.edits) != 1:
        raise InvalidEdit(f"fact {case.id!r} consists of {len(case.edits)} edits; revert it and edit it anew")
    queries = []
    for query in case.queries:
        if prompt_kind(query.axis) in ("own", "paraphrase"):
            queries.append(replace(query, target=target, answers=((target,),) if query.answers else ()))
        elif is_locality(query.axis):
            queries.append(query if query.contrast is None else replace(query, contrast=target))
    return replace(case, edits=(replace(case.edits[0], target_new=target),), queries=tuple(queries))
