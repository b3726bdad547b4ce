"""Critical transmission paths: which key and value vectors, one of each per layer, an edit runs through (CTP).

Zhai et al. 2025, "Parameter-Aware Contrastive Knowledge Editing", section 4.2; released as SonglinZhai/PAC. A *node* is
one input weight vector k_j of an MLP's unit j (a row of W1, M x D in math orientation) or its output weight vector v_j
(a column of W2, D x M). A *slot* is one of those matrices; a path takes one node from every slot. A path's score is a
sum over slots, so that best and worst paths follow from node scores without enumeration. What the paper leaves open:
docs/methods/ctp.md.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.arguments import check_choice, list_of_some
from retcon.edits import Edit, list_of_edits
from retcon.errors import InvalidSetting, NonFinite
from retcon.lm.model import LM, require_lm
from retcon.lm.prompts import Row
from retcon.lm.site import Site, SiteName
from retcon.locate.gradients import Captured, catch
from retcon.seed import generator_of
from retcon.training.descent import Reduction, shares
from retcon.training.objective import answer_nll, answer_rows, token_chunks

LayerSteps = Literal["equal", "score", "middle"]
"""How step sizes of layers compare: see `step_weights`."""
Score = Literal["z_abs", "signed_sum", "abs_of_sum", "sum_abs", "l2", "grad_x_weight", "random"]
"""What a node is worth, of the gradient G (D x M) of the edit loss with respect to its matrix:

`z_abs`: mean over d of |G[d, j]| once each row of G is standardised over the nodes (the released code); `signed_sum`:
sum over d of G[d, j], Eq. 5 to the letter; `abs_of_sum`: its size; `sum_abs`, `l2`: sum of sizes, and length, of column
j;
`grad_x_weight`: |sum over d of W[d, j] G[d, j]|; `random`: a control, drawn by seed.
"""
ADDITIVE = ("signed_sum", "abs_of_sum", "grad_x_weight")
"""Scores that add up over passes without a weight gradient."""
Select = Literal["rank_aligned", "k_best"]
"""`rank_aligned`: path r takes the r-th node of every slot (the released code); `k_best`: the best sums."""
Assess = Literal["pooled", "per_edit"]
"""`pooled`: the score of the summed gradient; `per_edit`: the mean of every edit's own scores."""
KeyMatrix = Literal["up", "gate", "both"]

MAX_GRADIENT_BYTES = 2**31
"""Gradients held at a time where edits need several passes; only memory and speed depend on it."""


@dataclass(frozen=True)
class Slot:
    """One matrix whose units are nodes, or one of every routed expert of a block, whose units are nodes together."""

    sites: tuple[Site, ...]

    @property
    def site(self) -> Site:
        """The matrix; of a mixture the first expert's."""
        return self.sites[0]

    @property
    def is_value(self) -> bool:
        """Nodes are columns of W2 (value vectors); otherwise rows of W1 (key vectors)."""
        return self.site.kind == "down_proj"

    @property
    def n_nodes(self) -> int:
        """M, the units of the MLP; in a mixture those of its experts, one after the other."""
        return sum(site.shape[1 if self.is_value else 0] for site in self.sites)

    def by_node(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "d nodes"]:
        """Return a matrix of the site's shape as (D x M), one column per node."""
        return matrix if self.is_value else matrix.T


@dataclass(frozen=True)
class Paths:
    """Some paths, best (or worst) first."""

    nodes: tuple[tuple[int, ...], ...]
    """Per path, its node in every slot."""
    scores: tuple[float, ...]
    """Per path, the sum of its nodes' scores (float64)."""

    def in_slot(self, slot: int) -> list[int]:
        """Return the nodes that some path takes in that slot, in order of their first path, each once."""
        return list(dict.fromkeys(path[slot] for path in self.nodes))


@dataclass(frozen=True, eq=False)
class Transmission:
    """What an assessment found."""

    slots: tuple[Slot, ...]
    scores: tuple[Float[Tensor, " nodes"], ...]
    """Per slot, every node's score, on the CPU."""
    positive: Paths
    """T+: the paths of highest score."""
    negative: Paths
    """T-: the paths of lowest score."""


