"""Integrated gradients over weights: how much of an answer's probability each row, column or entry of a matrix carries.

Li et al., "Knowledge Neuronal Ensemble" (KNE), Eqs. 3 to 5, after Sundararajan et al. 2017 and Dai et al. 2022. For a
group of weights scaled together, w = alpha w̄,

    Attr(w_k) = w̄_k * integral over alpha in [0, 1] of dF/dw_k (alpha w̄),     sum_k Attr(w_k) = F(w̄) - F(0).

F is the answer's probability, token by token. What the paper leaves open, and why the defaults are what they are:
docs/methods/kne.md. With h_t = W x_t and g_t = dF/dy_t, the attribution of a row is the integral of sum_t h_t g_t, that
of a column of sum_t x_t (W^T g_t): activations and their gradients, no weight gradient. Entries need sum_t g_t x_t^T,
which is formed for one matrix at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.arguments import check_choice, list_of_some
from retcon.edits import Edit, list_of_edits
from retcon.errors import InvalidSetting, NonFinite
from retcon.lm.batches import MAX_BATCH_TOKENS, buckets
from retcon.lm.forward import Hook, Point, answer_places, gold, input_rows, log_probs, logits_at, reading, run
from retcon.lm.hooks import hooked
from retcon.lm.model import LM
from retcon.lm.prompts import Row, pad
from retcon.lm.replay import ReplayState, flat_places, replaying
from retcon.lm.site import Site, SiteName, Unit
from retcon.locate.gradients import Captured, catch
from retcon.training.objective import Answer, answer_rows
from retcon.work import Here, in_order, silent

Scaling = Literal["layer", "joint", "local"]
"""What is scaled together along the integral."""
Quadrature = Literal["right", "midpoint", "gauss"]
Probability = Literal["conditional", "joint"]


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """How probability is attributed."""

    path: Scaling = "layer"
    """What is scaled together: one matrix at a time (`layer`), all matrices at once (`joint`), nothing (`local`: the
    gradient at the weights as they are, times the weight)."""
    n_points: int = 20
    """m: points of the integral (ignored by `local`)."""
    quadrature: Quadrature = "right"
    """Where they lie: i/m as in the paper's Eq. 5, interval midpoints, or Gauss-Legendre nodes."""
    probability: Probability = "conditional"
    """P of the first j tokens: p(y_j | x, y_<j), or the product of those up to j."""
    answer: Answer = "target_new"
    """The answer whose probability is attributed."""

    def __post_init__(self) -> None:
        for name, known in (
            ("path", Scaling),
            ("quadrature", Quadrature),
            ("probability", Probability),
            ("answer", Answer),
        ):
            check_choice(getattr(self, name), known, f"{name} of an attribution")
        if self.n_points < 1:
            raise InvalidSetting(f"attribution: n_points must be at least 1, found {self.n_points}")

    def points(self) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Return points in (0, 1] and their weights, which sum to 1; float64."""
        m = self.n_points
        if self.path == "local":
            return torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        if self.quadrature == "gauss":  # Golub & Welsch 1969
            i = torch.arange(1, m, dtype=torch.float64)
            off = torch.diag(i / (4 * i**2 - 1).sqrt(), 1)
            nodes, vectors = torch.linalg.eigh(off + off.T)
            return (nodes + 1) / 2, vectors[0] ** 2
        shift = 0.5 if self.quadrature == "midpoint" else 0.0
        return (torch.arange(1, m + 1, dtype=torch.float64) - shift) / m, torch.full((m,), 1 / m, dtype=torch.float64)


@dataclass(frozen=True)
class _Copies:
    """A group of facts, each at every point: rows are ordered copy by copy."""

    rows: tuple[Row, ...]
    """The facts, without their last answer tokens in `ids`."""
    labels: tuple[Row, ...]
    """The same with them."""
    alpha: Float[Tensor, " m"]
    weight: Float[Tensor, " m"]

    @cached_property
    def places(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Rows and positions of the tokens that predict answer tokens, in all copies."""
        return answer_places(self.labels * len(self.alpha))

    def objective(self, log_p: Float[Tensor, "n vocab"], probability: Probability) -> Tensor:
        """Return the sum over points of weight * F."""
        m = len(self.alpha)
        found = gold(log_p, self.labels * m).view(m, -1)
        if probability == "joint":
            by_fact = found.split([len(row.target_ids) for row in self.labels], 1)
            found = torch.cat([tokens.cumsum(1) for tokens in by_fact], 1)
        return found.exp().sum(1) @ self.weight.to(found)


