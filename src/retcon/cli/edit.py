"""`retcon edit`: facts in, a delta out."""

import shlex
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from retcon.cli.estimate import Estimate, estimate
from retcon.cli.moments import TimedMoments, check_corpus, moments_for
from retcon.cli.settings import Resolved, read_settings, resolve
from retcon.cli.shell import (
    Device,
    DType,
    Json,
    Model,
    Seed,
    check_can_write,
    check_not_an_input,
    console,
    count,
    emit,
    load_deltas,
    load_model,
    program,
    progress_bars,
    seconds,
    size,
    spinner,
    warn,
)
from retcon.edits import Case, Edit
from retcon.errors import InvalidSetting, MalformedFile, RetconWarning
from retcon.files import cache_dir

if TYPE_CHECKING:
    from torch import Tensor

    from retcon.delta import Delta, EditReport
    from retcon.evaluation import Evaluation
    from retcon.lm.model import LM
    from retcon.memory.moments import Moments
    from retcon.memory.values import ValueCache

N_SHOWN = 12
"""Edits shown in the report; of more, the least successful ones."""

Conflicts = Literal["error", "drop", "last"]

FileFormat = Annotated[
    str | None,
    typer.Option("--format", metavar="NAME", help="What kind of file that is; by its fields.", show_default=False),
]
OnError = Annotated[
    Literal["stop", "skip"],
    typer.Option("--on-error", help="When a row cannot be used: refuse the file, or leave the row out."),
]


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
    method: Annotated[str, typer.Option(help="One of those that `retcon methods` lists.")] = "jeep",
    dataset: Annotated[
        str | None, typer.Option(help="Which of the model's presets: counterfact, zsre, ...", show_default=False)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A preset by its full name, method/model/dataset.", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A setting over the preset's; repeat.", show_default=False),
    ] = None,
    layers: Annotated[
        Literal["probe"] | None,
        typer.Option(help="Edit the layers that the contrast-based probe advises for EDITS.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Edits written at once, each batch on top of those before; all, or 1 for methods that take one fact.",
            show_default=False,
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
    corpus: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="Text for the second moments, as for moments; WikiText-103.",
            show_default=False,
        ),
    ] = None,
    file_format: FileFormat = None,
    on_error: OnError = "stop",
    start: Annotated[int, typer.Option(min=0, help="Rows of EDITS to pass over.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of EDITS to read; all.", show_default=False)] = None,
    conflicts: Annotated[
        Conflicts, typer.Option(help="When edits contradict each other: refuse, or keep the first or the last.")
    ] = "error",
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
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is at DELTA.")] = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Edit facts into a model and save the change as a delta. The model's files are not touched.

    An edit has taken when the edited model's own answer to its prompt begins with the new one.

    A run that was killed goes on where it was when the same command is given again.
    """
    if out is not None:
        check_can_write(out)
        check_not_an_input(out, [edits, *(earlier or []), *([Path(corpus)] if corpus else [])])
    elif not dry_run:
        raise InvalidSetting("--out DELTA is missing: name the file that the delta goes to, or ask for a --dry-run")
    given = read_settings(method, dataset=dataset, preset=preset, assignments=assignments or ())
    if layers and "layers" in given:
        raise InvalidSetting("--layers probe and --set layers=... both say which layers to edit; give one of them")
    asked = read_asked(edits, start, limit, conflicts, file_format, on_error)
    if corpus is not None:
        check_corpus(corpus)
    show = console(stderr=as_json)
    started = time.perf_counter()
    before = load_deltas(earlier or [])
    lm = load_model(model, device=device, dtype=dtype)
    for each in before:
        lm.apply(each)
    took = {"load": time.perf_counter() - started}
    with spinner("probing for layers" if layers else "choosing settings"):
        probe_with = asked.edits if layers else ()
        resolved = resolve(lm, method, dataset=dataset, preset=preset, given=given, probe_with=probe_with)
    show.print(f"[bold]{resolved.name}[/] on {escape(str(lm))}")
    show.print(f"edits     {escape(asked.about)}", soft_wrap=True)
    show.print(f"settings  {escape(resolved.source)}", soft_wrap=True)
    show.print(resolved.table())
    if dry_run:
        expected = expect(lm, resolved, asked.edits, corpus=corpus, seed=seed, batch_size=batch_size)
        show.print()
        show.print(subjects(asked.edits))
        show.print()
        show.print(expected.table())
        if as_json:
            emit({"model": model, "method": resolved.name, "settings": resolved.settings} | expected.as_dict())
        return
    assert out is not None
    if not force:
        check_replaces_its_like(out, lm, resolved, asked.edits, seed)

    from retcon.memory.values import ValueCache

    kept = ValueCache(cache_dir() / "values")
    state = before[-1].state if before and before[-1].provenance.get("method") == method else None
    delta = make(
        lm,
        resolved,
        asked.edits,
        corpus=corpus,
        seed=seed,
        took=took,
        batch_size=batch_size,
        state=state,
        values=kept,
    )
    delta.save(out)
    kept.discard()
    if kept.resumed:
        show.print(f"[dim]values of {count(kept.resumed, 'edit')} were there from a run that did not end[/]")
    show.print()
    show.print(edits_table(delta, asked.edits))
    show.print()
    show.print(changes_table(lm, delta))
    show.print()
    measured: Evaluation | None = None
    if evaluate:
        from retcon.evaluation import evaluate as measure

        started = time.perf_counter()
        measured = measure(lm, asked.cases, delta=delta, seed=seed, progress=console(stderr=True).is_terminal)
        took["evaluate"] = time.perf_counter() - started
        show.print(escape(str(measured.summary())))
        show.print()
    n = len(delta.report)
    show.print(
        f"{seconds(took['edit'])} for {count(n, 'edit')}, {seconds(took['edit'] / n)} each"
        f"  [dim](loading {seconds(took['load'])}, moments {seconds(took['moments'])}"
        + (f", measuring {seconds(took['evaluate'])}" if evaluate else "")
        + ")[/]"
    )
    show.print(f"saved  [bold]{escape(str(out))}[/]  [dim]{size(out.stat().st_size)}, delta {delta.id}[/]")
    if help_ := remedy(resolved, delta):
        show.print(f"[yellow]tune   {escape(help_)}[/]", soft_wrap=True)
    if as_json:
        emit(_record(model, resolved, delta, out, seed, took, measured))
    else:
        ask = f"{program()} complete {shlex.quote(model)} PROMPT --delta {shlex.quote(str(out))}"
        show.print(f"[dim]try    {escape(ask)}[/]", soft_wrap=True)
    took_hold = sum(bool(r.greedy_match) for r in delta.report)
    if took_hold < require * n:
        warn(
            f"{took_hold} of {count(n, 'edit')} took, fewer than asked for (--require {require:g}); the delta is saved "
            "and does not do what it should"
        )
        raise typer.Exit(1)


def check_replaces_its_like(out: Path, lm: "LM", resolved: Resolved, edits: Sequence[Edit], seed: int) -> None:
    """Refuse to put a delta in the place of another file than the delta of an earlier run of the same command.

    Raises:
        InvalidSetting: the file is something else; --force replaces it.
    """
    from retcon.delta import Delta

    if not out.exists():
        return
    try:
        old = Delta.load(out)
    except MalformedFile:
        raise InvalidSetting(f"{out} exists and is no delta; name another file, or replace it with --force") from None
    made = old.provenance
    same = (old.base, made.get("method"), made.get("seed")) == (lm.fingerprint(), resolved.name, seed)
    if not same or list(old.edits) != list(edits):
        raise InvalidSetting(
            f"{out} holds another delta ({old.id}: {made.get('method')}, {count(len(old.edits), 'edit')}); name "
            "another file, or replace it with --force"
        )


def _record(
    model: str,
    resolved: Resolved,
    delta: "Delta",
    out: Path,
    seed: int,
    took: dict[str, float],
    measured: "Evaluation | None",
) -> dict[str, Any]:
    return {
        "model": model,
        "base": delta.base,
        "method": resolved.name,
        "preset": resolved.preset and resolved.preset.name,
        "settings": resolved.settings,
        "n_probed": resolved.n_probed,
        "seed": seed,
        "delta": {"id": delta.id, "file": str(out), "bytes": delta.nbytes()},
        "report": [asdict(r) for r in delta.report],
        "norms": delta.norms(),
        "ranks": delta.ranks(),
        "seconds": took,
        "evaluation": measured.summary().as_dict() if measured else None,
    }


# --- what is asked -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """The edits of a file, and the cases that measure them."""

    edits: tuple[Edit, ...]
    cases: tuple[Case, ...]
    about: str


def read_asked(
    path: Path,
    start: int,
    limit: int | None,
    conflicts: Conflicts,
    file_format: str | None = None,
    on_error: Literal["stop", "skip"] = "stop",
) -> Asked:
    """Facts from a file of any format; what was left out, and fields that nobody knows, are warned of.

    Raises:
        MalformedFile, ConflictingEdits: the message names file, row and field.
        InvalidSetting: nothing is left to edit.
    """
    from retcon.evaluation import read_cases

    cases, report = read_cases(
        path,
        file_format,  # type: ignore[arg-type]  # an unknown one is refused by name
        start=start,
        limit=limit,
        conflicts=conflicts,
        on_error=on_error,
    )
    for hint in report.hints():
        warnings.warn(f"{path}: {hint}; kept, and not used", RetconWarning, stacklevel=2)
    if report.refused:
        warnings.warn(f"{path}: left out {report.refusals()}", RetconWarning, stacklevel=2)
    asked = Asked(tuple(e for c in cases for e in c.edits), tuple(cases), report.summary())
    if not asked.edits:
        raise InvalidSetting(f"nothing to edit: {report}")
    return asked


# --- making and showing ------------------------------------------------------------------------------------------


def make(
    lm: "LM",
    resolved: Resolved,
    edits: Sequence[Edit],
    *,
    corpus: str | None,
    seed: int,
    took: dict[str, float],
    batch_size: int | None = None,
    state: "Mapping[str, Tensor] | None" = None,
    values: "ValueCache | None" = None,
) -> "Delta":
    """Propose, with progress bars; `took` gets the seconds for moments and, apart from them, for the edit itself."""
    from retcon.methods.common.sequence import in_steps

    given = needed_moments(lm, resolved, corpus)
    started = time.perf_counter()
    with progress_bars() as advance:
        moments = TimedMoments(given, advance)
        delta = in_steps(
            resolved.method,
            lm,
            edits,
            batch_size=batch_size,
            moments=moments,
            state=state,
            values=values,
            seed=seed,
            progress=lambda stage, n, of: advance(f"optimising {stage}", n, of),
        )
    took |= {"moments": moments.seconds, "edit": time.perf_counter() - started - moments.seconds}
    return delta


def needed_moments(lm: "LM", resolved: Resolved, corpus: str | None) -> "Moments":
    """Second moments for the method; none, and no corpus read, where it has no use for them."""
    from retcon.memory.moments import GivenMoments

    return moments_for(lm, corpus) if resolved.method.uses_moments else GivenMoments({})


def expect(
    lm: "LM",
    resolved: Resolved,
    edits: Sequence[Edit],
    *,
    corpus: str | None,
    seed: int,
    batch_size: int | None = None,
) -> Estimate:
    """What the run would take, from trying a few of the edits."""
    from retcon.methods.common.sequence import in_steps

    moments = needed_moments(lm, resolved, corpus)
    with spinner("trying a few edits"):
        return estimate(lm, partial(in_steps, resolved.method, batch_size=batch_size), edits, moments, seed=seed)  # type: ignore[arg-type]


def subjects(edits: Sequence[Edit]) -> Group:
    """What would be written, the first few."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("prompt", "new answer"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=60)
    for edit in edits[:N_SHOWN]:
        table.add_row(escape(edit.text), escape(edit.target_new))
    more = len(edits) - N_SHOWN
    return Group(table, f"[dim]and {more:,} more[/]") if more > 0 else Group(table)


