"""`retcon edit`: facts in, a delta out."""

import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from retcon.cli.chat_options import chat_options
from retcon.cli.facts import reads_facts
from retcon.cli.models import load_deltas, load_model, loading_options, loads_a_model
from retcon.cli.options import Assignments, Corpus, Json, Method, Model, On, OtherBase, Preset, PresetsOf, Seed, Shrink
from retcon.cli.output_checks import check_output
from retcon.cli.printing import console, emit, plural, program, seconds, size, styled, warn
from retcon.cli.progress import progress_bars, spinner
from retcon.cli.stores import Message, entry_record, open_store
from retcon.cli.tables import changes_table, edits_preview, edits_table, estimate_table, settings_table
from retcon.cluster import workers, working_on
from retcon.errors import InvalidSetting
from retcon.memory.corpus import check_corpus
from retcon.work import Workers
from retcon.workflow import (
    Made,
    Resolved,
    check_replaces_its_like,
    estimate,
    facts_that_fit,
    needed_moments,
    read_facts,
    read_settings,
    remedy,
    resolve,
    took_line,
    write_facts,
)
from retcon.workflow.facts import Facts, Reading

if TYPE_CHECKING:
    from retcon.evaluation import Evaluation
    from retcon.lm.model import LM
    from retcon.memory.moments import Moments
    from retcon.store import Store


@loads_a_model
@reads_facts("EDITS", trains=True, conflicts="error")
def edit(
    model: Model,
    edits: Annotated[
        Path,
        typer.Argument(
            metavar="EDITS",
            help="Facts: JSON, JSON lines or CSV with prompt, subject and target_new, or any format of docs/data.md; "
            "hub:NAME.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DELTA", help="File that the delta goes to.")] = None,
    method: Method = "jeep",
    dataset: PresetsOf = None,
    preset: Preset = None,
    assignments: Assignments = None,
    layers: Annotated[
        Literal["probe"] | None, typer.Option(help="Edit the layers that the contrast-based probe advises for EDITS.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Edits written at once, each batch on top of those before.",
            show_default="all, or 1 for methods that take one fact",
        ),
    ] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(
            "--delta",
            metavar="DELTA",
            help="A delta to edit on top of; repeat for several, in order. A method that remembers its earlier batches "
            "goes on from the last.",
        ),
    ] = None,
    corpus: Corpus = None,
    *,
    reading: Reading,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Measure the model before and after, on the file's own queries.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be edited and what it would take; save nothing.")
    ] = False,
    require: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of edits that must take, or the exit code is 1; the delta is saved."),
    ] = 0.5,
    store_path: Annotated[
        Path | None,
        typer.Option(
            "--store",
            metavar="DIR",
            help="Instead of --out: a store (retcon init) that the edit becomes an entry of, on top of what is there.",
        ),
    ] = None,
    message: Message = "",
    on: On = "local",
    shrink: Shrink = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is at DELTA.")] = False,
    seed: Seed = 0,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Edit facts into a model and save the change as a delta. The model's files are not touched.

    An edit has taken when the edited model's own answer to its prompt begins with the new one.

    A run that was killed goes on where it was when the same command is given again.
    """
    _check_options(out=out, store=store_path, earlier=earlier, message=message, evaluate=evaluate, dry_run=dry_run)
    check_output(out, Path(model), edits, *(earlier or []), None if corpus is None else Path(corpus))
    place = workers(on)
    assigned = [*(assignments or ()), *(["shrink=true"] if shrink else [])]
    given = read_settings(method, dataset=dataset, preset=preset, assignments=assigned)
    if layers and "layers" in given:
        raise InvalidSetting("--layers probe and --set layers=... both say which layers to edit; give one of them")
    facts = read_facts(edits, reading)
    if corpus is not None:
        check_corpus(corpus)
    started = time.perf_counter()
    store = None if store_path is None else open_store(store_path)
    if store is not None:
        store.check_new_facts(facts.cases)  # what can be refused before the model is loaded
    lm = _load(model, store, earlier or [], other_base)
    loading = time.perf_counter() - started
    facts = facts_that_fit(lm, facts, reading.on_error)
    with spinner("probing for layers" if layers else "choosing settings"):
        resolved = resolve(
            lm,
            method,
            dataset=dataset,
            preset=preset,
            given=given,
            edits=facts.edits,
            batch_size=batch_size,
            probe=layers is not None,
        )
    _show_settings(lm, resolved, facts, as_json)

    def check_out() -> None:
        if out is not None and not (force or dry_run):
            check_replaces_its_like(out, lm, resolved, facts.edits, seed)

    check_out()
    with spinner("reading the corpus"):
        moments = needed_moments(lm, resolved.method, corpus)
    run = _Run(
        lm=lm,
        model=model,
        resolved=resolved,
        facts=facts,
        moments=moments,
        batch_size=batch_size,
        seed=seed,
        place=place,
        require=require,
        as_json=as_json,
    )
    if dry_run:
        _show_estimate(run)
    elif store is not None:
        _edit_store(run, store, message, corpus)
    else:
        assert out is not None
        _edit_file(run, out, check_out, evaluate=evaluate, loading=loading)


def _check_options(
    *, out: Path | None, store: Path | None, earlier: list[Path] | None, message: str, evaluate: bool, dry_run: bool
) -> None:
    """Refuse options that exclude each other, and an edit that would go nowhere."""
    if store is not None and (out is not None or earlier):
        what = "--out" if out is not None else "--delta"
        raise InvalidSetting(f"--store and {what} exclude each other: a store keeps the delta, on top of its own")
    if store is not None and evaluate:
        raise InvalidSetting("with --store, measure with `retcon verify` instead of --evaluate")
    if store is None and message:
        raise InvalidSetting("-m is the message of a store's log; give --store, or leave -m out")
    if out is None and store is None and not dry_run:
        raise InvalidSetting(
            "--out DELTA is missing: name the file that the delta goes to, a --store, or ask for a --dry-run"
        )


def _load(model: str, store: "Store | None", earlier: list[Path], other_base: bool) -> "LM":
    """Return the model with the deltas that the edit comes on top of, read first: a store's, or those named."""
    before = load_deltas(earlier) if store is None else store.deltas()
    lm = load_model(model)
    if store is not None:
        store.checkout(lm)
    else:
        for each in before:
            lm.apply(each, other_base=other_base)
    return lm


