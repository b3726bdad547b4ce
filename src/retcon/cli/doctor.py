"""`retcon doctor`: does everything that editing rests on hold for this model?"""

import typer
from rich.table import Table

from retcon.cli.models import load_model, loads_a_model
from retcon.cli.options import Json, Model
from retcon.cli.printing import console, emit, styled
from retcon.cli.progress import spinner

_MARKS = {"passed": styled("[green]✓[/]"), "failed": styled("[red]✗[/]"), "skipped": styled("[dim]-[/]")}


@loads_a_model
def doctor(model: Model, as_json: Json = False) -> None:
    """Try layout, replay, keys, one edit per kind of method, undo and saving on a model. Exit code 0: all hold; 1: not.

    The edited model is saved once to a temporary folder, so there must be room for a second copy of it.
    """
    from retcon.workflow.doctor import examine

    lm = load_model(model)
    with spinner("examining"):
        found = examine(lm)
    if as_json:
        emit(found.as_dict())
    else:
        table = Table(box=None, pad_edge=False, title_justify="left")
        table.title = f"{found.model}: {found.model_type}, {found.n_layers} layers, {found.dtype}"
        for heading in ("", "check", "found"):
            table.add_column(heading, overflow="fold")
        for finding in found.findings:
            table.add_row(_MARKS[finding.outcome], finding.check, finding.detail)
        console().print(table)
    if not found.passed:
        raise typer.Exit(1)
