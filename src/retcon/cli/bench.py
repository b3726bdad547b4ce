"""`retcon bench`: a matrix of models, methods, datasets, protocols and seeds, into a directory."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.live import Live
from rich.table import Table

from retcon.cli.facts import FileFormat
from retcon.cli.models import check_model_path, warn_of_remote_code
from retcon.cli.options import Json, On, VerifyBase
from retcon.cli.output_checks import check_can_make_folder
from retcon.cli.printing import console, emit, plain_table, plural, program, seconds, styled
from retcon.cluster import workers
from retcon.errors import InvalidSetting

if TYPE_CHECKING:
    from retcon.bench import BenchSpec, Cell, Event, MethodSpec, Protocol
    from retcon.evaluation import Evaluation
    from retcon.evaluation.datasets import Loaded

_SHOWN = ("Score", "ES", "GS", "LS", "Portability")
N_RESAMPLES = 200
"""Of the bootstrap while running; reports take more."""


def bench(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A TOML file; or give the options.")] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the results; a run in it goes on.", show_default=False)
    ] = Path("bench"),
    model: Annotated[
        str | None, typer.Option(help="demo:gptj, a directory, a hub id; one of the file's, or over it.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method; repeat. Over the file's.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A file, hub:owner/name/file.json, or world; over the file's.")
    ] = None,
    file_format: FileFormat = None,
    on_error: Annotated[
        Literal["stop", "skip"] | None,
        typer.Option(help="When a row of a dataset cannot be used: refuse it, or leave the row out; over the file's."),
    ] = None,
    case_target: Annotated[
        Literal["new", "alt"] | None,
        typer.Option(help="The answer to write: the row's new one, or its alternative; over the file's."),
    ] = None,
    conflicts: Annotated[
        Literal["error", "drop", "last"] | None,
        typer.Option(help="When facts contradict each other: refuse, or keep the first or last; over the file's."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="single, batch, sequential, batch_sequential or curve: the file's of that kind, or else a new one.",
            show_default="batch",
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="Cases; of a curve, its last point at most.", show_default="all")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Cases edited in one call.", show_default="all; 1 of batch_sequential")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="A seed; repeat. Over the file's.")] = None,
    corpus: Annotated[
        str | None, typer.Option(metavar="FILE|DATASET", help="Text for the second moments, as for moments.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out text, whose perplexity is measured too.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Where DIR holds another benchmark, start this one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be run, and how long.")] = False,
    on: On = "local",
    verify_base: VerifyBase = False,
    as_json: Json = False,
) -> None:
    """Run a benchmark: edit, measure before and after, restore. Ended at any point, the same command goes on.

    What has no option here, such as a model's device and dtype and a method's settings, is said in FILE
    (docs/evaluation.md).
    """
    place = workers(on)
    spec = _spec(
        file,
        method=method,
        protocol=protocol,
        n=n,
        batch=batch,
        seeds=seed,
        model=model,
        dataset=dataset,
        corpus=corpus,
        text=text,
    )
    spec = _with_reading(spec, format=file_format, on_error=on_error, case_target=case_target, conflicts=conflicts)
    for each in spec.models:
        check_model_path(each.name)
        if each.trust_remote_code:
            warn_of_remote_code("trust_remote_code", each.name)
    check_can_make_folder(out)

    from retcon.bench.inputs import read_inputs

    loaded = read_inputs(spec)

    from retcon.bench import run_bench

    def show_loaded(report: object) -> None:
        console(stderr=True).print(str(report), soft_wrap=True)

    if dry_run:
        for _, report in loaded.values():
            show_loaded(report)
        _estimate(spec, loaded, out, as_json)
        return
    board = _Board(console(stderr=True).is_terminal)
    started = time.perf_counter()
    shown = Live(board.table(), console=console(stderr=True), refresh_per_second=2, transient=True)
    with place as at, shown as live:
        if not board.shown:
            live.stop()

        def watch(event: "Event") -> None:
            board.update(event)
            if board.shown:
                live.update(board.table())
            elif event.evaluation is not None:
                console(stderr=True).print(board.line(event), soft_wrap=True)

        how: dict[str, Any] = dict(force=force, verify_base=verify_base, workers=at)
        run_bench(spec, out, watch=watch, on_loaded=show_loaded, loaded=loaded, **how)
    took = time.perf_counter() - started
    if as_json:
        emit({"directory": str(out), "seconds": took, "runs": board.record()})
        return
    console().print(board.table())
    console().print(styled("{} in {}, kept in [bold]{}[/]", plural(len(board.rows), "run"), seconds(took), out))
    console().print(styled("[dim]next   {} report {}[/]", program(), out), soft_wrap=True)


def _spec(
    file: Path | None,
    *,
    model: str | None,
    method: Sequence[str] | None,
    dataset: str | None,
    protocol: str | None,
    n: int | None,
    batch: int | None,
    seeds: Sequence[int] | None,
    corpus: str | None,
    text: Path | None,
) -> "BenchSpec":
    from retcon.bench import BenchSpec, DatasetSpec, MethodSpec, ModelSpec, spec_from_file
    from retcon.bench.spec import Protocol

    if file is None:
        if missing := [f"--{k}" for k, v in (("model", model), ("method", method), ("dataset", dataset)) if not v]:
            raise InvalidSetting(f"give a TOML file, or {', '.join(missing)} too")
        spec = BenchSpec(
            models=(ModelSpec(name=str(model)),),
            methods=tuple(MethodSpec(name=name) for name in method or ()),
            datasets=(DatasetSpec(path=str(dataset)),),
        )
        model = dataset = None
    else:
        spec = spec_from_file(file)
        if method:
            asked = [chosen for name in method for chosen in _methods(spec, name)]
            once = tuple(chosen for i, chosen in enumerate(asked) if chosen not in asked[:i])  # by name and by label
            spec = replace(spec, methods=once)
    places = {"model": model, "dataset": dataset, "corpus": corpus, "text": text}
    spec = spec.with_places(**{k: None if v is None else str(v) for k, v in places.items()})
    if protocol is not None:  # the file's of that kind, or else a new one
        own = tuple(p for p in spec.protocols if p.kind == protocol) if file is not None else ()
        spec = replace(spec, protocols=own or (Protocol(kind=protocol, n=n, batch=batch),))  # type: ignore[arg-type]
    if n is not None or batch is not None:
        over: dict[str, Any] = {name: value for name, value in (("n", n), ("batch", batch)) if value is not None}
        kept: dict[Protocol, Protocol] = {}
        for p in (replace(_within(p, n), **over) for p in spec.protocols):  # what is now one, once
            kept.setdefault(p if p.n is None or p.kind == "curve" else p.settled(p.n), p)
        spec = replace(spec, protocols=tuple(kept.values()))
    return replace(spec, seeds=tuple(seeds)) if seeds else spec


def _within(protocol: "Protocol", n: int | None) -> "Protocol":
    """Return a file's protocol without the checkpoints that fewer cases do not reach, which are named on stderr."""
    beyond = [c for c in protocol.checkpoints if n is not None and c > n]
    if not beyond:
        return protocol
    named = f"the checkpoint{'s' * (len(beyond) > 1)} {', '.join(map(str, beyond))}"
    console(stderr=True).print(f"--n {n} leaves out {named}", soft_wrap=True)
    return replace(protocol, checkpoints=tuple(c for c in protocol.checkpoints if c not in beyond))


