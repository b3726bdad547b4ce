"""ROME's and R-ROME's identities (float64, tiny models), and their guards."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.errors import InvalidEdit, InvalidSetting, RetconWarning, UnsafeUpdate
from retcon.lm.forward import Point
from retcon.memory.moments import GivenMoments
from retcon.memory.values import ValueSearch, ValueSite, search_values
from retcon.methods.r_rome import RRome
from retcon.methods.rome import Rome
from tests.conftest import random_moments
from tests.methods.common import BARE, CONTEXTS, SEARCH, keys_of, same, update, value_of

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight")
LAYER = 1


def rome(**settings):
    return Rome(layer=LAYER, **(SEARCH | dict(small_denominator="warn", min_denominator=0.0) | settings))


def r_rome(**settings):
    return RRome(layer=LAYER, **(SEARCH | settings))


def propose(method, lm, edit, contexts=CONTEXTS, moments=None):
    return method.propose(lm, [edit], contexts=contexts, moments=moments or random_moments(lm))


def v_star(lm, edit, contexts=CONTEXTS):
    """What both search for, and the mean output over contexts."""
    site = ValueSite(Point(LAYER, "mlp"), "subject_last", SEARCH["clamp"], SEARCH["weight_decay"])
    search = ValueSearch(steps=SEARCH["steps"], learning_rate=SEARCH["learning_rate"], stop="loss", threshold=0.05)
    return search_values(lm, [edit], [site], contexts, search)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_rome_stores_its_value_under_the_bare_key(family, tiny, edit):
    """Identities 11 and 17: (W + dW) k + b = v* exactly, though u is made from another key."""
    lm = tiny(family)
    v = v_star(lm, edit)
    delta = propose(rome(), lm, edit)
    k, before = keys_of(lm, [edit], LAYER, BARE)[0], value_of(lm, [edit], Point(LAYER, "mlp"))[0]
    assert_close(before + update(lm, delta, LAYER) @ k, v.target(0)[0])
    with lm.edited(delta):
        assert_close(value_of(lm, [edit], Point(LAYER, "mlp")), v.target(0), rtol=1e-6, atol=1e-7)


def test_r_rome_stores_it_under_the_mean_key(tiny, edit):
    """Identity 12: with `delta` as residual, delta itself is what the mean key gains."""
    lm = tiny("gpt2")
    v = v_star(lm, edit)
    k = keys_of(lm, [edit], LAYER, average="uniform")[0]
    mean = keys_mean_output(lm, edit)
    assert_close(mean + update(lm, propose(r_rome(), lm, edit), LAYER) @ k, v.target(0)[0])
    gained = update(lm, propose(r_rome(residual="delta"), lm, edit), LAYER) @ k
    assert_close(gained, v.offset[0][0])


def keys_mean_output(lm, edit):
    from retcon.memory.keys import mean_keys

    return mean_keys(lm, [edit], CONTEXTS, Point(LAYER, "mlp"), "subject_last", average="uniform")[0][0]


def test_r_rome_with_the_prompts_key_stores_it_on_the_bare_prompt(tiny, edit):
    """Identities 12 and 17."""
    lm = tiny("llama")
    wanted = v_star(lm, edit).target(0)
    with lm.edited(propose(r_rome(key_mode="prompt"), lm, edit)):
        assert_close(value_of(lm, [edit], Point(LAYER, "mlp")), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["avg", "prompt"])
def test_without_contexts_the_two_are_one(mode, tiny, edit):
    """Identities 12 and 13."""
    lm = tiny("llama")
    same(lm, propose(rome(), lm, edit, BARE), propose(r_rome(key_mode=mode), lm, edit, BARE))


@pytest.mark.parametrize("method", [rome(), r_rome(), r_rome(key_mode="prompt")])
def test_the_update_has_rank_one_and_a_blind_spot(method, tiny, edit, randn):
    """Identity 14: nothing happens to keys x with (C^-1 k) . x = 0."""
    lm = tiny("llama")
    moments = random_moments(lm)
    dw = update(lm, propose(method, lm, edit, moments=moments), LAYER)
    assert int(torch.linalg.matrix_rank(dw)) == 1
    contexts = BARE if getattr(method, "key_mode", "avg") == "prompt" else CONTEXTS
    k = keys_of(lm, [edit], LAYER, contexts, "uniform")[0]
    u = torch.linalg.solve(moments.by_name[lm.site(LAYER, "down_proj").name], k)
    x = randn(len(k))
    x -= u * (u @ x) / (u @ u)
    assert_close(dw @ x, torch.zeros(len(dw), dtype=torch.float64))


def test_with_one_key_the_update_is_the_least_disturbing_one(tiny, edit, randn):
    """Identity 15: adding any E with E k = 0 costs tr(dW C dW^T)."""
    lm = tiny("llama")
    moments = random_moments(lm)
    dw = update(lm, propose(r_rome(), lm, edit, moments=moments), LAYER)
    c, k = moments.by_name[lm.site(LAYER, "down_proj").name], keys_of(lm, [edit], LAYER, average="uniform")[0]
    for _ in range(20):
        e = randn(*dw.shape)
        e -= torch.outer(e @ k, k) / (k @ k)
        assert torch.trace((dw + 0.01 * e) @ c @ (dw + 0.01 * e).T) > torch.trace(dw @ c @ dw.T)


@pytest.mark.parametrize("method", [rome(), r_rome()])
def test_the_moments_scale_does_not_matter(method, tiny, edit):
    """Identity 16."""
    lm = tiny("llama")
    moments = random_moments(lm)
    larger = GivenMoments({n: 37.0 * c for n, c in moments.by_name.items()})
    same(lm, propose(method, lm, edit, moments=moments), propose(method, lm, edit, moments=larger))


@pytest.mark.parametrize("make", [rome, r_rome])
def test_without_the_moment_the_identity_stands_in(make, tiny, edit):
    lm = tiny("llama")
    m = lm.site(LAYER, "down_proj").weight.shape[1]
    eye = GivenMoments({lm.site(LAYER, "down_proj").name: torch.eye(m, dtype=torch.float64)})
    without = make(use_moment=False).propose(lm, [edit], contexts=CONTEXTS, moments=GivenMoments({}))
    same(lm, without, propose(make(), lm, edit, moments=eye))
    assert without.provenance["moments"] == {}  # none was asked for


# --- guards --------------------------------------------------------------------------------------------------------


def test_a_small_denominator_is_warned_about_or_refused(tiny, edit):
    lm = tiny("llama")
    with pytest.warns(RetconWarning, match=r"'france' \('France'\): ROME divides by .* Use r_rome"):
        propose(rome(min_denominator=1e6), lm, edit)
    with pytest.raises(UnsafeUpdate, match="ROME divides by"):
        propose(rome(min_denominator=1e6, small_denominator="raise"), lm, edit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*larger than the weight")
        propose(rome(min_denominator=1e-6), lm, edit)


def test_a_change_larger_than_the_weight_is_warned_about(tiny, edit):
    lm = tiny("llama")
    with pytest.warns(RetconWarning, match=r"layers\.1\.mlp\.down_proj\.weight: the change .* larger than the weight"):
        propose(r_rome(clamp=1e4, learning_rate=1e3, kl_factor=0.0), lm, edit)


@pytest.mark.parametrize("method", [rome(), r_rome()])
def test_several_edits_are_refused_with_the_way_out(method, tiny, edits, untouched):
    lm = tiny("llama")
    before = untouched(lm)
    with pytest.raises(InvalidEdit, match=r"one fact at a time, found 4 edits; .*in_steps"):
        method.propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm))
    with pytest.raises(InvalidSetting, match="keeps nothing between batches"):
        method.propose(lm, edits[:1], contexts=CONTEXTS, moments=random_moments(lm), state={"x": torch.ones(1)})
    assert untouched(lm) == before


@pytest.mark.parametrize(
    ("settings", "text"),
    [(dict(clamp=-1.0), "clamp must not be negative"), (dict(stop="often"), "known: loss, probability"),
     (dict(context_style="x"), "known: memit, rome, rome_easyedit"), (dict(key_average="x"), "known: two_level"),
     (dict(small_denominator="x"), "known: warn, raise")],
)  # fmt: skip
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        rome(**settings)


def test_prefixes_of_its_own_style_are_made_where_none_are_given(tiny):
    lm = tiny("llama", torch.float32, tok="bos")
    edit = Edit("You know {}", "France", "Rome")
    own = rome(context_style="rome", steps=2).propose(lm, [edit], moments=random_moments(lm))
    assert len(own.contexts) == 20
