"""What `propose` holds at its fullest: touched base values, running sums, one layer's moment and its factor."""

import gc

import pytest
import torch

from retcon.memory.contexts import Contexts
from retcon.memory.solve import cholesky
from retcon.methods.jeep import Jeep
from tests.conftest import everyday, random_moments


def tensor_bytes() -> int:
    """Bytes of every tensor alive, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class CountedMoments:
    """Moments made when asked for; nothing of them is kept here but what was held when a factor was made."""

    def __init__(self, made):
        self.made = made
        self.held = []

    def prepare(self, lm, sites):
        pass

    def second_moment(self, lm, site):
        return self.made[site.name].clone()

    def factor(self, lm, site):
        moment = self.second_moment(lm, site)
        lower = cholesky(moment)[0]
        gc.collect()
        self.held.append(tensor_bytes())
        del moment
        return lower

    def derived(self, lm, site, what, build):
        return build(self.second_moment(lm, site))

    def keys(self, lm, sites):
        return {}


@pytest.mark.parametrize("n_edits", everyday(4, of=[1, 4]))
def test_no_more_than_one_moment_is_held_and_each_touched_value_costs_its_base_and_four_bytes(n_edits, tiny, edits):
    lm = tiny("llama", torch.float32, n_layers=6)
    moments = CountedMoments({n: m.float() for n, m in random_moments(lm).by_name.items()})
    layers = dict(low=(0, 1, 2), high=(3, 4))
    m, d = 64, 32
    gc.collect()
    start = tensor_bytes()
    Jeep(**layers, steps=3).propose(lm, edits[:n_edits], contexts=Contexts(), moments=moments)
    seen = [held - start for held in moments.held]
    assert len(seen) == 5
    per_edit = 8 * (m + d) * 12  # keys, residuals, values and their double copies
    for i, found in enumerate(seen):
        touched = i * m * d
        allowed = touched * (4 + 4) + (4 + 8) * m * m + n_edits * (per_edit + i * 4 * (m + d)) + 4096
        assert 8 * m * m < found <= allowed, (i, found, allowed)
