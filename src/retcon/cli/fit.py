"""`retcon fit`: an editor trained for a model, for methods that edit with one."""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from retcon.cli.facts import reads_facts
from retcon.cli.models import load_model, loads_a_model
from retcon.cli.options import Assignments, Json, Model, Preset, PresetsOf, Seed
from retcon.cli.output_checks import check_output
from retcon.cli.printing import console, emit, seconds, size, styled, warn
from retcon.cli.progress import progress_bars
from retcon.cli.tables import settings_table
from retcon.errors import InvalidSetting, how_to_install
from retcon.workflow import facts_that_fit, read_facts, read_settings, resolve
from retcon.workflow.facts import Reading
from retcon.workflow.fitting import check_trainable, draw_curve, fit_editor, memory_needed


@loads_a_model
@reads_facts("CASES", trains=True)
def fit(
    model: Model,
    cases: Annotated[
        Path,
        typer.Argument(
            metavar="CASES",
            help="Facts with paraphrases and neighbours to train on, none of those to be edited; any format of "
            "docs/data.md. A thousand are good.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File that the editor goes to.")],
    method: Annotated[str, typer.Option(help="mend or malmen.")] = "mend",
    dataset: PresetsOf = None,
    preset: Preset = None,
    assignments: Assignments = None,
    *,
    reading: Reading,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file that is at FILE, and what another run has kept beside it.")
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train an editor for MODEL, which `retcon edit --method METHOD --set editor=FILE` then edits with.

    A run that was killed goes on where it was when the same command is given again; what it keeps meanwhile is in
    FILE.unfinished. Beside FILE comes a picture of the losses, where matplotlib is installed.
    """
    check_trainable(method)
    check_output(out, cases, Path(model))
    if out.exists() and not force:
        raise InvalidSetting(f"{out} is there already; name another file, or give --force to replace it")
    given = read_settings(method, dataset=dataset, preset=preset, assignments=assignments or ())
    facts = read_facts(cases, reading)
    show = console(stderr=as_json)
    lm = load_model(model)
    facts = facts_that_fit(lm, facts, reading.on_error)
    resolved = resolve(lm, method, dataset=dataset, preset=preset, given=given)
    show.print(styled("[bold]{}[/] on {}", method, lm))
    show.print(f"facts     {facts.about}", soft_wrap=True)
    show.print(f"settings  {resolved.source}", soft_wrap=True)
    show.print(f"memory    {memory_needed(lm, resolved)}", soft_wrap=True)
    show.print(settings_table(resolved))
    with progress_bars() as advance:
        fitted = fit_editor(lm, resolved, facts.cases, out, seed=seed, force=force, progress=advance)
    pictures: list[Path] = []
    losses = ""
    if fitted.curve:
        first, best, last = fitted.curve[0], fitted.best, fitted.curve[-1]
        losses = f"validation loss {first.validation:.4g} untrained, {best.validation:.4g} at step {best.step:,} "
        losses += f"of {last.step:,}; "
        if find_spec("matplotlib") is None:
            warn(f"no picture of the losses: matplotlib is not installed ({how_to_install('plot')})")
        else:
            pictures = draw_curve(fitted, out.with_suffix("") if out.suffix == ".safetensors" else out)
    show.print(f"{losses}{seconds(fitted.seconds)}", soft_wrap=True)
    show.print(styled("editor kept in [bold]{}[/], {}", out, size(out.stat().st_size)), soft_wrap=True)
    if as_json:
        emit(
            {
                "model": model,
                "method": method,
                "settings": resolved.settings,
                "editor": str(out),
                "pictures": [str(path) for path in pictures],
                "best": asdict(fitted.best) if fitted.curve else None,
                "curve": [asdict(point) for point in fitted.curve],
                "cases": len(facts.cases),
                "seconds": fitted.seconds,
            }
        )
