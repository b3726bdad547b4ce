"""AlphaEdit on tiny models (float64); the solver's identities are in tests/memory/test_solvers.py."""

import pytest
import torch
from torch.testing import assert_close

from retcon.delta import Delta
from retcon.errors import InvalidSetting, RetconWarning
from retcon.lm.forward import Point
from retcon.memory.moments import GivenMoments
from retcon.memory.solve import null_space
from retcon.methods.alphaedit import AlphaEdit
from retcon.methods.memit import Memit
from tests.conftest import everyday, random_moments
from tests.methods.common import CONTEXTS, SEARCH, equal, keys_of, same, update, value_of, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight")


def alphaedit(**settings):
    given = dict(layers=(0, 1), null_threshold=0.6, threshold_mode="rank", ridge=0.5)
    return AlphaEdit(**(given | SEARCH | settings))


def propose(lm, edits, state=None, moments=None, **settings):
    moments = moments or random_moments(lm)
    return alphaedit(**settings).propose(lm, edits, contexts=CONTEXTS, moments=moments, state=state)


@pytest.mark.parametrize("family", everyday("gpt2", of=["gpt2", "llama"]))
def test_keys_of_the_text_are_left_alone(family, tiny, edits, randn):
    """Identity 44, on the model."""
    lm = tiny(family)
    moments = random_moments(lm)
    delta = propose(lm, edits, moments=moments)
    for layer in (0, 1):
        site = lm.site(layer, "down_proj")
        space = null_space(moments.by_name[site.name], 0.6, "rank")
        dw = update(lm, delta, layer)
        assert_close(space.project(dw.T).T, dw)
        x = randn(dw.shape[1], 3)
        assert_close(dw @ (x - space.project(x)), torch.zeros(len(dw), 3, dtype=torch.float64))
        assert delta.provenance["null_space_ranks"][site.name] == space.rank


def test_a_ridge_by_the_median_follows_the_size_of_the_keys(tiny, edits):
    lm = tiny("llama")
    moments = random_moments(lm)
    name = lm.site(1, "down_proj").name
    median = float(moments.by_name[name].diagonal().median())
    relative = propose(lm, edits, moments=moments, layers=(1,), ridge=2.0, ridge_mode="median")
    same(lm, relative, propose(lm, edits, moments=moments, layers=(1,), ridge=2.0 * median))
    assert not torch.allclose(update(lm, relative, 1), update(lm, propose(lm, edits, layers=(1,), ridge=2.0), 1))


def test_moments_keep_a_null_space_for_each_threshold(tiny, edits):
    lm = tiny("llama")
    moments = random_moments(lm)
    site = lm.site(1, "down_proj")
    for share in (0.4, 0.8):
        delta = propose(lm, edits, moments=moments, layers=(1,), null_threshold=share)
        assert delta.provenance["null_space_ranks"] == {site.name: round(share * site.shape[1])}


@pytest.mark.parametrize("form", everyday("keys", of=["eigenbasis", "keys", "released"]))
def test_forms_agree_on_the_model(form, tiny, edits):
    """Identity 45: two batches, the second with a state."""
    lm = tiny("llama")
    for share in (0.35, 0.8):
        first = propose(lm, edits[:2], null_threshold=share)
        second = [propose(lm, edits[2:], state=first.state, null_threshold=share, form=f) for f in (form, "auto")]
        same(lm, *second)


@pytest.mark.filterwarnings("ignore:alphaedit. .* in its null space")
def test_with_nothing_protected_it_is_memit_on_the_identity(tiny, edits):
    """Identity 46."""
    lm = tiny("llama")
    m = lm.site(0, "down_proj").weight.shape[1]
    eye = GivenMoments({lm.site(i, "down_proj").name: torch.eye(m, dtype=torch.float64) for i in range(4)})
    memit = Memit(layers=(0, 1), moment_weight=0.5, **SEARCH).propose(lm, edits, contexts=CONTEXTS, moments=eye)
    same(lm, propose(lm, edits, null_threshold=1.0), memit)


def test_with_everything_protected_nothing_is_written(tiny, edits):
    """Identity 47."""
    lm = tiny("llama")
    with pytest.warns(RetconWarning, match=r"0 of \d+ dimensions in its null space \(0%\).* raise it"):
        delta = propose(lm, edits, null_threshold=0.0, threshold_mode="absolute")
    assert all(not update(lm, delta, layer).any() for layer in (0, 1))


def test_two_batches_with_the_cache_are_one(randn):
    """Identity 48, on fixed keys with the second residual measured after the first batch."""
    from retcon.memory.solve import null_space_ridge

    x = randn(12, 200)
    space = null_space(x @ x.T / 200, 0.7, "rank")
    w, first, second, v1, v2 = randn(4, 12), randn(12, 3), randn(12, 2), randn(4, 3), randn(4, 2)
    both = torch.cat([first, second], dim=1)
    joint = (torch.cat([v1, v2], dim=1) - w @ both) @ null_space_ridge(both, space, 0.5)
    step = (v1 - w @ first) @ null_space_ridge(first, space, 0.5)
    cached = step + (v2 - (w + step) @ second) @ null_space_ridge(both, space, 0.5)[3:]
    assert_close(cached, joint)


def test_the_cache_grows_by_each_batchs_keys_and_a_reset_forgets_them(tiny, edits):
    """Identity 49."""
    lm = tiny("llama")
    name = lm.site(1, "down_proj").name
    first = propose(lm, edits[:2])
    lm.apply(first)
    second = propose(lm, edits[2:], state=first.state)
    with lm.edited(second):
        fresh = keys_of(lm, edits[2:], 1)
    kept = [d.state["keys/" + name].double() for d in (first, second)]
    assert_close(kept[1].T @ kept[1], kept[0].T @ kept[0] + fresh.T @ fresh)
    lm.revert(first)
    alone = [propose(lm, [e]) for e in edits[:2]]  # independent edits: no state handed on
    again = [propose(lm, [e]) for e in edits[1::-1]]
    same(lm, alone[0], again[1])
    same(lm, alone[1], again[0])


def test_earlier_edits_stay_better_with_the_cache(tiny, edits):
    """Identity 50, on the model."""
    lm = tiny("llama")
    first = propose(lm, edits[:2])
    lm.apply(first)
    before, moved = value_of(lm, edits[:2], Point(1, "block")), []
    for state in (None, first.state):
        with lm.edited(propose(lm, edits[2:], state=state)):
            moved.append(float((value_of(lm, edits[:2], Point(1, "block")) - before).norm()))
    assert moved[1] < 0.9 * moved[0]


@pytest.mark.long
def test_half_way_saved_and_resumed_is_the_uninterrupted_run(tiny, edits, tmp_path):
    def run(lm, edits, state=None):
        for edit in edits:
            delta = propose(lm, [edit], state=state)
            lm.apply(delta)
            state = delta.state
        return delta

    whole, half = tiny("llama", torch.float32), tiny("llama", torch.float32)
    run(whole, edits)
    run(half, edits[:2]).save(tmp_path / "half")
    run(half, edits[2:], state=Delta.load(tmp_path / "half").state)
    assert equal(weights(half), weights(whole))


@pytest.mark.parametrize(
    ("settings", "text"),
    [(dict(ridge=0.0), "ridge must be positive"), (dict(null_threshold=1.5), "null_threshold is a share"),
     (dict(threshold_mode="x"), "known: absolute, trace, rank"), (dict(form="x"), "known: auto, eigenbasis"),
     (dict(null_threshold=-1.0), "null_threshold must not")],
)  # fmt: skip
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        alphaedit(**settings)
