"""`retcon log`: what was done to a model, entry by entry."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from retcon.cli.shell import Json, console, count, emit
from retcon.cli.stores import StorePath, entry_record, open_store


def log(
    n: Annotated[int | None, typer.Option("-n", min=1, help="Entries shown, from the last; all.")] = None,
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """List the entries of the store, the last one first."""
    found = open_store(store)
    entries = found.log()
    shown = list(reversed(entries))[:n]
    if as_json:
        emit({"store": str(store), "state": found.state().id, "entries": [entry_record(found, e) for e in shown]})
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for style, width in (("yellow", 12), ("dim", 16), ("bold", 7)):
        table.add_column(style=style, no_wrap=True, min_width=width)
    table.add_column(overflow="ellipsis", no_wrap=True)
    for entry in shown:
        table.add_row(entry.id, entry.time[:16].replace("T", " "), entry.action, escape(entry.message))
    show = console()
    show.print(table)
    state = found.state()
    in_force = f"{count(len(found.facts()), 'fact')} in force in {count(len(state.deltas), 'delta')}, state {state.id}"
    show.print(f"[dim]{in_force}, of {escape(found.model)}[/]" if entries else "[dim]no entries yet[/]")
