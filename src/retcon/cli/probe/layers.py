"""`retcon probe layers`: which layers to edit, and on what evidence."""

import shlex
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from retcon.cli.chat_options import chat_options
from retcon.cli.facts import reading_options, reads_facts
from retcon.cli.models import load_model, loading_options, loads_a_model
from retcon.cli.options import Json, Model, Seed
from retcon.cli.printing import console, emit, plain_table, program, styled
from retcon.cli.probe.shared import Cases, Out, about, check_stem, facts, probed, write_figures
from retcon.cli.progress import progress_bars
from retcon.workflow.facts import Reading, facts_that_fit

if TYPE_CHECKING:
    from retcon.locate import Advice, Choice


@loads_a_model
@reads_facts("--cases", limit=1_000)
def layers(
    model: Model,
    cases: Cases = None,
    *,
    reading: Reading,
    final_norm: Annotated[
        bool,
        typer.Option(
            "--final-norm/--no-final-norm",
            help="Read states through the final norm, as the model does, or without it, as the paper does.",
        ),
    ] = True,
    out: Out = "layers",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Propose the layers to edit: where the original and the target answer part.

    Low layers for JEEP's first group and the MEMIT family, high ones for JEEP's second. Prints the evidence and how
    stable the choice is over resampled facts, and says when it is weak.
    """
    check_stem(out, cases)
    asked = facts(model, cases, reading, seed)
    lm = load_model(model)
    asked = facts_that_fit(lm, asked, reading.on_error)
    edits = list(asked.edits)

    from retcon.locate import Rule, advise, contrast_probe, figures

    with progress_bars() as advance:
        found = contrast_probe(
            lm, edits, norms=(False, True) if final_norm else (False,), progress=partial(advance, "reading facts")
        )
    advice = advise(found, Rule(final_norm=final_norm), seed=seed)
    drawn = {"": figures.advice_figure(advice), "-contrast": figures.contrast_figure(found, advice)}
    record = {**about(lm, asked.about, seed), **_record(advice), "skipped": found.skipped, "means": found.means()}
    written = write_figures(out, drawn, record)
    if as_json:
        emit(record)
        return
    show = console()
    show.print(styled("[bold]layers[/] for {}", lm))
    show.print(f"facts  {asked.about}", soft_wrap=True)
    show.print(probed(found), soft_wrap=True)
    show.print()
    show.print(_table(advice))
    show.print()
    show.print(f"jeep          low = {list(advice.low.layers)}, high = {list(advice.high.layers)}")
    show.print(f"memit, ...    layers = {list(advice.low.layers)}")
    show.print(f"rome, ...     layer = {advice.settings(['layer'])['layer']}")
    if advice.weak:
        show.print(styled("[yellow]the evidence is weak:[/]"))
        for reason in advice.weak:
            show.print(styled("  [yellow]{}[/]", reason), soft_wrap=True)
    else:
        show.print(styled("[green]the evidence is clear[/]"))
    show.print(f"written  {', '.join(map(str, written))}", soft_wrap=True)
    file = "EDITS" if cases is None else shlex.quote(str(cases))
    how = reading_options(reading) + (chat_options(edits) if reading.chat else "") + loading_options()
    ask = f"{program()} edit {shlex.quote(model)} {file}{how} --layers probe --out edits.safetensors"
    show.print(styled("[dim]try      {}[/]", ask), soft_wrap=True)


def _table(advice: "Advice") -> Table:
    from retcon.locate.advice import span

    table = plain_table("group", "read at", right=("layers", "score", "95 %", "stability", "next best"))
    for name, choice in (("low", advice.low), ("high", advice.high)):
        table.add_row(
            name,
            "subject's last token" if choice.where == "subject_last" else "prediction position",
            span(choice.layers),
            f"{choice.score:.2f}",
            f"{choice.low:.2f} to {choice.high:.2f}",
            f"{choice.stability:.0%}",
            _next_best(choice),
        )
    table.caption = "score: sum of Δ, log ranks the original answer gains beyond the target"
    return table


def _next_best(choice: "Choice") -> str:
    from retcon.locate.advice import span

    others = [(float(s), start) for s, start in zip(choice.scores, choice.starts, strict=True)]
    others = sorted((pair for pair in others if pair[1] != choice.layers[0]), reverse=True)
    if not others:
        return "-"
    score, start = others[0]
    return f"{span(range(start, start + len(choice.layers)))} ({score:.2f})"


def _record(advice: "Advice") -> dict[str, Any]:
    def choice(of: "Choice") -> dict[str, Any]:
        return {
            "layers": list(of.layers),
            "position": of.where,
            "score": of.score,
            "interval": [of.low, of.high],
            "stability": of.stability,
            "windows": [
                {"first": start, "score": score, "share_of_resamples": share}
                for start, score, share in zip(of.starts, of.scores.tolist(), of.shares.tolist(), strict=True)
            ],
        }

    return {
        "low": choice(advice.low),
        "high": choice(advice.high),
        "settings": {"jeep": advice.settings(["low", "high"]), **advice.settings(["layers", "layer"])},
        "contrast": {
            where: {"mean": mean.tolist(), "half_width": advice.half_width[where].tolist()}
            for where, mean in advice.contrast.items()
        },
        "n": advice.n_cases,
        "n_known": advice.n_known,
        "n_assumed": advice.n_assumed,
        "weak": list(advice.weak),
        "rule": asdict(advice.rule),
    }
