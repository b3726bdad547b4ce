"""Knowledge regression tests: every check of every fact in force, and since which entry what fails does.

found = verify(store, lm)
print(found.markdown())
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from retcon.edits import Case, Query
from retcon.errors import ConflictingEdits, InvalidEdit, InvalidSetting, MalformedFile
from retcon.escaping import markdown
from retcon.pages import PASSES_BY_CHOICE, Answered, Fact, FactOutcome, FactTable, PromptKind, render, worst_first
from retcon.pages.junit import TestCase, junit
from retcon.plural import plural
from retcon.store.history import Entry, State, in_force_since
from retcon.store.index import clashes, two_answers
from retcon.store.store import Store
from retcon.work import silent

if TYPE_CHECKING:
    from retcon.lm.model import LM

CheckKind = Literal["took", "generalised", "follows", "local", "stays"]
"""The fact's own prompt; its paraphrases; what follows from it (portability, two hops); other questions, whose answers
must stay as the unedited model's; a fact of the list that must stay."""
Outcome = Literal["passed", "broke", "never"]
"""`broke`: it passed when its fact was written (for what must stay: on the base), and an entry has broken it; `never`:
it has not passed yet. Where nobody looked since when (`bisect=False`), all that fails is `broke`."""

KINDS: tuple[CheckKind, ...] = ("took", "generalised", "follows", "local", "stays")
TITLES: Mapping[CheckKind, str] = {
    "took": "own prompts give the new answer",
    "generalised": "paraphrases give it too",
    "follows": "what follows is answered",
    "local": "other answers are as they were",
    "stays": "what must stay does",
}
_KIND_OF: Mapping[PromptKind, CheckKind] = {
    "own": "took", "paraphrase": "generalised", "follows": "follows", "neighbour": "local",
}  # fmt: skip
MAX_ANSWERS = 200
"""Failing prompts at most for which the model's own words are written: what broke first, own prompts before others."""


@dataclass(frozen=True)
class Check:
    """One check and what came of it."""

    fact: str
    query: Query
    kind: CheckKind
    outcome: Outcome
    since: Entry | None = None
    """The entry in force that broke it."""
    said: str = ""
    """What the model says now, where the check fails."""

    @property
    def wanted(self) -> str:
        """The answer that passes."""
        return "as before the edits" if self.kind == "local" else self.query.target or ""

    @property
    def words(self) -> str:
        """The failure in a sentence."""
        never = "has never passed" if self.outcome == "never" else "the entry that broke it was not searched for"
        how = never if self.since is None else f"broke in {self.since.id} ({self.since.message})"
        said = f", found {self.said!r}" if self.said else ""
        return f"{self.query.prompt!r}: wanted {self.wanted!r}{said}; {how}"


@dataclass(frozen=True)
class Verification:
    """What a store's checks say of the model in one state."""

    store: str
    model: str
    state: State
    checks: tuple[Check, ...]
    n_facts: int
    n_skipped: int
    """Checks that could not be asked (no target, no text)."""
    strict: bool = False

    @property
    def failed(self) -> tuple[Check, ...]:
        """Those that count: everything that broke, own prompts that never passed, and with `strict` all others."""
        return tuple(c for c in self.checks if c.outcome == "broke" or (c.outcome == "never" and self._counts(c)))

    def _counts(self, check: Check) -> bool:
        return self.strict or check.kind == "took"

    @property
    def ok(self) -> bool:
        """Nothing that counts fails."""
        return not self.failed

    def counts(self) -> dict[CheckKind, dict[Outcome, int]]:
        """Count checks by kind and outcome."""
        found: dict[CheckKind, dict[Outcome, int]] = {}
        for check in self.checks:
            row = found.setdefault(check.kind, {"passed": 0, "broke": 0, "never": 0})
            row[check.outcome] += 1
        return {kind: found[kind] for kind in KINDS if kind in found}

    def junit(self) -> str:
        """Return the checks as JUnit XML: a test case each, a failure where it counts, `skipped` if it never passed."""
        failed = set(map(id, self.failed))
        cases = [
            TestCase(
                f"{check.kind}.{check.fact}",
                f"{check.query.id}: {check.query.prompt}",
                "passed" if check.outcome == "passed" else "failed" if id(check) in failed else "skipped",
                check.words,
            )
            for check in self.checks
        ]
        return junit(f"retcon verify {self.state.id}", cases)

    def html(self) -> str:
        """Return the result as one self-contained page: a row per fact, to filter and to sort."""
        return render("verify.html", found=self, titles=TITLES, table=self._table())

    def _table(self) -> FactTable:
        by_fact: dict[str, list[Check]] = {}
        for check in self.checks:
            by_fact.setdefault(check.fact, []).append(check)
        facts = []
        for name, checks in by_fact.items():
            own = next((c for c in checks if c.query.axis == "rewrite"), checks[0])
            outcome = FactOutcome(tuple(map(_answered, checks)))
            facts.append(Fact(name, own.query.prompt, own.query.contrast or "", own.wanted, (outcome,)))
        return FactTable(
            "Facts in force, and what must stay", (self.state.id,), worst_first(facts), passes=PASSES_BY_CHOICE
        )

    def markdown(self) -> str:
        """Return the result as Markdown: for a pull request's comment or a job's summary."""
        verdict = "nothing broke" if self.ok else f"{plural(len(self.failed), 'check')} failed"
        lines = [
            f"## {'✅' if self.ok else '❌'} retcon verify: {verdict}",
            "",
            f"{plural(self.n_facts, 'fact')} in force in {plural(len(self.state.deltas), 'delta')} on "
            f"{markdown(self.model)}, state `{self.state.id}`.",
            "",
            "| check | asked | pass | broke | never passed |",
            "|---|---:|---:|---:|---:|",
        ]
        for kind, row in self.counts().items():
            lines.append(
                f"| {TITLES[kind]} | {sum(row.values()):,} | {row['passed']:,} | {row['broke']:,} | {row['never']:,} |"
            )
        if self.failed:
            lines += ["", "| fact | prompt | wanted | found | since |", "|---|---|---|---|---|"]
            for check in self.failed[:50]:
                never = "never passed" if check.outcome == "never" else "not looked for"
                since = f"`{check.since.id}` {markdown(check.since.message)}" if check.since else never
                cells = map(markdown, (check.fact, check.query.prompt, check.wanted, check.said))
                lines.append(f"| {' | '.join([*cells, since])} |")
            if len(self.failed) > 50:
                lines.append(f"\nand {len(self.failed) - 50:,} more")
        return "\n".join(lines) + "\n"


