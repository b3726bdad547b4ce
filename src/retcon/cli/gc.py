"""`retcon gc`: files of a store that nothing needs, removed."""

from pathlib import Path
from typing import Annotated

import typer

from retcon.cli.options import Json
from retcon.cli.printing import console, emit, plural, size
from retcon.cli.stores import StorePath, open_store


def gc(
    before: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Also the deltas that neither the state after this entry nor a later one needs."
        ),
    ] = None,
    values: Annotated[
        bool,
        typer.Option(
            "--values", help="Also all searched values; to take a fact back then searches those of its batch anew."
        ),
    ] = False,
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """Remove files that no entry names. What else is removed, the log says, and so does whatever asks for it later."""
    removed, n_bytes = open_store(store).gc(before=before, values=values)
    if as_json:
        emit({"removed": removed, "bytes": n_bytes})
        return
    console().print(f"removed {plural(len(removed), 'file')}, {size(n_bytes)}" if removed else "nothing to remove")