def attribute(
    lm: LM,
    facts: Iterable[Edit],
    sites: Sequence[Site],
    how: Attribution,
    unit: Unit = "row",
    *,
    progress: Callable[[int, int], None] = silent,
) -> list[Tensor]:
    """Return the mean attribution over `facts` of every unit of every site.

    Args:
        sites: matrices, of any layers and kinds; `path="layer"` scales each by itself, a block's experts together.
        progress: called with (facts done, facts).

    Returns:
        Per site: (out) scores for rows, (in) for columns, (out * in) for entries, row by row; on the CPU, float32 or
        the weights' dtype where that is wider.

    Raises:
        InvalidSetting: no such unit, no facts or no sites.
        InvalidEdit: the answer asked for is missing.
        NonFinite: a score is NaN or infinite; the message names the parameter.
    """
    check_choice(unit, Unit, "unit of an attribution")
    facts, sites = list_of_some(list_of_edits(facts), "facts"), list_of_some(sites, "sites")
    totals: dict[str, Tensor] = {}
    done = 0
    with lm.frozen_eval():
        groups = _groups(answer_rows(lm, facts, how.answer), how)
        for rows, contributions in zip(groups, _contributions(lm, groups, sites, how, unit), strict=True):
            for key, found in contributions:
                totals[key] = totals[key].add_(found) if key in totals else found
            done += len(rows)
            progress(done, len(facts))
    scores = []
    for site in sites:
        score = totals.pop(_key(site)) / len(facts)
        if unit == "entry":
            score = score * site.weight.to(score).reshape(-1)
        if not bool(torch.isfinite(score).all()):
            raise NonFinite(f"{site.id}: an attribution is NaN or infinite; is the model's own probability finite?")
        scores.append(score)
    return scores


def answer_probabilities(lm: LM, facts: Iterable[Edit], how: Attribution) -> Float[Tensor, " n_facts"]:
    """Return F of each fact on the weights as they are: the sum over answer tokens of P."""
    rows = answer_rows(lm, list_of_some(list_of_edits(facts), "facts"), how.answer)
    one = torch.ones(1, dtype=torch.float64)
    with lm.frozen_eval(), torch.no_grad():
        found = []
        for row in rows:
            copies = _Copies(tuple(input_rows([row])), (row,), one, one)
            found.append(copies.objective(_log_p(lm, copies, None), how.probability))
        return torch.stack(found)


