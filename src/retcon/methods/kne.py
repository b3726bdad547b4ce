"""KNE: attribute the answer's probability to units of every layer, and tune only the ensemble that carries it.

Li et al., "Knowledge Editing for Large Language Model with Knowledge Neuronal Ensemble"; equation numbers and symbols
as there. No code of the authors exists; what the paper leaves open, and the reading of its contradictions:
docs/methods/kne.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Int
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.evaluation.datasets import read_cases
from retcon.lm.model import LM, require_lm
from retcon.lm.site import Site, SiteName, Unit
from retcon.locate.attribution import Attribution, Probability, Quadrature, Scaling
from retcon.locate.ensemble import (
    Ensemble,
    UnitScore,
    above_threshold,
    check_ensemble,
    count_units,
    random_scores,
    sampled,
    share_of_budget,
    site_key,
    union,
    unit_scores,
)
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import ModelShape, State, check_mlp, lower_layers
from retcon.methods.common.marks import marked, unmarked
from retcon.methods.common.settings import EACH_ONCE, Count, Layers
from retcon.methods.common.tuning import TuningSettings, sites_of_kinds, tuning
from retcon.training.objective import Answer
from retcon.training.parts import Part, trained_units
from retcon.work import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Kne(TuningSettings):
    """Knowledge Neuronal Ensemble."""

    name: ClassVar[str] = "kne"
    fits_learning_rate: ClassVar[bool] = True
    state_description: ClassVar[str] = "the ensemble"

    modules: Annotated[tuple[SiteName, ...], EACH_ONCE] = ("down_proj",)
    """Matrices that are attributed and edited, in every layer; any of down_proj, up_proj, gate_proj, q_proj, k_proj,
    v_proj, o_proj."""
    mlp: Literal["dense", "experts"] | None = None
    """What is attributed and edited in a mixture of experts, as in MEMIT."""
    layers: Layers | None = None
    """Layers whose matrices are attributed and edited, ascending, counted from 0; None: all, as published. Rows of the
    upper layers raise the answer whatever the subject is."""
    granularity: Unit = "row"
    """What an ensemble is made of: output units (Eqs. 6, 8), input units (Eq. 10; on down_proj, the value vectors of
    knowledge neurons), or single weights."""
    budget: float | None = 0.01
    """Share of the model's parameters that the ensemble may hold; p follows from it."""
    p: float | None = None
    """Share of the units that are chosen (Eq. 6), in place of a budget."""
    score: Literal["attribution", "random"] = "attribution"
    """`random`: a control; units drawn by seed."""
    unit_score: UnitScore = "sum"
    """A row's or column's score: the sum of its entries' attributions, or of their sizes."""
    sign: Literal["signed", "abs"] = "signed"
    """`abs`: units that lower the probability count as well."""
    path: Scaling = "layer"
    """What is scaled together along the integral (Eq. 4): a matrix, all of them, or nothing."""
    n_points: Count = 20
    """m in Eq. 5."""
    quadrature: Quadrature = "right"
    """Points of the integral: i/m (Eq. 5), interval midpoints, or Gauss-Legendre nodes."""
    probability: Probability = "conditional"
    """P of the first j answer tokens (Eq. 3): p(y_j | x, y_<j), or the product of those up to j."""
    answer: Answer = "target_new"
    """y*: the answer that is attributed."""
    pool: Literal["mean", "union"] = "mean"
    """Over facts: one threshold over mean scores, or the union of every fact's own ensemble."""
    locate_on: str | None = None
    """JSON lines of edits to locate on; None: the edits of the call."""
    locate_limit: Count = 200
    """Facts to locate on at most, drawn by seed."""
    reuse: bool = False
    """Take the ensemble from `state` where one is given (`locate` makes one, and every delta carries its own), rather
    than locate on the weights as they are now."""
    alpha: float = 1.0
    """Scale of the update (Eq. 11): a layer's change is alpha / sqrt(n) times what is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.budget is None) == (self.p is None):
            raise InvalidSetting(
                f"kne: give budget or p, and None for the other; found budget {self.budget}, p {self.p}"
            )
        share = self.budget if self.p is None else self.p
        if not 0 < share <= 1:  # type: ignore[operator]
            raise InvalidSetting(f"kne: budget and p are shares above 0 and up to 1, found {share}")
        if self.granularity == "entry" and self.unit_score == "sum_abs":
            raise InvalidSetting("kne: unit_score='sum_abs' sums over a row or column; entries have nothing to sum")
        self.attribution()

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Lower layers, and two Gauss-Legendre points; the learning rate is the smallest to try."""
        return {
            "layers": lower_layers(shape.n_layers),
            "quadrature": "gauss",
            "n_points": 2,
            "learning_rate": 2.5e-3,
            "epochs": 40,
            "stop_loss": 0.1,
        }

    def for_next_try(self) -> "Kne":
        """Return the same ensemble: it was located on these edits."""
        return replace(self, reuse=True)

    def propose(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        state: State | None = None,
        values: ValueCache | None = None,
        keep_values: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Delta:
        """Return the change that writes `edits` as one batch; contexts and moments are not used.

        The delta's `state` is its ensemble; with `reuse`, that of an earlier call is taken over.

        Raises:
            InvalidSetting: more units than there are.
            DeltaMismatch: the ensemble given is not one of this model and these settings; of one that `locate` made,
                or an earlier version kept, only its matrices and units are checked.
        """
        sites = self.sites(lm)
        with tuning(self, lm, edits, [site.name for site in sites], seed=seed, progress=progress) as run:
            if not edits:
                return run.delta(state=state if self.keeps_state else None)
            if self.reuse and state:
                given = unmarked(self.name, state, lm, "locate anew (reuse=False)", granularity=self.granularity)
                ensemble = check_ensemble(given, lm, sites, self.granularity)
            else:
                ensemble = self.locate(lm, self._facts(edits), seed=seed, progress=run.progress)
            parts = [self._part(site, ensemble[site_key(site)]) for site in sites if site_key(site) in ensemble]
            kept = marked(ensemble, lm, granularity=self.granularity)
            return run.delta(parts, run.train(parts, stage="ensemble"), state=kept)

    def locate(self, lm: LM, facts: Sequence[Edit], *, seed: int = 0, progress: Progress = silent) -> Ensemble:
        """Return N*, the ensemble of `facts` on the weights as they are now (Eqs. 4 to 7).

        Of more than `locate_limit` facts, `seed` draws that many.
        """
        facts = sampled(facts, self.locate_limit, seed)
        if self.pool == "mean":
            return self.choose(lm, self.scores(lm, facts, seed=seed, progress=progress))
        own: list[Ensemble] = []
        for i, fact in enumerate(facts):
            own.append(self.choose(lm, self.scores(lm, [fact], seed=seed + i)))
            progress("attribution", i + 1, len(facts))
        return union(self.sites(lm), own)

    def scores(self, lm: LM, facts: Sequence[Edit], *, seed: int = 0, progress: Progress = silent) -> list[Tensor]:
        """Return the score of every unit of every site (`sites`), higher is sooner chosen."""
        sites = self.sites(lm)
        if self.score == "random":
            return random_scores(sites, self.granularity, seed)
        report = partial(progress, "attribution")
        how, unit = self.attribution(), self.granularity
        found = unit_scores(lm, facts, sites, how, unit, self.unit_score, progress=report)
        return [s.abs() for s in found] if self.sign == "abs" else found

    def sites(self, lm: LM) -> list[Site]:
        """Return the matrices of the blocks that have them, in order of layers; that order breaks ties."""
        require_lm(lm)
        layers = range(lm.n_layers) if self.layers is None else self.layers
        of_mlp = {"down_proj", "up_proj", "gate_proj"} & set(self.modules)
        check_mlp(self.name, lm, layers, self.mlp if of_mlp else None)
        return sites_of_kinds(self.name, lm, layers, self.modules, routed=self.mlp == "experts")

    def choose(self, lm: LM, scores: Sequence[Tensor]) -> Ensemble:
        """Return the units above the one threshold over all sites (Eqs. 6, 7)."""
        sites = self.sites(lm)
        return above_threshold(sites, scores, self.n_chosen(lm, sites))

    def n_chosen(self, lm: LM, sites: Sequence[Site]) -> int:
        """Return how many units: max(1, round(p * units)); where a budget is given, p follows from it."""
        p = self.p if self.budget is None else share_of_budget(lm, sites, self.budget)
        assert p is not None
        return max(1, round(p * sum(count_units(site, self.granularity) for site in sites)))

    @property
    def bytes_per_value(self) -> int:  # type: ignore[override]
        """With the place of each entry besides, and its row and column while a gradient is taken."""
        return TuningSettings.bytes_per_value + (24 if self.granularity == "entry" else 0)

    def attribution(self) -> Attribution:
        """Return how scores are found."""
        return Attribution(
            path=self.path,
            n_points=self.n_points,
            quadrature=self.quadrature,
            probability=self.probability,
            answer=self.answer,
        )

    def _part(self, site: Site, units: Int[Tensor, " n"]) -> Part:
        """W_kne, zero (Eq. 8), which Eqs. 9 to 11 place in the matrix and scale."""
        return trained_units(site, self.granularity, units, self.alpha / math.sqrt(len(units)))

    def _facts(self, edits: Sequence[Edit]) -> Sequence[Edit]:
        if self.locate_on is None:
            return edits
        return [edit for case in read_cases(self.locate_on)[0] for edit in case.edits]