def _with_reading(spec: "BenchSpec", **options: str | None) -> "BenchSpec":
    """Return the specification with options of reading put over those of its datasets."""
    over: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return replace(spec, datasets=tuple(replace(d, **over) for d in spec.datasets)) if over else spec


def _methods(spec: "BenchSpec", name: str) -> "list[MethodSpec]":
    """Return those of the file by label or name; one that the file lacks, with its preset."""
    from retcon.bench import MethodSpec

    return [m for m in spec.methods if name in (m.label, m.name)] or [MethodSpec(name=name)]


def _estimate(spec: "BenchSpec", loaded: "Mapping[str, Loaded]", out: Path, as_json: bool) -> None:
    from retcon.bench import estimate

    found = list(estimate(spec, out, loaded=loaded))
    rows = [
        {
            "run": e.cell.slug,
            "cases": e.n_cases,
            "seconds_per_edit": e.seconds_edit,
            "seconds_per_case_measured": e.seconds_measure,
            "seconds": e.seconds,
            "finished": e.finished_before,
        }
        for e in found
    ]
    if as_json:
        emit({"runs": rows, "seconds": sum(e.seconds for e in found)})
        return
    table = plain_table("run", right=("cases", "per edit", "per case measured", "in all"))
    for e in found:
        cells = [seconds(e.seconds_edit), f"{1000 * e.seconds_measure:.0f} ms", seconds(e.seconds)]
        if e.finished_before:
            cells = ["", "", "before"]
        table.add_row(e.cell.slug, f"{e.n_cases:,}", *cells)
    console().print(table)
    left, took = sum(not e.finished_before for e in found), sum(e.seconds for e in found)
    console().print(
        styled("{}, about {} [dim](from a few edits and cases each)[/]", plural(left, "run"), seconds(took))
    )


