"""`retcon log`: what was done to a model, entry by entry."""

from pathlib import Path
from typing import Annotated

import typer

from retcon.cli.options import Json
from retcon.cli.printing import console, emit, plural, styled, warn
from retcon.cli.stores import StorePath, entry_record, open_store


def log(
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Entries shown, from the last.", show_default="all")
    ] = None,
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """List the entries of the store, the last one first."""
    from retcon.store.index import clashes, two_answers

    found = open_store(store)
    steps = found.history_of_states()
    shown = list(reversed(steps))[:n]
    state = found.state()
    if as_json:
        emit({"store": str(store), "state": state.id, "entries": [entry_record(*step) for step in shown]})
        return
    show = console()
    for entry, _ in shown:  # lines, not a table: with many entries that takes longer than reading them
        when = entry.time[:16].replace("T", " ")
        line = styled("[yellow]{}[/]  [dim]{}[/]  [bold]{:7}[/]  ", entry.id, when, entry.action)
        show.print(line + entry.message, no_wrap=True, overflow="ellipsis", highlight=False)
    facts = found.facts()
    in_force = f"{plural(len(facts), 'fact')} in force in {plural(len(state.deltas), 'delta')}, state {state.id}"
    show.print(styled("[dim]{}, of {}[/]", in_force, found.model) if steps else styled("[dim]no entries yet[/]"))
    if (pair := next(clashes(facts), None)) is not None:
        warn(two_answers(*pair))
