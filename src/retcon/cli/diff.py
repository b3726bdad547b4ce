"""`retcon diff`: which facts differ between two states."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from retcon.cli.shell import Json, console, count, emit
from retcon.cli.stores import StorePath, fact_record, open_store


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="An entry, or base.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")] = "HEAD",
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """List the facts that came, went or changed from the state after entry A to the state after entry B."""
    found = open_store(store)
    came, went, changed = found.diff(a, b)
    if as_json:
        emit(
            {
                "came": [fact_record(line) for line in came],
                "went": [fact_record(line) for line in went],
                "changed": [{"before": fact_record(one), "after": fact_record(two)} for one, two in changed],
                "deltas": {"a": list(found.state(a).deltas), "b": list(found.state(b).deltas)},
            }
        )
        return
    out = console()
    for line in went:
        out.print(f"[red]- {escape(line.fact)}  {escape(line.prompt)} {escape(line.target)}[/]", soft_wrap=True)
    for line in came:
        out.print(f"[green]+ {escape(line.fact)}  {escape(line.prompt)} {escape(line.target)}[/]", soft_wrap=True)
    for one, two in changed:
        what = f"{escape(one.target)} -> {escape(two.target)}"
        out.print(f"[yellow]~ {escape(one.fact)}  {escape(one.prompt)} {what}[/]", soft_wrap=True)
    total = f"{count(len(came), 'fact')} came, {len(went):,} went, {len(changed):,} changed"
    out.print(f"[dim]{total}[/]")