def _answered(check: Check) -> Answered:
    """Return a check as the table of facts shows it."""
    from retcon.evaluation.metrics import prompt_kind

    passed, broke = check.outcome == "passed", check.outcome == "broke"
    since = f"broke in {check.since.id} ({check.since.message})" if check.since is not None else ""
    after = check.wanted if passed else check.said or "something else"
    kind: PromptKind = "own" if check.kind == "stays" else prompt_kind(check.query.axis)
    return Answered(kind, check.query.prompt, check.wanted, check.query.contrast or "", after, passed, broke, since)


def verify(
    store: Store,
    lm: "LM",
    *,
    at: str | None = None,
    stay: Sequence[Case] = (),
    strict: bool = False,
    bisect: bool = True,
    on_progress: Callable[[str], None] = silent,
) -> Verification:
    """Put every check of the facts in force after an entry to the model, and find since when what fails does.

    A check passes where the whole answer is the model's own greedy choice; one of locality, where the model chooses as
    the unedited one does. The model is left as it was.

    Args:
        at: an entry; now by default.
        stay: facts that must stay, whose targets are the answers the unedited model gives.
        strict: paraphrases, consequences and locality that have never passed count as failures too.
        bisect: find the entry in force that broke what fails (a few more passes over those checks alone). Without it,
            what never passed cannot be told apart, so that every check that fails counts.

    Raises:
        WrongBase: the store is of another model.
        ConflictingEdits: two facts in force answer one question.
        InvalidEdit: a fact of the list has the id of one in force.
        InvalidSetting: there is nothing to check.
        MalformedFile: a delta is missing that the state needs, or with `bisect` an earlier one.
    """
    from retcon.evaluation.metrics import prompt_kind

    lines, history = store.facts(at), store.history_of_states()
    if at is not None:
        history = history[: 0 if at == "base" else [e.id for e, _ in history].index(store.entry(at).id) + 1]
    cases = [store.index.case(line) for line in lines]
    if clash := {c.id for c in cases} & {c.id for c in stay}:
        raise InvalidEdit(f"fact {min(clash)!r} is in force, and in the list of what must stay; take it out there")
    if not cases and not stay:
        raise InvalidSetting(f"{store.path}: no facts are in force, so there is nothing to verify")
    if (pair := next(clashes(lines), None)) is not None:
        raise ConflictingEdits(two_answers(*pair))
    n_before = {entry.id: n for n, (entry, _) in enumerate(history)}
    born = {line.fact: n_before[line.entry] for line in lines}
    asked = [*cases, *(replace(c, edits=c.edits[:1], queries=_own(c)) for c in stay)]
    staying = {c.id for c in stay}
    asker = _Asker(store, lm, asked, on_progress)
    now = asker.ask(at, asked)
    failing = [place for place, passed in now.items() if not passed]
    since: dict[tuple[str, str], Entry | None] = dict.fromkeys(failing)
    if bisect and failing:
        on_progress("looking for the entries that broke what fails")
        try:
            since |= _blame(asker, store.state("base"), history, failing, born)
        except MalformedFile as error:  # `gc` removes deltas that only earlier states need
            raise MalformedFile(
                f"{error}. An earlier state cannot be asked without it; ",
                python="verify the present one alone (bisect=False)",
                option="verify the present one alone (--no-bisect)",
                page="retcon verify --no-bisect checks the present one alone",
            ) from None
    kinds: dict[tuple[str, str], CheckKind] = {
        (case.id, query.id): "stays" if case.id in staying else _KIND_OF[prompt_kind(query.axis)]
        for case in asked
        for query in case.queries
    }
    deciding = sorted(failing, key=lambda place: (since[place] is None, kinds[place] != "took"))
    said = asker.say(at, deciding[:MAX_ANSWERS])
    checks = []
    for case in asked:
        for query in case.queries:
            place = (case.id, query.id)
            if place not in now:
                continue
            entry = since.get(place)
            outcome: Outcome = "passed" if now[place] else "never" if entry is None and bisect else "broke"
            checks.append(Check(case.id, query, kinds[place], outcome, entry, said.get(place, "")))
    n_queries = sum(len(case.queries) for case in asked)
    return Verification(
        str(store.path), store.model, store.state(at), tuple(checks), len(lines), n_queries - len(checks), strict
    )


