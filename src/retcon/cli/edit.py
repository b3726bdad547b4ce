"""`retcon edit`: facts in, a delta out."""

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from retcon.cli.chat_options import chat_options
from retcon.cli.facts import reads_facts
from retcon.cli.models import load_deltas, load_model, loading_options, loads_a_model
from retcon.cli.options import Assignments, Corpus, Json, Method, Model, On, OtherBase, Preset, PresetsOf, Seed, Shrink
from retcon.cli.output_checks import check_output
from retcon.cli.printing import console, emit, plural, program, seconds, size, styled, warn
from retcon.cli.progress import progress_bars, spinner
from retcon.cli.stores import entry_record, open_store
from retcon.cli.tables import changes_table, edits_preview, edits_table, estimate_table, settings_table
from retcon.cluster import workers, working_on
from retcon.errors import InvalidSetting
from retcon.memory.corpus import check_corpus
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
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DELTA", help="File that the delta goes to.", show_default=False)
    ] = None,
    method: Method = "jeep",
    dataset: PresetsOf = None,
    preset: Preset = None,
    assignments: Assignments = None,
    layers: Annotated[
        Literal["probe"] | None,
        typer.Option(help="Edit the layers that the contrast-based probe advises for EDITS.", show_default=False),
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
            show_default=False,
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
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Instead of --out: a store (retcon init) that the edit becomes an entry of, on top of what is there.",
            show_default=False,
        ),
    ] = None,
    message: Annotated[
        str, typer.Option("-m", "--message", help="Message of the store's log.", show_default=False)
    ] = "",
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
    if store is not None and (out is not None or earlier):
        what = "--out" if out is not None else "--delta"
        raise InvalidSetting(f"--store and {what} exclude each other: a store keeps the delta, on top of its own")
    if store is not None and evaluate:
        raise InvalidSetting("with --store, measure with `retcon verify` instead of --evaluate")
    if store is None and message:
        raise InvalidSetting("-m is the message of a store's log; give --store, or leave -m out")
    if out is not None:
        check_output(out, Path(model), edits, *(earlier or []), None if corpus is None else Path(corpus))
    elif store is None and not dry_run:
        raise InvalidSetting(
            "--out DELTA is missing: name the file that the delta goes to, a --store, or ask for a --dry-run"
        )
    place = workers(on)
    assigned = [*(assignments or ()), *(["shrink=true"] if shrink else [])]
    given = read_settings(method, dataset=dataset, preset=preset, assignments=assigned)
    if layers and "layers" in given:
        raise InvalidSetting("--layers probe and --set layers=... both say which layers to edit; give one of them")
    facts = read_facts(edits, reading)
    if corpus is not None:
        check_corpus(corpus)
    show = console(stderr=as_json)
    started = time.perf_counter()
    kept_in = None if store is None else open_store(store)
    if kept_in is not None:
        kept_in.check_new_facts(facts.cases)  # what can be refused before the model is loaded
    before = load_deltas(earlier or []) if kept_in is None else kept_in.deltas()
    lm = load_model(model)
    if kept_in is None:
        for each in before:
            lm.apply(each, other_base=other_base)
    else:
        kept_in.checkout(lm)
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
    show.print(styled("[bold]{}[/] on {}", resolved.name, lm))
    show.print(f"edits     {facts.about}", soft_wrap=True)
    show.print(f"settings  {resolved.source}", soft_wrap=True)
    for note in resolved.notes:
        show.print(f"          {note}", soft_wrap=True)
    show.print(settings_table(resolved))
    show.print()

    def check_out() -> None:
        if out is not None and not (force or dry_run):
            check_replaces_its_like(out, lm, resolved, facts.edits, seed)

    check_out()
    with spinner("reading the corpus"):
        moments = needed_moments(lm, resolved.method, corpus)
    if dry_run or (out is None and kept_in is None):
        with spinner("trying a few edits"):
            expected = estimate(lm, resolved, facts.edits, moments=moments, batch_size=batch_size, seed=seed)
        show.print(edits_preview(facts.edits))
        show.print()
        show.print(estimate_table(expected))
        if as_json:
            emit({"model": model, "method": resolved.name, "settings": resolved.settings} | expected.as_dict())
        return

    if kept_in is not None:
        with place as at, working_on(lm, at):
            _edit_store(kept_in, lm, resolved, facts, moments, batch_size, seed, corpus, message, require, as_json)
        return
    from retcon.methods.common.sequence import state_after

    assert out is not None
    with place as at, working_on(lm, at), progress_bars() as advance:
        made = write_facts(
            lm,
            resolved,
            facts.edits,
            moments=moments,
            batch_size=batch_size,
            state=state_after(before, resolved.method),
            seed=seed,
            out=out,
            check_out=check_out,
            progress=advance,
        )
    _show_made(lm, model, resolved, facts, made, out, loading, evaluate, seed, require, as_json)


