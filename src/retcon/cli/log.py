"""`retcon log`: what was done to a model, entry by entry."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from retcon.cli.shell import Json, console, count, emit
from retcon.cli.stores import StorePath, entry_record, open_store


def log(
    n: Annotated[int | None, typer.Option("-n", min=1, help="Entries shown, from the last; all.")] = None,
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """List the entries of the store, the last one first."""
    found = open_store(store)
    steps = found.history_of_states()
    shown = list(reversed(steps))[:n]
    state = found.state()
    if as_json:
        emit({"store": str(store), "state": state.id, "entries": [entry_record(*step) for step in shown]})
        return
    show = console()
    for entry, _ in shown:  # lines, not a table: with many entries that takes longer than reading them
        when = escape(entry.time[:16].replace("T", " "))
        line = f"[yellow]{entry.id}[/]  [dim]{when}[/]  [bold]{escape(entry.action):7}[/]  "
        show.print(line + escape(entry.message), no_wrap=True, overflow="ellipsis", highlight=False)
    in_force = f"{count(len(found.facts()), 'fact')} in force in {count(len(state.deltas), 'delta')}, state {state.id}"
    show.print(f"[dim]{in_force}, of {escape(found.model)}[/]" if steps else "[dim]no entries yet[/]")