def _show_settings(lm: "LM", resolved: Resolved, facts: Facts, as_json: bool) -> None:
    show = console(stderr=as_json)
    show.print(styled("[bold]{}[/] on {}", resolved.name, lm))
    show.print(f"edits     {facts.about}", soft_wrap=True)
    show.print(f"settings  {resolved.source}", soft_wrap=True)
    for note in resolved.notes:
        show.print(f"          {note}", soft_wrap=True)
    show.print(settings_table(resolved))
    show.print()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """An edit that is ready to be made."""

    lm: "LM"
    model: str
    resolved: Resolved
    facts: Facts
    moments: "Moments"
    batch_size: int | None
    seed: int
    place: AbstractContextManager[Workers]
    require: float
    """Share of the edits that must take."""
    as_json: bool

    @property
    def show(self) -> Console:
        """Where people read what became of it."""
        return console(stderr=self.as_json)

    def judge(self, n_took: int, n: int, consequence: str) -> None:
        """Exit with 1 where fewer edits took than must."""
        if n_took < self.require * n:
            edits = plural(n, "edit")
            warn(f"{n_took} of {edits} took, fewer than asked for (--require {self.require:g}); {consequence}")
            raise typer.Exit(1)


def _show_estimate(run: _Run) -> None:
    """Say what would be edited and what it would take."""
    edits = run.facts.edits
    with spinner("trying a few edits"):
        expected = estimate(run.lm, run.resolved, edits, moments=run.moments, batch_size=run.batch_size, seed=run.seed)
    run.show.print(edits_preview(edits))
    run.show.print()
    run.show.print(estimate_table(expected))
    if run.as_json:
        resolved = run.resolved
        emit({"model": run.model, "method": resolved.name, "settings": resolved.settings} | expected.as_dict())


