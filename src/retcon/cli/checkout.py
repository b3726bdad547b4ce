"""`retcon checkout`: the model as of any entry."""

from pathlib import Path
from typing import Annotated

import typer

from retcon.cli.models import loads_as_stored
from retcon.cli.options import Json
from retcon.cli.printing import console, emit, plural, size, styled
from retcon.cli.progress import spinner
from retcon.cli.stores import OtherModel, StorePath, load_base, open_store
from retcon.files import found_from


@loads_as_stored
def checkout(
    save: Annotated[Path, typer.Option(metavar="DIR", help="Where the checkpoint goes.")],
    entry: Annotated[str, typer.Argument(metavar="ID", help="An entry, or base.")] = "HEAD",
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint that is in DIR.")] = False,
    model: OtherModel = None,
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """Save the model as of an entry: safetensors weights, tokenizer and model card.

    Weights are saved in the dtype that transformers loads the model in (one for all, such as bfloat16), or in --dtype.

    To ask a state something, no checkpoint is needed: wherever a verb takes a DELTA, a store stands for the deltas in
    force, and DIR@ID for those after an entry.
    """
    from retcon.export import export
    from retcon.export.write import check_place

    found = open_store(store)
    state = found.state(None if entry == "HEAD" else entry)
    source = model or found_from(found.model, found.path)
    check_place(save, Path(source) if Path(source).is_dir() else None, force, [Path(source), Path(found.path)])
    lm = load_base(found, model)
    with spinner(f"saving {save}"):
        found.checkout(lm, None if entry == "HEAD" else entry)
        made = export(lm, save, format="hf", files=[f"{d}.safetensors" for d in state.deltas], force=force)
    if as_json:
        emit({"saved": str(save), "bytes": made.n_bytes, "state": state.id, **made.record})
        return
    facts = plural(len(found.facts(None if entry == "HEAD" else entry)), "fact")
    about = f"{size(made.n_bytes)}, state {state.id}: {facts} in {plural(len(state.deltas), 'delta')}"
    console().print(styled("saved  [bold]{}[/]  [dim]{}[/]", save, about))
