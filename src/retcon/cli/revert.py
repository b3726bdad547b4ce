"""`retcon revert`: an entry, or one fact, taken back."""

from typing import Annotated

import typer

from retcon.cli.models import loads_a_model
from retcon.cli.options import Json
from retcon.cli.printing import console, emit, plural, styled
from retcon.cli.stores import Rewriting, entry_record, open_store, rewrites, rewritten, say_on_top
from retcon.errors import InvalidSetting


@loads_a_model
@rewrites
def revert(
    name: Annotated[str | None, typer.Argument(metavar="ID", help="An entry; HEAD is the last.")] = None,
    fact: Annotated[str | None, typer.Option(metavar="FACT", help="One fact of a batch instead.")] = None,
    *,
    how: Rewriting,
    as_json: Json = False,
) -> None:
    """Take back an entry, or one fact of it. Reverting a revert brings back what it took.

    An entry is taken back without the model. Of a batch, --fact writes the others again; none of them is searched.
    """
    if (name is None) == (fact is None):
        raise InvalidSetting("name an entry to revert, or one fact by --fact; retcon log lists the entries")
    if name is not None and (how.repropose or how.method is not None):
        option = "--repropose" if how.repropose else "--method"
        raise InvalidSetting(f"{option} goes with --fact; an entry is taken back without the model")
    found = open_store(how.store)
    if name is not None:
        entry = found.revert(name, message=how.message)
    else:
        assert fact is not None
        entry = rewritten(found.revert_fact, found, how, fact)
    if as_json:
        emit(entry_record(entry, found.state(entry.id)))
        return
    searched = f"; {plural(entry.about['searched'], 'value')} searched" if "searched" in entry.about else ""
    facts = plural(len(found.facts()), "fact")
    console().print(styled("[yellow]{}[/]  {}  [dim]{} in force{}[/]", entry.id, entry.message, facts, searched))
    say_on_top(entry, offer=fact is not None)
