"""KNE and CTP against a second, plain implementation on whole weights."""

from collections.abc import Callable

import pytest
import torch
from benchmarks.released_ctp import ReleasedCtp
from torch.testing import assert_close

from retcon.methods.kne import Kne
from tests.conftest import everyday
from tests.parity import plain_tuning


def restored(lm, work: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What `work` makes of the weights, which are put back."""
    kept = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    with lm.frozen_eval():
        try:
            return work()
        finally:
            for name, p in lm.model.named_parameters():
                p.data = kept[name]


def compare(lm, delta, wanted: dict[str, torch.Tensor], **tolerance) -> None:
    assert set(delta.changes) == {name for name, change in wanted.items() if bool(change.any())}
    for name in delta.changes:
        assert_close(delta.dense(name, lm.parameter(name).shape), wanted[name], **tolerance)


@pytest.mark.parametrize("family", everyday("gptj", of=["gptj", "llama"]))
@pytest.mark.parametrize("alpha", everyday(2.0, of=[1.0, 2.0]))
def test_kne(family, alpha, tiny, edits):
    lm = tiny(family)
    method = Kne(budget=None, p=0.1, n_points=3, epochs=5, learning_rate=1e-2, alpha=alpha)
    delta = method.propose(lm, edits)
    wanted = restored(lm, lambda: plain_tuning.kne(lm, edits, method))
    compare(lm, delta, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", everyday("gptj", of=["gptj", "llama"]))
@pytest.mark.parametrize("reassess", everyday(2, of=[0, 2]))
def test_the_released_ctp(family, reassess, tiny, edits):
    """Momentum leak, whole output bias, per-token loss and repeated assessment included."""
    lm = tiny(family)
    method = ReleasedCtp(n_positive=4, learning_rate=1e-3, epochs=4, reassess=reassess)
    delta = method.propose(lm, edits, seed=5)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(len(edits), generator=generator).tolist() for _ in range(4)]
    wanted = restored(lm, lambda: plain_tuning.ctp_release(lm, edits, method, orders))
    compare(lm, delta, wanted, rtol=1e-2, atol=2e-5)  # eps decides where gradients are tiny
