"""`retcon revert`: an entry, or one fact, taken back."""

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
from retcon.errors import InvalidSetting


@loads_a_model
def revert(
    name: Annotated[
        str | None, typer.Argument(metavar="ID", help="An entry; HEAD is the last.", show_default=False)
    ] = None,
    fact: Annotated[
        str | None, typer.Option(metavar="FACT", help="One fact of a batch instead.", show_default=False)
    ] = None,
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
    """Take back an entry, or one fact of it. Reverting a revert brings back what it took.

    An entry is taken back without the model. Of a batch, --fact writes the others again; none of them is searched.
    """
    if (name is None) == (fact is None):
        raise InvalidSetting("name an entry to revert, or one fact by --fact; retcon log lists the entries")
    if name is not None and (repropose or method is not None):
        option = "--repropose" if repropose else "--method"
        raise InvalidSetting(f"{option} goes with --fact; an entry is taken back without the model")
    found = open_store(store)
    if name is not None:
        entry = found.revert(name, message=message)
    else:
        assert fact is not None
        given: dict[str, Any] = dict(repropose=repropose, editor=editor, method=method, message=message)
        entry = rewritten(found.revert_fact, found, fact, model=model, corpus=corpus, **given)
    if as_json:
        emit(entry_record(entry, found.state(entry.id)))
        return
    searched = f"; {plural(entry.about['searched'], 'value')} searched" if "searched" in entry.about else ""
    facts = plural(len(found.facts()), "fact")
    console().print(styled("[yellow]{}[/]  {}  [dim]{} in force{}[/]", entry.id, entry.message, facts, searched))
    say_on_top(entry, offer=fact is not None)
