"""JEEP's own identities (float64, tiny models)."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import retcon
from retcon.edits import Edit
from retcon.errors import (
    ConflictingEdits,
    InvalidEdit,
    InvalidSetting,
    NonFinite,
    NotEditable,
    RetconWarning,
    UnknownMethod,
    UnknownPreset,
)
from retcon.lm.forward import Point
from retcon.memory.contexts import Contexts
from retcon.memory.keys import mean_keys
from retcon.memory.moments import GivenMoments
from retcon.memory.values import ValueSearch, ValueSite, search_values
from retcon.methods.common.choosing import method
from retcon.methods.common.contract import ModelShape
from retcon.methods.common.presets import presets, signature
from retcon.methods.jeep import Jeep
from tests.conftest import everyday, random_moments
from tests.methods.common import same

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight")  # exact writes into tiny random models
CONTEXTS, BARE = Contexts(("The train stood still. ",)), Contexts()
SETTINGS: dict[str, Any] = dict(
    low=(0, 1), high=(2, 3), low_clamp=2.0, high_clamp=1.0, low_moment_weight=2.0, high_moment_weight=2.0,
    low_weight_decay=0.02, high_weight_decay=0.02, steps=6, learning_rate=0.2,
)  # fmt: skip


def jeep(**settings: Any) -> Jeep:
    return Jeep(**{**SETTINGS, **settings})


def propose(lm, edits, contexts=CONTEXTS, **settings):
    return jeep(**settings).propose(lm, edits, contexts=contexts, moments=random_moments(lm))


@pytest.mark.parametrize("family", everyday("gptj", of=["gptj", "llama"]))
def test_a_zero_high_clamp_gives_the_low_values_of_the_low_group_alone(family, tiny, edits):
    lm = tiny(family)
    a = propose(lm, edits, high_clamp=0.0, write_high=False)
    b = propose(lm, edits, high=())
    same(lm, a, b)


def test_a_zero_low_clamp_gives_the_high_values_of_the_high_group_alone(tiny, edits):
    lm = tiny("llama")
    same(lm, propose(lm, edits, low_clamp=0.0, write_low=False), propose(lm, edits, low=()))


def test_each_step_writes_its_own_layers_only(tiny, edits):
    lm = tiny("gpt2")
    whole = propose(lm, edits)
    low, high = propose(lm, edits, write_high=False), propose(lm, edits, write_low=False)
    name = [lm.site(layer, "down_proj").name for layer in range(4)]
    assert set(low.changes) == set(name[:2])
    assert set(high.changes) == set(name[2:])
    assert set(whole.changes) == set(name)
    for n in name[:2]:
        assert torch.equal(whole.dense(n, lm.parameter(n).shape), low.dense(n, lm.parameter(n).shape))


def test_release_and_mlp_differ_in_high_layers_only(tiny, edits):
    lm = tiny("gptj")  # parallel: delta* at attn and at mlp is the same computation
    # with one step of freedom and no decay the low values agree, as the clamp radius is never met
    free = dict(low_clamp=1e9, high_clamp=1e9, low_weight_decay=0.0, high_weight_decay=0.0)
    a, b = propose(lm, edits, **free), propose(lm, edits, sites="release", **free)
    low = [lm.site(layer, "down_proj").name for layer in (0, 1)]
    high = [lm.site(layer, "down_proj").name for layer in (2, 3)]
    for n in low:
        assert_close(a.dense(n, (32, 128)), b.dense(n, (32, 128)), rtol=1e-3, atol=1e-4)
    for n in high:
        assert not torch.allclose(a.dense(n, (32, 128)), b.dense(n, (32, 128)), rtol=1e-2, atol=1e-3)


def exact(**more: Any) -> dict[str, Any]:
    """Single low and high layer, nothing of the old keys kept: writes are exact on bare prompts."""
    return dict(low=(1,), high=(3,), low_moment_weight=0.0, high_moment_weight=0.0, **more)


def state_at(lm, edits, point, where):
    return mean_keys(lm, edits, BARE, Point(0, "key"), where, value=point)[1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_exact_writes_put_both_values_in_place(family, tiny, edits):
    lm = tiny(family)
    settings = exact()
    m = jeep(**settings)
    places = [ValueSite(Point(1, "mlp"), "subject_last", m.low_clamp, m.low_weight_decay),
              ValueSite(Point(3, "mlp"), "prediction", m.high_clamp, m.high_weight_decay)]  # fmt: skip
    search = ValueSearch(steps=m.steps, learning_rate=m.learning_rate)
    values = search_values(lm, edits, places, BARE, search)
    with lm.edited(propose(lm, edits, BARE, **settings)):
        assert_close(state_at(lm, edits, places[0].point, "subject_last"), values.target(0), rtol=1e-5, atol=1e-6)
        assert_close(state_at(lm, edits, places[1].point, "prediction"), values.target(1), rtol=1e-5, atol=1e-6)


def test_clean_block_targets_undo_step_two_and_joint_ones_do_not(tiny, edits):
    """The defect of the literal reading: z* measured without delta' makes Step 3 erase what Step 2 brought."""
    lm = tiny("llama")
    at = Point(3, "block")
    clean = dict(sites="block", high_target="clean")
    states = []
    for more in ({}, dict(write_low=False)):
        with lm.edited(propose(lm, edits, BARE, **exact(**clean, **more))):
            states.append(state_at(lm, edits, at, "prediction"))
    assert_close(*states, rtol=1e-5, atol=1e-6)

    m = jeep(**exact(sites="block"))
    places = [ValueSite(Point(1, "block"), "subject_last", m.low_clamp, m.low_weight_decay),
              ValueSite(at, "prediction", m.high_clamp, m.high_weight_decay)]  # fmt: skip
    values = search_values(lm, edits, places, BARE, ValueSearch(steps=m.steps, learning_rate=m.learning_rate))
    with lm.edited(propose(lm, edits, BARE, **exact(sites="block"))):  # joint is what block defaults to
        assert_close(state_at(lm, edits, at, "prediction"), values.target(1, "joint"), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(values.target(1, "joint"), values.target(1), rtol=1e-3)


def test_block_sites_behind_a_post_norm_fall_back_to_the_mlp_output(tiny, edit):
    lm = tiny("olmo2")
    with pytest.warns(RetconWarning, match="norm stands between"):
        a = propose(lm, [edit], sites="block")
    same(lm, a, propose(lm, [edit], high_target="joint"))


def test_stop_reasons_agree_with_the_probability(tiny, edits):
    lm = tiny("llama")
    for r in propose(lm, edits, steps=40, low_clamp=50.0, high_clamp=50.0, threshold=0.2).report:
        assert (r.stopped == "reached") == (r.search_probability >= 0.2)
        assert r.stopped == "reached" or r.steps == 39


def test_proposing_on_live_deltas_keeps_them(tiny, edits, untouched):
    lm = tiny("llama", torch.float32)
    first = propose(lm, edits[:2])
    lm.apply(first)
    before = untouched(lm)
    second = propose(lm, edits[2:])
    assert untouched(lm) == before
    assert second.parents == (first.id,)
    lm.apply(second)
    lm.revert(first)
    with pytest.warns(RetconWarning, match="proposed on top of"):
        lm.revert(second)
        lm.apply(second)
    lm.revert_all()
    assert not lm.applied


# --- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ([Edit("The capital of Spain is", "France", "Rome", id="x")], InvalidEdit, r"'x'.*'France' does not occur"),
        (
            [Edit("{} is in", "Rome", "Gaul", id="a"), Edit("{} is in", "rome", "Asia", id="b")],
            ConflictingEdits,
            r"'a' and 'b' contradict",
        ),
        (
            [Edit("{} is in", "Rome", "Gaul", id="a"), Edit("{} is", "Paris", "Gaul", id="a")],
            InvalidEdit,
            "share the id",
        ),
    ],
)
def test_bad_edits_are_refused_by_name_and_nothing_is_left_behind(bad, error, text, tiny, untouched):
    lm = tiny("llama")
    before = untouched(lm)
    with pytest.raises(error, match=text):
        propose(lm, bad)
    assert untouched(lm) == before


