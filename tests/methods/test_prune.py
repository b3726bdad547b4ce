"""PRUNE's identities (float64)."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from retcon.delta import Dense, LowRank
from retcon.errors import InvalidSetting
from retcon.methods.common.choosing import method
from retcon.methods.prune import Prune, restrain, singular_values
from tests.conftest import random_moments
from tests.methods.common import CONTEXTS, SEARCH, equal, same, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*larger than the weight"),
    pytest.mark.filterwarnings("ignore:.*proposed on top of"),
]
BASE = dict(layers=(0, 1), moment_weight=1e-6) | SEARCH | dict(clamp=50.0, weight_decay=0.0)


def prune(**settings):
    return Prune(**(dict(base_method="memit", base_settings=BASE) | settings))


def propose(chosen, lm, edits):
    return chosen.propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm))


def test_small_singular_values_are_left_alone(randn):
    """Identity 54."""
    s = randn(8).abs().sort(descending=True).values
    assert torch.equal(restrain(s, float(s.max()), guard=False), s)


@pytest.mark.parametrize("alpha", [math.e, 2.0, 1.5, 1.2])
@pytest.mark.parametrize("restraint", ["log", "linear"])
def test_order_is_kept_and_f_is_continuous(alpha, restraint):
    """Identities 55 and 56."""
    sigma = 0.5
    s = torch.linspace(0.0, 40.0, 4001, dtype=torch.float64)
    for guard in (False, True):
        f = restrain(s, sigma, alpha, restraint, guard=guard)
        assert (f.diff() >= 0).all()
        just = restrain(torch.tensor([sigma, sigma + 1e-9], dtype=torch.float64), sigma, alpha, restraint, guard=guard)
        assert_close(just[0], just[1], rtol=0, atol=1e-7)
    assert (restrain(s, sigma, alpha, restraint) <= s).all()


def test_unguarded_f_expands_just_above_a_small_sigma():
    assert float(restrain(torch.tensor([0.9]), 0.5, guard=False)) == pytest.approx(1.0878, abs=1e-4)
    assert float(restrain(torch.tensor([0.9]), 0.5)) == pytest.approx(0.9)


def test_log_formula():
    s = torch.tensor([7.0], dtype=torch.float64)
    assert float(restrain(s, 2.0, 1.5)) == pytest.approx(math.log(7, 1.5) - math.log(2, 1.5) + 2)
    assert float(restrain(s, 2.0, restraint="linear")) == pytest.approx(4.5)


def test_thin_and_dense_sums_have_the_same_singular_values(randn):
    left, right, full = randn(6, 2), randn(2, 9), randn(6, 9)
    thin = [LowRank(left=left, right=right), LowRank(left=left[:, :1], right=right[:1])]
    whole = left @ right + left[:, :1] @ right[:1]
    u, s, vh = singular_values(thin, whole.shape)
    assert_close(u * s @ vh, whole)
    assert len(s) == 3
    u, s, vh = singular_values([*thin, Dense(full=full)], whole.shape)
    assert_close(u * s @ vh, whole + full)


def total(lm, deltas, name):
    return sum(d.dense(name, lm.parameter(name).shape) for d in deltas if name in d.changes)


def test_all_live_deltas_become_one_whose_spectrum_is_held_down(tiny, edits):
    """Identities 55 to 57, on the model."""
    lm = tiny("llama")
    before = weights(lm)
    live = []
    for edit in edits:
        live.append(propose(prune().wrapped, lm, [edit]))
        lm.apply(live[-1])
    edited = weights(lm)
    delta = propose(prune(), lm, [])
    assert delta.supersedes == tuple(d.id for d in live)
    assert [r.id for r in delta.report] == [e.id for e in edits]
    for name, lowered in delta.provenance["singular_values_restrained"].items():
        assert lowered > 0
        w0, whole, held = before[name], total(lm, live, name), total(lm, [delta], name)
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        f = u.T @ held @ vh.T
        assert_close(f, torch.diag(f.diagonal()), rtol=1e-6, atol=1e-6)
        assert (f.diagonal() <= s + 1e-9).all()
        assert int(torch.linalg.matrix_rank(held)) <= int(torch.linalg.matrix_rank(whole))
        sigma = float(torch.linalg.matrix_norm(w0, 2))
        top, top_held = float(s[0]), float(torch.linalg.matrix_norm(held, 2))
        assert top_held <= top
        assert float(torch.linalg.matrix_norm(w0 + held, 2)) <= sigma + top_held + 1e-9
        low = float(torch.linalg.svdvals(w0)[-1])
        if low > top:  # the upper bound of the condition number, where it is one
            assert (sigma + top_held) / (low - top_held) <= (sigma + top) / (low - top)
    lm.apply(delta)
    for name in delta.changes:  # identity 58: base plus the restrained change, not the edited weights plus it
        assert_close(lm.parameter(name).detach(), before[name] + total(lm, [delta], name))
    lm.revert(delta)
    assert equal(weights(lm), edited)
    lm.revert_all()
    assert equal(weights(lm), before)


def held_down(delta, base, alpha=math.e):
    """The restraint of one matrix, from its definition."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u * restrain(s, float(torch.linalg.matrix_norm(base, 2)), alpha) @ vh


