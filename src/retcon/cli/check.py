"""`retcon check`: is an edit safe to ship? In plain words, and as an exit code."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from retcon.cli.shell import (
    AsChat,
    Device,
    DType,
    FileFormat,
    Json,
    Model,
    OnError,
    System,
    TemplateArgs,
    chat_of,
    check_exists,
    console,
    count,
    emit,
    load_deltas,
    load_model,
    spinner,
)
from retcon.workflow.facts import read_facts

if TYPE_CHECKING:
    from retcon.evaluation.safety import Answer, Verdict

_TITLES = {
    "took": "The edit took",
    "generalised": "It generalised",
    "local": "It stayed local",
    "language": "The language is intact",
}
_MARKS = {"passed": "[green]✓[/]", "failed": "[red]✗[/]", "unknown": "[yellow]?[/]", "off": "[dim]-[/]"}


def check(
    model: Model,
    delta: Annotated[list[Path], typer.Option(metavar="DELTA", help="A delta; repeat for several, applied in order.")],
    cases: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Cases, a dataset, or the edits themselves.", show_default=False),
    ],
    file_format: FileFormat = None,
    on_error: OnError = "stop",
    as_chat: AsChat = False,
    system: System = None,
    template_args: TemplateArgs = None,
    start: Annotated[int, typer.Option(min=0, help="Rows of it to pass over.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of it to read; all.", show_default=False)] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out text; plain paragraphs of the package's own.", show_default=False),
    ] = None,
    took: Annotated[float, typer.Option(help="Share of edited prompts that must give the whole new answer.")] = 0.95,
    generalised: Annotated[float, typer.Option(help="The same of rephrased prompts; 0 does not ask.")] = 0.6,
    local: Annotated[float, typer.Option(help="Share of other answers that must stay; 0 does not ask.")] = 0.95,
    perplexity_ratio: Annotated[
        float, typer.Option(help="Perplexity of held-out text may grow by this factor; inf does not ask.")
    ] = 1.05,
    other_base: Annotated[bool, typer.Option("--other-base", help="The delta was made for another base.")] = False,
    device: Device = None,
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Say whether an edit took, generalised, stayed local and left the language intact. Exit code 0: it did; 1: not."""
    from retcon.evaluation import safety

    limits = safety.Thresholds(took=took, generalised=generalised, local=local, perplexity_ratio=perplexity_ratio)
    chat = chat_of(as_chat, system, template_args)
    asked = read_facts(
        cases, start=start, limit=limit, conflicts="drop", file_format=file_format, on_error=on_error, chat=chat
    )
    if text is not None:
        check_exists(text)
    deltas = load_deltas(delta)
    lm = load_model(model, device=device, dtype=dtype)
    with spinner("asking"):
        verdict = safety.check(
            lm,
            asked.cases,
            deltas,
            thresholds=limits,
            text=None if text is None else text.read_text("utf-8"),
            other_base=other_base,
        )
    if as_json:
        emit(_record(verdict))
    else:
        _tell(verdict)
    if not verdict.safe:
        raise typer.Exit(1)


def _record(verdict: "Verdict") -> dict[str, object]:
    answers = {a.part: {**asdict(a), "words": a.words} for a in verdict.answers}
    return {"safe": verdict.safe, "n_cases": verdict.n_cases, "answers": answers}


def _tell(verdict: "Verdict") -> None:
    show = console()
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column()
    for answer in verdict.answers:
        table.add_row(_MARKS[answer.outcome], f"[bold]{_TITLES[answer.part]}[/]", escape(answer.words))
    show.print(table)
    for answer in verdict.answers:
        if answer.worst and answer.outcome == "failed":
            show.print()
            show.print(f"[bold]{_TITLES[answer.part]}: where it fell short[/]")
            show.print(_examples(answer))
    show.print()
    failed = [a for a in verdict.answers if a.outcome == "failed"]
    unknown = [a for a in verdict.answers if a.outcome == "unknown"]
    if verdict.safe:
        show.print(f"[bold green]Safe to ship[/] by these thresholds, on {count(verdict.n_cases, 'case')}.")
    elif failed:
        reasons = ", ".join(_TITLES[a.part].lower() for a in failed)
        show.print(f"[bold red]Not safe to ship:[/] fell short of: {reasons}.")
    else:
        options = ", ".join(f"--{a.part} 0" for a in unknown)
        show.print(
            "[bold yellow]Not known to be safe:[/] the cases do not ask everything. Give cases that do, or say that "
            f"it does not matter ({options})."
        )


def _examples(answer: "Answer") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for head, width in (("prompt", 46), ("wanted", 15), ("before", 15), ("after", 15)):
        table.add_column(head, no_wrap=True, overflow="ellipsis", width=width)
    for e in answer.worst:
        table.add_row(*(escape(" ".join(part.split())) for part in (e.prompt, e.wanted, e.before, e.after)))
    return table