@dataclass
class _Row:
    cell: "Cell"
    done: int = 0
    total: int = 0
    started: float = field(default_factory=time.perf_counter)
    took: float | None = None
    finished_before: bool = False
    failed: int = 0
    """Cases whose edit failed."""
    numbers: dict[str, str] = field(default_factory=dict)
    values: dict[str, float | None] = field(default_factory=dict)


class _Board:
    """What is shown while runs go on: one line each."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.rows: dict[str, _Row] = {}
        """By the run's identity."""

    def update(self, event: "Event") -> None:
        row = self.rows.setdefault(event.run_id, _Row(event.cell))
        row.done, row.total, row.finished_before = event.done, event.total, event.finished_before
        if event.evaluation is not None:
            row.took = None if event.finished_before else time.perf_counter() - row.started
            self._take(row, event.evaluation)

    def _take(self, row: _Row, evaluation: "Evaluation") -> None:
        summary = evaluation.summary(n_resamples=N_RESAMPLES)
        row.failed = summary.counts["failed_edits"]
        for name in _SHOWN:
            line = summary.get(name)
            if line is not None and line.post is not None and line.post.value is not None:
                row.values[f"{line.metric} {line.variant}"] = line.post.value
                row.numbers[name] = f"{100 * line.post.value:.1f}"

    def line(self, event: "Event") -> str:
        """Return one finished run."""
        row = self.rows[event.run_id]
        numbers = ", ".join(f"{name} {value}" for name, value in row.numbers.items())
        how = "finished before" if row.took is None else f"in {seconds(row.took)}"
        failed = f", {plural(row.failed, 'edit')} failed" if row.failed else ""
        return f"{event.cell.slug}: {numbers or 'done'}{failed}, {how}"

    def table(self) -> Table:
        columns = [name for name in _SHOWN if any(name in row.numbers for row in self.rows.values())]
        failed = ["failed"] if any(row.failed for row in self.rows.values()) else []
        heads = [(name, None) for name in ("model", "method", "dataset", "protocol", "seed")]
        table = plain_table(*heads, right=("units", "time", *failed, *columns), padding=(0, 2, 0, 0))
        for row in self.rows.values():
            cell = row.cell
            what = (cell.model.label, cell.method.label, cell.dataset.label, cell.protocol.describe(), str(cell.seed))
            table.add_row(
                *what,
                f"{row.done}/{row.total}",
                self._time(row),
                *([str(row.failed)] if failed else []),
                *(row.numbers.get(name, "") for name in columns),
            )
        return table

    def _time(self, row: _Row) -> str:
        if row.finished_before:
            return "before"
        if row.took is not None:
            return seconds(row.took)
        gone = time.perf_counter() - row.started
        left = f", {seconds(gone / row.done * (row.total - row.done))} left" if row.done else ""
        return f"{seconds(gone)}{left}"

    def record(self) -> list[dict[str, Any]]:
        """Return the plain values, for JSON."""
        return [
            {
                "run": row.cell.slug,
                "id": run_id,
                "units": row.total,
                "found": row.finished_before,
                "seconds": row.took,
                "failed_edits": row.failed,
                "values": row.values,
            }
            for run_id, row in self.rows.items()
        ]
