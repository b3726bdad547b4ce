"""Node scores, paths without enumeration, and the gradients behind them (T20 to T24, T30)."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.model import LM
from retcon.locate.paths import (
    Slot,
    assess,
    choose_paths,
    k_best,
    n_paths_covering,
    node_scores,
    paths,
    rank_aligned,
    slots_of,
)
from retcon.methods.ctp import Ctp
from retcon.training.objective import AnswerLoss, answer_nll, answer_rows

FROM_GRADIENT = ("z_abs", "signed_sum", "abs_of_sum", "sum_abs", "l2", "grad_x_weight")


def mean_loss(lm: LM, edits: list[Edit]) -> float:
    with lm.frozen_eval():
        return answer_nll(lm, answer_rows(lm, edits)).mean().item()


def gradients(lm: LM, edits: list[Edit], slots: list[Slot]) -> list[torch.Tensor]:
    """G (D x M) of every slot by autograd on the weights themselves."""
    rows = answer_rows(lm, edits)
    with lm.frozen_eval():
        for slot in slots:
            slot.site.module.weight.requires_grad_(True)
        AnswerLoss(lm, rows)(range(len(rows))).mean().backward()
        found = []
        for slot in slots:
            g = slot.site.module.weight.grad
            g = g.T if slot.site.transposed else g
            found.append(slot.by_node(g if slot.site.rows is None else g[slot.site.rows]).clone())
            slot.site.module.weight.grad = None
    return found


def perturb_norms(lm: LM) -> None:
    """A fresh LayerNorm has gain 1 and bias 0, which hides what real ones do."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if parameter.dim() == 1 and ("norm" in name or "ln" in name):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "phi3", "opt"])
@pytest.mark.parametrize("score", FROM_GRADIENT)
def test_streamed_scores_are_those_of_the_whole_gradient(family, score, tiny, edits):
    lm = tiny(family)
    slots = slots_of(lm)
    wanted = [
        node_scores(g, score, slot.by_node(slot.site.weight))
        for slot, g in zip(slots, gradients(lm, edits, slots), strict=True)
    ]
    one_pass = assess(lm, edits, slots, score)
    close = dict(rtol=1e-6, atol=1e-9) if family == "gpt2" else dict(rtol=2e-3, atol=2e-5)
    for a, b in zip(one_pass, wanted, strict=True):
        assert_close(a, b, **close)


@pytest.mark.parametrize("score", FROM_GRADIENT)
def test_several_passes_over_groups_of_matrices_give_the_same(score, tiny, edits, monkeypatch):
    lm = tiny("gpt2")
    slots = slots_of(lm)
    whole = assess(lm, edits, slots, score)
    monkeypatch.setattr("retcon.locate.paths.token_chunks", lambda rows, items: [[i] for i in items])
    for a, b in zip(whole, assess(lm, edits, slots, score, max_gradient_bytes=3 * 4 * 32 * 128), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_signed_sum_is_the_derivative_along_a_path(tiny, edits):
    """T20: of a node, and of a path the sum of its nodes', by central differences. K nodes, LayerNorm perturbed."""
    lm = tiny("gpt2")
    perturb_norms(lm)
    slots = [slot for slot in slots_of(lm) if not slot.is_value]
    scores = assess(lm, edits, slots, "signed_sum")
    path = [3, 14, 15, 92]
    step = 1e-5

    def shifted(nodes: dict[int, int], by: float) -> float:
        with torch.no_grad():
            for t, node in nodes.items():
                slots[t].site.weight[node] += by  # a view of the parameter
        try:
            return mean_loss(lm, edits)
        finally:
            with torch.no_grad():
                for t, node in nodes.items():
                    slots[t].site.weight[node] -= by

    for nodes in ({1: path[1]}, dict(enumerate(path))):
        slope = (shifted(nodes, step) - shifted(nodes, -step)) / (2 * step)
        assert_close(slope, float(sum(scores[t][node] for t, node in nodes.items())), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "opt"])
def test_signed_sum_is_zero_on_every_value_node_behind_a_layer_norm(family, tiny, edits):
    """T21: nothing reads the mean of the residual stream. Key nodes too, while LayerNorm's gain is 1 and its bias 0."""
    lm = tiny(family)
    for perturbed in (False, True):
        if perturbed:
            perturb_norms(lm)
        slots = slots_of(lm)
        sums, largest = assess(lm, edits, slots, "signed_sum"), assess(lm, edits, slots, "sum_abs")
        for slot, s, size in zip(slots, sums, largest, strict=True):
            relative = float(s.abs().max() / size.max())
            if slot.is_value:
                assert relative < (1e-12 if family in ("gpt2", "gpt_neox") else 1e-5)  # float32 inside the others
            elif not perturbed:
                assert relative < (1e-12 if family in ("gpt2", "gpt_neox") else 1e-5)
            else:
                assert relative > 1e-3


