"""What a store holds: its log, the states that follow from it, its facts and the files of its deltas."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retcon.edits import Case
from retcon.errors import DeltaNotApplied, MalformedFile, OtherParents, UnknownEntry, WrongBase
from retcon.files import found_from, read_text
from retcon.plural import plural
from retcon.store.history import Entry, State, one_named, read_log, states
from retcon.store.index import Index, Line
from retcon.store.journal import LOG, recover

if TYPE_CHECKING:
    from retcon.attachment import Attachment
    from retcon.lm.model import LM

FORMAT = "retcon-store-1"
CONFIG, DELTAS, VALUES = "store.json", "deltas", "values"
Precision = Literal["float32", "float16"]


class Contents:
    """The half of a `Store` that reads. It takes no lock: what another process is writing is not there yet."""

    def __init__(self, path: str | os.PathLike[str] = ".retcon") -> None:
        self.path = Path(path)
        config = self.path / CONFIG
        if not config.is_file():
            raise MalformedFile(f"{self.path}: holds no store; make one with `retcon init MODEL --store {self.path}`")
        try:
            record = json.loads(read_text(config))
            self.base: str = record["base"]
            """Fingerprint of the unedited model."""
            self.model: str = record["model"]
            """How the model was called when the store was made."""
            self.precision: Precision = record["precision"]
            """In which deltas are kept."""
            known = record["format"]
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedFile(f"{config}: not the description of a store ({error!r})") from None
        if known != FORMAT:
            raise MalformedFile(f"{config}: store format {known!r}, this version reads {FORMAT!r}")
        recover(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def __repr__(self) -> str:
        return f"Store({self.path}: {self.model}, {plural(len(self.log()), 'entry', 'entries')})"

    def log(self) -> tuple[Entry, ...]:
        """Return every entry, oldest first."""
        return read_log(self.path / LOG)

    def entry(self, name: str) -> Entry:
        """Return an entry by its id, the beginning of it, or `HEAD`, `HEAD~1`, ...

        Raises:
            UnknownEntry: there is none, or several begin so.
        """
        return _named(name, self.log())

    def state(self, at: str | None = None) -> State:
        """Return the deltas in force after an entry (`base`: before the first); now by default."""
        entries = self.log()
        found = states(self.base, entries, self.path / LOG)
        if at is None:
            return found[-1]
        if at == "base":
            return found[0]
        return found[1 + entries.index(_named(at, entries))]

    def history_of_states(self) -> list[tuple[Entry, State]]:
        """Return every entry, oldest first, with the state after it."""
        entries = self.log()
        return list(zip(entries, states(self.base, entries, self.path / LOG)[1:], strict=True))

    @cached_property
    def index(self) -> Index:
        """The facts, quick to ask."""
        return Index(self.path)

    def lines_by_delta(self, fact: str | None = None) -> dict[str, dict[str, Line]]:
        """Return the facts of every delta that ever was, by id, in order; one fact alone where it is named."""
        held: dict[str, dict[str, Line]] = {}
        by_entry = self.index.by_entry(fact)
        for entry in self.log():
            brought: dict[str, dict[str, Line]] = {}
            for line in by_entry.get(entry.id, ()):
                brought.setdefault(line.delta, {})[line.fact] = line
            for before, now in entry.sets.values():
                if now is None:
                    continue
                own = brought.get(now, {})
                if now in held and not own:  # back to what it was
                    continue
                if before is not None and before != now:
                    kept = {f: line for f, line in held.get(before, {}).items() if f not in entry.drops}
                    held[now] = {**kept, **own}
                else:
                    held[now] = own
        return held

    def facts(self, at: str | None = None) -> list[Line]:
        """Return the facts in force after an entry, in order of application."""
        return self._facts(at, self.lines_by_delta())

    def _facts(self, at: str | None, held: Mapping[str, Mapping[str, Line]]) -> list[Line]:
        return [line for delta in self.state(at).deltas for line in held.get(delta, {}).values()]

    def cases(self, at: str | None = None) -> list[Case]:
        """Return the facts in force after an entry, with their checks."""
        return [self.index.case(line) for line in self.facts(at)]

    def fact(self, name: str, at: str | None = None) -> tuple[Line, str]:
        """Return a fact that is in force, by its id or the beginning of it, and the delta that holds it.

        Raises:
            UnknownEntry: there is none; the message says whether it was reverted.
        """
        held = self.lines_by_delta()
        live = {f: (line, delta) for delta in self.state(at).deltas for f, line in held.get(delta, {}).items()}
        if name not in live and self.index.of_fact(name):
            raise UnknownEntry(f"fact {name!r} is no longer in force; it was reverted (retcon show {name})")
        return live[one_named(name, live, "fact")]

    def corpus_of(self, delta: str) -> str | None:
        """Return the text of the second moments that a delta in force was made with; None: the model's default."""
        named = self._written_by(delta).get("corpus")
        return None if named is None else found_from(named, self.path)

    def files_of(self, delta: str) -> dict[str, str]:
        """Return the settings that are files, of the method that made a delta in force, where they were given by paths
        from the root on: a delta's own record has their last parts."""
        return {name: found_from(path, self.path) for name, path in self._written_by(delta).get("files", {}).items()}

    def _written_by(self, delta: str) -> Mapping[str, Any]:
        """Return what is on record about the entry that first wrote the batch of a delta in force."""
        slot = self.state().slot_of(delta)
        return next((e.about for e in self.log() if slot in e.sets), {})

    def history(self, fact: str) -> list[tuple[Entry, Line | None]]:
        """Return the entries that changed a fact, oldest first, with what it was from then on; None: not in force."""
        if not self.index.of_fact(fact):
            return []
        held, found = self.lines_by_delta(fact), []
        entries = self.log()
        last: Line | None = None
        for entry, state in zip(entries, states(self.base, entries, self.path / LOG)[1:], strict=True):
            now = next((held[d][fact] for d in state.deltas if fact in held.get(d, {})), None)
            if now != last:
                found.append((entry, now))
            last = now
        return found

    def diff(self, a: str, b: str | None = None) -> tuple[list[Line], list[Line], list[tuple[Line, Line]]]:
        """Return the facts that came, went and changed from the state after one entry to that after another."""
        held = self.lines_by_delta()
        before = {line.fact: line for line in self._facts(a, held)}
        after = {line.fact: line for line in self._facts(b, held)}
        came = [line for fact, line in after.items() if fact not in before]
        went = [line for fact, line in before.items() if fact not in after]
        changed = [
            (before[fact], line)
            for fact, line in after.items()
            if fact in before and (before[fact].prompt, before[fact].target) != (line.prompt, line.target)
        ]
        return came, went, changed

    def delta(self, delta: str) -> "Attachment":
        """Read a delta.

        Raises:
            MalformedFile: its file is missing or damaged; the message says why it can be missing.
        """
        from retcon.attachment import load

        path = self.file(DELTAS, delta)
        found = load(path)
        if found.id != delta:
            raise MalformedFile(f"{path}: holds delta {found.id}; the file was renamed or put in another's place")
        return found

    def file(self, folder: str, delta: str) -> Path:
        """Return the file of a delta, or of its values.

        Raises:
            MalformedFile: it is missing; the message says why it can be.
        """
        path = self.path / folder / f"{delta}.safetensors"
        if not path.is_file():
            gone = [e for e in self.log() if f"{folder}/{path.name}" in e.about.get("removed", ())]
            why = (
                f"entry {gone[-1].id} (gc) removed it"
                if gone
                else "it was not committed to git, or not fetched; restore it from there"
            )
            raise MalformedFile(f"{path}: no such file; {why}")
        with open(path, "rb") as file:
            if file.read(24) == b"version https://git-lfs.":
                raise MalformedFile(f"{path}: a pointer of git-lfs, not the file itself; run `git lfs pull`")
        return path

    def file_size(self, delta: str) -> int:
        """Return the bytes of a delta's files, values included."""
        files = (self.path / folder / f"{delta}.safetensors" for folder in (DELTAS, VALUES))
        return sum(file.stat().st_size for file in files if file.is_file())

    def deltas(self, at: str | None = None) -> list["Attachment"]:
        """Return the deltas in force after an entry, in order of application."""
        return [self.delta(name) for name in self.state(at).deltas]

    def paths(self, at: str | None = None) -> list[Path]:
        """Return the files of these deltas."""
        return [self.file(DELTAS, name) for name in self.state(at).deltas]

    def check_base(self, lm: "LM") -> None:
        """Raise WrongBase where the store is of another model than this."""
        if lm.fingerprint() != self.base:
            raise WrongBase(
                f"{self.path} holds edits of {self.model} (fingerprint {self.base[:12]}), this is {lm.name!r} "
                f"(fingerprint {lm.fingerprint()[:12]}); load the model the store was made for"
            )

    def checkout(self, lm: "LM", at: str | State | None = None) -> State:
        """Bring the model to a state, or to that after an entry: its deltas, in order, and no others.

        Raises:
            WrongBase: the store is of another model.
            DeltaNotApplied: deltas are applied that are not the store's.
            MalformedFile: a delta is missing; the model is as it was.
        """
        self.check_base(lm)
        state, before = at if isinstance(at, State) else self.state(at), lm.applied
        own = {slot for entry in self.log() for pair in entry.sets.values() for slot in pair if slot}
        if foreign := [d.id for d in before if d.id not in own]:
            raise DeltaNotApplied(f"applied deltas are not the store's ({', '.join(foreign)}); revert them first")
        wanted = [self.delta(name) for name in state.deltas]
        with _other_parents_are_usual(), lm.scope():
            keep = 0
            while keep < min(len(before), len(wanted)) and before[keep] == wanted[keep]:
                keep += 1
            for delta in reversed(before[keep:]):
                lm.revert(delta)
            for delta in wanted[keep:]:
                lm.apply(delta)
        return state

    @contextmanager
    def at(self, lm: "LM", entry: str | State | None = None) -> Iterator[State]:
        """Put the model in a state, or in that after an entry, while the scope lasts."""
        before = lm.applied
        try:
            yield self.checkout(lm, entry)
        finally:
            with _other_parents_are_usual():
                for delta in reversed(lm.applied):
                    lm.revert(delta)
                for delta in before:
                    lm.apply(delta)


_other_parents_are_usual = partial(warnings.catch_warnings, action="ignore", category=OtherParents)
"""Says nothing of a delta on other predecessors than it was proposed on: a store is for that, and `log` says it."""


def _named(name: str, entries: tuple[Entry, ...]) -> Entry:
    """Return the entry that `Contents.entry` is asked for."""
    head, tilde, back = name.partition("~")
    if head == "HEAD" and (not tilde or back.isdecimal()):
        place = len(entries) - 1 - int(back or 0)
        if place < 0:
            raise UnknownEntry(f"{name}: the log has {plural(len(entries), 'entry', 'entries')}")
        return entries[place]
    found = one_named(name, (e.id for e in entries), "entry")
    return next(e for e in entries if e.id == found)