def edits_table(delta: "Delta", edits: Sequence[Edit]) -> Group:
    """How far each edit got while its values were sought, and in the weights; of many, those that got least far."""
    by_id = {e.id: e for e in edits}
    reports = [r for r in delta.report if r.id in by_id]
    if len(reports) > N_SHOWN:
        reports = sorted(
            reports, key=lambda r: r.search_probability if r.final_probability is None else r.final_probability
        )[:N_SHOWN]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("subject", "new answer", "searched", "final", "steps", "outcome"):
        right = name in ("searched", "final", "steps")
        table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis", max_width=44)
    for report in reports:
        edit = by_id[report.id]
        colour = {"reached": "green", "conflict": "red"}.get(report.outcome, "yellow")
        table.add_row(
            escape(edit.subject or "-"),
            escape(edit.target_new),
            f"{report.search_probability:.3f}",
            "-" if report.final_probability is None else f"{report.final_probability:.3f}",
            str(report.steps),
            f"[{colour}]{report.outcome}[/]",
        )
    shown = f"; shown are the {len(reports)} furthest from it" if len(reports) < len(delta.report) else ""
    return Group(table, f"[dim]{outcomes(delta)}{shown}[/]")


def _how_far(report: "EditReport") -> float:
    return report.search_probability if report.final_probability is None else report.final_probability