def test_layers_the_model_does_not_have(tiny, edit):
    with pytest.raises(InvalidSetting, match=r"layer 7 asked for.*layers 0 to 3"):
        propose(tiny("llama"), [edit], high=(2, 7))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(low=(2, 1)), "ascend"),
        (dict(low=(), high=()), "nothing to edit"),
        (dict(low_clamp=-1.0), "low_clamp"),
        (dict(high_weight_decay=-1.0), "high_weight_decay"),
        (dict(write_low=False, write_high=False), "nothing would be written"),
        (dict(write_low=False, high=()), "both groups optimised jointly"),
        (dict(write_high=False, joint_optimisation=False), "both groups optimised jointly"),
        (dict(sites="head"), "known: mlp, release, block"),
        (dict(high_spread="odd"), "known: even, sqrt"),
    ],
)
def test_settings_are_checked_against_each_other(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        jeep(**settings)


def test_a_parameter_that_must_not_be_edited_is_refused_with_its_reason(tiny, edit):
    lm = tiny("llama")
    name = lm.site(2, "down_proj").name
    lm.not_editable[name] = "it is shared with lm_head.weight, which would change too"
    with pytest.raises(NotEditable, match=r"shared with lm_head"):
        propose(lm, [edit])


def test_nan_in_a_moment_is_refused_and_the_model_is_as_it_was(tiny, edit, untouched):
    lm = tiny("gptj")
    before = untouched(lm)
    moments = random_moments(lm)
    bad = GivenMoments({n: torch.full_like(m, float("nan")) for n, m in moments.by_name.items()})
    with pytest.raises(NonFinite):
        jeep().propose(lm, [edit], contexts=CONTEXTS, moments=bad)
    assert untouched(lm) == before


# --- names, presets, overrides -----------------------------------------------------------------------------------


def test_published_presets_are_the_papers():
    by_name = {p.name: p for p in presets("jeep")}
    llama = by_name["jeep/llama-7b/zsre"]
    assert llama.settings["low"] == [5, 6, 7, 8, 9, 10]
    assert (llama.settings["high_clamp"], llama.settings["low_moment_weight"]) == (0.7, 6000.0)
    assert {"jeep/gpt-j-6b/counterfact", "jeep/gpt-j-6b/zsre", "jeep/llama-7b/counterfact"} <= set(by_name)
    for preset in by_name.values():
        Jeep(**{k: tuple(v) if isinstance(v, list) else v for k, v in preset.settings.items()})
        assert preset.source


def test_presets_are_matched_by_sizes_and_the_choice_is_said(tiny, monkeypatch):
    lm = tiny("llama")
    wanted = presets("jeep")
    llama = next(p for p in wanted if p.model == "llama-7b").match
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(llama))
    with pytest.warns(RetconWarning, match="taking jeep/llama-7b/counterfact"):
        assert method("jeep", for_model=lm).high_clamp == 0.25
    assert method("jeep", for_model=lm, dataset="zsre").high_clamp == 0.7
    with pytest.raises(UnknownPreset, match="known: jeep/llama-7b/counterfact"):
        method("jeep", for_model=lm, dataset="mquake")
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(llama) | {"context": 4096})
    with pytest.warns(RetconWarning, match="follow from its shape"):  # LLaMA-2-7B differs in its context alone
        method("jeep", for_model=lm)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 5, 6, 8, 12, 16, 30, 36, 80, 126])
