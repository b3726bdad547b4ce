"""RECT's identities (float64)."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from retcon.delta import Dense, Region
from retcon.errors import InvalidSetting
from retcon.methods.common.choosing import method
from retcon.methods.common.wrappers import by_matrix
from retcon.methods.rect import Rect
from tests.conftest import everyday, random_moments
from tests.methods.common import CONTEXTS, SEARCH, keys_of, same

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight")
BASE = dict(layers=(0, 1), moment_weight=1.0) | SEARCH


def rect(**settings):
    return Rect(**(dict(base_method="memit", base_settings=BASE) | settings))


def propose(method, lm, edits, state=None):
    return method.propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm), state=state)


@pytest.mark.parametrize("k", [0.0, 0.1, 20.0, 33.3, 99.99, 100.0])
def test_exactly_the_relatively_largest_entries_are_kept(k, randn):
    """Identities 51 and 52."""
    dw, w = randn(13, 17), randn(13, 17)
    kept = rect().filtered(dw, w, k)
    chosen = kept != 0
    assert int(chosen.sum()) == math.ceil(k * dw.numel() / 100)
    assert torch.equal(kept[chosen], dw[chosen])
    q = dw.abs() / (w.abs() + 1e-8)
    if chosen.any() and not chosen.all():
        assert q[chosen].min() >= q[~chosen].max()


def test_of_equals_the_first_are_kept(randn):
    kept = rect().filtered(torch.ones(4, 5), torch.ones(4, 5), 35.0)
    assert kept.flatten().nonzero()[:, 0].tolist() == list(range(7))
    released = rect(count="released").filtered(torch.ones(4, 5), torch.ones(4, 5), 35.0)
    assert bool(released.all())  # all are on the threshold


def test_permuting_and_scaling_change_nothing(randn):
    """Identity 53."""
    dw, w = randn(6, 9), randn(6, 9)
    rows, columns = torch.randperm(6), torch.randperm(9)
    own = rect(eps=0.0)
    kept = own.filtered(dw, w, 40.0)
    assert torch.equal(own.filtered(dw[rows][:, columns], w[rows][:, columns], 40.0), kept[rows][:, columns])
    assert torch.equal(own.filtered(dw * 8, w * 8, 40.0), kept * 8)


def test_released_forms(randn):
    """As AlphaEdit's `memit_rect_main.py` has it; the larger eps tells its denominator from ours."""
    dw, w, eps = randn(10, 10), randn(10, 10), 0.5
    ratio = torch.abs(dw / (w + eps))
    mask = ratio >= torch.kthvalue(ratio.reshape(-1), 60).values
    released = rect(denominator="signed", count="released", eps=eps).filtered(dw, w, 40.0)
    assert torch.equal(released, torch.where(mask, dw, 0.0))
    assert int((released != 0).sum()) == 100 - int(100 * 0.6) + 1
    exact = rect(denominator="signed", eps=eps).filtered(dw, w, 40.0)
    assert not torch.equal(exact, rect(eps=eps).filtered(dw, w, 40.0))


@pytest.mark.parametrize("family", everyday("llama", of=["gpt2", "llama"]))
def test_it_filters_its_hosts_delta(family, tiny, edits):
    lm = tiny(family)
    base = rect().wrapped
    whole = propose(base, lm, edits)
    same(lm, propose(rect(keep_percent=100.0), lm, edits), whole)
    nothing = propose(rect(keep_percent=0.0), lm, edits)
    assert all(not nothing.dense(n, lm.parameter(n).shape).any() for n in nothing.changes)
    some = propose(rect(keep_percent=10.0), lm, edits)
    for name, (change,) in some.changes.items():
        assert change.kind == "entries"  # smaller than the whole
        shape = lm.parameter(name).shape
        assert_close(some.dense(name, shape), rect().filtered(whole.dense(name, shape), lm.parameter(name), 10.0))
    assert some.provenance["settings"]["base_settings"]["moment_weight"] == 1.0
    assert [r.steps for r in some.report] == [r.steps for r in whole.report]
    assert some.report[0].final_probability != whole.report[0].final_probability  # measured after the filter