def _show_made(
    lm: "LM",
    model: str,
    resolved: Resolved,
    facts: Facts,
    made: Made,
    out: Path,
    loading: float,
    evaluate: bool,
    seed: int,
    require: float,
    as_json: bool,
) -> None:
    """Say what became of the edits of a delta that is saved, and measure it where that is asked for."""
    show = console(stderr=as_json)
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
            measured = measure(lm, facts.cases, delta=delta, seed=seed, progress=advance)
        took["evaluate"] = time.perf_counter() - started
        show.print(str(measured.summary()))
        show.print()
    n = len(delta.report)
    took_each = f"{seconds(took['edit'])} for {plural(n, 'edit')}, {seconds(took['edit'] / n)} each"
    beside = f"loading {seconds(took['load'])}, moments {seconds(took['moments'])}"
    measuring = f", measuring {seconds(took['evaluate'])}" if evaluate else ""
    show.print(styled("{}  [dim]({}{})[/]", took_each, beside, measuring))
    show.print(styled("saved  [bold]{}[/]  [dim]{}, delta {}[/]", out, size(out.stat().st_size), delta.id))
    if help_ := remedy(resolved, delta):
        show.print(styled("[yellow]tune   {}[/]", help_), soft_wrap=True)
    if as_json:
        emit(_record(model, resolved, made, out, seed, took, measured))
    else:
        how = chat_options(facts.edits) + loading_options()
        ask = f"{program()} complete {shlex.quote(model)} PROMPT --delta {shlex.quote(str(out))}{how}"
        show.print(styled("[dim]try    {}[/]", ask), soft_wrap=True)
    if made.n_took < require * n:
        warn(
            f"{made.n_took} of {plural(n, 'edit')} took, fewer than asked for (--require {require:g}); the delta is "
            "saved and does not do what it should"
        )
        raise typer.Exit(1)


def _edit_store(
    store: "Store",
    lm: "LM",
    resolved: Resolved,
    facts: Facts,
    moments: "Moments",
    batch_size: int | None,
    seed: int,
    corpus: str | None,
    message: str,
    require: float,
    as_json: bool,
) -> None:
    """Make the edit an entry of a store, and say what became of it."""
    show = console(stderr=as_json)
    with progress_bars() as advance:
        entry = store.edit(
            lm,
            facts.cases,
            resolved.method,
            batch_size=batch_size,
            moments=moments,
            seed=seed,
            message=message,
            corpus=corpus,
            progress=advance,
        )
    made = [store.delta(delta) for _, delta in entry.sets.values() if delta is not None]
    reports = [report for delta in made for report in delta.report]
    took = sum(bool(report.greedy_match) for report in reports)
    n_bytes = sum(store.file_size(delta.id) for delta in made)
    show.print(took_line(reports), soft_wrap=True)
    show.print(
        styled(
            "entry  [yellow]{}[/]  {}  [dim]{}, {}; state {}[/]",
            entry.id,
            entry.message,
            plural(len(made), "delta"),
            size(n_bytes),
            store.state().id,
        )
    )
    if as_json:
        emit(
            entry_record(entry, store.state(entry.id))
            | {"took": took, "report": [asdict(r) for r in reports], "bytes": n_bytes}
        )
    if took < require * len(reports):
        warn(
            f"{took} of {plural(len(reports), 'edit')} took, fewer than asked for (--require {require:g}); "
            f"{program()} revert {entry.id} takes the entry back"
        )
        raise typer.Exit(1)


def _record(
    model: str,
    resolved: Resolved,
    made: Made,
    out: Path,
    seed: int,
    took: dict[str, float],
    measured: "Evaluation | None",
) -> dict[str, Any]:
    delta = made.delta
    return {
        "model": model,
        "base": delta.base,
        "method": resolved.name,
        "preset": resolved.preset and resolved.preset.name,
        "settings": resolved.settings,
        "n_probed": resolved.n_probed,
        "notes": list(resolved.notes),
        "seed": seed,
        "delta": {"id": delta.id, "file": str(out), "bytes": delta.nbytes()},
        "report": [asdict(r) for r in delta.report],
        "norms": delta.norms(),
        "ranks": delta.ranks(),
        "seconds": took,
        "evaluation": measured.summary().as_dict() if measured else None,
    }
