"""EMMET on tiny models (float64); the solver's identities are in tests/memory/test_solvers.py."""

import pytest
from torch.testing import assert_close

import retcon
from retcon import world
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.forward import Point
from retcon.memory.values import ValueSearch, ValueSite, search_values
from retcon.methods.emmet import Emmet
from retcon.methods.memit import Memit
from retcon.methods.r_rome import RRome
from tests.conftest import random_moments
from tests.methods.common import BARE, CONTEXTS, SEARCH, same, update, value_of

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight")


def emmet(**settings):
    return Emmet(**(dict(layers=(1,)) | SEARCH | settings))


def propose(method, lm, edits, contexts=CONTEXTS):
    return method.propose(lm, edits, contexts=contexts, moments=random_moments(lm))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_a_stabiliser_every_value_is_reached(family, tiny, edits):
    """Identity 39, on the model."""
    lm = tiny(family)
    site = ValueSite(Point(1, "block"), "subject_last", SEARCH["clamp"], SEARCH["weight_decay"])
    search = ValueSearch(steps=SEARCH["steps"], learning_rate=SEARCH["learning_rate"], stop="loss", threshold=0.05)
    z = search_values(lm, edits, [site], BARE, search).target(0)
    with lm.edited(propose(emmet(stabiliser=0.0), lm, edits, BARE)):
        assert_close(value_of(lm, edits, Point(1, "block")), z, rtol=1e-6, atol=1e-7)


def test_edits_that_share_a_key_get_the_nearest_there_is():
    lm = retcon.load("demo:gptj")
    prompts = ["{} lies in", "{} is twinned with", "{} was founded by", "{} belongs to the continent of"]
    shared = [Edit(p, s, "Norway", id=s + p) for p in prompts for s in ("Geneva", "Mount Everest")]
    edits = [*shared, *(case.edits[0] for case in world.cases(8, seed=3))]
    few = dict(layers=(3,), steps=2)
    exact, nearly = (Emmet(stabiliser=a, **few).propose(lm, edits).norms() for a in (0.0, 1e-3))
    assert exact == pytest.approx(nearly, rel=0.01)


def test_as_published_it_is_memit_with_a_times_w(tiny, edits):
    """Identity 41, over several layers."""
    lm = tiny("llama")
    a = emmet(layers=(0, 1), stabiliser=0.1, moment_weight=20.0)
    same(lm, propose(a, lm, edits), propose(Memit(layers=(0, 1), moment_weight=2.0, **SEARCH), lm, edits))


def test_one_edit_is_exact_by_default_and_r_romes(tiny, edit):
    """Identity 42: the search at the block and at the MLP's output is the same computation, clamp apart."""
    lm = tiny("llama")
    free = dict(clamp=1e9, weight_decay=0.0)
    one = propose(emmet(**free), lm, [edit])
    other = propose(RRome(layer=1, residual="delta", key_average="two_level", **(SEARCH | free)), lm, [edit])
    same(lm, one, other, rtol=1e-6, atol=1e-8)
    same(lm, one, propose(emmet(**free, stabiliser=0.0), lm, [edit]))


def test_several_edits_are_stabilised_by_default(tiny, edits):
    lm = tiny("llama")
    default = propose(emmet(), lm, edits)
    same(lm, default, propose(emmet(stabiliser=0.1), lm, edits))
    exact = propose(emmet(stabiliser=0.0), lm, edits)
    assert float((update(lm, default, 1) - update(lm, exact, 1)).norm()) > 1e-3


def test_the_identitys_weight_shrinks_the_update(tiny, edits):
    lm = tiny("llama")
    norms = [float(update(lm, propose(emmet(identity_weight=mu), lm, edits), 1).norm()) for mu in (0.0, 1.0, 100.0)]
    assert norms == sorted(norms, reverse=True)


@pytest.mark.parametrize(
    ("settings", "text"),
    [(dict(moment_weight=0.0), "moment_weight must be positive"), (dict(stabiliser=-0.1), "stabiliser must not"),
     (dict(identity_weight=-1.0), "identity_weight must not"), (dict(layers=(1, 1)), "must ascend")],
)  # fmt: skip
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        emmet(**settings)
