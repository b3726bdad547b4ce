"""MEMIT's own identities, and MEMIT-seq's (float64, tiny models); the solver's are in tests/memory/test_solve.py."""

import pytest
import torch
from torch.testing import assert_close

from retcon.delta import Delta
from retcon.errors import InvalidSetting, RetconWarning
from retcon.lm.forward import Point
from retcon.memory.solve import ridge
from retcon.methods.common.proposal import answers
from retcon.methods.memit import Memit
from tests.conftest import random_moments
from tests.methods.common import CONTEXTS, EASY, SEARCH, equal, keys_of, same, update, value_of, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight")


def memit(**settings):
    return Memit(**(dict(layers=(1,), moment_weight=2.0) | SEARCH | settings))


def propose(lm, edits, state=None, **settings):
    return memit(**settings).propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm), state=state)


def test_rank_is_at_most_the_number_of_edits_and_no_search_writes_nothing(tiny, edits):
    """Identity 10."""
    lm = tiny("llama")
    assert int(torch.linalg.matrix_rank(update(lm, propose(lm, edits[:2]), 1))) <= 2
    still = propose(lm, edits, learning_rate=0.0, clamp=0.0)
    assert float(update(lm, still, 1).norm()) < 1e-12


def test_a_light_moment_stores_the_values_and_a_heavy_one_writes_nothing(tiny, edits):
    """Identities 18 and 19."""
    lm = tiny("llama")
    norms = [float(update(lm, propose(lm, edits, moment_weight=w), 1).norm()) for w in (1e-6, 0.1, 10.0, 1e3, 1e9)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-6 * norms[0]


def test_one_edit_points_as_r_romes(tiny, edit):
    """Identity 26: rows are multiples of C^-1 k whatever lambda is."""
    lm = tiny("llama")
    moments = random_moments(lm)
    u = torch.linalg.solve(moments.by_name[lm.site(1, "down_proj").name], keys_of(lm, [edit], 1)[0])
    for weight in (1e-9, 1.0, 1e4):
        dw = update(lm, propose(lm, [edit], moment_weight=weight), 1)
        assert_close(dw / dw[:, :1], (u / u[0]).expand_as(dw), rtol=1e-5, atol=1e-7)


def test_order_of_edits_does_not_matter(tiny, edits):
    """Identity 24."""
    lm = tiny("llama")
    same(lm, propose(lm, edits, layers=(0, 1)), propose(lm, edits[::-1], layers=(0, 1)), rtol=1e-6, atol=1e-8)


# --- MEMIT-seq -----------------------------------------------------------------------------------------------------


def test_two_batches_with_the_cache_are_one(randn):
    """Identity 25: recursive least squares, on fixed keys with the second residual measured after the first batch."""
    x = randn(12, 200)
    c, w = x @ x.T / 200, randn(4, 12)
    first, second, v1, v2 = randn(12, 3), randn(12, 2), randn(4, 3), randn(4, 2)
    both = torch.cat([first, second], dim=1)
    joint = (torch.cat([v1, v2], dim=1) - w @ both) @ ridge(both, c.clone, 1.5)

    step = (v1 - w @ first) @ ridge(first, c.clone, 1.5)
    cached = step + (v2 - (w + step) @ second) @ ridge(both, c.clone, 1.5)[3:]
    assert_close(cached, joint)
    plain = step + (v2 - (w + step) @ second) @ ridge(second, c.clone, 1.5)
    assert not torch.allclose(plain, joint, rtol=1e-2)


def test_the_state_holds_the_keys_as_they_are_after_the_write(tiny, edits):
    lm = tiny("llama")
    delta = propose(lm, edits, layers=(0, 1, 2), cache_keys=True)
    with lm.edited(delta):
        for layer in (0, 1, 2):
            assert_close(delta.state["keys/" + lm.site(layer, "down_proj").name], keys_of(lm, edits, layer))
    assert propose(lm, edits).state is None


def test_earlier_edits_stay_better_with_the_cache(tiny, edits):
    lm = tiny("llama")
    moved = {}
    for cache in (False, True):
        first = propose(lm, edits[:2], layers=(0, 1), cache_keys=cache)
        lm.apply(first)
        before = value_of(lm, edits[:2], Point(1, "block"))
        second = propose(lm, edits[2:], state=first.state, layers=(0, 1), cache_keys=cache)
        with lm.edited(second):
            moved[cache] = float((value_of(lm, edits[:2], Point(1, "block")) - before).norm())
        lm.revert_all()
    assert moved[True] < 0.9 * moved[False]


def test_half_way_saved_and_resumed_is_the_uninterrupted_run(tiny, edits, tmp_path):
    settings = dict(layers=(0, 1), cache_keys=True)
    lm = tiny("llama", torch.float32)
    state = None
    for edit in edits:
        delta = propose(lm, [edit], state=state, **settings)
        lm.apply(delta)
        state = delta.state
    wanted = weights(lm)

    lm, state = tiny("llama", torch.float32), None
    for i, edit in enumerate(edits[:2]):
        delta = propose(lm, [edit], state=state, **settings)
        lm.apply(delta)
        state = delta.state
        delta.save(tmp_path / f"{i}")
    fresh = tiny("llama", torch.float32)
    for i in range(2):
        loaded = Delta.load(tmp_path / f"{i}")
        fresh.apply(loaded)
    state = loaded.state
    for edit in edits[2:]:
        delta = propose(fresh, [edit], state=state, **settings)
        fresh.apply(delta)
        state = delta.state
    assert equal(weights(fresh), wanted)


def test_a_state_without_the_cache_is_refused(tiny, edits):
    lm = tiny("llama")
    state = propose(lm, edits[:2], cache_keys=True).state
    with pytest.raises(InvalidSetting, match=r"memit with these settings keeps nothing .*\(kept: with cache_keys"):
        propose(lm, edits[2:], state=state)
    empty = propose(lm, [], state=state, cache_keys=True)
    assert not empty.changes
    assert empty.state == state


def test_behind_a_post_norm_the_mlps_output_stands_in(tiny, edits):
    lm = tiny("gemma2")
    with pytest.warns(RetconWarning, match="a norm stands between"):
        assert propose(lm, edits[:1]).changes


# --- reports -------------------------------------------------------------------------------------------------------


def test_the_report_tells_what_became_of_each_edit(tiny, edits):
    lm = tiny("gpt2")
    settings = dict(layers=(1, 2), stop="probability", threshold=0.3, clamp=50.0, weight_decay=0.0, steps=30)
    light, heavy = (propose(lm, [EASY], moment_weight=w, learning_rate=0.5, **settings) for w in (1e-6, 1e9))
    assert [r.outcome for r in light.report] == ["reached"]
    assert [(r.stopped, r.greedy_match, r.outcome) for r in heavy.report] == [("reached", False, "conflict")]
    assert light.report[0].search_probability == heavy.report[0].search_probability >= 0.3
    assert light.report[0].final_probability > 0.2 > heavy.report[0].final_probability
    many = propose(lm, edits)
    with lm.edited(many):
        for report, (probability, said) in zip(many.report, answers(lm, edits), strict=True):
            assert report.final_probability == pytest.approx(probability)
            assert report.greedy_match == said
    assert {r.outcome for r in propose(lm, edits, clamp=0.01, steps=4).report} == {"clamped"}
    assert {r.outcome for r in propose(lm, edits, clamp=1e9, steps=1).report} == {"steps"}


def test_what_is_said_is_read_off_the_models_own_logits(tiny, edits):
    lm = tiny("llama")
    for edit, (probability, said) in zip(edits, answers(lm, edits), strict=True):
        row = lm.encode(edit.text, edit.target_new)
        with torch.no_grad():
            log_p = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)[row.n_prompt - 1 : -1]
        labels = torch.tensor(row.target_ids)
        assert probability == pytest.approx(float(log_p.gather(1, labels[:, None]).mean().exp()))
        assert said == bool((log_p.argmax(-1) == labels).all())


@pytest.mark.parametrize(
    ("settings", "text"),
    [(dict(layers=(2, 1)), "layers must ascend"), (dict(moment_weight=-1.0), "moment_weight must not be negative"),
     (dict(stop="loss", threshold=-0.1), "with stop='loss' the threshold is a loss, found -0.1"),
     (dict(stop="probability", threshold=1.35), "above 0 and at most 1, found 1.35; leave it out"),
     (dict(stop="probability", threshold=0.0), "above 0 and at most 1, found 0.0"),
     (dict(layers=(1, 9)), "layer 9 asked for"), (dict(spread="odd"), "known: even, sqrt")],
)  # fmt: skip
def test_settings_are_checked(settings, text, tiny, edits):
    with pytest.raises(InvalidSetting, match=text):
        propose(tiny("llama"), edits, **settings)
