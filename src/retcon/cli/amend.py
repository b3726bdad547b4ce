"""`retcon amend`: another answer for a fact."""

from typing import Annotated

import typer

from retcon.cli.models import loads_a_model
from retcon.cli.options import Json
from retcon.cli.printing import console, emit, plural, styled
from retcon.cli.stores import Rewriting, entry_record, open_store, rewrites, rewritten, say_on_top


@loads_a_model
@rewrites
def amend(
    fact: Annotated[str, typer.Argument(metavar="FACT", help="A fact that is in force.")],
    target: Annotated[str, typer.Option(metavar="TEXT", help="Its new answer.")],
    *,
    how: Rewriting,
    as_json: Json = False,
) -> None:
    """Give a fact another answer. Its batch is written again, and its value alone is searched."""
    found = open_store(how.store)
    entry = rewritten(found.amend, found, how, fact, target)
    if as_json:
        emit(entry_record(entry, found.state(entry.id)))
        return
    searched = f"{plural(entry.about['searched'], 'value')} searched"
    console().print(styled("[yellow]{}[/]  {}  [dim]{}[/]", entry.id, entry.message, searched))
    say_on_top(entry, offer=True)