@pytest.mark.parametrize("in_loop", [False, True])
def test_each_expert_keeps_its_share(in_loop, tiny, edits):
    lm = tiny("mixtral")
    edits = [replace(edit, prompt="You know {}") for edit in edits[:2]]
    moments = random_moments(lm, kinds=(), experts=True)
    delta = rect(keep_percent=20.0, in_loop=in_loop).propose(lm, edits, contexts=CONTEXTS, moments=moments)
    for name, changes in delta.changes.items():
        written = delta.dense(name, lm.parameter(name).shape)
        assert 1 < len({c.region for c in changes}) == len(changes)
        for change in changes:
            own = change.part_of(written)
            assert int((own != 0).sum()) == math.ceil(0.2 * own.numel())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("v_proj",), ("q_proj", "k_proj", "v_proj")])
@pytest.mark.parametrize("base", ["ft", "lora"])
def test_projections_of_a_fused_parameter_keep_their_share(base, modules, family, tiny, edits):
    lm = tiny(family)
    settings = dict(layers=(1,), modules=modules, epochs=2) | (
        dict(rank=2) if base == "lora" else {"train_bias": False}
    )
    delta = propose(rect(base_method=base, base_settings=settings, keep_percent=20.0), lm, edits[:2])
    (name,) = delta.changes
    n = sum(lm.site(1, kind).shape.numel() for kind in modules)
    assert int((delta.dense(name, lm.parameter(name).shape) != 0).sum()) in range(math.ceil(0.2 * n), int(0.2 * n) + 3)


def test_a_projection_of_an_expert_keeps_its_share(tiny, edits):
    lm = tiny("mixtral")
    settings = dict(layers=(1,), modules=("up_proj",), epochs=2)
    delta = propose(rect(base_method="ft", base_settings=settings, keep_percent=20.0), lm, edits[:2])
    sites = lm.expert_sites(1, "up_proj")
    written = delta.dense(sites[0].name, lm.parameter(sites[0].name).shape)
    assert len(delta.changes[sites[0].name]) == len(sites)
    assert [int((each != 0).sum()) for each in written] == [math.ceil(0.2 * site.shape.numel()) for site in sites]


def test_rows_that_a_mask_chose_are_held_against_their_whole_matrix(tiny, randn):
    """KNE's units: what it leaves out is part of the update, zero."""
    for family, kind in (("llama", "down_proj"), ("phi3", "q_proj")):
        lm = tiny(family)
        site = lm.site(1, kind)
        change = site.stored_rows(torch.tensor([0, 2, 5]), randn(3, site.shape[1]))
        kept = rect().filtered_change(lm, site.name, [change], 5.0)
        n = int((kept.dense(lm.parameter(site.name).shape) != 0).sum())
        assert n == min(math.ceil(0.05 * site.shape.numel()), 3 * site.shape[1])


def test_changes_of_one_matrix_are_filtered_as_their_sum(tiny, randn):
    lm = tiny("mixtral")
    name = lm.expert_sites(1)[0].name
    w = lm.parameter(name).detach()
    whole, two, one = randn(*w.shape), randn(*w.shape[1:]), randn(*w.shape[1:])
    expert = Region(0, 2, 3)
    changes = [Dense(region=expert, full=one), Dense(region=Region(0, 0, 1), full=one), Dense(region=expert, full=two)]
    first, second = (rect().filtered_change(lm, name, of_one, 20.0) for of_one in by_matrix(changes, w.shape))
    assert (first.region, second.region) == (Region(0, 0, 1), expert)
    assert_close(second.dense(w.shape)[2], rect().filtered(one + two, w[2], 20.0))
    of_all = by_matrix([*changes, Dense(full=whole)], w.shape)  # regions overlap: the sum is taken apart by expert
    total = sum(change.dense(w.shape) for change in [*changes, Dense(full=whole)])
    for e, of_one in enumerate(of_all):
        assert_close(
            rect().filtered_change(lm, name, of_one, 20.0).dense(w.shape)[e], rect().filtered(total[e], w[e], 20.0)
        )
    (of_all,) = by_matrix([Dense(region=Region(0, 0, 2), full=one), Dense(full=two)], two.shape)  # one matrix
    assert len(of_all) == 2


