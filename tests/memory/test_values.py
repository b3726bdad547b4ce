"""The value optimiser against its definition (float64, tiny models)."""

import pytest
import torch
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite
from retcon.lm.forward import Point
from retcon.lm.prompts import encode_edit
from retcon.memory.contexts import Contexts
from retcon.memory.values import ValueSearch, ValueSite, search_values

CONTEXTS = Contexts(("The train stood still. ",))
LOW = ValueSite(Point(1, "mlp"), "subject_last", clamp=1.5, weight_decay=0.02)
HIGH = ValueSite(Point(2, "mlp"), "prediction", clamp=0.5, weight_decay=0.02)


def search(lm, edit, sites=(LOW, HIGH), contexts=CONTEXTS, **settings):
    return search_values(lm, [edit], sites, contexts, ValueSearch(**settings))


def test_first_loss_is_the_nll_of_the_plain_forward(tiny, edit):
    lm = tiny("llama")
    found = search(lm, edit, steps=1)
    nll = []
    for prefix in CONTEXTS.all:
        row = encode_edit(lm.tokenizer, edit, prefix, answer=edit.target_new)
        with torch.no_grad():
            log_p = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        labels = torch.tensor(row.target_ids)
        nll.append(-log_p[row.n_prompt - 1 : len(row.ids) - 1].gather(1, labels[:, None]).mean())
    detail = found.report[0].detail
    assert detail["nll"] == pytest.approx(float(torch.stack(nll).mean()))
    assert detail["loss"] == pytest.approx(detail["nll"])
    assert detail["kl"] == pytest.approx(0)
    assert found.report[0].steps == 0
    for s in range(2):
        assert not found.offset[s].any()
        assert torch.equal(found.target(s), found.init[s])


@pytest.mark.parametrize("steps", range(2, 7))
def test_deltas_stay_in_their_balls_and_kl_is_not_negative(tiny, edit, steps):
    found = search(tiny("gptj"), edit, steps=steps, threshold=1.0)
    for s, site in enumerate((LOW, HIGH)):
        assert float(found.offset[s].norm()) <= site.clamp * float(found.init[s].norm()) * (1 + 1e-6)
    assert found.report[0].detail["kl"] >= 0


def test_no_learning_rate_no_move(tiny, edit):
    found = search(tiny("llama"), edit, steps=4, learning_rate=0.0)
    assert not found.offset[0].any()
    assert not found.offset[1].any()


def test_stops_when_the_probability_is_reached_or_the_steps_are_used_up(tiny, edit):
    free = tuple(ValueSite(s.point, s.where, clamp=1e6, weight_decay=0.0) for s in (LOW, HIGH))
    lm = tiny("gptj")
    # a random model's final norm bounds how sure it can be: 0.004 is far above where it starts
    done = search(lm, edit, free, Contexts(), steps=100, kl_factor=0.0, threshold=0.004)
    assert done.report[0].stopped == "reached"
    assert (
        done.report[0].search_probability
        >= 0.004
        > search(lm, edit, free, Contexts(), steps=1).report[0].search_probability
    )
    assert done.report[0].steps < 99
    short = search(lm, edit, free, steps=3, kl_factor=0.0)
    assert (short.report[0].stopped, short.report[0].steps) == ("steps", 2)
    tight = tuple(ValueSite(s.point, s.where, clamp=0.01, weight_decay=0.0) for s in (LOW, HIGH))
    assert search(lm, edit, tight, steps=8).report[0].stopped == "clamped"
    by_loss = search(lm, edit, free, Contexts(), steps=100, kl_factor=0.0, stop="loss", threshold=5.5)
    assert by_loss.report[0].stopped == "reached"
    assert by_loss.report[0].detail["loss"] < 5.5


def test_a_zero_clamp_takes_its_site_out(tiny, edit):
    lm = tiny("gptj")
    closed = ValueSite(HIGH.point, HIGH.where, clamp=0.0, weight_decay=HIGH.weight_decay)
    both, alone = search(lm, edit, (LOW, closed), steps=6), search(lm, edit, (LOW,), steps=6)
    assert not both.offset[1].any()
    assert torch.equal(both.target(1), both.init[1])
    assert_close(both.target(0), alone.target(0))


def test_same_layer_mlp_and_block_give_the_same_delta_without_clamp_or_decay(tiny, edit):
    lm = tiny("llama")
    deltas = [
        search(lm, edit, (ValueSite(Point(1, t), "subject_last", 1e9, 0.0),), steps=5).offset[0]
        for t in ("mlp", "block")
    ]
    assert_close(*deltas)


@pytest.mark.parametrize(("family", "same"), [("gptj", True), ("llama", False)])
def test_attention_site_is_the_same_only_in_parallel_blocks(tiny, edit, family, same):
    lm = tiny(family)
    a, b = (
        search(lm, edit, (ValueSite(Point(2, t), "prediction", 1e9, 0.0),), steps=4).offset[0] for t in ("mlp", "attn")
    )
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) == same  # GPT-J's attention computes in float32


def test_an_edit_does_not_depend_on_its_neighbours(tiny, edits):
    lm = tiny("llama")
    together = search_values(lm, edits, (LOW, HIGH), CONTEXTS, ValueSearch(steps=4))
    for i, edit in enumerate(edits):
        alone = search(lm, edit, steps=4)
        assert_close(together.offset[0][i], alone.offset[0][0])
        one_of_many, one = together.report[i], alone.report[0]
        assert (one_of_many.steps, one_of_many.stopped) == (one.steps, one.stopped)
        assert one_of_many.detail == pytest.approx(one.detail)


def test_no_gradient_is_kept_and_nothing_is_borrowed_for_good(tiny, edit, untouched):
    lm = tiny("gpt2")
    lm.model.train()
    before = untouched(lm)
    search(lm, edit, steps=3)
    assert untouched(lm) == before


def test_nan_is_reported_with_the_edit_and_everything_goes_back(tiny, untouched):
    lm = tiny("llama")
    with torch.no_grad():
        lm.model.model.norm.weight[0] = float("nan")
    before = untouched(lm)
    with pytest.raises(NonFinite, match=r"edit 'bad' \('France'\)"):
        search(lm, Edit("The capital of {} is", "France", "Rome", id="bad"), steps=3)
    assert untouched(lm) == before


def test_settings_are_checked():
    with pytest.raises(InvalidSetting, match="steps"):
        ValueSearch(steps=0)
    with pytest.raises(InvalidSetting, match="negative"):
        ValueSearch(kl_factor=-1.0)
