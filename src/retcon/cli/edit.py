"""`retcon edit`: facts in, a delta out."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from retcon.cli.moments import TimedMoments, moments_for
from retcon.cli.settings import Resolved, read_settings, resolve
from retcon.cli.shell import (
    Device,
    DType,
    Json,
    Model,
    Seed,
    bars,
    check_can_write,
    check_exists,
    console,
    count,
    emit,
    load_model,
    program,
    seconds,
    size,
)
from retcon.edits import Case, Edit, Query, read_edits, resolve_conflicts
from retcon.errors import InvalidSetting
from retcon.files import read_json_rows

if TYPE_CHECKING:
    from retcon.delta import Delta
    from retcon.evaluation import Evaluation
    from retcon.lm.model import LM

N_SHOWN = 12
"""Edits shown in the report; of more, the least successful ones."""

CasesFormat = Literal["auto", "edits", "counterfact", "counterfact-flat", "zsre", "cases"]
Conflicts = Literal["error", "drop", "last"]

_DATASET_FIELDS = {
    *("requested_rewrite", "src", "rephrase", "edits", "queries", "case_id"),
    *("ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
}
"""Fields by which a file is no plain list of edits."""


def edit(
    model: Model,
    edits: Annotated[
        Path,
        typer.Argument(
            metavar="EDITS",
            help="JSON lines with prompt, subject and target_new; or a CounterFact, zsRE or cases file.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DELTA", help="File that the delta goes to.", show_default=False)],
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
    corpus: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text for the second moments; WikiText-103.", show_default=False),
    ] = None,
    cases_format: Annotated[CasesFormat, typer.Option(help="What kind of file EDITS is.")] = "auto",
    start: Annotated[int, typer.Option(min=0, help="Rows of EDITS to pass over.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of EDITS to read; all.", show_default=False)] = None,
    conflicts: Annotated[
        Conflicts, typer.Option(help="When edits contradict each other: refuse, or keep the first or the last.")
    ] = "error",
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Measure the model before and after, on the file's own queries.")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Edit facts into a model, all at once, and save the change as a delta. The model's files are not touched."""
    check_can_write(out)
    given = read_settings(method, dataset=dataset, preset=preset, assignments=assignments or ())
    asked = read_asked(edits, cases_format, start, limit, conflicts)
    if corpus is not None:
        check_exists(corpus)
    show = console(stderr=as_json)
    started = time.perf_counter()
    lm = load_model(model, device=device, dtype=dtype)
    took = {"load": time.perf_counter() - started}
    resolved = resolve(lm, method, dataset=dataset, preset=preset, given=given)
    show.print(f"[bold]{resolved.name}[/] on {escape(str(lm))}")
    show.print(f"edits     {escape(asked.about)}", soft_wrap=True)
    show.print(f"settings  {escape(resolved.source)}", soft_wrap=True)
    show.print(resolved.table())

    delta = make(lm, resolved, asked.edits, corpus=corpus, seed=seed, took=took)
    delta.save(out)
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
    if as_json:
        emit(_record(model, resolved, delta, out, seed, took, measured))
    else:
        ask = f"{program()} complete {shlex.quote(model)} PROMPT --delta {shlex.quote(str(out))}"
        show.print(f"[dim]try    {escape(ask)}[/]", soft_wrap=True)


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


def read_asked(path: Path, kind: CasesFormat, start: int, limit: int | None, conflicts: Conflicts) -> Asked:
    """Edits from a plain list of them or from a dataset.

    Raises:
        MalformedFile, ConflictingEdits: the message names file, row and field.
        InvalidSetting: nothing is left to edit.
    """
    if kind == "auto" and not _DATASET_FIELDS & read_json_rows(path)[0][1].keys():
        kind = "edits"
    if kind == "edits":
        rows = read_edits(path)[start : None if limit is None else start + limit]
        edits = tuple(dict.fromkeys(resolve_conflicts(rows, conflicts)))
        asked = Asked(edits, _cases(edits), f"{path}: {len(edits):,} of {len(rows):,} rows")
    else:
        from retcon import evaluation

        cases, report = evaluation.load(
            path, None if kind == "auto" else kind, start=start, limit=limit, conflicts=conflicts
        )
        asked = Asked(tuple(e for c in cases for e in c.edits), tuple(cases), str(report))
    if not asked.edits:
        raise InvalidSetting(f"nothing to edit: {asked.about}")
    for edit in asked.edits:
        edit.require_subject_span()
    return asked


def _cases(edits: Sequence[Edit]) -> tuple[Case, ...]:
    """Edits measured by nothing but their own prompts; against the old answers where all of them are known."""
    rivals = all(e.target_true for e in edits)
    queries = [
        Query("rewrite/0", "rewrite", e.text, e.target_new, e.target_true if rivals else None, ((e.target_new,),))
        for e in edits
    ]
    return tuple(Case(e.id, (e,), (q,), dataset="edits") for e, q in zip(edits, queries, strict=True))


# --- making and showing ------------------------------------------------------------------------------------------


def make(
    lm: "LM", resolved: Resolved, edits: Sequence[Edit], *, corpus: Path | None, seed: int, took: dict[str, float]
) -> "Delta":
    """Propose, with progress bars; `took` gets the seconds for moments and, apart from them, for the edit itself."""
    given = moments_for(lm, corpus)
    started = time.perf_counter()
    with bars() as advance:
        moments = TimedMoments(given, advance)
        delta = resolved.method.propose(
            lm, edits, moments=moments, seed=seed, progress=lambda stage, n, of: advance(f"optimising {stage}", n, of)
        )
    took |= {"moments": moments.seconds, "edit": time.perf_counter() - started - moments.seconds}
    return delta


def edits_table(delta: "Delta", edits: Sequence[Edit]) -> Group:
    """How far each edit got while its values were sought; the worst first where there are many."""
    by_id = {e.id: e for e in edits}
    reports = list(delta.report)
    if len(reports) > N_SHOWN:
        reports = sorted(reports, key=lambda r: r.probability)[:N_SHOWN]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("subject", "new answer", "probability", "steps", "stopped"):
        right = name in ("probability", "steps")
        table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis", max_width=44)
    for report in reports:
        edit = by_id[report.id]
        colour = "green" if report.stopped == "reached" else "yellow"
        table.add_row(
            escape(edit.subject),
            escape(edit.target_new),
            f"{report.probability:.3f}",
            str(report.steps),
            f"[{colour}]{report.stopped}[/]",
        )
    n_reached = sum(r.stopped == "reached" for r in delta.report)
    note = f"{n_reached} of {len(delta.report)} reached the probability asked for"
    if len(reports) < len(delta.report):
        note += f"; shown are the {len(reports)} furthest from it, all are in the file"
    return Group(table, f"[dim]{note}[/]")


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
        table.add_row(escape(name), f"{norm:.3g}", f"{norm / weight:.1%}", "-" if rank is None else f"≤ {rank}")
    return table