def test_signed_sum_is_not_zero_on_rms_norm_models(tiny, edits):
    """T21."""
    lm = tiny("llama")
    slots = slots_of(lm)
    for s, size in zip(assess(lm, edits, slots, "signed_sum"), assess(lm, edits, slots, "sum_abs"), strict=True):
        assert float(s.abs().max() / size.max()) > 1e-2


def test_z_abs_sees_shapes_only(randn):
    """T22: no factor and no shift of a row of G matters; of a rank-one G it is the z-score; no gradient, no NaN."""
    g = randn(6, 40)
    factor, shift = randn(6, 1) + 3, randn(6, 1)
    assert_close(node_scores(g, "z_abs"), node_scores(-factor * g + shift, "z_abs"))
    u, a = randn(6), randn(40)
    assert_close(node_scores(torch.outer(u, a), "z_abs"), ((a - a.mean()) / a.std()).abs())
    g[2] = 0.7
    assert bool(torch.isfinite(node_scores(g, "z_abs")).all())
    assert_close(node_scores(g, "z_abs"), node_scores(g[[0, 1, 3, 4, 5]], "z_abs") * 5 / 6)


def test_scores_of_a_gradient_by_hand():
    g = torch.tensor([[1.0, -3.0], [2.0, 1.0]])
    assert node_scores(g, "signed_sum").tolist() == [3.0, -2.0]
    assert node_scores(g, "abs_of_sum").tolist() == [3.0, 2.0]
    assert node_scores(g, "sum_abs").tolist() == [3.0, 4.0]
    assert_close(node_scores(g, "l2"), torch.tensor([5.0, 10.0]).sqrt())
    assert node_scores(g, "grad_x_weight", torch.tensor([[1.0, 1.0], [-1.0, 2.0]])).tolist() == [1.0, 1.0]


def test_per_edit_and_pooled_assessment_agree_on_one_edit(tiny, edits):
    """T30; on several they do not, since gradients cancel before their size is taken."""
    lm = tiny("llama")
    slots = slots_of(lm)
    for batch, same in ((edits[:1], True), (edits, False)):
        a, b = (assess(lm, batch, slots, pool=pool) for pool in ("pooled", "per_edit"))
        assert all(torch.allclose(x, y, rtol=1e-6) for x, y in zip(a, b, strict=True)) == same


def test_random_scores_are_drawn_by_seed(tiny, edit):
    lm = tiny("llama")
    slots = slots_of(lm)
    a, b, c = (assess(lm, [edit], slots, "random", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])


# --- paths -------------------------------------------------------------------------------------------------------


def every_path(scores: list[torch.Tensor]) -> list[tuple[float, tuple[int, ...]]]:
    """All of them, best first; among equals in order of the nodes' ranks."""
    ranks = [s.argsort(descending=True, stable=True).argsort() for s in scores]
    found = [
        (sum(float(s[i]) for s, i in zip(scores, nodes, strict=True)), nodes)
        for nodes in itertools.product(*(range(len(s)) for s in scores))
    ]
    return sorted(found, key=lambda p: (-p[0], tuple(int(r[i]) for r, i in zip(ranks, p[1], strict=True))))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_k_best_is_what_enumeration_finds(n, ties):
    """T24: 5 nodes in 5 slots."""
    generator = torch.Generator().manual_seed(n)
    scores = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(5)]
    if ties:
        scores = [s.round() for s in scores]
    found, wanted = k_best(scores, n), every_path(scores)[:n]
    assert len(set(found.nodes)) == n
    assert_close(torch.tensor(found.scores), torch.tensor([score for score, _ in wanted]))
    if ties:  # rounding may part equal sums; the multiset of scores is what is fixed, and paths must have theirs
        for nodes, score in zip(found.nodes, found.scores, strict=True):
            assert_close(sum(float(s[i]) for s, i in zip(scores, nodes, strict=True)), score)
    else:
        assert list(found.nodes) == [nodes for _, nodes in wanted]
    worst = k_best(scores, 3, lowest=True)
    assert_close(torch.tensor(worst.scores), torch.tensor([score for score, _ in every_path(scores)[::-1][:3]]))
    assert worst.scores[0] == min(worst.scores)