@pytest.mark.parametrize("parallel", [True, False])
def test_starting_points_fit_any_depth(n_layers, parallel):
    """Two or three high layers, above the low ones and below the topmost; fewer where there is no room."""
    guess = Jeep.fallback_settings(ModelShape(n_layers, 64, 256, parallel))
    low, high = guess["low"], guess["high"]
    assert len(high) in ((2, 3) if n_layers >= 4 else (max(n_layers - 2, 0),))
    assert low[0] >= 0
    assert max((low[-1], *high)) < max(n_layers - 1, 1)
    assert not high or low[-1] < high[0]
    Jeep(**guess)


def test_a_model_without_a_preset_is_told_so(tiny, edit):
    lm = tiny("qwen3")
    with pytest.warns(RetconWarning, match="no jeep preset.*qwen3"):
        found = method("jeep", for_model=lm, low_clamp=8.0)
    assert found.low_clamp == 8.0
    assert signature(lm)["model_type"] == "qwen3"


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UnknownMethod, match="Did you mean 'jeep'"):
        retcon.method("jep")
    with pytest.raises(InvalidSetting, match="did you mean 'high_clamp'"):
        retcon.method("jeep", low=(1,), high=(2,), high_clam=1)
    with pytest.raises(InvalidSetting, match="needs low, high"):
        retcon.method("jeep")
    with pytest.raises(UnknownPreset, match="known: jeep/gpt-j-6b"):
        retcon.method("jeep", preset="jeep/none/none")
    assert retcon.method("jeep", preset="jeep/gpt-j-6b/zsre").high_clamp == 0.8