def slots_of(lm: LM, key_matrix: KeyMatrix = "up", *, routed: bool = False) -> list[Slot]:
    """Return every layer's key matrices and value matrix, in order of layers.

    Args:
        routed: take the routed experts also where a block has a dense or a shared MLP.

    Raises:
        InvalidSetting: no such key matrix, or the gate matrix is asked for and the model has none.
        UnsupportedModel: `lm` is no `LM`.
    """
    require_lm(lm)
    check_choice(key_matrix, KeyMatrix, "key matrix")
    if key_matrix != "up" and not any(lm.sites(layer, "gate_proj", routed=routed) for layer in range(lm.n_layers)):
        raise InvalidSetting(
            f"key matrix {key_matrix!r}: {lm.name!r} ({lm.model.config.model_type}) has no gated MLP; take 'up'"
        )
    keys: dict[KeyMatrix, tuple[SiteName, ...]] = {
        "up": ("up_proj",),
        "gate": ("gate_proj",),
        "both": ("up_proj", "gate_proj"),
    }
    kinds: tuple[SiteName, ...] = (*keys[key_matrix], "down_proj")
    found = [lm.sites(layer, kind, routed=routed) for layer in range(lm.n_layers) for kind in kinds]
    return [Slot(tuple(sites)) for sites in found if sites]


# --- node scores -------------------------------------------------------------------------------------------------


def node_scores(
    g: Float[Tensor, "d nodes"], score: Score, weight: Float[Tensor, "d nodes"] | None = None
) -> Float[Tensor, " nodes"]:
    """Return the scores of nodes from a gradient, one column per node; only `grad_x_weight` needs `weight`."""
    if score == "z_abs":
        std = g.std(1, keepdim=True)  # unbiased, as torch.std
        centred = g - g.mean(1, keepdim=True)
        z = torch.where(std > 0, centred / std, torch.zeros_like(g))  # a coordinate without gradient says nothing
        return z.abs().mean(0)
    if score == "signed_sum":
        return g.sum(0)
    if score == "abs_of_sum":
        return g.sum(0).abs()
    if score == "sum_abs":
        return g.abs().sum(0)
    if score == "l2":
        return g.norm(dim=0)
    if score == "grad_x_weight" and weight is not None:
        return (weight.to(g) * g).sum(0).abs()
    raise ValueError(f"no score {score!r} from a gradient alone")


def _summed(slot: Slot, caught: Captured, score: Score) -> Float[Tensor, " nodes"]:
    """Return the part of a score that adds up over passes, from activations and their gradients: no weight gradient."""
    if score == "grad_x_weight":
        return caught.columns() if slot.is_value else caught.rows()
    if slot.is_value:
        return (caught.x * caught.g.sum(1, keepdim=True)).sum(0)
    return (caught.g * caught.x.sum(1, keepdim=True)).sum(0)