def _own(case: Case) -> tuple[Query, ...]:
    """Return the checks of what must stay: its own prompts, or all where it has none of those."""
    from retcon.evaluation.metrics import prompt_kind

    return tuple(q for q in case.queries if prompt_kind(q.axis) in ("own", "paraphrase")) or case.queries


def _blame(
    asker: "_Asker",
    base: State,
    history: Sequence[tuple[Entry, State]],
    failing: Iterable[tuple[str, str]],
    born: Mapping[str, int],
) -> dict[tuple[str, str], Entry]:
    """Return the entry in force that broke each failing check, if it passed when its fact was written."""
    by_birth: dict[int, list[tuple[str, str]]] = {}
    for place in failing:
        by_birth.setdefault(born.get(place[0], -1), []).append(place)
    found: dict[tuple[str, str], Entry] = {}
    for first, places in by_birth.items():
        start = base if first < 0 else history[first][1]
        course = in_force_since(start, [entry for entry, _ in history[first + 1 :]])
        if course:
            found |= _broken_in(asker, start, course, places)
    return found


def _broken_in(
    asker: "_Asker", start: State, course: Sequence[tuple[Entry, State]], places: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Entry]:
    """Return the entry of a course that broke each check which passes at its start, and fails in the end."""
    states = [start, *(state for _, state in course)]
    found: dict[tuple[str, str], Entry] = {}

    def search(places: Sequence[tuple[str, str]], good: int, bad: int, step: int) -> None:
        """`places` pass in state `good` and fail in state `bad`: go back in steps that double, then halve."""
        if not places:
            return
        if bad - good == 1:
            found.update(dict.fromkeys(places, course[good][0]))
            return
        middle = max(bad - step, (good + bad) // 2)
        passed = asker.again(states[middle], places)
        search([p for p in places if passed[p]], middle, bad, bad)
        search([p for p in places if not passed[p]], good, middle, 2 * step)

    passed = asker.again(start, places)
    search([p for p in places if passed[p]], 0, len(course), 1)
    return found


class _Asker:
    """Puts checks to the model in a state; the unedited model's choices are asked for once."""

    def __init__(self, store: Store, lm: "LM", cases: Sequence[Case], on_progress: Callable[[str], None]) -> None:
        from retcon.evaluation.measure import measure
        from retcon.evaluation.plan import Measures, plan_queries

        self.store, self.lm, self.on_progress = store, lm, on_progress
        self.cases = {case.id: case for case in cases}
        self.measures = Measures(generate=False)
        self.plan = plan_queries(lm, cases, self.measures)
        on_progress("asking the unedited model")
        with store.at(lm, "base"):
            self.before = measure(lm, self.plan, self.measures, "pre")

    def ask(self, at: str | State | None, cases: Sequence[Case]) -> dict[tuple[str, str], bool]:
        """Return whether each check passes; those that cannot be asked are left out."""
        from retcon.evaluation.measure import measure
        from retcon.evaluation.plan import plan_queries
        from retcon.evaluation.records import passed

        whole = {case.id: case for case in cases} == self.cases
        plan = self.plan if whole else plan_queries(self.lm, cases, self.measures)
        after = f"in state {at.id}" if isinstance(at, State) else f"after {at or 'the last entry'}"
        self.on_progress(f"asking {plural(len(plan.queries), 'check')} {after}")
        with self.store.at(self.lm, at):
            found = measure(self.lm, plan, self.measures, "final", self.before)
        return {
            (str(record.case_id), str(record.query_id)): right
            for record in found.records
            if (right := passed(record)) is not None
        }

    def again(self, at: State, places: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        """Return the same of a few checks, by (fact, query)."""
        wanted = set(places)
        cases = []
        for fact in dict.fromkeys(fact for fact, _ in places):
            case = self.cases[fact]
            cases.append(replace(case, queries=tuple(q for q in case.queries if (fact, q.id) in wanted)))
        found = self.ask(at, cases)
        return {place: found.get(place, False) for place in places}

    def say(self, at: str | None, places: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Return what the model writes after the prompts of these checks."""
        from retcon.evaluation.writing import write_answers

        if not places:
            return {}
        queries = {(c.id, q.id): q for c in self.cases.values() for q in c.queries}
        asked = list(dict.fromkeys((queries[place].prompt, queries[place].chat) for place in places))
        with self.store.at(self.lm, at):
            texts = dict(zip(asked, write_answers(self.lm, asked), strict=True))
        return {place: texts[queries[place].prompt, queries[place].chat] for place in places}
