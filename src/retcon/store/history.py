"""What a store's log says: entries, and the state after each of them.

Every entry sets slots. A slot is the place of one delta in the order of application, named by the delta that opened it;
its content is that delta, a later version of it (written again without a fact), or nothing (reverted).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from retcon.errors import MalformedFile, UnknownEntry
from retcon.plural import plural

Action = Literal["edit", "revert", "restore", "amend", "gc"]
MERGE_MARKS = ("<<<<<<<", "=======", ">>>>>>>", "|||||||")
MIN_PREFIX = 4
"""Characters of an id that are enough where they name one thing."""


@dataclass(frozen=True)
class Entry:
    """One line of the log."""

    id: str
    time: str
    """UTC, ISO 8601."""
    action: Action
    message: str
    after: str | None
    """The entry that was the last one then. Where two branches were merged, another one may come before it now."""
    sets: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    """By slot: the delta that was there, and the one that is there from now on."""
    drops: tuple[str, ...] = ()
    """Facts that the deltas written again no longer hold."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Method, corpus, sizes, files removed: whatever else is worth knowing."""

    @classmethod
    def make(cls, action: Action, message: str, *, time: str, after: str | None, **parts: Any) -> "Entry":
        """Return an entry with the id that follows from its content."""
        content = cls("", time, action, message, after, **parts)
        digest = hashlib.sha256(json.dumps(asdict(content), sort_keys=True).encode()).hexdigest()
        return cls(digest[:12], time, action, message, after, **parts)

    @property
    def line(self) -> str:
        """The entry as the log has it."""
        return json.dumps({k: v for k, v in asdict(self).items() if v or k == "after"}, ensure_ascii=False)


@dataclass(frozen=True)
class State:
    """Which deltas are in force, in order of application."""

    base: str
    slots: Mapping[str, str | None]
    """The delta in each slot, in the order in which slots were opened."""

    @property
    def deltas(self) -> tuple[str, ...]:
        """Ids of the deltas in force."""
        return tuple(delta for delta in self.slots.values() if delta is not None)

    @property
    def id(self) -> str:
        """A hash of base and deltas: two states of one id are the same weights."""
        return hashlib.sha256(json.dumps([self.base, *self.deltas]).encode()).hexdigest()[:16]

    def slot_of(self, delta: str) -> str:
        """Return the slot that holds a delta.

        Raises:
            UnknownEntry: none does.
        """
        for slot, held in self.slots.items():
            if held == delta:
                return slot
        raise UnknownEntry(f"delta {delta} is not in force in this state")

    def later(self, slots: Iterable[str]) -> tuple[str, ...]:
        """Return the slots in force that come after the first of these."""
        wanted, order = set(slots), list(self.slots)
        first = min((order.index(slot) for slot in wanted), default=len(order))
        return tuple(s for s in order[first:] if s not in wanted and self.slots[s] is not None)


def read_log(path: Path) -> tuple[Entry, ...]:
    """Return the entries of a log, oldest first.

    Raises:
        MalformedFile: a line that is no entry, merge marks, or an entry that is there twice.
    """
    entries: dict[str, Entry] = {}
    for number, record in json_lines(path):
        where = f"{path}, line {number}"
        try:
            sets = {slot: (pair[0], pair[1]) for slot, pair in record.pop("sets", {}).items()}
            entry = Entry(
                id=record.pop("id"),
                time=record.pop("time"),
                action=record.pop("action"),
                message=record.pop("message", ""),
                after=record.pop("after"),
                sets=sets,
                drops=tuple(record.pop("drops", ())),
                about=record.pop("about", {}),
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise MalformedFile(f"{where}: not an entry of a store ({error!r})") from None
        if entry.action not in get_args(Action):
            raise MalformedFile(f"{where}: unknown action {entry.action!r}; was it written by a later retcon?")
        if record:
            unknown = f"{plural(len(record), 'unknown field')} ({', '.join(record)})"
            raise MalformedFile(f"{where}: {unknown}; was it written by a later retcon?")
        if entry.id in entries:
            raise MalformedFile(f"{where}: entry {entry.id} is there twice; take one of the two lines out")
        entries[entry.id] = entry
    return tuple(entries.values())


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a file of JSON lines; none where there is no file.

    Raises:
        MalformedFile: merge marks, or a line that is no object.
    """
    if not path.is_file():
        return
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFile(f"{path}: not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if line.startswith(MERGE_MARKS):
            raise MalformedFile(
                f"{path}, line {number}: holds the marks of a merge that was not finished ({line[:20]!r}); keep the "
                "lines that shall stay, and take the marks out"
            )
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MalformedFile(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise MalformedFile(f"{path}, line {number}: expected an object, found {type(record).__name__}")
        yield number, record


def states(base: str, entries: Sequence[Entry], where: Path) -> list[State]:
    """Return the state before the first entry and after each.

    Raises:
        MalformedFile: two merged branches have changed the same delta, or the entry that made one is missing.
    """
    slots: dict[str, str | None] = {}
    last: dict[str, str] = {}
    found = [State(base, {})]
    for entry in entries:
        for slot, (before, now) in entry.sets.items():
            if slot not in slots and before is not None:
                raise MalformedFile(
                    f"{where}: entry {entry.id} changes delta {slot}, and no line before it has made that one; put the "
                    "entry that did back, above it (git has it), or take this line out"
                )
            if slots.get(slot) != before:
                raise MalformedFile(
                    f"{where}: entries {last[slot]} and {entry.id} both change delta {slot}, which "
                    f"entry {entry.id} expects as {before or 'reverted'}; two branches were merged that do so. Take "
                    "the line of one of them out, and do it again"
                )
            slots[slot] = now
            last[slot] = entry.id
        found.append(State(base, dict(slots)))
    return found


def in_force_since(start: State, entries: Sequence[Entry]) -> list[tuple[Entry, State]]:
    """Return those of the entries after a state whose changes are in force, oldest first, each with its state.

    What was taken back since is left out, and so is what took it back: a slot goes from what it holds at the start to
    what it holds in the end without coming by anything twice. The last state is the one after all entries.
    """
    slots = dict(start.slots)
    course: dict[str, list[tuple[int, str | None]]] = {}
    for place, entry in enumerate(entries):
        for slot, (_, now) in entry.sets.items():
            course.setdefault(slot, [(-1, slots.setdefault(slot, None))]).append((place, now))
    kept: list[dict[str, str | None]] = [{} for _ in entries]
    for slot, steps in course.items():
        held = [delta for _, delta in steps]
        step = held.index(held[-1])
        while step:
            kept[steps[step][0]][slot] = held[step]
            step = held.index(held[step - 1])
    found = []
    for entry, sets in zip(entries, kept, strict=True):
        if sets:
            slots |= sets
            found.append((entry, State(start.base, dict(slots))))
    return found


def one_named(name: str, known: Iterable[str], what: str) -> str:
    """Return the one of `known` that `name` is, or begins.

    Raises:
        UnknownEntry: none or several are; the message names them.
    """
    names = list(dict.fromkeys(known))
    if name in names:
        return name
    close = [n for n in names if n.startswith(name)] if len(name) >= MIN_PREFIX else []
    if len(close) == 1:
        return close[0]
    if close:
        raise UnknownEntry(f"{name!r} is the beginning of several {what}s: {', '.join(close[:5])}")
    hint = f"; the last one is {names[-1]}" if names else "; there is none yet"
    raise UnknownEntry(f"no {what} {name!r} in this store{hint}")
