"""The layer loop: spreading, recomputation, and what stays live (float64)."""

from contextlib import ExitStack

import pytest
import torch
from torch.testing import assert_close

from retcon.errors import NonFinite
from retcon.lm.forward import Point
from retcon.memory.contexts import Contexts
from retcon.memory.keys import mean_keys
from retcon.memory.moments import GivenMoments
from retcon.memory.write import LayerGroup, divisor, weighted, write
from tests.conftest import random_moments

BARE = Contexts()


def shares(spread: str, n: int) -> tuple[list[float], float]:
    """Residual written at each of n layers of an additive stack with exact solves, and what is left over."""
    missing, written = 1.0, []
    for i in range(n):
        written.append(missing / divisor(spread, n - i))
        missing -= written[-1]
    return written, missing


def test_even_spread_gives_every_layer_its_part_and_sqrt_ever_less():
    even, left = shares("even", 5)
    assert even == pytest.approx([0.2] * 5)
    assert left == pytest.approx(0)
    root, left = shares("sqrt", 5)
    assert root == sorted(root, reverse=True)
    assert len(set(root)) == 5
    assert left == pytest.approx(0)
    assert divisor("sqrt", 1) == divisor("even", 1) == 1


def targets_at(lm, edits, point, where, generator_seed=3):
    _, now = mean_keys(lm, edits, BARE, Point(0, "key"), where, value=point)
    noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(generator_seed), dtype=now.dtype)
    return now + noise


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "opt", "phi3", "gemma2"])
@pytest.mark.parametrize("measured", ["mlp", "block"])
@pytest.mark.parametrize("where", ["subject_last", "prediction"])
def test_a_single_layer_without_old_keys_reaches_its_value_exactly(family, measured, where, tiny, edits):
    if measured == "block" and family == "gemma2":
        pytest.skip("a norm stands between the MLP's output and the block's")
    lm = tiny(family)
    moments = random_moments(lm)
    group = LayerGroup((2,), where, measured, "even", weighted(0.0))
    z = targets_at(lm, edits, Point(2, measured), where)
    with ExitStack() as scope:
        changes = write(lm, edits, z, group, BARE, moments, scope).changes
        _, now = mean_keys(lm, edits, BARE, Point(2, "key"), where, value=Point(2, measured))
        assert_close(now, z, rtol=1e-5, atol=1e-5 if family == "gptj" else 1e-6)
    assert list(changes) == [lm.site(2, "down_proj").name]
    assert all(c.left.shape[1] <= len(edits) if c.kind == "low_rank" else True for own in changes.values() for c in own)


@pytest.mark.parametrize("spread", ["even", "sqrt"])
def test_the_last_layer_closes_what_is_left(spread, tiny, edits):
    lm = tiny("llama")
    group = LayerGroup((0, 1, 2), "subject_last", "block", spread, weighted(0.0))
    z = targets_at(lm, edits, Point(2, "block"), "subject_last")
    with ExitStack() as scope:
        write(lm, edits, z, group, BARE, random_moments(lm), scope)
        _, now = mean_keys(lm, edits, BARE, Point(2, "key"), "subject_last", value=Point(2, "block"))
        assert_close(now, z, rtol=1e-5, atol=1e-6)


def test_layers_above_see_the_layers_below_already_written(tiny, edits):
    lm = tiny("llama")
    moments = random_moments(lm)
    z = targets_at(lm, edits, Point(1, "mlp"), "subject_last")
    with ExitStack() as scope:
        group = LayerGroup((0, 1), "subject_last", "mlp", "even", weighted(1.0))
        both = write(lm, edits, z, group, BARE, moments, scope).changes
    with ExitStack() as scope:
        first = {lm.site(0, "down_proj").name: both[lm.site(0, "down_proj").name]}
        scope.enter_context(lm.edited(lm.delta(first)))
        group = LayerGroup((1,), "subject_last", "mlp", "even", weighted(1.0))
        second = write(lm, edits, z, group, BARE, moments, scope).changes
    name = lm.site(1, "down_proj").name
    shape = lm.parameter(name).shape
    (one,), (other,) = both[name], second[name]
    assert_close(one.dense(shape), other.dense(shape))


def test_a_conv1d_model_gets_the_update_of_its_linear_twin(tiny, edits):
    """GPT-2 stores (in, out): the same problem solved in math orientation lands transposed."""
    lm = tiny("gpt2")
    site = lm.site(2, "down_proj")
    z = targets_at(lm, edits, Point(2, "mlp"), "subject_last")
    weight = site.weight.clone()
    keys, now = mean_keys(lm, edits, BARE, Point(2, "key"), "subject_last", value=Point(2, "mlp"))
    group = LayerGroup((2,), "subject_last", "mlp", "even", weighted(0.0))
    with ExitStack() as scope:
        write(lm, edits, z, group, BARE, random_moments(lm), scope)
        assert_close((site.weight - weight) @ keys.T, (z - now).T, rtol=1e-5, atol=1e-6)


def test_nan_in_a_moment_or_residual_leaves_the_model_as_it_was(tiny, edits, untouched):
    lm = tiny("llama")
    before = untouched(lm)
    moments = random_moments(lm)
    z = targets_at(lm, edits, Point(2, "mlp"), "subject_last")
    bad = dict(moments.by_name) | {lm.site(2, "down_proj").name: torch.full((64, 64), float("nan"))}
    group = LayerGroup((1, 2), "subject_last", "mlp", "even", weighted(1.0))
    with pytest.raises(NonFinite), ExitStack() as scope:
        write(lm, edits, z, group, BARE, GivenMoments(bad), scope)
    assert untouched(lm) == before
    z[0, 0] = float("inf")
    with pytest.raises(NonFinite, match="layer 2"), ExitStack() as scope:
        write(lm, edits, z, LayerGroup((2,), "subject_last", "mlp", "even", weighted(1.0)), BARE, moments, scope)
    assert untouched(lm) == before