def _groups(rows: Sequence[Row], how: Attribution) -> list[tuple[Row, ...]]:
    """Return the facts' rows in groups that share their passes; each counts once for every point."""
    n_points = len(how.points()[0])
    groups = buckets([len(row.ids) - 1 for row in rows], max(1, MAX_BATCH_TOKENS // n_points))
    return [tuple(rows[i] for i in group) for group in groups]


def _key(site: Site) -> str:
    return f"{site.id}/{site.kind}"


def _contributions(
    lm: LM, groups: Sequence[tuple[Row, ...]], sites: Sequence[Site], how: Attribution, unit: Unit
) -> Iterator[Iterable[tuple[str, Tensor]]]:
    """Yield every group's contributions, in the groups' order, from wherever the model's workers are."""
    if isinstance(lm.workers, Here) or len(groups) < 2 or not all(site.kind in get_args(SiteName) for site in sites):
        return (_of_group(lm, rows, sites, how, unit) for rows in groups)  # one matrix at a time is held
    named = tuple((site.layer, cast(SiteName, site.kind), site.expert) for site in sites)
    return in_order(lm.workers.map(lm, GroupAttribution(named, how, unit), groups, silent))


@dataclass(frozen=True)
class GroupAttribution:
    """The contributions of a group of facts, as work that can be sent elsewhere."""

    sites: tuple[tuple[int, SiteName, int | None], ...]
    """Layer, matrix and routed expert of each."""
    how: Attribution
    unit: Unit

    def __call__(self, lm: LM, piece: tuple[Row, ...], progress: Callable[[int], None]) -> list[tuple[str, Tensor]]:
        """Return what the group adds to every site's scores, by the site."""
        sites = [
            lm.site(layer, kind) if expert is None else lm.expert_sites(layer, kind)[expert]
            for layer, kind, expert in self.sites
        ]
        with lm.frozen_eval():
            return list(_of_group(lm, piece, sites, self.how, self.unit))


def _of_group(
    lm: LM, rows: Sequence[Row], sites: Sequence[Site], how: Attribution, unit: Unit
) -> Iterator[tuple[str, Tensor]]:
    copies = _Copies(tuple(input_rows(rows)), tuple(rows), *how.points())
    for caught in _passes(lm, copies, sites, how):
        yield _key(caught.site), _contribution(caught, unit).cpu()


def _passes(lm: LM, copies: _Copies, sites: Sequence[Site], how: Attribution) -> Iterator[Captured]:
    alpha = copies.alpha.repeat_interleave(len(copies.rows))
    if how.path != "layer":
        yield from catch(sites, lambda: copies.objective(_log_p(lm, copies, None), how.probability), alpha)
        return
    replays = lm.layout.earlier != "other"  # where layers share keys and values every pass is a whole one
    below = _Below.record(lm, copies.rows, sites) if replays else _Below({}, {}, {})
    for group in _in_groups(sites):
        if replays and _adds_to_the_stream(lm, group[0]):
            yield from _after_block(lm, copies, group, below, how)
        else:
            forward = partial(_log_p, lm, copies, below.entering.get(group[0].layer))
            yield from catch(group, lambda run=forward: copies.objective(run(), how.probability), alpha)  # type: ignore[misc]


def _in_groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Return the sites in groups that are scaled together.

    Each is a group of its own, but for a block's routed experts, which are one linear map of the weighted keys.
    """
    groups: dict[tuple[int, str, bool], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.layer, site.kind, site.expert is not None), []).append(site)
    return list(groups.values())


@dataclass(frozen=True)
class _Below:
    """What does not depend on how a layer is scaled: all that comes before it, from one pass over the facts."""

    entering: dict[int, ReplayState]
    """Inputs of the blocks, all tokens of them; not of block 0, which is run from the tokens."""
    keys: dict[tuple[int, int | None], Tensor]
    """Inputs of the down-projections, by layer and routed expert."""
    values: dict[int, Tensor]
    """Outputs of the dense ones, by layer."""

    @classmethod
    def record(cls, lm: LM, rows: Sequence[Row], sites: Sequence[Site]) -> "_Below":
        seen: dict[Point, Tensor] = {}
        added = [site for site in sites if _adds_to_the_stream(lm, site)]
        last = max(site.layer + (site in added) for site in sites)
        wanted = [Point(layer, "block") for layer in range(last)]
        wanted += [Point(site.layer, "key", site.expert) for site in added]
        wanted += [Point(site.layer, "mlp") for site in added if site.expert is None]
        if not wanted:
            return cls({}, {}, {})
        with torch.no_grad():
            run(lm, pad(rows, lm.device), {point: reading(seen, point) for point in wanted})
        _ = lm.block_outputs  # found by a pass of its own, which must not meet the hooks of an attribution
        starts, lengths = (0,) * len(rows), tuple(len(row.ids) for row in rows)
        return cls(
            {
                p.layer + 1: ReplayState(p.layer + 1, x, (), (), starts, lengths)
                for p, x in seen.items()
                if p.tensor == "block"
            },
            {(p.layer, p.expert): x for p, x in seen.items() if p.tensor == "key"},
            {p.layer: x for p, x in seen.items() if p.tensor == "mlp"},
        )


def _adds_to_the_stream(lm: LM, site: Site) -> bool:
    """Return whether the site's output is added to the block's as it is, so that its own block need not run again."""
    kind = lm.kinds[site.layer]
    if site.expert is not None:  # a shared expert's gate is not theirs
        kind = replace(kind, gated_shared=False)
    return site.kind == "down_proj" and kind.adds_mlp_output and not hooked(lm.block(site.layer))


def _after_block(lm: LM, copies: _Copies, sites: Sequence[Site], below: _Below, how: Attribution) -> Iterator[Captured]:
    """Yield the gradients of sites whose scaling adds (alpha - 1) h to their block's output; only later blocks run."""
    layer = sites[0].layer
    frozen = below.entering[layer + 1]
    shape = frozen.states.shape
    wide = torch.promote_types(lm.dtype, torch.float32)
    keys = [below.keys[layer, site.expert].to(wide) for site in sites]
    if sites[0].expert is None:
        value = below.values[layer].view(shape).to(wide)
        h = [value if sites[0].bias is None else value - sites[0].bias.to(wide)]
    else:
        h = [x.view(*shape[:-1], -1) @ site.weight.T.to(wide) for x, site in zip(keys, sites, strict=True)]
    less = copies.alpha.to(h[0])[:, None, None, None] - 1
    moved = (less * sum(h)).view(-1, *shape[1:]).requires_grad_()

    moving: dict[Point, Hook] = {Point(layer, "block"): lambda state: (state + moved).to(state.dtype)}
    with torch.enable_grad():
        log_p = _log_p(lm, copies, frozen, moving, end_at_logits=True)
        (g,) = torch.autograd.grad(copies.objective(log_p, how.probability), [moved])
    g = g.view(len(copies.alpha), -1, shape[-1]).sum(0)  # x and h are the same for all copies
    for site, x, output in zip(sites, keys, h, strict=True):
        yield Captured(site, x.reshape(len(g), -1), output.reshape(len(g), -1), g)


def _log_p(
    lm: LM,
    copies: _Copies,
    frozen: ReplayState | None,
    hooks: Mapping[Point, Hook] | None = None,
    *,
    end_at_logits: bool = False,
) -> Float[Tensor, "n vocab"]:
    """Return log-probabilities where answers are predicted, for all copies; by a replay where `frozen` is given."""
    m, n = len(copies.alpha), len(copies.rows)
    if frozen is None:
        return log_probs(logits_at(lm, pad(copies.rows * m, lm.device), copies.places))
    all_of_it = frozen.select(list(range(n)) * m)
    ends = flat_places(copies.places, all_of_it.states.shape[1]) if end_at_logits else None
    with replaying(lm, all_of_it, ends=ends) as inputs:
        return log_probs(logits_at(lm, inputs, copies.places, hooks))


def _contribution(caught: Captured, unit: Unit) -> Tensor:
    if unit == "row":
        return caught.rows()
    if unit == "column":
        return caught.columns()
    return caught.weight_gradient().reshape(-1)


# --- selection ---------------------------------------------------------------------------------------------------


def select(scores: Sequence[Float[Tensor, " units"]], count: int) -> list[Tensor]:
    """Return the `count` units of highest score over all tensors: per tensor, their indices, ascending (Eqs. 6, 7).

    One threshold over all; ties go to the earlier tensor, then the lower index, so that the count is exact. Scores are
    compared as float32. Two histograms of 65,536 bins find the threshold, so that nothing is ever sorted or joined and
    no tensor is too large.

    Raises:
        InvalidSetting: there are fewer units, or none is asked for.
        NonFinite: a score is NaN.
    """
    n_units = sum(len(s) for s in scores)
    if not 1 <= count <= n_units:
        raise InvalidSetting(f"{count} units asked for; there are {n_units}")
    high = torch.zeros(2**16, dtype=torch.long)
    for score in scores:
        high += torch.bincount((_ordered(score) >> 16) + 2**15, minlength=2**16)
    top, above = _bin_of(high, count)
    low = torch.zeros(2**16, dtype=torch.long)
    for score in scores:
        key = _ordered(score)
        low += torch.bincount(key[(key >> 16) + 2**15 == top] & 0xFFFF, minlength=2**16)
    rest, more = _bin_of(low, count - above)
    threshold = ((top - 2**15) << 16) | rest
    ties = count - above - more
    chosen = []
    for score in scores:
        key = _ordered(score)
        equal = (key == threshold).nonzero()[:, 0][:ties]
        ties -= len(equal)
        chosen.append(torch.cat([(key > threshold).nonzero()[:, 0], equal]).sort().values)
    return chosen


def _ordered(score: Tensor) -> Tensor:
    """Return integers in the order of the scores: the bits of a float32, inverted for negative numbers."""
    single = score.detach().cpu().to(torch.float32) + 0.0  # -0 is 0
    if bool(single.isnan().any()):
        raise NonFinite("a score is NaN, so that units cannot be ranked")
    bits = single.view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """Return the bin that holds the `count`-th largest value, and how many values are in bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int((from_top >= count).nonzero()[0, 0])
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, above
