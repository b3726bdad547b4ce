"""`Store`: the edits of one model under version control, as text and content-addressed files that live in git.

    .retcon/
      store.json                the base's fingerprint, how it is called, in which precision deltas are kept
      log.jsonl                 one line per entry: which slot holds which delta from then on
      facts/ENTRY.jsonl         the facts that an entry brought, one line each, with their checks
      deltas/DELTA.safetensors  one file per delta, named by its content
      values/DELTA.safetensors  what was searched for it, so that it can be written again without searching
      index.sqlite              made from the facts, ignored by git

The state after an entry follows from the lines up to it, so two branches merge by keeping the lines of both.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retcon.edits import Case, Edit, check_edits, same_question
from retcon.errors import (
    ConflictingEdits,
    DeltaNotApplied,
    InvalidEdit,
    InvalidSetting,
    MalformedFile,
    NonFinite,
    RetconWarning,
    UnknownEntry,
    WrongBase,
)
from retcon.files import read_text, write_atomically
from retcon.store.history import Action, Entry, State, one_named, read_log, states
from retcon.store.index import FACTS, INDEX, Index, Line, fact_line, with_target
from retcon.store.journal import LOCK, LOG, STAGING, Transaction, recover, writing

if TYPE_CHECKING:
    from retcon.attachment import Attachment
    from retcon.lm.model import LM
    from retcon.memory.moments import Moments
    from retcon.memory.values import ValueCache
    from retcon.methods.common.contract import Method, Progress

FORMAT = "retcon-store-1"
CONFIG, DELTAS, VALUES = "store.json", "deltas", "values"
Precision = Literal["float32", "float16"]

_IGNORED = f"""# made anew from the other files
{INDEX}*
{LOCK}
{STAGING}/
.*.tmp
"""
_ATTRIBUTES = f"""# the log is a list of lines: a merge keeps those of both sides
{LOG} merge=union
{DELTAS}/* -text -diff
{VALUES}/* -text -diff
"""
_LFS = "".join(f"{folder}/*.safetensors filter=lfs diff=lfs merge=lfs -text\n" for folder in (DELTAS, VALUES))


class Store:
    """The edits of one model under version control.

    Args:
        path: the store's folder, made by `Store.init`.

    Raises:
        MalformedFile: there is no store, or a file in it cannot be read; the message names file and line.
    """

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

    @classmethod
    def init(
        cls,
        path: str | os.PathLike[str],
        lm: "LM",
        *,
        model: str | None = None,
        precision: Precision = "float32",
        lfs: bool = False,
    ) -> "Store":
        """Make an empty store for a model.

        Args:
            model: what loads it; the LM's name by default.
            lfs: let git-lfs keep deltas and values.

        Raises:
            InvalidSetting: there is a store or something else at `path`, or no such precision.
        """
        root = Path(path)
        if precision not in ("float32", "float16"):
            raise InvalidSetting(f"unknown precision {precision!r}; known: float32, float16")
        cls.check_new(root)
        for name in (FACTS, DELTAS, VALUES):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / ".gitignore").write_text(_IGNORED)
        (root / ".gitattributes").write_text(_ATTRIBUTES + (_LFS if lfs else ""))
        write_atomically(root / LOG, b"")
        record = {"format": FORMAT, "base": lm.fingerprint(), "model": model or lm.name, "precision": precision}
        write_atomically(root / CONFIG, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        return cls(root)

    @staticmethod
    def check_new(path: str | os.PathLike[str]) -> None:
        """Raises InvalidSetting where there is a store, or something else, already."""
        root = Path(path)
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            what = "a store already" if (root / CONFIG).is_file() else "in use for something else"
            raise InvalidSetting(f"{root} is {what}; name another folder")

    def __repr__(self) -> str:
        return f"Store({self.path}: {self.model}, {len(self.log())} entries)"

    # --- reading -------------------------------------------------------------------------------------------------

    def log(self) -> tuple[Entry, ...]:
        """Every entry, oldest first."""
        return read_log(self.path / LOG)

    def entry(self, name: str) -> Entry:
        """An entry by its id, the beginning of it, or `HEAD`, `HEAD~1`, ...

        Raises:
            UnknownEntry: there is none, or several begin so.
        """
        entries = self.log()
        head, tilde, back = name.partition("~")
        if head == "HEAD" and (not tilde or back.isdecimal()):
            place = len(entries) - 1 - int(back or 0)
            if place < 0:
                raise UnknownEntry(f"{name}: the log has {len(entries)} entries")
            return entries[place]
        found = one_named(name, (e.id for e in entries), "entry")
        return next(e for e in entries if e.id == found)

    def state(self, at: str | None = None) -> State:
        """The deltas in force after an entry (`base`: before the first); now by default."""
        entries = self.log()
        found = states(self.base, entries, self.path / LOG)
        if at is None:
            return found[-1]
        if at == "base":
            return found[0]
        return found[1 + [e.id for e in entries].index(self.entry(at).id)]

    @cached_property
    def index(self) -> Index:
        """The facts, quick to ask."""
        return Index(self.path)

    def _lines_by_delta(self) -> dict[str, dict[str, Line]]:
        """The facts of every delta that ever was, by id, in order."""
        held: dict[str, dict[str, Line]] = {}
        for entry in self.log():
            brought: dict[str, dict[str, Line]] = {}
            for line in self.index.of_entry(entry.id):
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
        """The facts in force after an entry, in order of application."""
        return self._facts(at, self._lines_by_delta())

    def _facts(self, at: str | None, held: Mapping[str, Mapping[str, Line]]) -> list[Line]:
        return [line for delta in self.state(at).deltas for line in held.get(delta, {}).values()]

    def cases(self, at: str | None = None) -> list[Case]:
        """The facts in force after an entry, with their checks."""
        return [self.index.case(line) for line in self.facts(at)]

    def fact(self, name: str, at: str | None = None) -> tuple[Line, str]:
        """A fact that is in force, by its id or the beginning of it, and the delta that holds it.

        Raises:
            UnknownEntry: there is none; the message says whether it was reverted.
        """
        held = self._lines_by_delta()
        live = {f: (line, delta) for delta in self.state(at).deltas for f, line in held.get(delta, {}).items()}
        if name not in live and self.index.of_fact(name):
            raise UnknownEntry(f"fact {name!r} is no longer in force; it was reverted (retcon show {name})")
        return live[one_named(name, live, "fact")]

    def history(self, fact: str) -> list[tuple[Entry, Line | None]]:
        """The entries that changed a fact, oldest first, with what it was from then on; None: not in force."""
        if not self.index.of_fact(fact):
            return []
        held, found = self._lines_by_delta(), []
        entries = self.log()
        last: Line | None = None
        for entry, state in zip(entries, states(self.base, entries, self.path / LOG)[1:], strict=True):
            now = next((held[d][fact] for d in state.deltas if fact in held.get(d, {})), None)
            if now != last:
                found.append((entry, now))
            last = now
        return found

    def diff(self, a: str, b: str | None = None) -> tuple[list[Line], list[Line], list[tuple[Line, Line]]]:
        """The facts that came, that went, and that changed from the state after one entry to that after another."""
        held = self._lines_by_delta()
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

        path = self._file(DELTAS, delta)
        found = load(path)
        if found.id != delta:
            raise MalformedFile(f"{path}: holds delta {found.id}; the file was renamed or put in another's place")
        return found

    def _file(self, folder: str, delta: str) -> Path:
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
        """Bytes of a delta's files, values included."""
        files = (self.path / folder / f"{delta}.safetensors" for folder in (DELTAS, VALUES))
        return sum(file.stat().st_size for file in files if file.is_file())

    def deltas(self, at: str | None = None) -> list["Attachment"]:
        """The deltas in force after an entry, in order of application."""
        return [self.delta(name) for name in self.state(at).deltas]

    def paths(self, at: str | None = None) -> list[Path]:
        """The files of these deltas."""
        return [self._file(DELTAS, name) for name in self.state(at).deltas]

    def check_base(self, lm: "LM") -> None:
        """Raises WrongBase where the store is of another model than this."""
        if lm.fingerprint() != self.base:
            raise WrongBase(
                f"{self.path} holds edits of {self.model} (fingerprint {self.base[:12]}), this is {lm.name!r} "
                f"(fingerprint {lm.fingerprint()[:12]}); load the model the store was made for"
            )

    def checkout(self, lm: "LM", at: str | None = None) -> State:
        """Bring the model to the state after an entry: its deltas, in order, and no others.

        Raises:
            WrongBase: the store is of another model.
            DeltaNotApplied: deltas are applied that are not the store's.
            MalformedFile: a delta is missing; the model is as it was.
        """
        self.check_base(lm)
        state, before = self.state(at), lm.applied
        own = {slot for entry in self.log() for pair in entry.sets.values() for slot in pair if slot}
        if foreign := [d.id for d in before if d.id not in own]:
            raise DeltaNotApplied(f"applied deltas are not the store's ({', '.join(foreign)}); revert them first")
        wanted = [self.delta(name) for name in state.deltas]
        with warnings.catch_warnings():
            # A delta on other predecessors than it was proposed on is what a store is for; `log` says it.
            warnings.filterwarnings("ignore", message=".*was proposed on top of", category=RetconWarning)
            with lm.scope():
                keep = 0
                while keep < min(len(before), len(wanted)) and before[keep] == wanted[keep]:
                    keep += 1
                for delta in reversed(before[keep:]):
                    lm.revert(delta)
                for delta in wanted[keep:]:
                    lm.apply(delta)
        return state

    @contextmanager
    def at(self, lm: "LM", entry: str | None = None) -> Iterator[State]:
        """The model in the state after an entry, while the scope lasts."""
        before = lm.applied
        try:
            yield self.checkout(lm, entry)
        finally:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*was proposed on top of", category=RetconWarning)
                for delta in reversed(lm.applied):
                    lm.revert(delta)
                for delta in before:
                    lm.apply(delta)

    # --- writing -------------------------------------------------------------------------------------------------

    def edit(
        self,
        lm: "LM",
        cases: Sequence[Case],
        method: "Method",
        *,
        batch_size: int | None = None,
        moments: "Moments | None" = None,
        values: "ValueCache | None" = None,
        seed: int = 0,
        message: str = "",
        corpus: str | None = None,
        progress: "Progress | None" = None,
    ) -> Entry:
        """Edit facts on top of the present state, and keep them.

        Every batch becomes a delta of its own; with a method that takes one fact, every fact. The model is left as it
        was.

        Args:
            batch_size: facts written at once; all, or 1 for methods that take one.
            values: where searched values are kept on disk, so that a run that was killed goes on where it was.
            corpus: the text of the moments, for the record.

        Raises:
            ConflictingEdits: a fact in force asks the same question; amend it.
            InvalidEdit: a fact has no edit, or the id of one that is in force.
            StoreBusy: another process is writing.
            WrongBase: the store is of another model.
        """
        if not cases:
            raise InvalidSetting("no facts to edit")
        size = batch_size or (len(cases) if method.supports_batches else 1)
        if size > 1 and not method.supports_batches:
            raise InvalidSetting(f"batch_size {size}: {method.name} takes 1")
        with self._change() as change, self.at(lm):
            self.check_new_facts(cases)
            state, lines, sets = self._last_state(lm, method), [], {}
            applied = 0
            for first in range(0, len(cases), size):
                batch = cases[first : first + size]
                edits = [edit for case in batch for edit in case.edits]
                delta = self._proposed(
                    change, lm, edits, method, moments=moments, values=values, state=state, seed=seed, progress=progress
                )
                sets[delta.id] = (None, delta.id)
                lines += [fact_line(case, delta.id) for case in batch]
                lm.apply(delta)
                applied, state = applied + 1, delta.state
                if progress is not None and size < len(cases):
                    progress("facts", min(first + size, len(cases)), len(cases))
            about: dict[str, Any] = {"method": method.name, "facts": len(cases), "seed": seed}
            if corpus is not None:
                about["corpus"] = corpus
            return change.commit(
                "edit",
                message or f"{len(cases)} fact{'s' * (len(cases) != 1)} by {method.name}",
                sets,
                lines,
                about=about,
            )

    def _last_state(self, lm: "LM", method: "Method") -> Any:
        if lm.applied and lm.applied[-1].provenance.get("method") == method.name:
            return lm.applied[-1].state
        return None

    def check_new_facts(self, cases: Sequence[Case]) -> None:
        """Check facts that are to be edited against each other and against those in force.

        Raises:
            InvalidEdit, ConflictingEdits: as `edit`.
        """
        check_edits([edit for case in cases for edit in case.edits])
        live = self.facts()
        ids = {line.fact for line in live}
        asked: dict[tuple[str, str], tuple[str, Edit]] = {}
        for line in live:
            for edit in self.index.case(line).edits:
                asked[same_question(edit)] = (line.fact, edit)
        seen: set[str] = set()
        for case in cases:
            if not case.edits:
                raise InvalidEdit(f"fact {case.id!r} has no edit")
            if case.id in ids or case.id in seen:
                where = "in force already" if case.id in ids else "in the file twice"
                raise InvalidEdit(f"fact {case.id!r} is {where}; leave it out, or amend it (retcon amend {case.id})")
            seen.add(case.id)
            for edit in case.edits:
                if (found := asked.get(same_question(edit))) is not None:
                    raise ConflictingEdits(
                        f"fact {case.id!r} asks what fact {found[0]!r} in force answers ({found[1].text!r}: "
                        f"{found[1].target_new!r}); change that one: retcon amend {found[0]} --target "
                        f"{edit.target_new!r}"
                    )

    def _proposed(
        self,
        change: "_Change",
        lm: "LM",
        edits: Sequence[Edit],
        method: "Method",
        *,
        moments: "Moments | None",
        values: "ValueCache | None" = None,
        known: Any = None,
        state: Any = None,
        seed: int,
        contexts: Any = None,
        progress: "Progress | None" = None,
    ) -> "Attachment":
        """A delta on the model as it is, in the store's precision, staged with its values."""
        from dataclasses import replace

        from retcon.files import cache_dir
        from retcon.memory.values import ValueCache
        from retcon.memory.values.store import KnownValues

        cache = values or ValueCache(cache_dir() / "values")
        known = known or KnownValues(len(lm.applied))
        delta = method.propose(
            lm,
            edits,
            contexts=contexts,
            moments=moments,
            state=state,
            values=replace(cache, known=known),
            seed=seed,
            progress=progress,
        )
        delta = in_precision(lm, delta, self.precision)
        delta.save(change.path(f"{DELTAS}/{delta.id}.safetensors"))
        if known.used:
            known.save(change.path(f"{VALUES}/{delta.id}.safetensors"))
        change.searched += known.searched
        change.caches.append(cache)
        return delta

    def revert(self, name: str, *, message: str = "") -> Entry:
        """Take back an entry: its deltas go out of force, or come back where it had reverted them.

        Needs no model. Later deltas stay as they are; those that were proposed on top of it are in the new entry's
        `about["on_top"]`.

        Raises:
            UnknownEntry: no such entry, or nothing of it is left to take back.
        """
        with self._change() as change:
            entry, state = self.entry(name), self.state()
            sets: dict[str, tuple[str | None, str | None]] = {}
            for slot, (before, now) in entry.sets.items():
                held = state.slots.get(slot)
                if entry.action == "edit" and held is not None:
                    sets[slot] = (held, None)  # also where it was written again since
                elif entry.action != "edit" and held == now and before != now:
                    sets[slot] = (held, before)
            if not sets:
                raise UnknownEntry(f"entry {entry.id} ({entry.action}): nothing of it is in force; see `retcon log`")
            back = any(held is None for held, _ in sets.values())
            about = {"of": entry.id, **self._on_top(state, sets)}
            what = message or (f"restore what {entry.id} reverted" if back else f"revert {entry.id}: {entry.message}")
            return change.commit("restore" if back else "revert", what, sets, about=about)

    def _on_top(self, state: State, sets: Mapping[str, Any]) -> dict[str, Any]:
        later = [state.slots[slot] for slot in state.later(sets)]
        return {"on_top": later} if later else {}

    def revert_fact(
        self,
        lm: "LM",
        name: str,
        *,
        moments: "Moments | None" = None,
        repropose: bool = False,
        message: str = "",
        progress: "Progress | None" = None,
    ) -> Entry:
        """Take one fact back. A batch that held it is written again without it; no other value is searched again.

        Args:
            repropose: propose the later deltas again too, in order, on what is there now; their values are searched
                anew.

        Raises:
            UnknownEntry: no such fact is in force.
        """
        line, delta = self.fact(name)
        return self._rewritten(
            lm,
            delta,
            {line.fact: None},
            moments=moments,
            repropose=repropose,
            message=message or f"revert fact {line.fact}: {line.prompt}",
            progress=progress,
            action="revert",
        )

    def amend(
        self,
        lm: "LM",
        name: str,
        target: str,
        *,
        moments: "Moments | None" = None,
        repropose: bool = False,
        message: str = "",
        progress: "Progress | None" = None,
    ) -> Entry:
        """Give a fact another answer. Its batch is written again; its value alone is searched.

        Checks whose answers followed from the old one (portability) are left out of the fact.

        Raises:
            UnknownEntry: no such fact is in force.
            InvalidEdit: the target is empty, or what it is already.
        """
        line, delta = self.fact(name)
        case = self.index.case(line)
        new = with_target(case, target)
        if new.edits == case.edits:
            raise InvalidEdit(f"fact {line.fact!r} has that answer already ({case.edits[0].target_new!r})")
        return self._rewritten(
            lm,
            delta,
            {line.fact: new},
            moments=moments,
            repropose=repropose,
            message=message or f"amend {line.fact}: {line.prompt} {new.edits[0].target_new}",
            progress=progress,
            action="amend",
        )

    def _rewritten(
        self,
        lm: "LM",
        delta: str,
        facts: Mapping[str, Case | None],
        *,
        moments: "Moments | None",
        repropose: bool,
        message: str,
        progress: "Progress | None",
        action: Action,
    ) -> Entry:
        """Write the batch of a delta again with `facts` changed, or gone where None."""
        self.check_base(lm)
        with self._change() as change:
            state = self.state()
            slot = state.slot_of(delta)
            held = list(self._lines_by_delta()[delta].values())
            cases = [facts.get(line.fact, self.index.case(line)) for line in held]
            kept = [case for case in cases if case is not None]
            sets: dict[str, tuple[str | None, str | None]] = {}
            later = [s for s in state.later([slot]) if state.slots[s] is not None]
            lines: list[str] = []
            before = lm.applied
            with self.at(lm):
                self._to(lm, state, upto=slot)
                if kept:
                    new = self._again(change, lm, delta, kept, moments=moments, search=False, progress=progress)
                    lines = [fact_line(case, new.id) for case in facts.values() if case is not None]
                    lm.apply(new)
                    sets[slot] = (delta, new.id)
                else:
                    sets[slot] = (delta, None)
                for each in later if repropose else ():
                    old = str(state.slots[each])
                    own = [self.index.case(line) for line in self._lines_by_delta()[old].values()]
                    new = self._again(change, lm, old, own, moments=moments, search=True, progress=progress)
                    lm.apply(new)
                    sets[each] = (old, new.id)
                about: dict[str, Any] = {"searched": change.searched}
                if later:
                    about["proposed_again" if repropose else "on_top"] = [state.slots[s] for s in later]
            assert lm.applied == before
            drops = tuple(fact for fact, case in facts.items() if case is None)
            return change.commit(action, message, sets, lines, drops=drops if kept else (), about=about)

    def _to(self, lm: "LM", state: State, *, upto: str) -> None:
        """Take off the deltas from a slot on."""
        order = list(state.slots)
        upper = {state.slots[slot] for slot in order[order.index(upto) :]}
        for each in reversed(lm.applied):
            if each.id in upper:
                lm.revert(each)

    def _again(
        self,
        change: "_Change",
        lm: "LM",
        delta: str,
        cases: Sequence[Case],
        *,
        moments: "Moments | None",
        search: bool,
        progress: "Progress | None",
    ) -> "Attachment":
        """The delta's method, settings, contexts and seed once more, for these facts, on the model as it is."""
        from retcon.memory.contexts import Contexts
        from retcon.memory.values.store import KnownValues
        from retcon.methods.common.registry import method_class

        old = self.delta(delta)
        made = old.provenance
        method = method_class(str(made["method"]))(**made["settings"])
        known = None
        if not search:
            with_values = self.path / VALUES / f"{delta}.safetensors"
            if with_values.is_file():
                known = KnownValues.load(self._file(VALUES, delta), len(lm.applied))
            else:
                warnings.warn(
                    f"delta {delta} has no values in the store ({made['method']} keeps none, or gc removed them); its "
                    f"{len(cases)} facts are edited anew",
                    RetconWarning,
                    stacklevel=4,
                )
        new = self._proposed(
            change,
            lm,
            [edit for case in cases for edit in case.edits],
            method,
            moments=moments,
            known=known,
            state=self._last_state(lm, method) if method.state_description else None,
            seed=int(made["seed"]),
            contexts=Contexts(old.contexts) if old.contexts else None,
            progress=progress,
        )
        if old.provenance.get("moments") and new.provenance["moments"] != old.provenance["moments"]:
            raise InvalidSetting(
                f"delta {delta} was made with other second moments than those given; name the same text (--corpus)"
            )
        return new

    def gc(self, *, before: str | None = None, values: bool = False) -> tuple[list[str], int]:
        """Remove files that no entry names; return them and their size in bytes.

        Args:
            before: also the deltas and values that neither this entry's state nor a later one needs. What states
                before it can then no longer be checked out is said when they are asked for.
            values: also all values: no fact of a batch can then be taken out without searching the others again.
        """
        with self._change() as change:
            entries = self.log()
            needed = {d for e in entries for pair in e.sets.values() for d in pair if d}
            if before is not None:
                first = [e.id for e in entries].index(self.entry(before).id)
                found = states(self.base, entries, self.path / LOG)[first + 1 :]
                needed = {delta for state in found for delta in state.deltas}
            removed = []
            for folder in (DELTAS, VALUES):
                for path in sorted((self.path / folder).glob("*.safetensors")):
                    if path.stem not in needed or (values and folder == VALUES):
                        removed.append(f"{folder}/{path.name}")
            known = {e.id for e in entries}
            removed += [f"{FACTS}/{p.name}" for p in sorted((self.path / FACTS).glob("*")) if p.stem not in known]
            if not removed:
                return [], 0
            n_bytes = sum((self.path / name).stat().st_size for name in removed)
            change.commit("gc", f"remove {len(removed)} files", {}, about={"removed": removed}, remove=removed)
            return removed, n_bytes

    @contextmanager
    def _change(self) -> Iterator["_Change"]:
        with writing(self.path):
            self.__dict__.pop("index", None)  # another process may have written since
            change = _Change(self)
            try:
                yield change
            finally:
                change.transaction.abandon()
                self.__dict__.pop("index", None)


class _Change:
    """One entry on its way into a store."""

    def __init__(self, store: Store) -> None:
        self.store, self.transaction = store, Transaction(store.path)
        self.searched = 0
        self.caches: list[Any] = []

    def path(self, name: str) -> Path:
        """Where to write the file that shall be `name` in the store."""
        return self.transaction.path(name)

    def commit(
        self,
        action: Action,
        message: str,
        sets: Mapping[str, tuple[str | None, str | None]],
        lines: Sequence[str] = (),
        *,
        drops: tuple[str, ...] = (),
        about: Mapping[str, Any] | None = None,
        remove: Sequence[str] = (),
    ) -> Entry:
        """Make it an entry."""
        last = self.store.log()
        entry = Entry.make(
            action,
            " ".join(message.split()),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            after=last[-1].id if last else None,
            sets=sets,
            drops=drops,
            about=dict(about or {}),
        )
        if lines:
            write_atomically(self.path(f"{FACTS}/{entry.id}.jsonl"), ("\n".join(lines) + "\n").encode())
        self.transaction.commit(entry.line, remove=remove)
        for cache in self.caches:
            cache.discard()
        return entry


def in_precision(lm: "LM", delta: "Attachment", precision: Precision) -> "Attachment":
    """The delta with its changes in that precision, and with what the model says then in its report; an attachment of
    another kind as it is.

    Raises:
        NonFinite: a value is out of float16's range.
    """
    from dataclasses import fields, replace

    import torch

    from retcon.delta import Delta
    from retcon.methods.common.proposal import report_after

    if precision == "float32" or not isinstance(delta, Delta):
        return delta
    changes = {}
    for name, parts in delta.changes.items():
        narrow = []
        for change in parts:
            tensors: dict[str, Any] = {
                f.name: tensor.to(torch.float16)
                for f in fields(change)
                if isinstance(tensor := getattr(change, f.name), torch.Tensor) and tensor.is_floating_point()
            }
            if not all(bool(t.isfinite().all()) for t in tensors.values()):
                raise NonFinite(f"{name}: the change is out of float16's range; make the store with float32")
            narrow.append(replace(change, **tensors))
        changes[name] = tuple(narrow)
    delta = replace(delta, changes=changes)
    with lm.edited(delta):
        return replace(delta, report=report_after(lm, delta.edits, delta.report))