def test_in_the_loop_later_layers_make_up_for_it(tiny, edits):
    lm = tiny("llama")
    after, within = (propose(rect(keep_percent=20.0, in_loop=x), lm, edits) for x in (False, True))
    first, second = (lm.site(i, "down_proj").name for i in (0, 1))
    shape = lm.parameter(first).shape
    assert_close(after.dense(first, shape), within.dense(first, shape))
    assert not torch.allclose(after.dense(second, shape), within.dense(second, shape), rtol=1e-3)
    assert int((within.dense(second, shape) != 0).sum()) == math.ceil(0.2 * shape.numel())


def test_how_much_is_kept_depends_on_the_host_where_nothing_is_said(tiny, edit):
    lm = tiny("llama")
    for base, settings, percent in (("rome", dict(layer=1) | SEARCH, 20), ("memit", BASE, 40)):
        method = Rect(base_method=base, base_settings=settings)
        delta = propose(method, lm, [edit])
        assert method.supports_batches == (base == "memit")
        for name in delta.changes:
            shape = lm.parameter(name).shape
            assert int((delta.dense(name, shape) != 0).sum()) == math.ceil(percent * shape.numel() / 100)


@pytest.mark.parametrize("base", ["memit", "alphaedit"])
@pytest.mark.parametrize("name", ["rect", "rect in the loop", "prune"])
def test_remembered_keys_are_those_of_the_filtered_weights(name, base, tiny, edits):
    """Spec 2.7: they are read on the edited weights."""
    lm = tiny("llama")
    own = (
        dict(cache_keys=True, moment_weight=1e-3)
        if base == "memit"
        else dict(threshold_mode="rank", null_threshold=0.6, ridge=1e-6)
    )
    inner = dict(
        base_method=base,
        base_settings=SEARCH | dict(layers=(0, 1), clamp=50.0, weight_decay=0.0, learning_rate=2.0, **own),
    )
    how = {} if name == "prune" else dict(keep_percent=20.0, in_loop="loop" in name)
    chosen = method(name.split()[0], **inner, **how)
    first = propose(chosen, lm, edits[:2])
    lm.apply(first)
    second = propose(chosen, lm, edits[2:], state=first.state)
    lm.apply(second)
    assert all(second.provenance.get("singular_values_restrained", {"": 1}).values())
    for layer in (0, 1):
        of = "keys/" + lm.site(layer, "down_proj").name
        assert torch.equal(second.state[of][:2], first.state[of])
        assert_close(second.state[of][2:], keys_of(lm, edits[2:], layer))


@pytest.mark.parametrize(
    ("settings", "text"),
    [(dict(keep_percent=101.0), "from 0 to 100"), (dict(denominator="x"), "known: absolute, signed"),
     (dict(count="x"), "known: exact, released"), (dict(base_settings={}, in_loop=True), "memit needs layers"),
     (
         dict(base_method="rect", base_settings=dict(base_settings=BASE), in_loop=True),
         "writes layer by layer; rect does not",
     )],
)  # fmt: skip
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        rect(**settings)


@pytest.mark.parametrize("name", ["rect", "prune"])
def test_a_base_method_that_trains_its_own_change_on_is_refused(name, tiny, edit):
    filtered = method(name, base_method="lora", base_settings=dict(continue_adapter=True))
    with pytest.raises(InvalidSetting, match=rf"{name}: lora .* trains its own change .*continue_adapter"):
        filtered.propose(tiny("llama"), [edit])