def test_rank_aligned_paths_are_disjoint_and_start_with_the_best(randn):
    """T23."""
    scores = [randn(9) for _ in range(4)]
    found = rank_aligned(scores, 6)
    assert found.nodes[0] == every_path(scores)[0][1]
    assert all(len(found.in_slot(t)) == 6 for t in range(4))
    assert list(found.scores) == sorted(found.scores, reverse=True)
    assert rank_aligned(scores, 1, lowest=True).nodes[0] == every_path(scores)[-1][1]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95])
def test_covering_takes_no_path_more_than_the_share_needs(share, randn):
    scores = [randn(12), randn(12).abs(), randn(12)]
    every = rank_aligned(scores, 12).scores
    above = [s - every[-1] for s in every]
    n = n_paths_covering(scores, share)
    assert sum(above[:n]) >= share * sum(above) - 1e-12
    assert n == 1 or sum(above[: n - 1]) < share * sum(above)
    assert n_paths_covering(scores, 1.0, n_negative=4) <= 8


def test_k_best_hardly_leaves_the_best_path():
    """Why it is not the default: 15 best sums over 64 slots share nearly all of their nodes."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(11008, generator=generator).abs() for _ in range(64)]
    near, apart = k_best(scores, 15), rank_aligned(scores, 15)
    assert 64 < sum(len(near.in_slot(t)) for t in range(64)) < 80
    assert sum(len(apart.in_slot(t)) for t in range(64)) == 960


@pytest.mark.parametrize("select", ["rank_aligned", "k_best"])
@pytest.mark.parametrize("coverage", [None, 0.5])
def test_best_and_lowest_share_no_node_where_scores_are_equal(select, coverage, tiny):
    lm = tiny("gpt2")
    slots = slots_of(lm)
    scores = [torch.zeros(slot.n_nodes) for slot in slots]
    scores[0][:3] = 1.0  # as with experts that no token is routed to
    found = choose_paths(slots, scores, 20, 4, select, coverage=coverage)
    for t in range(len(slots)):
        assert not set(found.positive.in_slot(t)) & set(found.negative.in_slot(t))


def test_equal_scores_are_ranked_by_index():
    assert rank_aligned([torch.tensor([1.0, 2.0, 2.0, 1.0])], 3).in_slot(0) == [1, 2, 0]
    assert rank_aligned([torch.tensor([1.0, 2.0, 2.0, 1.0])], 3, lowest=True).in_slot(0) == [3, 0, 2]


def test_found_paths_can_be_looked_at(tiny, edits):
    lm = tiny("llama")
    found = paths(lm, edits, n_positive=4, n_negative=2)
    assert [slot.site.kind for slot in found.slots] == ["up_proj", "down_proj"] * 4
    assert [len(s) for s in found.scores] == [64] * 8
    for t, scores in enumerate(found.scores):
        up, down = found.positive.in_slot(t), found.negative.in_slot(t)
        assert up == scores.argsort(descending=True)[:4].tolist()
        assert len(down) == 2
        assert not set(up) & set(down)
    both = slots_of(lm, "both")
    assert [slot.site.kind for slot in both[:3]] == ["up_proj", "gate_proj", "down_proj"]


def test_what_cannot_be_is_refused(tiny, edit):
    with pytest.raises(InvalidSetting, match="no gated MLP"):
        slots_of(tiny("gpt2"), "gate")
    slots = slots_of(tiny("llama"))
    with pytest.raises(InvalidSetting, match="60 positive and 5 negative paths asked for; a slot has 64 nodes"):
        choose_paths(slots, [torch.rand(64)] * 8, 60, 5, "rank_aligned")
    with pytest.raises(InvalidSetting, match="-3 positive and 1 negative paths asked for; neither can be below 0"):
        choose_paths(slots, [torch.rand(64)] * 8, -3, 1, "rank_aligned")
    once, given = (assess(tiny("llama"), e, slots) for e in (iter([edit]), [edit]))
    assert all(map(torch.equal, once, given))
    with pytest.raises(InvalidSetting, match="no edits were given"):
        paths(tiny("llama"), [])


@pytest.mark.parametrize("select", ["rank_aligned", "k_best"])
def test_there_may_be_no_negative_paths(select, tiny, edit):
    assert not paths(tiny("llama"), [edit], select=select, n_negative=0).negative.nodes
    assert Ctp(select=select, n_negative=0, epochs=1).propose(tiny("llama"), [edit]).changes
