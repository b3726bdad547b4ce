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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from retcon.arguments import check_choice
from retcon.atomic import TEMPORARY, write_atomically
from retcon.edits import Case, Edit, check_edits, list_of_cases, same_question
from retcon.errors import ConflictingEdits, InvalidEdit, InvalidSetting, UnknownEntry
from retcon.files import as_shared
from retcon.plural import plural
from retcon.seed import check_seed
from retcon.store.change import PendingEntry
from retcon.store.contents import CONFIG, DELTAS, FORMAT, VALUES, Contents, Precision
from retcon.store.history import Action, Entry, State, states
from retcon.store.index import FACTS, INDEX, Line, clashes, fact_line, with_target
from retcon.store.journal import LOCK, LOG, STAGING, writing

if TYPE_CHECKING:
    from retcon.lm.model import LM
    from retcon.memory.moments import Moments
    from retcon.memory.values import ValueCache
    from retcon.methods.common.contract import Method
    from retcon.work import Progress

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


def _begun(folder: Path) -> bool:
    """Return whether a folder holds no more than what `init` writes before it is a store."""
    written = {".gitignore": {_IGNORED}, ".gitattributes": {_ATTRIBUTES, _ATTRIBUTES + _LFS}, LOG: {""}}

    def ours(entry: Path) -> bool:
        if entry.is_dir():
            return entry.name in (FACTS, DELTAS, VALUES) and not any(entry.iterdir())
        if entry.name.startswith(".") and entry.name.endswith(TEMPORARY):
            return True
        return entry.name in written and entry.read_text(encoding="utf-8", errors="replace") in written[entry.name]

    return all(map(ours, folder.iterdir()))