def test_each_expert_is_held_against_its_own_base(tiny, edits):
    """Spec 2.9: each edited matrix separately."""
    lm = tiny("mixtral")
    edits = [replace(edit, prompt="You know {}") for edit in edits[:2]]
    moments = random_moments(lm, kinds=(), experts=True)
    before = weights(lm)
    written = prune().wrapped.propose(lm, edits, contexts=CONTEXTS, moments=moments)
    lm.apply(written)
    for _ in range(2):  # the second time from one change of the whole tensor
        delta = propose(prune(), lm, [])
        for name, lowered in delta.provenance["singular_values_restrained"].items():
            whole, held = total(lm, [written], name), total(lm, [delta], name)
            n = 0
            for e, base in enumerate(before[name]):
                assert_close(held[e], held_down(whole[e], base))
                n += int((torch.linalg.svdvals(whole[e]) > torch.linalg.matrix_norm(base, 2)).sum())
            assert lowered == n > 1
        lm.revert_all()
        written = lm.delta({name: [Dense(full=total(lm, [written], name))] for name in written.changes})
        lm.apply(written)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("as_region", [True, False])
def test_a_projection_of_a_fused_parameter_is_held_against_its_own_base(as_region, family, tiny, randn):
    lm = tiny(family)
    site = lm.site(1, "v_proj")
    left, right = 30 * randn(site.shape[0], 2), randn(2, site.shape[1])
    change = site.stored(left, right) if as_region else site.stored_dense(left @ right)
    lm.apply(lm.delta({site.name: [change]}))
    delta = propose(prune(), lm, [])
    held = total(lm, [delta], site.name)
    lm.revert_all()
    base = site.weight.clone()
    lm.apply(lm.delta({site.name: [Dense(full=held)]}))
    assert_close(site.weight - base, held_down(left @ right, base))


def test_edits_given_are_written_by_the_host_first(tiny, edits):
    lm = tiny("llama")
    lm.apply(propose(prune().wrapped, lm, edits[:2]))
    both = propose(prune(), lm, edits[2:])
    assert [r.id for r in both.report] == [e.id for e in edits]
    with lm.edited(propose(prune().wrapped, lm, edits[2:])):
        same(lm, both, propose(prune(), lm, []))
    lm.apply(both)
    again = propose(prune(), lm, [])  # restrained once, and always against the true base
    assert again.supersedes == (both.id,)
    assert len(again.report) == 4


def test_nothing_happens_where_nothing_is_large(tiny, edits):
    """Identity 54, on the model."""
    lm = tiny("llama")
    small = BASE | dict(moment_weight=1e6)
    alone = propose(method("memit", **small), lm, edits)
    delta = propose(prune(base_settings=small), lm, edits)
    same(lm, delta, alone, rtol=1e-9, atol=1e-12)
    assert not any(delta.provenance["singular_values_restrained"].values())


@pytest.mark.parametrize(
    ("settings", "text"),
    [(dict(alpha=1.0), "alpha must be above 1"), (dict(restraint="x"), "known: log, linear")],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        prune(**settings)


@pytest.mark.parametrize("name", ["prune", "rect"])
def test_a_base_method_that_replaces_applied_deltas_is_refused(name, tiny, edits):
    lm = tiny("llama")
    lm.apply(propose(prune().wrapped, lm, edits[:1]))
    inner = dict(base_method="memit", base_settings=BASE)
    with pytest.raises(InvalidSetting, match=f"{name}: prune replaces earlier deltas.* revert those deltas first"):
        propose(method(name, base_method="prune", base_settings=inner), lm, edits[1:])
