"""`retcon probe attribution`: which matrices, and which of their rows, carry the probability of an answer."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from retcon.cli.facts import reads_facts
from retcon.cli.models import load_model, loads_a_model
from retcon.cli.options import Json, Model, Seed
from retcon.cli.printing import console, emit, plain_table, plural, styled
from retcon.cli.probe.shared import Cases, Out, about, check_stem, facts, write_figures
from retcon.cli.progress import progress_bars
from retcon.workflow.facts import Reading, facts_that_fit

if TYPE_CHECKING:
    from retcon.edits import Edit
    from retcon.lm.model import LM
    from retcon.locate.ensemble import Ensemble


@loads_a_model
@reads_facts("--cases", limit=20)
def attribution(
    model: Model,
    cases: Cases = None,
    *,
    reading: Reading,
    modules: Annotated[str, typer.Option(help="Matrices, separated by commas; any of q, k, v, o, gate, up, down.")] = (
        "down"
    ),
    unit: Annotated[
        Literal["row", "column"], typer.Option(help="What gets a score: a row or a column of a matrix.")
    ] = "row",
    path: Annotated[
        Literal["layer", "joint", "local"], typer.Option(help="What is scaled together: a matrix, all, or nothing.")
    ] = "layer",
    points: Annotated[int, typer.Option(min=1, help="Points of the integral over the path.")] = 20,
    answer: Annotated[
        Literal["new", "true"], typer.Option(help="The answer whose probability is attributed.")
    ] = "true",
    probability: Annotated[
        Literal["conditional", "joint"],
        typer.Option(help="Of each answer token: given the answer's earlier tokens, or together with them."),
    ] = "conditional",
    budget: Annotated[float, typer.Option(min=0, max=1, help="Share of all parameters an ensemble may hold.")] = 0.01,
    out: Out = "attribution",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Attribute the probability of answers to rows or columns of weights, by integrated gradients (KNE's locating).

    Draws how much probability each layer carries and where the ensemble of the facts lies; and how alike the ensembles
    of two facts are, of one relation and of two (STEM-overlap.png).
    """
    check_stem(out, cases)
    asked = facts(model, cases, reading, seed)
    lm = load_model(model)
    asked = facts_that_fit(lm, asked, reading.on_error)
    edits = list(asked.edits)

    import torch

    from retcon.locate import unit_figures
    from retcon.locate.attribution import answer_probabilities
    from retcon.locate.ensemble import site_key
    from retcon.locate.means import mean_and_half_width
    from retcon.methods.kne import Kne

    kinds = tuple(f"{part.strip().removesuffix('_proj')}_proj" for part in modules.split(","))
    method = Kne(
        modules=kinds,  # type: ignore[arg-type]
        granularity=unit,
        path=path,
        n_points=points,
        answer=f"target_{answer}",  # type: ignore[arg-type]
        probability=probability,
        budget=budget,
    )
    sites = method.sites(lm)
    total: list[torch.Tensor] = []
    each: list[torch.Tensor] = []
    ensembles: list[Ensemble] = []
    with progress_bars() as advance:
        for i, edit in enumerate(edits):
            scores = method.scores(lm, [edit])
            total = [t + s for t, s in zip(total, scores, strict=True)] if total else scores
            each.append(torch.stack([score.double().sum() for score in scores]))
            ensembles.append(method.choose(lm, scores))
            advance("attributing", i + 1, len(edits))
    found = float(answer_probabilities(lm, edits, method.attribution()).mean())
    mean = [t / len(edits) for t in total]
    ensemble = method.choose(lm, mean)

    by_layer = {kind: torch.zeros(len(edits), lm.n_layers, dtype=torch.float64) for kind in kinds}
    chosen = {kind: torch.zeros(lm.n_layers, dtype=torch.long) for kind in kinds}
    for site, sums in zip(sites, torch.stack(each, 1), strict=True):  # (sites, facts); a block's experts count as one
        by_layer[site.kind][:, site.layer] += sums
        chosen[site.kind][site.layer] += len(ensemble.get(site_key(site), ()))
    carried, interval = {}, {}
    for kind, sums in by_layer.items():
        carried[kind], interval[kind] = mean_and_half_width(sums)
    same, different = overlaps(edits, ensembles)
    n_units = sum(map(len, mean))
    p = method.n_chosen(lm, sites) / n_units
    by_chance = p / (2 - p)
    drawn = {"": unit_figures.attribution_figure(carried, interval, chosen, unit)}
    if same or different:
        drawn["-overlap"] = unit_figures.overlap_figure(same, different, by_chance)
    record = {
        **about(lm, asked.about, seed),
        "n": len(edits),
        "unit": unit,
        "path": path,
        "points": points,
        "answer": answer,
        "probability": probability,
        "budget": budget,
        "answers_have": found,
        "units": n_units,
        "chosen": sum(map(len, ensemble.values())),
        "carried": {kind: values.tolist() for kind, values in carried.items()},
        "carried_half_width": {kind: values.tolist() for kind, values in interval.items()},
        "in_ensemble": {kind: values.tolist() for kind, values in chosen.items()},
        "overlap": {
            "one_relation": _mean(same),
            "two_relations": _mean(different),
            "by_chance": by_chance,
            "pairs": [len(same), len(different)],
        },
    }
    written = write_figures(out, drawn, record)
    if as_json:
        emit(record)
    else:
        _show(lm, record, written)