class Store(Contents):
    """The edits of one model under version control.

    Args:
        path: the store's folder, made by `Store.init`.

    Raises:
        MalformedFile: there is no store, or a file in it cannot be read; the message names file and line.
    """

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
            UnsupportedModel: `lm` is no `LM`.
        """
        from retcon.lm.model import require_lm  # torch, which reading a store does without

        require_lm(lm)
        root = Path(path)
        check_choice(precision, Precision, "precision")
        cls.check_new(root)
        for name in (FACTS, DELTAS, VALUES):
            (root / name).mkdir(parents=True, exist_ok=True)
        write_atomically(root / ".gitignore", _IGNORED.encode())
        write_atomically(root / ".gitattributes", (_ATTRIBUTES + (_LFS if lfs else "")).encode())
        write_atomically(root / LOG, b"")
        record = {
            "format": FORMAT,
            "base": lm.fingerprint(),
            "model": as_shared(model or lm.name, root),
            "precision": precision,
        }
        write_atomically(root / CONFIG, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        return cls(root)

    @staticmethod
    def check_new(path: str | os.PathLike[str]) -> None:
        """Raise InvalidSetting where there is a store, or something else, already; what a killed `init` left is not."""
        root = Path(path)
        if root.exists() and not (root.is_dir() and _begun(root)):
            what = "a store already" if (root / CONFIG).is_file() else "in use for something else"
            raise InvalidSetting(f"{root} is {what}; name another folder")

    def edit(
        self,
        lm: "LM",
        cases: Iterable[Case],
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

        Every batch becomes a delta of its own; with a method that takes one fact, every fact. The model is left alone.

        Args:
            batch_size: facts written at once; all, or 1 for methods that take one.
            values: where searched values are kept on disk, so that a run that was killed goes on where it was.
            corpus: the text of the moments, for the record.

        Raises:
            ConflictingEdits: a fact in force asks the same question; amend it.
            InvalidEdit: a fact has no edit, or the id of one that is in force, or several edits where the method writes
                one.
            InvalidSetting: there are no facts, `batch_size` does not suit the method, or the method's delta would take
                the place of those before it (PRUNE).
            StoreBusy: another process is writing.
            WrongBase: the store is of another model.
        """
        cases, seed = list_of_cases(cases), check_seed(seed)
        if not cases:
            raise InvalidSetting("no facts to edit")
        from retcon.methods.common.contract import files_of
        from retcon.methods.common.sequence import batch_size_for, state_after

        size = batch_size_for(method, len(cases), batch_size)
        several = next((case for case in cases if len(case.edits) > 1), None)
        if several is not None and not method.supports_batches:
            raise InvalidEdit(
                f"fact {several.id!r} consists of {len(several.edits)} edits, and {method.name} writes one at a time; "
                "make each a fact of its own, or take a method for batches (memit, jeep)"
            )
        with self._change() as change:
            lines: list[str] = []
            sets: dict[str, tuple[str | None, str | None]] = {}
            with self.at(lm):
                self.check_new_facts(cases)
                state = state_after(lm.applied, method)
                for first in range(0, len(cases), size):
                    batch = cases[first : first + size]
                    edits = [edit for case in batch for edit in case.edits]
                    delta = change.propose(
                        lm, edits, method, moments=moments, values=values, state=state, seed=seed, progress=progress
                    )
                    sets[delta.id] = (None, delta.id)
                    lines += [fact_line(case, delta.id) for case in batch]
                    lm.apply(delta)
                    state = delta.state
                    if progress is not None and size < len(cases):
                        progress("facts", min(first + size, len(cases)), len(cases))
            about: dict[str, Any] = {"method": method.name, "facts": len(cases), "seed": seed}
            if corpus is not None:
                about["corpus"] = as_shared(corpus, self.path)
            named = files_of(method.settings).items()
            if files := {name: as_shared(path, self.path) for name, path in named if os.path.isabs(path)}:
                about["files"] = files
            return change.commit(
                "edit", message or f"{plural(len(cases), 'fact')} by {method.name}", sets, lines, about=about
            )

    def check_new_facts(self, cases: Sequence[Case]) -> None:
        """Check facts that are to be edited against each other and against those in force.

        Raises:
            InvalidEdit, ConflictingEdits: as `edit`.
        """
        check_edits([edit for case in cases for edit in case.edits])
        asked = self.questions()
        ids = {line.fact for line in self.facts()}
        seen: set[str] = set()
        for case in cases:
            if not case.edits:
                raise InvalidEdit(f"fact {case.id!r} has no edit")
            if case.id in ids or case.id in seen:
                where = "in force already" if case.id in ids else "in the file twice"
                amend = f"retcon amend {quote(case.id)}"
                raise InvalidEdit(f"fact {case.id!r} is {where}; leave it out, or amend it ({amend})")
            seen.add(case.id)
            for edit in case.edits:
                if (found := asked.get(same_question(edit))) is not None:
                    raise ConflictingEdits(
                        f"fact {case.id!r} asks what fact {found[0]!r} in force answers ({found[1].text!r}: "
                        f"{found[1].target_new!r}); change that one: retcon amend {quote(found[0])} "
                        f"--target {quote(edit.target_new)}"
                    )

    def questions(self) -> dict[tuple[str, str], tuple[str, Edit]]:
        """Return the questions that facts in force answer (`same_question`): the fact that does, and its edit."""
        return {same_question(edit): (line.fact, edit) for line in self.facts() for edit in self.index.case(line).edits}

    def revert(self, name: str, *, message: str = "") -> Entry:
        """Take back an entry: its deltas go out of force, or come back where it had reverted them.

        Needs no model. Later deltas stay; those proposed on top of it are in the new entry's `about["on_top"]`.

        Raises:
            UnknownEntry: no such entry, or nothing of it is left to take back.
            ConflictingEdits: a fact would come back whose question another one has answered since.
            MalformedFile: a delta would come back whose file is missing; the message says why it can be.
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
                raise UnknownEntry(f"entry {entry.id} ({entry.action}): {self._why_not(entry)}")
            for _, returning in sets.values():
                if returning is not None:
                    self.file(DELTAS, returning)  # or the state could not be rebuilt
            self._check_returning(entry, state, sets)
            back = any(held is None for held, _ in sets.values())
            about = {"of": entry.id, **self._on_top(state, sets)}
            what = message or (f"restore what {entry.id} reverted" if back else f"revert {entry.id}: {entry.message}")
            return change.commit("restore" if back else "revert", what, sets, about=about)

    def _why_not(self, entry: Entry) -> str:
        """Return why there is nothing of an entry to take back."""
        if not entry.sets:
            return "it changed no facts, so there is nothing to take back"
        last = next(e for e in reversed(self.log()) if e.sets.keys() & entry.sets.keys())
        if entry.action == "edit":
            return f"nothing of it is in force; reverting {last.id} ({last.action}) brings it back"
        return f"entry {last.id} ({last.action}: {last.message}) changed the same batch since; revert that one first"

    def _check_returning(self, entry: Entry, state: State, sets: Mapping[str, tuple[str | None, str | None]]) -> None:
        """Check that facts which come back, by `sets`, answer no question that one in force does."""
        held = self.lines_by_delta()

        def lines(slots: Mapping[str, str | None]) -> list[Line]:
            return [line for delta in slots.values() if delta for line in held.get(delta, {}).values()]

        present = set(lines(state.slots))
        after = lines({**state.slots, **{slot: now for slot, (_, now) in sets.items()}})
        stay, back = [line for line in after if line in present], {line for line in after if line not in present}
        for there, line in clashes([*stay, *back]):
            if line in back:
                raise ConflictingEdits(
                    f"reverting {entry.id} brings back fact {line.fact!r} ({line.prompt!r}: {line.target!r}), and fact "
                    f"{there.fact!r} in force answers that question ({there.target!r}); take that one back first: "
                    f"retcon revert --fact {quote(there.fact)}"
                )

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
        editor: str | os.PathLike[str] | None = None,
        method: str | None = None,
        message: str = "",
        progress: "Progress | None" = None,
    ) -> Entry:
        """Take one fact back. A batch that held it is written again without it; no other value is searched again.

        Args:
            moments: None: of the text that each batch was made with.
            repropose: propose the later deltas again too, in order, on what is there now; their values are searched
                anew.
            editor: the trained editor that the batch was made with (MEND, MALMEN), if it is not where it was.
            method: "module:Class" of the method of one's own that the batch was made with, where it is not imported.

        Raises:
            UnknownEntry: no such fact is in force.
            InvalidSetting: the editor, the second moments or the method are not those that the batch was made with; or
                the method is one of one's own that is neither imported nor named.
        """
        line, delta = self.fact(name)
        return self._rewritten(
            lm,
            delta,
            {line.fact: None},
            moments=moments,
            repropose=repropose,
            editor=editor,
            method=method,
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
        editor: str | os.PathLike[str] | None = None,
        method: str | None = None,
        message: str = "",
        progress: "Progress | None" = None,
    ) -> Entry:
        """Give a fact another answer. Its batch is written again; its value alone is searched.

        Checks whose answers followed from the old one (portability) are left out of the fact.

        Raises:
            UnknownEntry: no such fact is in force.
            InvalidEdit: the target is empty, or what it is already.
            InvalidSetting: as `revert_fact`.
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
            editor=editor,
            method=method,
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
        editor: str | os.PathLike[str] | None,
        method: str | None,
        message: str,
        progress: "Progress | None",
        action: Action,
    ) -> Entry:
        """Write the batch of a delta again with `facts` changed, or gone where None."""
        self.check_base(lm)
        with self._change() as change:
            state = self.state()
            slot = state.slot_of(delta)
            held = list(self.lines_by_delta()[delta].values())
            cases = [facts.get(line.fact, self.index.case(line)) for line in held]
            kept = [case for case in cases if case is not None]
            sets: dict[str, tuple[str | None, str | None]] = {}
            later = state.later([slot])
            lines: list[str] = []
            before = lm.applied
            again = partial(change.propose_again, lm, moments=moments, progress=progress, editor=editor, method=method)
            with self.at(lm):
                self._to(lm, state, upto=slot)
                if kept:
                    new = again(delta, kept, search=False)
                    lines = [fact_line(case, new.id) for case in facts.values() if case is not None]
                    lm.apply(new)
                sets[slot] = (delta, new.id if kept else None)
                for each in later if repropose else ():
                    old = str(state.slots[each])
                    own = [self.index.case(line) for line in self.lines_by_delta()[old].values()]
                    new = again(old, own, search=True)
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
            removed += [f"{FACTS}/{p.name}" for p in sorted((self.path / FACTS).glob("*.jsonl")) if p.stem not in known]
            if not removed:
                return [], 0
            n_bytes = sum((self.path / name).stat().st_size for name in removed)
            what = f"remove {plural(len(removed), 'file')}"
            change.commit("gc", what, {}, about={"removed": removed}, remove=removed)
            return removed, n_bytes

    @contextmanager
    def _change(self) -> Iterator[PendingEntry]:
        with writing(self.path):
            self.__dict__.pop("index", None)  # another process may have written since
            change = PendingEntry(self)
            try:
                yield change
            finally:
                change.transaction.abandon()
                self.__dict__.pop("index", None)
