"""What the page shows and does, without a web server.

Every browser sees the same session; which entry's state it looks at (`at`; None: the last one's) is its own.
Methods that return a `Job` submit it and return at once.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from retcon.edits import Case, same_question
from retcon.errors import InvalidSetting
from retcon.plural import plural
from retcon.store import Entry, Store
from retcon.store.index import FACTS
from retcon.store.journal import LOG
from retcon.web.commands import assignments, command_line
from retcon.web.jobs import Job, Jobs
from retcon.web.listing import N_ROWS, Listing, listed
from retcon.web.maps import LayerMap, contrast_map, trace_map
from retcon.web.pasted import pasted_cases
from retcon.work import Progress

if TYPE_CHECKING:
    from retcon.lm.model import LM
    from retcon.store.verify import Check, Verification
    from retcon.workflow import Estimate

N_ANSWERS = 12
"""Answers that are remembered."""


@dataclass(frozen=True)
class Reply:
    """What the model says after a prompt, without the edits and with them."""

    prompt: str
    before: str
    after: str

    @property
    def common(self) -> str:
        """What both begin with, whole words."""
        one, two = self.before.split(" "), self.after.split(" ")
        n = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        return " ".join(one[:n])

    @property
    def changed(self) -> bool:
        """Whether they differ."""
        return self.before != self.after


@dataclass(frozen=True)
class Conflict:
    """A fact that was to be added, and the one in force that answers the same question with something else."""

    fact: str
    """Id of the one in force."""
    prompt: str
    now: str
    wanted: str


@dataclass(frozen=True)
class Lamp:
    """What one of the four questions was answered by."""

    title: str
    cases: "tuple[Check, ...]" = ()
    """Checks that fell short, those that broke first."""
    passed: int = 0
    broke: int = 0
    never: int = 0

    @property
    def total(self) -> int:
        """Checks that were put to the model."""
        return self.passed + self.broke + self.never

    @property
    def colour(self) -> str:
        """The class of the lamp in the page's style sheet."""
        if not self.total:
            return "unknown"
        return "good" if self.passed == self.total else "bad" if self.broke else "mid"