def _show(lm: "LM", record: Mapping[str, Any], written: Sequence[Path]) -> None:
    carried, counts, overlap = record["carried"], record["in_ensemble"], record["overlap"]
    found, points, unit = record["answers_have"], record["points"], record["unit"]
    show = console()
    show.print(styled("[bold]attribution[/] on {}", lm))
    show.print(f"facts  {record['facts']}", soft_wrap=True)
    table = plain_table(right=("layer", *(head for kind in carried for head in (f"{kind}: carried", f"{unit}s"))))
    for layer in range(lm.n_layers):
        table.add_row(str(layer), *(c for k in carried for c in (f"{carried[k][layer]:.4f}", str(counts[k][layer]))))
    show.print(table)
    show.print(f"probability of the answers' tokens, summed: {found:.4f}")
    if record["path"] == "layer" and (places := unconverged(carried, found)):
        show.print(
            f"more than that is carried by {', '.join(places)}, which cannot be: {points} points are too few for the "
            f"integral there; try --points {5 * points}",
            soft_wrap=True,
        )
    n, of = record["chosen"], record["units"]
    show.print(f"the ensemble: {n:,} of {plural(of, unit)} ({n / of:.1%})")
    for name, n_pairs in zip(("one_relation", "two_relations"), overlap["pairs"], strict=True):
        if n_pairs:
            facts_of = name.replace("_", " ")
            show.print(f"overlap of two facts of {facts_of}: {overlap[name]:.3f} over {plural(n_pairs, 'pair')}")
    show.print(f"overlap by chance: {overlap['by_chance']:.3f}")
    show.print(f"written  {', '.join(map(str, written))}", soft_wrap=True)


def unconverged(carried: Mapping[str, Sequence[float]], probability: float) -> list[str]:
    """Return the matrices that carry more than the answers' whole probability, by name and layer.

    A matrix that is scaled by itself carries, of the exact integral, what the answers lose without it, and no more.
    """
    most = 1.05 * probability  # a sum over points is never exact
    return [f"{kind} {i}" for kind, values in carried.items() for i, value in enumerate(values) if value > most]


def overlaps(edits: "list[Edit]", ensembles: "list[Ensemble]") -> tuple[list[float], list[float]]:
    """Return the intersection over union of every two facts' ensembles: facts of one relation, and of two.

    Pairs of which one fact names no relation are left out.
    """
    units = [{(name, i) for name, index in ensemble.items() for i in index.tolist()} for ensemble in ensembles]
    same: list[float] = []
    different: list[float] = []
    for (a, one), (b, other) in combinations(zip(edits, units, strict=True), 2):
        if a.relation_id and b.relation_id:
            alike = len(one & other) / len(one | other)
            (same if a.relation_id == b.relation_id else different).append(alike)
    return same, different


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
