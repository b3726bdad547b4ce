"""`retcon apply`: an edited model as a checkpoint that any transformers user can load."""

from pathlib import Path
from typing import Annotated

import typer

from retcon.cli.models import delta_files, load_deltas, load_model, loads_as_stored
from retcon.cli.options import AppliedDeltas, Json, Model, OtherBase
from retcon.cli.printing import console, emit, plural, size, styled
from retcon.cli.progress import spinner


@loads_as_stored
def apply(
    model: Model,
    delta: AppliedDeltas,
    save: Annotated[Path, typer.Option(metavar="DIR", help="Where the checkpoint goes.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint that is in DIR.")] = False,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Apply deltas to a model and save the result: safetensors weights and tokenizer, for transformers.

    Weights are saved in the dtype that transformers loads the model in (one for all, such as bfloat16), or in --dtype,
    whatever the deltas were computed in.

    The model itself is left alone. DIR appears complete or not at all. It records which deltas are in it, and has a
    model card. `retcon export` knows this and other formats.
    """
    from retcon.export import export
    from retcon.export.write import check_place
    from retcon.lm.load import how_to_load

    inputs = [Path(model), *delta_files(delta)]
    check_place(save, Path(model) if Path(model).is_dir() else None, force, inputs)
    deltas = load_deltas(delta)
    lm = load_model(model)
    with spinner("applying"):
        for each in deltas:
            lm.apply(each, other_base=other_base)
    with spinner(f"saving {save}"):
        made = export(lm, save, format="hf", files=[f.name for f in delta_files(delta)], force=force)
    if as_json:
        emit({"saved": str(save), "bytes": made.n_bytes, **made.record})
        return
    out = console()
    for each in made.record["deltas"]:
        out.print(
            styled(
                "applied  {}  [dim]{}: {}, {}[/]",
                each["file"],
                each["id"],
                each["method"] or "unknown method",
                plural(each["n_edits"], "edit"),
            )
        )
    out.print(styled("saved    {}  [dim]{}, {}[/]", save, size(made.n_bytes), made.record["base"]["dtype"]))
    out.print(styled("[dim]load it with {}[/]", how_to_load(save)))