def _edit_file(run: _Run, out: Path, check_out: Callable[[], None], *, evaluate: bool, loading: float) -> None:
    """Save the edit as a delta, measure it where that is asked for, and say what became of it."""
    from retcon.methods.common.sequence import state_after

    lm, facts, show = run.lm, run.facts, run.show
    with run.place as at, working_on(lm, at), progress_bars() as advance:
        made = write_facts(
            lm,
            run.resolved,
            facts.edits,
            moments=run.moments,
            batch_size=run.batch_size,
            state=state_after(lm.applied, run.resolved.method),
            seed=run.seed,
            out=out,
            check_out=check_out,
            progress=advance,
        )
    delta, took = made.delta, {"load": loading, **made.seconds}
    if made.n_resumed:
        show.print(
            styled("[dim]values of {} were there from a run that did not end[/]\n", plural(made.n_resumed, "edit"))
        )
    show.print(edits_table(delta, facts.edits))
    show.print()
    show.print(changes_table(lm, delta))
    show.print()
    measured: Evaluation | None = None
    if evaluate:
        from retcon.evaluation import evaluate as measure

        started = time.perf_counter()
        with progress_bars() as advance:
            measured = measure(lm, facts.cases, delta=delta, seed=run.seed, progress=advance)
        took["evaluate"] = time.perf_counter() - started
        show.print(str(measured.summary()))
        show.print()
    n = len(delta.report)
    took_each = f"{seconds(took['edit'])} for {plural(n, 'edit')}, {seconds(took['edit'] / n)} each"
    beside = f"loading {seconds(took['load'])}, moments {seconds(took['moments'])}"
    measuring = f", measuring {seconds(took['evaluate'])}" if evaluate else ""
    show.print(styled("{}  [dim]({}{})[/]", took_each, beside, measuring))
    show.print(styled("saved  [bold]{}[/]  [dim]{}, delta {}[/]", out, size(out.stat().st_size), delta.id))
    if help_ := remedy(run.resolved, delta):
        show.print(styled("[yellow]tune   {}[/]", help_), soft_wrap=True)
    if run.as_json:
        emit(_record(run, made, out, took, measured))
    else:
        how = chat_options(facts.edits) + loading_options()
        ask = f"{program()} complete {shlex.quote(run.model)} PROMPT --delta {shlex.quote(str(out))}{how}"
        show.print(styled("[dim]try    {}[/]", ask), soft_wrap=True)
    run.judge(made.n_took, n, "the delta is saved and does not do what it should")


def _edit_store(run: _Run, store: "Store", message: str, corpus: str | None) -> None:
    """Make the edit an entry of a store, and say what became of it."""
    with run.place as at, working_on(run.lm, at), progress_bars() as advance:
        entry = store.edit(
            run.lm,
            run.facts.cases,
            run.resolved.method,
            batch_size=run.batch_size,
            moments=run.moments,
            seed=run.seed,
            message=message,
            corpus=corpus,
            progress=advance,
        )
    made = [store.delta(delta) for _, delta in entry.sets.values() if delta is not None]
    reports = [report for delta in made for report in delta.report]
    took = sum(bool(report.greedy_match) for report in reports)
    n_bytes = sum(store.file_size(delta.id) for delta in made)
    run.show.print(took_line(reports), soft_wrap=True)
    run.show.print(
        styled(
            "entry  [yellow]{}[/]  {}  [dim]{}, {}; state {}[/]",
            entry.id,
            entry.message,
            plural(len(made), "delta"),
            size(n_bytes),
            store.state().id,
        )
    )
    if run.as_json:
        emit(
            entry_record(entry, store.state(entry.id))
            | {"took": took, "report": [asdict(r) for r in reports], "bytes": n_bytes}
        )
    run.judge(took, len(reports), f"{program()} revert {entry.id} takes the entry back")


def _record(run: _Run, made: Made, out: Path, took: dict[str, float], measured: "Evaluation | None") -> dict[str, Any]:
    delta, resolved = made.delta, run.resolved
    return {
        "model": run.model,
        "base": delta.base,
        "method": resolved.name,
        "preset": resolved.preset and resolved.preset.name,
        "settings": resolved.settings,
        "n_probed": resolved.n_probed,
        "notes": list(resolved.notes),
        "seed": run.seed,
        "delta": {"id": delta.id, "file": str(out), "bytes": delta.nbytes()},
        "report": [asdict(r) for r in delta.report],
        "norms": delta.norms(),
        "ranks": delta.ranks(),
        "seconds": took,
        "evaluation": measured.summary().as_dict() if measured else None,
    }
