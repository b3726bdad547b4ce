"""`retcon probe trace`: which states carry a fact to its answer."""

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from retcon.cli.facts import reads_facts
from retcon.cli.models import load_model, loads_a_model
from retcon.cli.options import Json, Model, Seed
from retcon.cli.printing import console, emit, plain_table, plural, styled
from retcon.cli.probe.shared import Cases, Out, about, check_stem, facts, left_out, stood_in, write_figures
from retcon.cli.progress import progress_bars
from retcon.workflow.facts import Reading, facts_that_fit

if TYPE_CHECKING:
    from retcon.locate import Traces


@loads_a_model
@reads_facts("--cases", limit=10)
def trace(
    model: Model,
    cases: Cases = None,
    *,
    reading: Reading,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="What to restore: block, mlp, attn, severed_mlp, severed_attn; repeat.",
            show_default="the first three",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Layers whose MLP or attention is restored at once.",
            show_default="10, or 3/8 of a shallower model",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Draws of the noise for each fact.")] = 10,
    noise: Annotated[
        float, typer.Option(min=0, help="Strength of the noise, in standard deviations of the subjects' embeddings.")
    ] = 3.0,
    corruption: Annotated[
        Literal["add", "replace"], typer.Option(help="Put noise on top of the subject's embeddings, or in their place.")
    ] = "add",
    out: Out = "trace",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Corrupt the subject, restore one state at a time, and see what brings the answer back (ROME's causal tracing).

    Draws the average indirect effect by kind of token and layer, and the first fact's own heat map (STEM-first.png).
    """
    check_stem(out, cases)
    from retcon.locate.tracing import Tracing, causal_trace, default_window

    settings = Tracing(
        kinds=tuple(kinds or ("block", "mlp", "attn")),  # type: ignore[arg-type]
        samples=samples,
        noise=noise,
        corruption=corruption,
        seed=seed,
    )
    asked = facts(model, cases, reading, seed)
    lm = load_model(model)
    asked = facts_that_fit(lm, asked, reading.on_error)
    edits = list(asked.edits)

    from retcon.locate import figures

    settings = replace(settings, window=window or default_window(lm.n_layers))
    with progress_bars() as advance:
        found = causal_trace(lm, edits, settings, progress=partial(advance, "tracing facts"))
    drawn = {"": figures.effects_figure(found), "-first": figures.trace_figure(found.traces[0], found.settings.window)}
    record = {**about(lm, asked.about, seed), **_record(found)}
    written = write_figures(out, drawn, record)
    if as_json:
        emit(record)
        return
    show = console()
    show.print(styled("[bold]trace[/] on {}", lm))
    show.print(f"facts  {asked.about}", soft_wrap=True)
    mean, half = found.total()
    line = f"traced {plural(len(found), 'fact')}{stood_in(found.n_assumed)}; total effect {mean:.3f}"
    line += f" ± {half:.3f}" if len(found) > 1 else ""
    show.print(line + left_out(found.skipped), soft_wrap=True)
    show.print()
    show.print(_table(found))
    show.print(f"written  {', '.join(map(str, written))}", soft_wrap=True)


def _record(found: "Traces") -> dict[str, Any]:
    from retcon.locate.tracing import GROUPS

    averages = {}
    for kind in found.settings.kinds:
        effects = found.average(kind)
        averages[kind] = {
            group: {"n": n, "mean": mean, "half_width": half}
            for group, n, mean, half in zip(
                GROUPS, effects.n, effects.mean.tolist(), effects.half_width.tolist(), strict=True
            )
        }
    mean, half = found.total()
    return {
        "settings": asdict(found.settings),
        "embedding_deviation": found.deviation,
        "total_effect": {"mean": mean, "half_width": half},
        "average_indirect_effect": averages,
        "n_assumed": found.n_assumed,
        "skipped": found.skipped,
        "facts_traced": [
            {
                "id": t.id,
                "tokens": t.tokens,
                "subject": [t.subject.start, t.subject.stop],
                "answer": t.answer,
                "assumed": t.assumed,
                "high": t.high,
                "low": t.low,
                "scores": {kind: scores.tolist() for kind, scores in t.scores.items()},
            }
            for t in found.traces
        ],
    }


def _table(found: "Traces") -> Table:
    """Return where each kind of restoration does most."""
    from retcon.locate.tracing import GROUPS

    table = plain_table("restored", right=GROUPS)
    for kind in found.settings.kinds:
        mean = found.average(kind).mean
        cells = []
        for row in mean:
            best = int(row.nan_to_num(-1).argmax())
            cells.append("-" if bool(row.isnan().any()) else f"{row[best]:.3f} at {best}")
        table.add_row(kind, *cells)
    table.caption = "largest average indirect effect and its layer, by kind of token"
    return table
