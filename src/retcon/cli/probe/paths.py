"""`retcon probe paths`: the critical transmission paths of facts, node by node."""

from typing import Annotated, Literal

import typer

from retcon.cli.facts import reads_facts
from retcon.cli.models import load_model, loads_a_model
from retcon.cli.options import Json, Model, Seed
from retcon.cli.printing import console, emit, plain_table, styled
from retcon.cli.probe.shared import Cases, Out, about, check_stem, facts, write_figures
from retcon.cli.progress import spinner
from retcon.workflow.facts import Reading, facts_that_fit

Score = Literal["z_abs", "signed_sum", "abs_of_sum", "sum_abs", "l2", "grad_x_weight", "random"]


@loads_a_model
@reads_facts("--cases", limit=100)
def paths(
    model: Model,
    cases: Cases = None,
    *,
    reading: Reading,
    score: Annotated[Score, typer.Option(help="What makes a node critical.")] = "z_abs",
    select: Annotated[
        Literal["rank_aligned", "k_best"],
        typer.Option(
            help="rank_aligned: path r takes the r-th node of every matrix; k_best: the paths of the best sums."
        ),
    ] = "rank_aligned",
    positive: Annotated[int, typer.Option(min=1, help="Number of paths of highest score.")] = 15,
    negative: Annotated[int, typer.Option(min=0, help="Number of paths of lowest score.")] = 1,
    pool: Annotated[
        Literal["pooled", "per_edit"],
        typer.Option(help="Scores of all facts' summed gradient, or the mean of each one's."),
    ] = ("pooled"),
    key_matrix: Annotated[
        Literal["up", "gate", "both"], typer.Option(help="Where key vectors are, in a gated MLP.")
    ] = "up",
    out: Out = "paths",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Find the paths of key and value vectors that matter most for writing the new answers (CTP's tracing).

    Draws the scores of their nodes, layer by layer; all nodes of all paths are in STEM.json.
    """
    check_stem(out, cases)
    asked = facts(model, cases, reading, seed)
    lm = load_model(model)
    asked = facts_that_fit(lm, asked, reading.on_error)
    edits = list(asked.edits)

    from retcon.locate import paths as located
    from retcon.locate import unit_figures

    with spinner("assessing nodes"):
        found = located.paths(
            lm,
            edits,
            score=score,
            select=select,
            n_positive=positive,
            n_negative=negative,
            pool=pool,
            key_matrix=key_matrix,
            seed=seed,
        )
    slots = [
        {
            "layer": slot.site.layer,
            "matrix": slot.site.kind,
            "nodes": found.positive.in_slot(t),
            "scores": found.scores[t][found.positive.in_slot(t)].tolist(),
            "mean_score": float(found.scores[t].double().mean()),
            "negative": found.negative.in_slot(t),
        }
        for t, slot in enumerate(found.slots)
    ]
    record = {
        **about(lm, asked.about, seed),
        "n": len(edits),
        "score": score,
        "select": select,
        "pool": pool,
        "key_matrix": key_matrix,
        "path_scores": {"positive": list(found.positive.scores), "negative": list(found.negative.scores)},
        "slots": slots,
    }
    written = write_figures(out, {"": unit_figures.paths_figure(found, score)}, record)
    if as_json:
        emit(record)
        return
    show = console()
    show.print(styled("[bold]paths[/] on {}", lm))
    show.print(f"facts  {asked.about}", soft_wrap=True)
    table = plain_table()
    for name in ("layer", "matrix", "best score", "mean", "best nodes"):
        table.add_column(name, justify="left" if name in ("matrix", "best nodes") else "right")
    for t, slot in enumerate(found.slots):
        nodes, scores = found.positive.in_slot(t), found.scores[t]
        cells = [f"{float(scores[nodes[0]]):.3g}", f"{float(scores.double().mean()):.3g}"]
        table.add_row(str(slot.site.layer), slot.site.kind, *cells, ", ".join(map(str, nodes[:6])))
    show.print(table)
    show.print(f"written  {', '.join(map(str, written))}", soft_wrap=True)