@dataclass
class Session:
    """One model, its store, and what was done to them from the page."""

    store: Store
    load: "Callable[[str], LM]"
    """Loads a model by its name; called in the model's thread."""
    model: str
    loading: "Callable[[str], str]" = lambda model: ""
    """Options of the command line that a model of that name is loaded with, each after a space, but for the dtype."""
    dtype: str | None = None
    """Dtype that models are loaded in; None: as retcon has it."""
    draft: list[Case] = field(default_factory=list)
    """Facts that are about to be edited."""
    conflicts: list[Conflict] = field(default_factory=list)
    """Facts that were left out of the draft, since one in force answers their question."""
    method: str = "jeep"
    settings: dict[str, Any] = field(default_factory=dict)
    """Over the preset's."""
    estimate: "Estimate | None" = None
    layers: str = ""
    """Where the edit that was estimated would be written."""
    verification: "Verification | None" = None
    replies: list[Reply] = field(default_factory=list)
    maps: list[LayerMap] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    """What to type to do the same again."""
    version: int = 0
    """Goes up with every change."""

    def __post_init__(self) -> None:
        self.jobs = Jobs(self._load_first, self.changed)
        self._stores = {self.model: self.store}
        self._about = "loading the model"

    def _load_first(self) -> "LM":
        lm = self.load(self.model)
        self.store.check_base(lm)
        self._about = str(lm)
        return lm

    @property
    def about(self) -> str:
        """The model, or why there is none."""
        return self.jobs.problem or self._about

    def changed(self) -> None:
        """Let every browser look again."""
        self.version += 1

    @property
    def written(self) -> int:
        """When the store's log was last written, by whichever process."""
        log = self.store.path / LOG
        return log.stat().st_mtime_ns if log.is_file() else 0

    # --- facts ---------------------------------------------------------------------------------------------------

    def add_facts(self, text: str) -> str:
        """Add facts to the draft, as `pasted.pasted_cases` reads them.

        Those whose question a fact in force answers otherwise become `conflicts`, to be amended.

        Raises:
            RetconError: the text cannot be read, or a fact contradicts another one of the draft.
        """
        cases, notes = pasted_cases(text)
        fresh, conflicts, n_known = [], [], 0
        answered = self.store.questions()
        for case in cases:
            clash = next(((answered[q], e) for e in case.edits if (q := same_question(e)) in answered), None)
            if clash is None:
                fresh.append(case)
            elif clash[0][1].target_new == clash[1].target_new:
                n_known += 1
            else:
                (fact, held), edit = clash
                conflicts.append(Conflict(fact, held.text, held.target_new, edit.target_new))
        self.store.check_new_facts([*self.draft, *fresh])
        self.draft, self.conflicts = [*self.draft, *fresh], [*self.conflicts, *conflicts]
        self.estimate = None
        self.changed()
        said = [f"{plural(len(fresh), 'fact')} added"]
        said += [f"{n_known} in force already"] * bool(n_known)
        said += [f"{len(conflicts)} contradict what is in force"] * bool(conflicts)
        return "; ".join(said + notes)

    def clear(self) -> None:
        """Empty the draft."""
        self.draft, self.conflicts, self.estimate = [], [], None
        self.changed()

    def choose_model(self, name: str) -> Job:
        """Load another model, with the store that is beside this one's; what fails leaves everything as it is.

        A store holds the edits of one model. Another model's is `STORE-MODEL`, made where there is none.
        """

        def run(lm: "LM", progress: Progress) -> str:
            if not name.strip():
                raise InvalidSetting("name a model: a folder, a hub id, or demo:gptj")
            progress("loading", 0, 0)
            new = self.load(name.strip())
            store = self._store_of(new, name.strip())
            self.jobs.lm, self.store, self.model, self._about = new, store, name.strip(), str(new)
            self.settings, self.conflicts, self.maps, self.replies = {}, [], [], []
            self.estimate = self.verification = None
            return f"edits go to {store.path}"

        return self.jobs.submit("load", run)

    def _store_of(self, lm: "LM", name: str) -> Store:
        from retcon.store.contents import CONFIG

        for store in self._stores.values():
            if store.base == lm.fingerprint():
                return store
        first = next(iter(self._stores.values())).path
        path = first.with_name(f"{first.name}-{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-.')}")
        store = Store(path) if (path / CONFIG).is_file() else Store.init(path, lm, model=name)
        store.check_base(lm)
        self._stores[name] = store
        return store

    def choose(self, method: str, settings: Sequence[str]) -> None:
        """Choose a method and settings over the preset's, each `field=value`.

        Raises:
            RetconError: no such method or setting.
        """
        from retcon.workflow import read_settings

        found = read_settings(method, dataset=None, preset=None, assignments=[s for s in settings if s.strip()])
        self.method, self.settings = method, found
        self.estimate = None
        self.changed()

    @property
    def methods(self) -> list[str]:
        """Every method's name."""
        from retcon.methods.common.registry import list_methods

        return list_methods()

    @property
    def settings_text(self) -> str:
        """The settings over the preset's, one `field=value` a line."""
        return "\n".join(assignments(self.settings))

    def choose_layer(self, row: int, layer: int) -> None:
        """Edit at a layer that was clicked in a map: low or high layers of JEEP, or those of the method."""
        from retcon.methods.common.registry import method_class

        names = [f.name for f in fields(method_class(self.method))]
        name = next((n for n in (("low", "high")[min(row, 1)], "layers", "layer") if n in names), None)
        if name is None:
            raise InvalidSetting(f"{self.method} has no setting that names a layer")
        self.settings = {**self.settings, name: layer if name == "layer" else (layer,)}
        self.estimate = None
        self.changed()

    def dry_run(self) -> Job:
        """Say what editing the draft would take, by the method and settings that are chosen now."""
        method, settings = self.method, dict(self.settings)

        def run(lm: "LM", progress: Progress) -> str:
            from retcon.workflow import estimate, needed_moments, resolve

            self._need_draft()
            draft = self.draft
            with self.store.at(lm):
                edits = [edit for case in draft for edit in case.edits]
                resolved = resolve(lm, method, given=settings, edits=edits)
                found = estimate(lm, resolved, edits, moments=needed_moments(lm, resolved.method))
            if (self.method, self.settings, self.draft) == (method, settings, draft):  # none was changed meanwhile
                self.estimate, self.layers = found, _layers(resolved.settings)
            return f"about {found.edit_seconds:.1f} s for {plural(len(edits), 'edit')}"

        return self.jobs.submit("dry run", run)

    def edit(self) -> Job:
        """Edit the draft into the store, by the method and settings that are chosen now."""
        method, settings = self.method, dict(self.settings)

        def run(lm: "LM", progress: Progress) -> str:
            from retcon.workflow import needed_moments, resolve

            self._need_draft()
            cases = list(self.draft)
            progress("choosing settings", 0, 0)
            edits = [edit for case in cases for edit in case.edits]  # without a preset, clamps are fitted to them
            resolved = resolve(lm, method, given=settings, edits=edits)
            entry = self.store.edit(
                lm, cases, resolved.method, moments=needed_moments(lm, resolved.method), progress=progress
            )
            reports = [r for _, delta in entry.sets.values() if delta for r in self.store.delta(delta).report]
            took = sum(bool(r.greedy_match) for r in reports)
            edited = {case.id for case in cases}
            self.draft = [case for case in self.draft if case.id not in edited]  # some may have come meanwhile
            self.estimate = None
            facts, over = self.store.path / FACTS / f"{entry.id}.jsonl", assignments(settings)
            self._typed("edit", self.model, facts, method=method, set=over, store=self.store.path, how=self._loaded)
            return f"{took} of {plural(len(reports), 'edit')} took"

        return self.jobs.submit("edit", run)

    def _need_draft(self) -> None:
        if not self.draft:
            raise InvalidSetting("no facts to edit; add some first")

    def _typed(self, verb: str, *words: object, **options: Any) -> None:
        self.commands = [*self.commands, command_line(verb, *words, **options)]

    @property
    def _loaded(self) -> str:
        return self.loading(self.model) + (f" --dtype {self.dtype}" if self.dtype else "")

    def _state(self, at: str | None) -> str:
        """Return how a command names the state after an entry."""
        return f"{self.store.path}@{at}" if at else str(self.store.path)

    # --- the store -----------------------------------------------------------------------------------------------

    def rows(self, at: str | None = None) -> list[tuple[Entry, bool, int]]:
        """Return the entries that brought facts, oldest first: whether in force after an entry, and how many facts."""
        slots, counts = self.store.state(at).slots, self.store.index.counts()
        return [
            (entry, any(slots.get(slot) is not None for slot in entry.sets), counts.get(entry.id, 0))
            for entry in self.store.log()
            if entry.action == "edit"
        ]

    def facts(self, words: str = "", order: str = "applied", rows: int = N_ROWS, at: str | None = None) -> Listing:
        """Return the facts in force after an entry; the other arguments are those of `listing.listed`."""
        return listed(self.store.facts(at), words, order, rows)

    def _undoing(self, entry: Entry) -> str | None:
        """Return the entry to revert so that `entry` is in force again."""
        for other in reversed(self.store.log()):
            if any(slot in entry.sets and now is None for slot, (_, now) in other.sets.items()):
                return other.id
        return None

    def toggle(self, name: str) -> Job:
        """Take an entry out of force, or back in."""

        def run(lm: "LM", progress: Progress) -> str:
            entry, on = next(((e, on) for e, on, _ in self.rows() if e.id == name), (None, False))
            target = name if on else self._undoing(entry) if entry is not None else None
            if target is None:
                raise InvalidSetting(f"no entry {name!r} that can be switched")
            made = self.store.revert(target)
            self._typed("revert", target, store=self.store.path)
            return made.message

        return self.jobs.submit("switch", run)

    def revert_fact(self, fact: str, repropose: bool = False) -> Job:
        """Take one fact out of its batch."""

        def run(lm: "LM", progress: Progress) -> str:
            editor = self.settings.get("editor")
            entry = self.store.revert_fact(lm, fact, repropose=repropose, editor=editor, progress=progress)
            made = {"fact": fact, "repropose": repropose, "editor": editor}
            self._typed("revert", **made, store=self.store.path, how=self._loaded)
            return _searched(entry)

        return self.jobs.submit("revert fact", run)

    def amend(self, fact: str, target: str) -> Job:
        """Give a fact in force another answer; its batch is written again."""

        def run(lm: "LM", progress: Progress) -> str:
            editor = self.settings.get("editor")
            entry = self.store.amend(lm, fact, target.strip(), editor=editor, progress=progress)
            self.conflicts = [c for c in self.conflicts if c.fact != fact]
            self._typed("amend", fact, target=target.strip(), editor=editor, store=self.store.path, how=self._loaded)
            return _searched(entry)

        return self.jobs.submit("amend", run)

    # --- looking -------------------------------------------------------------------------------------------------

    def ask(self, prompt: str, chat: bool = False, at: str | None = None) -> Job:
        """Let the model go on after a prompt, without the edits and with them."""

        def run(lm: "LM", progress: Progress) -> str:
            if not prompt.strip():
                raise InvalidSetting("the prompt is empty; give some text to go on from")
            said = partial(lm.complete, prompt, max_new_tokens=256 if chat else 24, chat=chat)
            with self.store.at(lm, "base"):
                before = said()
            with self.store.at(lm, at):
                after = said()
            self.replies = [Reply(prompt, before, after), *self.replies[: N_ANSWERS - 1]]
            self._typed("complete", self.model, prompt, delta=self._state(at), chat=chat, how=self._loaded)
            return "changed" if before != after else "the answer is the same"

        return self.jobs.submit("ask", run)

    def verify(self, at: str | None = None) -> Job:
        """Put all checks of the facts in force after an entry to the model."""

        def run(lm: "LM", progress: Progress) -> str:
            from retcon.store.verify import verify

            self.verification = verify(self.store, lm, at=at, on_progress=lambda stage: progress(stage, 0, 0))
            self._typed("verify", at, store=self.store.path, how=self._loaded)
            failed = self.verification.failed
            return f"{plural(len(failed), 'check')} failed" if failed else "nothing broke"

        return self.jobs.submit("verify", run)

    def lamps(self) -> list["Lamp"]:
        """Return the four questions, with counts and the cases that fell short: those that broke first."""
        from retcon.store.verify import KINDS, TITLES

        counts = self.verification.counts() if self.verification else {}
        checks = self.verification.checks if self.verification else ()
        found = []
        for kind in KINDS[:4]:
            cases = [check for check in checks if check.kind == kind and check.outcome != "passed"]
            cases.sort(key=lambda check: check.outcome != "broke")
            found.append(Lamp(TITLES[kind], tuple(cases), **counts.get(kind, {})))
        return found

    def probe(self, trace: bool = False, at: str | None = None) -> Job:
        """Read where the facts of the draft (or those in force) sit, per layer; or trace the first of them."""

        def run(lm: "LM", progress: Progress) -> str:
            cases = self.draft or self.store.cases(at)
            edits = [edit for case in cases for edit in case.edits][:100]
            with self.store.at(lm, "base"):
                self.maps = [trace_map(lm, edits, progress) if trace else contrast_map(lm, edits, progress)]
            return self.maps[0].title

        return self.jobs.submit("trace" if trace else "contrast", run)

    def export(self, folder: str, form: str, at: str | None = None) -> Job:
        """Write the edited model for others to load."""

        def run(lm: "LM", progress: Progress) -> str:
            from retcon.export import export

            if not folder.strip():
                raise InvalidSetting("name the folder that the export goes to")
            progress("writing", 0, 0)
            stored = _as_stored(lm)
            with self.store.at(stored, at) as state:
                names = [f"{d}.safetensors" for d in state.deltas]
                made = export(stored, folder, format=form, files=names)  # type: ignore[arg-type]
            how = self.loading(self.model)
            self._typed("export", self.model, self._state(at), format=form, out=folder, how=how)
            return f"wrote {folder}: {made.n_bytes:,} bytes"

        return self.jobs.submit("export", run)


def _as_stored(lm: "LM") -> "LM":
    """Return the model in its checkpoint's dtype, which `retcon export` writes: on a CPU it works in float32."""
    from retcon.lm.load import load

    if lm.source is None or lm.device.type != "cpu":
        return lm
    name, options = lm.source
    return load(name, dtype="auto", **options)


def _searched(entry: Entry) -> str:
    return f"{entry.message}; {plural(entry.about.get('searched', 0), 'value')} searched"


def _layers(settings: Mapping[str, Any]) -> str:
    """Return the layers that a method's settings name."""
    from retcon.methods.common.contract import LAYER_SETTINGS

    parts = []
    for name in LAYER_SETTINGS:
        value = settings.get(name)
        if isinstance(value, list | tuple | range) and value:
            parts.append(f"{name + ' ' if name in ('low', 'high') else ''}{', '.join(map(str, value))}")
        elif isinstance(value, int):
            parts.append(str(value))
    return "; ".join(parts)
