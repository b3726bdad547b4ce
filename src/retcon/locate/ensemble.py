"""An ensemble: of the units of many matrices, those whose scores lie above one threshold for all.

Li et al., "Knowledge Editing for Large Language Model with Knowledge Neuronal Ensemble" (KNE), Eqs. 6 and 7. What a
unit scores is `attribution`'s.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from retcon.arguments import check_choice
from retcon.edits import Edit
from retcon.errors import DeltaMismatch
from retcon.lm.model import LM
from retcon.lm.site import Site, Unit
from retcon.locate.attribution import Attribution, attribute, select
from retcon.seed import generator_of
from retcon.work import silent

Ensemble = dict[str, Int[Tensor, " n"]]
"""N*: chosen units by `<layer>.<matrix>`, of a routed expert `<layer>.<matrix>.<expert>`, ascending; matrices without
a unit are left out."""
UnitScore = Literal["sum", "sum_abs"]


def site_key(site: Site) -> str:
    """Return what an ensemble calls a matrix."""
    return f"{site.layer}.{site.kind}" + ("" if site.expert is None else f".{site.expert}")


def count_units(site: Site, unit: Unit) -> int:
    """Return how many rows, columns or entries a matrix has."""
    out, into = site.shape
    return {"row": out, "column": into, "entry": out * into}[unit]


def share_of_budget(lm: LM, sites: Sequence[Site], budget: float) -> float:
    """Return the share of the sites' weights that is `budget` of the model's parameters; 1 where they have fewer."""
    return min(1.0, budget * lm.n_parameters / sum(site.shape.numel() for site in sites))


def unit_scores(
    lm: LM,
    facts: Sequence[Edit],
    sites: Sequence[Site],
    how: Attribution,
    unit: Unit,
    unit_score: UnitScore = "sum",
    *,
    progress: Callable[[int, int], None] = silent,
) -> list[Tensor]:
    """Return per site, every unit's mean score over `facts`: the sum of its entries' attributions, or of their sizes.

    Raises:
        InvalidSetting: no such score.
        InvalidEdit, NonFinite: as `attribute`.
    """
    check_choice(unit_score, UnitScore, "score of units")
    if unit_score == "sum":
        return attribute(lm, facts, sites, how, unit, progress=progress)
    found = attribute(lm, facts, sites, how, "entry", progress=progress)
    over = 1 if unit == "row" else 0
    return [score.abs().view(site.shape).sum(over) for score, site in zip(found, sites, strict=True)]


def random_scores(sites: Sequence[Site], unit: Unit, seed: int) -> list[Tensor]:
    """Return a control: scores drawn uniformly."""
    generator = generator_of(seed)
    return [torch.rand(count_units(site, unit), generator=generator) for site in sites]


def above_threshold(sites: Sequence[Site], scores: Sequence[Tensor], count: int) -> Ensemble:
    """Return the `count` units of the highest scores over all sites together; the order of the sites breaks ties."""
    found = select(scores, count)
    return {site_key(site): units for site, units in zip(sites, found, strict=True) if len(units)}


def union(sites: Sequence[Site], ensembles: Sequence[Ensemble]) -> Ensemble:
    """Return the units that are in any of the ensembles."""
    held = {site_key(site): [e[site_key(site)] for e in ensembles if site_key(site) in e] for site in sites}
    return {name: torch.cat(units).unique() for name, units in held.items() if units}


def sampled(facts: Sequence[Edit], limit: int, seed: int) -> Sequence[Edit]:
    """Return at most `limit` facts, in their order."""
    if len(facts) <= limit:
        return facts
    order = torch.randperm(len(facts), generator=generator_of(seed))[:limit]
    return [facts[i] for i in order.sort().values.tolist()]


def check_ensemble(given: Mapping[str, Tensor], lm: LM, sites: Sequence[Site], unit: Unit) -> Ensemble:
    """Return an ensemble that was kept, if it is one over these sites.

    Raises:
        DeltaMismatch: it names another matrix, or a unit that its matrix does not have.
    """
    known = {site_key(site): count_units(site, unit) for site in sites}
    for name, index in given.items():
        if name not in known or index.dtype != torch.long or not len(index) or int(index.max()) >= known[name]:
            raise DeltaMismatch(
                f"kne: the ensemble given names {name!r} ({len(index)} units), which is no {unit} ensemble over "
                f"{', '.join(dict.fromkeys(site.kind for site in sites))} of {lm.name!r}; locate anew (reuse=False)"
            )
    return {name: index.cpu() for name, index in given.items()}