def assess(
    lm: LM,
    edits: Iterable[Edit],
    slots: Sequence[Slot],
    score: Score = "z_abs",
    *,
    pool: Assess = "pooled",
    reduction: Reduction = "per_edit",
    groups: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> list[Float[Tensor, " nodes"]]:
    """Return every node's score for the loss of `edits`, on the weights as they are now (hooks in force included).

    Where one backward pass holds all edits, one matrix's gradient exists at a time. Otherwise slots are assessed in
    groups whose gradients fit in `max_gradient_bytes`, one pass over the edits per group. `ADDITIVE` scores form no
    gradient at all.

    Args:
        reduction: what the loss is the mean of.
        groups: mini-batches (indices of edits), each with its own mean, whose gradients are summed; None: one of all.
        seed: draws `random` scores.

    Raises:
        InvalidSetting: no such score or pool, or no edits to score by.
        NonFinite: a gradient is NaN or infinite; the message names the parameter.
    """
    check_choice(score, Score, "score of nodes")
    check_choice(pool, Assess, "pool")
    edits = list_of_edits(edits)
    if score == "random":
        generator = generator_of(seed)
        return [torch.rand(slot.n_nodes, generator=generator) for slot in slots]
    rows = answer_rows(lm, list_of_some(edits, "edits"))
    with lm.frozen_eval():
        if pool == "per_edit":
            total: list[Tensor] = []
            for i in range(len(rows)):
                own = _assess(lm, [rows[i]], [[0]], slots, score, reduction, max_gradient_bytes)
                total = [t + s for t, s in zip(total, own, strict=True)] if total else own
            found = [t / len(rows) for t in total]
        else:
            whole = [list(range(len(rows)))]
            found = _assess(lm, rows, whole if groups is None else groups, slots, score, reduction, max_gradient_bytes)
    for slot, values in zip(slots, found, strict=True):
        if not bool(torch.isfinite(values).all()):
            raise NonFinite(f"{slot.site.name}: the gradient of the edit loss is NaN or infinite")
    return found


def _assess(
    lm: LM,
    rows: Sequence[Row],
    groups: Sequence[Sequence[int]],
    slots: Sequence[Slot],
    score: Score,
    reduction: Reduction,
    max_gradient_bytes: int,
) -> list[Tensor]:
    passes = _passes(lm, rows, groups, reduction)
    if score in ADDITIVE:
        return _scores_by_sum(passes, slots, score)
    at_once = [slots] if len(passes) == 1 else _fitting(slots, max_gradient_bytes)
    return [found for some in at_once for found in _scores_by_gradient(passes, some, score)]


BackwardPass = Callable[[Sequence[Slot]], Iterator[list[Captured]]]
"""One backward pass of the loss of some edits: slot by slot, what each of its sites captured."""


def _passes(lm: LM, rows: Sequence[Row], groups: Sequence[Sequence[int]], reduction: Reduction) -> list[BackwardPass]:
    """Return the passes whose losses add up to the edits' loss, each with as many edits as fit."""

    def capture(items: Sequence[int], share: Mapping[int, float], slots: Sequence[Slot]) -> Iterator[list[Captured]]:
        def loss() -> Tensor:
            nll = answer_nll(lm, [rows[i] for i in items])
            return nll @ torch.tensor([share[i] for i in items], dtype=nll.dtype, device=nll.device)

        by_site = catch([site for slot in slots for site in slot.sites], loss)
        return (list(islice(by_site, len(slot.sites))) for slot in slots)

    return [
        partial(capture, chunk, dict(zip(group, shares(rows, group, reduction).tolist(), strict=True)))
        for group in groups
        for chunk in token_chunks(rows, list(group))
    ]


def _scores_by_sum(
    passes: Sequence[BackwardPass], slots: Sequence[Slot], score: Score
) -> list[Float[Tensor, " nodes"]]:
    """Return an additive score of every node."""
    sums: dict[int, Tensor] = {}
    for run in passes:
        for i, (slot, found) in enumerate(zip(slots, run(slots), strict=True)):
            part = torch.cat([_summed(slot, one, score) for one in found])
            sums[i] = sums[i] + part if i in sums else part
    return [(sums[i] if score == "signed_sum" else sums[i].abs()).cpu() for i in range(len(slots))]


def _scores_by_gradient(
    passes: Sequence[BackwardPass], slots: Sequence[Slot], score: Score
) -> list[Float[Tensor, " nodes"]]:
    """Return a score of every node that needs the gradient; one slot's exists at a time where there is one pass."""
    if len(passes) == 1:
        found = zip(slots, passes[0](slots), strict=True)
        return [node_scores(_gradient(slot, captured), score).cpu() for slot, captured in found]
    gradients: dict[int, Tensor] = {}
    for run in passes:
        for i, (slot, captured) in enumerate(zip(slots, run(slots), strict=True)):
            g = _gradient(slot, captured)
            gradients[i] = gradients[i].add_(g) if i in gradients else g
    return [node_scores(gradients[i], score).cpu() for i in range(len(slots))]


def _gradient(slot: Slot, captured: Sequence[Captured]) -> Float[Tensor, "d nodes"]:
    return torch.cat([slot.by_node(one.weight_gradient()) for one in captured], 1)


def _fitting(slots: Sequence[Slot], max_bytes: int) -> list[list[Slot]]:
    """Return the slots in order, in groups whose float32 gradients fit in `max_bytes` (one slot at least)."""
    groups: list[list[Slot]] = []
    room = 0
    for slot in slots:
        size = 4 * sum(site.shape.numel() for site in slot.sites)
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(slot)
        room -= size
    return groups


# --- paths -------------------------------------------------------------------------------------------------------


def rank_aligned(scores: Sequence[Float[Tensor, " nodes"]], n: int, *, lowest: bool = False) -> Paths:
    """Return n node-disjoint paths: path r takes the r-th ranked node of every slot; the first is the best of all."""
    ranked = [_ranked(s, n, lowest) for s in scores]
    nodes = [tuple(int(order[r]) for order, _ in ranked) for r in range(n)]
    return Paths(tuple(nodes), tuple(sum(float(values[r]) for _, values in ranked) for r in range(n)))


def k_best(scores: Sequence[Float[Tensor, " nodes"]], n: int, *, lowest: bool = False) -> Paths:
    """Return the n paths of highest score of all (there are M to the power of slots), ties by ranks.

    Best-first search over rank tuples: from each path popped, those that go one rank deeper in one slot are pushed.
    Every path but the best has such a predecessor of at least its score, so the pops come in order.
    """
    if n == 0:
        return Paths((), ())
    # n paths never need ranks below the n-th
    ranked = [_ranked(s, min(n, len(s)), lowest) for s in scores]
    sign = -1.0 if lowest else 1.0
    gains = [(sign * values).tolist() for _, values in ranked]
    start = (0,) * len(scores)
    heap = [(-sum(g[0] for g in gains), start)]
    seen = {start}
    popped: list[tuple[float, tuple[int, ...]]] = []
    while heap and len(popped) < n:
        cost, ranks = heapq.heappop(heap)
        popped.append((cost, ranks))
        for t, rank in enumerate(ranks):
            deeper = (*ranks[:t], rank + 1, *ranks[t + 1 :])
            if rank + 1 < len(gains[t]) and deeper not in seen:
                seen.add(deeper)
                heapq.heappush(heap, (cost + gains[t][rank] - gains[t][rank + 1], deeper))
    nodes = tuple(tuple(int(ranked[t][0][r]) for t, r in enumerate(ranks)) for _, ranks in popped)
    return Paths(nodes, tuple(-sign * cost for cost, _ in popped))


def _ranked(scores: Float[Tensor, " nodes"], n: int, lowest: bool) -> tuple[Tensor, Tensor]:
    """Return the n best nodes of a slot and their scores (float64); ties by index, of the lowest from the other end,
    so that best and lowest share none."""
    if n > len(scores):
        raise InvalidSetting(f"{n} paths asked for; a slot has {len(scores)} nodes")
    order = scores.argsort(descending=True, stable=True)
    chosen = order.flip(0)[:n] if lowest else order[:n]
    return chosen, scores[chosen].double()


def n_paths_covering(scores: Sequence[Float[Tensor, " nodes"]], share: float, n_negative: int = 0) -> int:
    """Return the fewest rank-aligned paths that hold a share of the score of all above the lowest path's.

    A path's worth of nodes is left for T-.
    """
    n = min(map(len, scores))
    by_rank = torch.stack([_ranked(s, n, False)[1] for s in scores]).sum(0)
    above = by_rank - by_rank[-1]
    return max(1, min(1 + int((above.cumsum(0) < share * above.sum()).sum()), n - n_negative))


def step_weights(found: Transmission, by: LayerSteps) -> list[float]:
    """Return how large steps are in each slot, 1 on average.

    `score`: as the mean score of T+'s nodes there; `middle`: three times as large in the middle as at both ends.

    Raises:
        InvalidSetting: no such rule.
    """
    check_choice(by, LayerSteps, "rule of the layers' steps")
    if by == "score":
        weights = [float(s[found.positive.in_slot(t)].double().mean().abs()) for t, s in enumerate(found.scores)]
    else:
        layers = [slot.site.layer for slot in found.slots]
        middle, half = (layers[0] + layers[-1]) / 2, max((layers[-1] - layers[0]) / 2, 1)
        weights = [1.5 - abs(layer - middle) / half if by == "middle" else 1.0 for layer in layers]
    mean = sum(weights) / len(weights)
    return [w / mean for w in weights] if mean else [1.0] * len(weights)


def choose_paths(
    slots: Sequence[Slot],
    scores: Sequence[Float[Tensor, " nodes"]],
    n_positive: int,
    n_negative: int,
    select: Select,
    *,
    coverage: float | None = None,
) -> Transmission:
    """Choose T+ and T- by node scores; their nodes are disjoint.

    Args:
        coverage: as many paths in T+ as hold this share of the scores (`n_paths_covering`), not `n_positive`.

    Raises:
        InvalidSetting: no such selection, a number below 0, or a slot has fewer nodes than both need.
    """
    check_choice(select, Select, "selection of paths")
    if n_positive < 0 or n_negative < 0:
        raise InvalidSetting(f"{n_positive} positive and {n_negative} negative paths asked for; neither can be below 0")
    kept = tuple(s.cpu() for s in scores)
    if coverage is not None:
        n_positive = n_paths_covering(kept, coverage, n_negative)
    fewest = min(slot.n_nodes for slot in slots)
    if n_positive + n_negative > fewest:
        raise InvalidSetting(
            f"{n_positive} positive and {n_negative} negative paths asked for; a slot has {fewest} nodes"
        )
    by: Callable[..., Paths] = rank_aligned if select == "rank_aligned" else k_best
    return Transmission(tuple(slots), kept, by(kept, n_positive), by(kept, n_negative, lowest=True))


def paths(
    lm: LM,
    edits: Iterable[Edit],
    *,
    score: Score = "z_abs",
    select: Select = "rank_aligned",
    n_positive: int = 15,
    n_negative: int = 1,
    pool: Assess = "pooled",
    key_matrix: KeyMatrix = "up",
    seed: int = 0,
) -> Transmission:
    """Return the critical transmission paths of `edits` on the model as it is now, to look at or to edit along."""
    slots = slots_of(lm, key_matrix)
    return choose_paths(slots, assess(lm, edits, slots, score, pool=pool, seed=seed), n_positive, n_negative, select)
