"""`retcon init`: a store for the edits of a model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from retcon.cli.models import load_model, loads_a_model
from retcon.cli.options import Json, Model
from retcon.cli.printing import console, emit, program, styled


@loads_a_model
def init(
    model: Model,
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder to make.")] = Path(".retcon"),
    precision: Annotated[
        Literal["float32", "float16"], typer.Option(help="In which deltas are kept; float16 takes half the room.")
    ] = "float32",
    lfs: Annotated[bool, typer.Option("--lfs", help="Let git-lfs keep deltas and values.")] = False,
    as_json: Json = False,
) -> None:
    """Make a store: a folder that keeps the edits of MODEL under version control, and lives in git."""
    from retcon.store import Store

    Store.check_new(store)
    lm = load_model(model)
    made = Store.init(store, lm, model=model, precision=precision, lfs=lfs)
    if as_json:
        emit({"store": str(store), "model": model, "base": made.base, "precision": precision})
        return
    show = console()
    show.print(styled("made   [bold]{}[/]  [dim]for {}, fingerprint {}[/]", store, model, made.base[:12]))
    show.print(styled("[dim]next   {} edit {} FACTS --store {}[/]", program(), model, store), soft_wrap=True)
