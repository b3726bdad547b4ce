"""Knowledge neurons by attribution (T38, T39) against activations set by hand."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from retcon.errors import InvalidSetting
from retcon.lm.forward import Point
from retcon.locate.neurons import attribute_neurons, grid_points
from retcon.training.objective import answer_rows


def probabilities(lm, row, layer, factor, neuron="value_input"):
    """p of each answer token with the layer's units scaled at that token's position alone, one pass for each."""
    found = []
    for j in range(len(row.target_ids)):
        position = row.n_prompt - 1 + j

        def scaled(value):
            value = value.clone()
            value[0, position] *= factor  # noqa: B023
            return value

        from retcon.lm.forward import log_probs, logits_at
        from retcon.lm.prompts import pad

        batch = pad([type(row)(row.ids[:-1], row.n_prompt)], lm.device)
        places = torch.tensor([0]), torch.tensor([position])
        with torch.no_grad(), lm.frozen_eval():
            log_p = log_probs(logits_at(lm, batch, places, {Point(layer, "key"): scaled}))
        found.append(float(log_p[0, row.target_ids[j]].exp()))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_scores_of_a_layer_add_up_to_what_its_units_do_together(family, tiny, edits):
    """T38: completeness, which the midpoint rule meets better the more points it has."""
    lm = tiny(family)
    rows = answer_rows(lm, edits[:2])
    errors = []
    for n_points in (8, 64):
        scores, _ = attribute_neurons(lm, rows, n_points=n_points)
        worst = 0.0
        for i, row in enumerate(rows):
            for layer in (0, 3):
                wanted = (probabilities(lm, row, layer, 1.0) - probabilities(lm, row, layer, 0.0)).mean()
                worst = max(worst, abs(float(scores[layer][i].sum() - wanted)))
        errors.append(worst)
    assert errors[1] < errors[0] / 8 or errors[1] < 1e-8
    assert errors[1] < 1e-4


def test_a_unit_that_is_off_scores_nothing(tiny, edits):
    """T39."""
    lm = tiny("gpt2")
    site = lm.site(2, "down_proj")
    up = lm.site(2, "up_proj")
    with torch.no_grad():
        up.module.weight[:, 5] = 0.0
        up.module.bias[5] = 0.0  # gelu(0) = 0
    scores, _ = attribute_neurons(lm, answer_rows(lm, edits), n_points=3)
    assert [x.shape for x in scores] == 4 * [(4, site.weight.shape[1])]
    assert not bool(scores[2][:, 5].any())
    assert bool(scores[2][:, 6].any())


@pytest.mark.parametrize("family", ["gptj", "phi3"])
def test_pre_activations_add_up_too(family, tiny, edits):
    lm = tiny(family)
    rows = answer_rows(lm, edits[:2])
    found, _ = attribute_neurons(lm, rows, n_points=60, neuron="pre_activation")
    both, _ = attribute_neurons(lm, rows, n_points=60)
    tolerance = dict(rtol=2e-2, atol=1e-5)  # act(0) = 0, so both are p with the units and p without
    for one, other in zip(found, both, strict=True):
        assert_close(one.sum(1), other.sum(1), **tolerance)
        assert not torch.allclose(one, other, rtol=1e-3)


def test_grids():
    assert grid_points(4, "midpoint").tolist() == [0.125, 0.375, 0.625, 0.875]
    assert grid_points(4, "left").tolist() == [0.0, 0.25, 0.5, 0.75]
    assert grid_points(1, "ends").tolist() == [0.0]  # the port's presets of one step: all units off
    assert grid_points(3, "ends").tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(InvalidSetting, match="unknown grid 'right'; known: midpoint, left, ends"):
        grid_points(3, "right")  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="n_points"):
        grid_points(0, "left")


def test_whole_passes_give_what_replayed_blocks_give(tiny, edits):
    """Families whose layers share keys and values have no replay."""
    lm = tiny("llama")
    rows = answer_rows(lm, edits[:2])
    replayed, _ = attribute_neurons(lm, rows, n_points=3)
    lm.layout = replace(lm.layout, earlier="other")
    assert_close(attribute_neurons(lm, rows, n_points=3)[0], replayed)


def test_rows_do_not_disturb_each_other(tiny, edits):
    lm = tiny("llama")
    rows = answer_rows(lm, edits)
    together, activations = attribute_neurons(lm, rows, n_points=3)
    assert bool((torch.cat(activations) < 0).any())  # a gate's product has either sign
    for i, row in enumerate(rows):
        for of_layer, alone in zip(together, attribute_neurons(lm, [row], n_points=3)[0], strict=True):
            assert_close(of_layer[i], alone[0], rtol=1e-5, atol=1e-8)


def test_only_the_token_that_predicts_is_run_again(tiny, edits):
    """Nothing before the scaled token depends on it, and the answer is read there."""
    lm = tiny("llama")
    row = answer_rows(lm, edits[:1])[0]
    shapes = []
    with lm.block(3).register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[:2]))):
        attribute_neurons(lm, [row], n_points=5)
    answer = len(row.target_ids)
    assert shapes[-4:] == 4 * [(5 * answer, 1)]  # from each of the four layers on
