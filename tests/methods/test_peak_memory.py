"""What `propose` holds at its fullest: touched base values, running sums, one layer's moment and its factor; what is
trained, with all that is kept beside it.
"""

import gc

import pytest
import torch

from retcon.memory.contexts import Contexts
from retcon.memory.solve import cholesky
from retcon.methods.adalora import AdaLora
from retcon.methods.ctp import Ctp
from retcon.methods.ft import Ft
from retcon.methods.jeep import Jeep
from retcon.methods.kne import Kne
from retcon.methods.lora import Lora
from retcon.training import descent
from tests.conftest import everyday, random_moments


def tensor_bytes() -> int:
    """Bytes of every tensor alive, gradients included, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
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


TRAIN = dict(epochs=2, stop_loss=0.0, learning_rate=1e-3)
WIDE = dict(layers=(1, 2), modules=("down_proj", "up_proj"), **TRAIN)


@pytest.mark.parametrize(
    "method",
    [
        Ft(**WIDE),
        Ft(**WIDE, box=1e-2, ball=1.0, anchor="base"),
        Ft(**WIDE, weight_decay=0.1, decay_to="base"),
        Ft(**WIDE, weight_decay=0.1, decay_to="base", box=1e-2, anchor="base"),
        Lora(rank=16, **TRAIN),
        Lora(rank=16, continue_adapter=True, **TRAIN),
        AdaLora(rank=16, **TRAIN),
        AdaLora(rank=16, allocate=False, **TRAIN),
        Kne(budget=None, p=1.0, score="random", **TRAIN),
        Kne(budget=None, p=0.5, granularity="entry", score="random", **TRAIN),
        Ctp(n_positive=60, score="random", reassess=1, **TRAIN),
    ],
    ids=lambda method: method.name,
)
def test_what_is_held_for_a_trained_value_is_what_is_said(method, tiny, edits):
    lm = tiny("llama", torch.float32)
    state = method.propose(lm, edits).state if getattr(method, "continue_adapter", False) else None
    method.propose(lm, edits[:1])  # what the model keeps of its own
    n_values, held = [], []

    def count(stage, done, total):
        if stage in ("tuning", "ensemble", "paths") and done == 2:
            gc.collect()
            held.append(tensor_bytes())

    keep = descent.keep_values

    def counting(values, kept):
        n_values[:] = [sum(tensor.numel() for tensor in values)]
        keep(values, kept)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(descent, "keep_values", counting)
        gc.collect()
        start = tensor_bytes()
        method.propose(lm, edits, state=state, progress=count)
    in_backward = 16 if getattr(method, "granularity", None) == "entry" else 0  # rows and columns, gone by now
    assert (held[0] - start) / n_values[0] == pytest.approx(method.bytes_per_value - in_backward, rel=0.05)
