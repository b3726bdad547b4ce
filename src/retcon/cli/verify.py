"""`retcon verify`: every check of a store's facts, and what broke since when."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retcon.atomic import write_atomically
from retcon.cli.facts import reads_facts
from retcon.cli.models import loads_a_model
from retcon.cli.options import Json
from retcon.cli.output_checks import check_output
from retcon.cli.printing import console, emit, plain_table, plural, styled
from retcon.cli.progress import spinner
from retcon.cli.stores import OtherModel, StorePath, load_base, open_store
from retcon.errors import InvalidSetting
from retcon.workflow.facts import Reading, read_facts

if TYPE_CHECKING:
    from retcon.store.verify import Verification

N_SHOWN = 15
"""Failing checks shown; the files have all."""


@loads_a_model
@reads_facts("what must stay")
def verify(
    entry: Annotated[
        str | None, typer.Argument(metavar="ID", help="The state after this entry.", show_default="HEAD")
    ] = None,
    stay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Facts that must stay; target_new is the answer of the unedited model."),
    ] = None,
    *,
    reading: Reading,
    strict: Annotated[
        bool, typer.Option("--strict", help="Also fail for paraphrases, consequences and locality that never passed.")
    ] = False,
    bisect: Annotated[bool, typer.Option(help="Find the entry in force that broke what fails.")] = True,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the checks as JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the result as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page, a row per fact.")] = None,
    model: OtherModel = None,
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """Hold the model to every check of the store's facts. Exit code 0: nothing broke; 1: something did.

    A check that passed when its fact was written and fails now broke, and the entry that did it is named. A fact whose
    own prompt never gave its answer fails too; other checks that never passed are counted.
    """
    from retcon.store.verify import verify as run

    if stay is None and reading != Reading(conflicts="drop"):
        raise InvalidSetting("how facts are read (--start, --chat, ...) goes with --stay; leave it out, or give that")
    for path in (junit, markdown, html):
        check_output(path, stay)
    must_stay = read_facts(stay, reading).cases if stay is not None else ()
    found = open_store(store)
    if entry is not None:
        found.state(entry)
    lm = load_base(found, model)
    with spinner("asking"):
        result = run(found, lm, at=entry, stay=must_stay, strict=strict, bisect=bisect)
    if junit is not None:
        write_atomically(junit, result.junit().encode())
    if markdown is not None:
        write_atomically(markdown, result.markdown().encode())
    if html is not None:
        write_atomically(html, result.html().encode())
    if as_json:
        emit(_record(result))
    else:
        _show(result)
    if not result.ok:
        raise typer.Exit(1)


def _record(result: "Verification") -> dict[str, object]:
    return {
        "ok": result.ok,
        "state": result.state.id,
        "n_facts": result.n_facts,
        "n_skipped": result.n_skipped,
        "counts": result.counts(),
        "failed": [
            {
                "fact": c.fact,
                "check": c.query.id,
                "kind": c.kind,
                "prompt": c.query.prompt,
                "wanted": c.wanted,
                "found": c.said,
                "outcome": c.outcome,
                "since": c.since and c.since.id,
            }
            for c in result.failed
        ],
    }


def _show(result: "Verification") -> None:
    from retcon.store.verify import TITLES

    show = console()
    table = plain_table("", right=("pass", "broke", "never passed"))
    for kind, row in result.counts().items():
        broke = styled("[red]{:,}[/]", row["broke"]) if row["broke"] else "0"
        table.add_row(TITLES[kind], f"{row['passed']:,}", broke, f"{row['never']:,}")
    show.print(table)
    if result.failed:
        show.print()
        for check in result.failed[:N_SHOWN]:
            show.print(styled("[red]✗[/] [bold]{}[/]  {}", check.fact, check.words), soft_wrap=True)
        if len(result.failed) > N_SHOWN:
            show.print(styled("[dim]and {:,} more; --json and the files have all[/]", len(result.failed) - N_SHOWN))
    show.print()
    facts = f"{plural(result.n_facts, 'fact')} in force, state {result.state.id}"
    if result.ok:
        show.print(styled("[bold green]Nothing broke[/]  [dim]{}[/]", facts))
    else:
        show.print(styled("[bold red]{} failed[/]  [dim]{}[/]", plural(len(result.failed), "check"), facts))
