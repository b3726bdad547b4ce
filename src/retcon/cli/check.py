"""`retcon check`: is an edit safe to ship? In plain words, and as an exit code."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from retcon.cli.complete import CHAT_TOKENS, PLAIN_TOKENS
from retcon.cli.facts import reads_facts
from retcon.cli.models import load_deltas, load_model, loading, loading_options, loads_a_model
from retcon.cli.options import Json, Model, On, OtherBase
from retcon.cli.output_checks import check_output
from retcon.cli.printing import console, emit, plain_table, styled
from retcon.cli.progress import progress_bars, spinner
from retcon.cluster import workers, working_on
from retcon.errors import InvalidSetting
from retcon.files import read_prose
from retcon.workflow.checking import TITLES, check_edited, check_report_name, load_edited, verdict_line, write_verdict
from retcon.workflow.facts import Reading, read_facts

if TYPE_CHECKING:
    from retcon.evaluation.safety import Answer, Verdict

_MARKS = {
    "passed": styled("[green]✓[/]"),
    "failed": styled("[red]✗[/]"),
    "unknown": styled("[yellow]?[/]"),
    "off": styled("[dim]-[/]"),
    "unmeasurable": styled("[dim]-[/]"),
}

TIMEOUT = 60.0
"""Seconds to wait for an answer of a server by default."""


@loads_a_model
@reads_facts("--cases")
def check(
    model: Model,
    cases: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="A file of facts, or world. Paraphrases and neighbours that it does not have are made."
        ),
    ],
    delta: Annotated[
        list[Path] | None, typer.Option(metavar="DELTA", help="A delta; repeat for several, applied in order.")
    ] = None,
    edited: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The edited model: a merged checkpoint, or a PEFT adapter.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="An OpenAI-compatible server that serves the edited model as MODEL; only its text is judged. The key "
            "is read from RETCON_API_KEY.",
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DELTA",
            help="Compare with what this delta makes of the same cases; repeat for several, applied in order.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer of the server.")] = TIMEOUT,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the verdict: .html, .md, or .xml for JUnit.")
    ] = None,
    *,
    reading: Reading,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out text.", show_default="paragraphs that ship with retcon"),
    ] = None,
    took: Annotated[
        float, typer.Option(help="Share of edited prompts that must give the whole new answer, from 0 to 1.")
    ] = 0.8,
    generalised: Annotated[
        float, typer.Option(help="Share of rephrased prompts that must give it too; 0 does not ask.")
    ] = 0.5,
    local: Annotated[float, typer.Option(help="Share of other answers that must stay; 0 does not ask.")] = 0.8,
    perplexity_ratio: Annotated[
        float, typer.Option(help="Perplexity of held-out text may grow by this factor; inf does not ask.")
    ] = 1.05,
    other_base: OtherBase = False,
    on: On = "local",
    as_json: Json = False,
) -> None:
    """Say whether an edit took, generalised, stayed local and left the language intact. Exit code 0: it did; 1: not.

    A share passes when the lower bound of its 95 % interval (Wilson's) reaches the threshold, so one case proves
    nothing. Give one of --delta, --edited and --url. --against compares with another delta; the exit code is that of
    the first.
    """
    if sum([bool(delta), edited is not None, url is not None]) != 1:
        raise InvalidSetting("what shall be checked? Give one of --delta DELTA, --edited FOLDER and --url ADDRESS")
    if against and url is not None:
        raise InvalidSetting("--against compares with a delta, which a served model cannot be given; leave out --url")
    if url is not None and on != "local":
        raise InvalidSetting("--on shares out the work of a model that is loaded here, not of a server's; leave it out")
    if url is None and timeout != TIMEOUT:
        raise InvalidSetting("--timeout goes with --url; leave it out")
    for option, given in (
        ("--text", text is not None),
        ("--device", loading().device is not None),
        ("--dtype", loading().dtype is not None),
        (loading_options().strip(), loading_options()),
    ):
        if url is not None and given:
            raise InvalidSetting(f"{option} is about a model that is loaded here, not about a server's; leave it out")
    if other_base and not delta and not against:
        raise InvalidSetting("--other-base goes with --delta and --against; leave it out")
    place = workers(on)
    if report is not None:
        check_report_name(report)
        check_output(report, cases, *(delta or []), text)
    asked = read_facts(cases, reading)
    held_out = None if text is None else read_prose(text)
    if edited is not None:
        check_edited(edited)

    from retcon.evaluation import safety

    limits = safety.Thresholds(took=took, generalised=generalised, local=local, perplexity_ratio=perplexity_ratio)
    other: tuple[str, Verdict] | None = None
    if url is not None:
        from retcon.evaluation.endpoint import Endpoint

        served = Endpoint(url=url, model=model, timeout=timeout)
        with progress_bars() as advance:
            verdict = safety.check_endpoint(
                served,
                asked.cases,
                thresholds=limits,
                max_tokens=CHAT_TOKENS if any(edit.chat for edit in asked.edits) else PLAIN_TOKENS,
                on_progress=partial(advance, "asking"),
            )
        about = f"{model} at {url}; {asked.about}"
    else:
        deltas, rivals = load_deltas(delta or []), load_deltas(against or [])
        lm = load_model(model)
        put = partial(
            safety.check,
            lm,
            asked.cases,
            thresholds=limits,
            text=held_out,
            other_base=other_base,
            own_words=report is not None and report.suffix.lower() == ".html",
        )
        merged = None if edited is None else load_edited(edited, model, vars(loading()))
        with place as at, working_on(lm, at), working_on(merged or lm, at), spinner("asking"):
            verdict = put(deltas, edited=merged)
            if against:
                other = (", ".join(path.name for path in against), put(rivals))
        what = edited.name if edited is not None else ", ".join(path.name for path in delta or [])
        about = f"{what} on {lm.label}; {asked.about}"
    if report is not None:
        write_verdict(report, verdict, about.replace(str(cases), cases.name), other)
    if as_json:
        emit(_record(verdict) | {"read": asked.about} | ({"against": _record(other[1])} if other else {}))
    else:
        console().print(styled("[dim]{}[/]", asked.about), soft_wrap=True)
        _show_verdict(verdict)
        if other:
            console().print(styled("\n[bold]Compared with {}[/]", other[0]), soft_wrap=True)
            _show_verdict(other[1])
    if not verdict.safe:
        raise typer.Exit(1)


def _record(verdict: "Verdict") -> dict[str, object]:
    answers = {a.part: {**asdict(a), "words": a.words} for a in verdict.answers}
    return {"safe": verdict.safe, "n_cases": verdict.n_cases, "notes": list(verdict.notes), "answers": answers}


def _show_verdict(verdict: "Verdict") -> None:
    show = console()
    table = plain_table("", "", "", show_header=False, padding=(0, 2, 0, 0))
    for answer in verdict.answers:
        table.add_row(_MARKS[answer.outcome], styled("[bold]{}[/]", TITLES[answer.part]), answer.words)
    show.print(table)
    for answer in verdict.answers:
        if answer.worst and answer.outcome == "failed":
            show.print()
            show.print(styled("[bold]{}: where it fell short[/]", TITLES[answer.part]))
            show.print(_examples(answer))
    show.print()
    for note in verdict.notes:
        show.print(styled("[dim]{}[/]", note), soft_wrap=True)
    colour = "green" if verdict.safe else "red" if any(a.outcome == "failed" for a in verdict.answers) else "yellow"
    show.print(styled("[bold {}]{}[/]", colour, verdict_line(verdict)), soft_wrap=True)
    unasked = [f"--{a.part} 0" for a in verdict.answers if a.outcome == "unknown" and a.value is None]
    if unasked:
        options = ", ".join(unasked)
        show.print(f"The cases do not ask everything: give cases that do, or say that it does not matter ({options}).")


def _examples(answer: "Answer") -> Table:
    table = plain_table(padding=(0, 2, 0, 0))
    for head, width in (("prompt", 46), ("wanted", 15), ("before", 15), ("after", 15)):
        table.add_column(head, no_wrap=True, overflow="ellipsis", width=width)
    for e in answer.worst:
        table.add_row(*(" ".join(part.split()) for part in (e.prompt, e.wanted, e.before, e.after)))
    return table
