"""`retcon amend`: another answer for a fact."""

from pathlib import Path
from typing import Annotated, Any

import typer

from retcon.cli.models import loads_a_model
from retcon.cli.options import Json
from retcon.cli.printing import console, emit, plural, styled
from retcon.cli.stores import (
    Again,
    Corpus,
    Editor,
    OtherModel,
    OwnMethod,
    StorePath,
    entry_record,
    open_store,
    rewritten,
    say_on_top,
)


@loads_a_model
def amend(
    fact: Annotated[str, typer.Argument(metavar="FACT", help="A fact that is in force.", show_default=False)],
    target: Annotated[str, typer.Option(metavar="TEXT", help="Its new answer.", show_default=False)],
    repropose: Again = False,
    editor: Editor = None,
    method: OwnMethod = None,
    message: Annotated[
        str, typer.Option("-m", "--message", help="Message of the store's log.", show_default=False)
    ] = "",
    model: OtherModel = None,
    corpus: Corpus = None,
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """Give a fact another answer. Its batch is written again, and its value alone is searched."""
    found = open_store(store)
    given: dict[str, Any] = dict(repropose=repropose, editor=editor, method=method, message=message)
    entry = rewritten(found.amend, found, fact, target, model=model, corpus=corpus, **given)
    if as_json:
        emit(entry_record(entry, found.state(entry.id)))
        return
    searched = f"{plural(entry.about['searched'], 'value')} searched"
    console().print(styled("[yellow]{}[/]  {}  [dim]{}[/]", entry.id, entry.message, searched))
    say_on_top(entry, offer=True)
