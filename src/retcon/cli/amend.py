"""`retcon amend`: another answer for a fact."""

from pathlib import Path
from typing import Annotated

import typer

from retcon.cli.moments import check_corpus
from retcon.cli.shell import Device, DType, Json, VerifyBase, console, count, emit, loads_a_model, progress_bars, styled
from retcon.cli.stores import (
    Again,
    Corpus,
    Editor,
    OtherModel,
    StorePath,
    entry_record,
    load_base,
    open_store,
    say_on_top,
)


@loads_a_model
def amend(
    fact: Annotated[str, typer.Argument(metavar="FACT", help="A fact that is in force.", show_default=False)],
    target: Annotated[str, typer.Option(metavar="TEXT", help="Its new answer.", show_default=False)],
    repropose: Again = False,
    editor: Editor = None,
    message: Annotated[str, typer.Option("-m", "--message", help="Why.", show_default=False)] = "",
    model: OtherModel = None,
    corpus: Corpus = None,
    store: StorePath = Path(".retcon"),
    device: Device = None,
    dtype: DType = None,
    verify_base: VerifyBase = False,
    as_json: Json = False,
) -> None:
    """Give a fact another answer. Its batch is written again, and its value alone is searched."""
    from retcon.workflow import moments_for

    found = open_store(store)
    found.fact(fact)  # what can be refused before the model is loaded
    if corpus is not None:
        check_corpus(corpus)
    lm = load_base(found, model, device=device, dtype=dtype, verify_base=verify_base)
    with progress_bars() as advance:
        entry = found.amend(
            lm,
            fact,
            target,
            moments=None if corpus is None else moments_for(lm, corpus),
            repropose=repropose,
            editor=editor,
            message=message,
            progress=advance,
        )
    if as_json:
        emit(entry_record(entry, found.state(entry.id)))
        return
    searched = f"{count(entry.about['searched'], 'value')} searched"
    console().print(styled("[yellow]{}[/]  {}  [dim]{}[/]", entry.id, entry.message, searched))
    say_on_top(entry, offer=True)