def outcomes(delta: "Delta") -> str:
    """One line on what became of the edits: how many got where they should, and why the others did not."""
    counts = Counter(report.outcome for report in delta.report)
    why = {
        "clamped": "held back by the clamp",
        "steps": "out of steps",
        "conflict": "lost in the write, to old keys or to each other",
    }
    parts = [f"{counts['reached']} of {len(delta.report)} reached what was asked for"]
    parts += [f"{counts[name]} {text}" for name, text in why.items() if counts[name]]
    matches = [r.greedy_match for r in delta.report]
    if matches and None not in matches:
        parts += [f"{sum(map(bool, matches))} are what the edited model says first"]
    return "; ".join(parts)


def remedy(resolved: Resolved, delta: "Delta") -> str | None:
    """Which settings to try next where nobody tuned any and a third of the edits or more stop for one reason."""
    if resolved.preset is not None:
        return None
    counts = Counter(report.outcome for report in delta.report)
    for outcome, ending, factor in (("clamped", "clamp", 4.0), ("conflict", "moment_weight", 0.1)):
        values = {name: value for name, value in resolved.settings.items() if name.endswith(ending) and value}
        if values and 3 * counts[outcome] >= len(delta.report):
            tried = " ".join(f"--set {name}={factor * value:g}" for name, value in values.items())
            return f"this model has no preset, and the defaults are for large ones: add {tried}"
    return None


def changes_table(lm: "LM", delta: "Delta") -> Table:
    """How much each parameter changes."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("parameter", no_wrap=True, overflow="ellipsis")
    for name in ("change", "of its norm", "rank"):
        table.add_column(name, justify="right")
    ranks = delta.ranks()
    for name, norm in delta.norms().items():
        weight = float(lm.base_weight(name).double().norm())
        rank = ranks[name]
        table.add_row(
            escape(name), f"{norm:.3g}", f"{norm / weight:.1%}" if weight else "-", "-" if rank is None else f"≤ {rank}"
        )
    return table
