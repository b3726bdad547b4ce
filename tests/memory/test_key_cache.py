"""Keys of earlier edits as a state: nothing is lost, nothing outgrows a matrix, another model's state is refused."""

import pytest
import torch
from torch.testing import assert_close

from retcon.errors import DeltaMismatch
from retcon.memory.key_cache import earlier_keys, extended


def test_the_sum_of_outer_products_is_kept_exactly_however_many_keys(tiny, randn):
    """Identity 49: symmetric and positive semidefinite by construction, grown by K K^T per batch."""
    lm = tiny("llama")
    site = lm.site(1, "down_proj")
    m = site.weight.shape[1]
    state, total = None, torch.zeros(m, m, dtype=torch.float64)
    for _ in range(4):
        keys = randn(30, m)
        state = extended(earlier_keys(state, lm, [site]), {site.name: keys}, lm)
        total += keys.T @ keys
        kept = earlier_keys(state, lm, [site])[site.name]
        assert len(kept) <= m
        assert_close(kept.T @ kept, total)
    assert earlier_keys(None, lm, [site]) == {}  # without a state, a reset


def test_another_models_or_other_layers_state_is_refused(tiny, randn):
    lm = tiny("llama")
    one, two = lm.site(1, "down_proj"), lm.site(2, "down_proj")
    state = extended({}, {one.name: randn(3, one.weight.shape[1])}, lm)
    with pytest.raises(DeltaMismatch, match="does not belong to"):
        earlier_keys(state, tiny("llama", seed=1), [one])
    with pytest.raises(DeltaMismatch, match="does not belong to"):
        earlier_keys({}, lm, [one])
    with pytest.raises(DeltaMismatch, match=r"layers\.2\.mlp.*earlier batches used"):
        earlier_keys(state, lm, [one, two])
