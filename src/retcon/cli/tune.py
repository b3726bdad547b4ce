"""`retcon tune`: settings for a model and facts of one's own, searched and kept as a preset."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from retcon.cli.facts import reads_facts
from retcon.cli.models import load_model, loads_a_model
from retcon.cli.options import Corpus, Json, Method, Model, On, Preset, Seed
from retcon.cli.output_checks import check_output
from retcon.cli.printing import console, emit, plain_table, plural, seconds, styled
from retcon.cluster import workers, working_on
from retcon.methods.common.presets import preset_path
from retcon.workflow import facts_that_fit, moments_for, read_facts, read_settings
from retcon.workflow.facts import Reading
from retcon.workflow.tuning import Trial, Tuned, objective, save_preset
from retcon.workflow.tuning import tune as search


@loads_a_model
@reads_facts("CASES", trains=True)
def tune(
    model: Model,
    cases: Annotated[
        Path,
        typer.Argument(
            metavar="CASES",
            help="Facts with paraphrases and neighbours to judge by; any format of docs/data.md. A hundred are good.",
        ),
    ],
    method: Method = "jeep",
    budget: Annotated[float, typer.Option(metavar="MIN", min=0, help="Minutes to search.")] = 60.0,
    trials: Annotated[int, typer.Option(min=2, help="Sets of settings to try at most.")] = 50,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A setting that is not searched; repeat.")
    ] = None,
    preset: Preset = None,
    corpus: Corpus = None,
    dataset: Annotated[
        str | None, typer.Option(help="Name of the preset's kind of data.", show_default="CASES's name")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--presets",
            metavar="FOLDER",
            help="Folder that the preset goes to.",
            show_default="RETCON_PRESETS, or ./retcon-presets",
        ),
    ] = None,
    *,
    reading: Reading,
    on: On = "local",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Search settings for METHOD on one half of CASES, report on the other half, and keep them as a preset.

    `edit`, `bench` and retcon.method(..., for_model=...) find the preset from then on, for models of these sizes.
    """
    place = workers(on)
    given = read_settings(method, dataset=None, preset=preset, assignments=assignments or ())
    check_output(preset_path(method, folder))
    facts = read_facts(cases, reading)
    lm = load_model(model)
    facts = facts_that_fit(lm, facts, reading.on_error)
    show = console(stderr=as_json)
    show.print(styled("[bold]{}[/] on {}", method, lm))
    show.print(f"facts     {facts.about}", soft_wrap=True)

    def show_trial(trial: Trial) -> None:
        changed = _all_shown(trial.changes) or "where it begins"
        failed = styled("  [red]{}[/]", trial.problem) if trial.problem else ""
        tried = f"{plural(trial.n_cases, 'case')}, {seconds(trial.seconds)}"
        show.print(styled("  {:5.1f}  {}  {}{}", 100 * trial.score, tried, changed, failed), soft_wrap=True)

    with place as at, working_on(lm, at):
        found = search(
            lm,
            method,
            facts.cases,
            moments=None if corpus is None else moments_for(lm, corpus),
            preset=preset,
            given=given,
            budget=60 * budget,
            max_trials=trials,
            seed=seed,
            on_trial=show_trial,
        )
    label = dataset or cases.name.removeprefix("hub:").partition(".")[0]
    before = f"{100 * objective(found.start_summary):.1f}" if found.start_summary else "failed"
    source = (
        f"tuned by retcon tune on {cases.name} ({plural(found.n_searched, 'fact')}, "
        f"{plural(len(found.trials), 'trial')}, seed {seed}); "
        f"{found.difference.metric if found.difference else 'Score'} {100 * objective(found.summary):.1f} "
        f"on {found.n_reported} others, {_start(found)} {before}"
    )
    show.print()
    show.print(_table(found))
    if (apart := found.difference) is not None and apart.interval is not None:
        low, high = 100 * apart.interval.low, 100 * apart.interval.high
        show.print(f"{apart.metric} {100 * apart.value:+.1f} [{low:.1f}, {high:.1f}] over that, paired by case")
    if found.changes:
        show.print(styled("found: {}", _all_shown(found.changes)), soft_wrap=True)
    path = None if found.worse or not found.changes else save_preset(lm, found, source, label, folder)
    searched = f"{plural(len(found.trials), 'trial')} in {seconds(found.seconds)}"
    if path is None:
        start = _start(found).removeprefix("by ")
        why = f"not kept: worse than {start} on cases that chose nothing"
        show.print(f"{searched}; {why if found.worse else f'nothing better than {start}'}")
    else:
        show.print(styled("{}; settings kept in [bold]{}[/]", searched, path))
    if as_json:
        emit(
            {
                "model": model,
                "method": method,
                "settings": asdict(found.method),
                "changes": found.changes,
                "preset": path and str(path),
                "trials": [asdict(trial) for trial in found.trials],
                "found": found.summary.as_dict(),
                "start": found.start_preset or "rule",
                "before": found.start_summary and found.start_summary.as_dict(),
                "n_searched": found.n_searched,
                "n_reported": found.n_reported,
                "seconds": found.seconds,
            }
        )


def _table(found: Tuned) -> Table:
    """Return the first and the best candidate's figures on the cases that were not searched on."""
    names = ("Score", "ES", "GS", "LS")
    table = plain_table(f"on {plural(found.n_reported, 'other case')}", right=names)
    for label, summary in ((_start(found), found.start_summary), ("found", found.summary)):
        table.add_row(label, *(_cell(summary, name) if summary else "failed" for name in names))
    return table


def _start(found: Tuned) -> str:
    return f"by {found.start_preset}" if found.start_preset else "by the rule"


def _cell(summary: Any, name: str) -> str:
    line = summary.get(name)
    return line.post.percent() if line and line.post else "-"


def _all_shown(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={_shown(value)}" for name, value in changes.items())


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
