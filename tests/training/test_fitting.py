"""The training loop: the best tensors are kept, it ends early, and goes on after a kill with the identical result."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from retcon.errors import InvalidSetting, NonFinite, RetconWarning
from retcon.training.fitting import Fit, FitSchedule


class Killed(Exception):
    """Stands for a process that is gone."""


class Problem:
    """Least squares on batches that are drawn by the step's number."""

    def __init__(self, kill_at=None):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((40, 3), (40,)))
        self.kill_at = kill_at
        self.module = nn.Linear(3, 1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def loss(self, rows):
        return (self.module(self.x[rows])[:, 0] - self.y[rows]).square().mean()

    def step(self, i):
        if i == self.kill_at:
            raise Killed
        loss = self.loss(torch.randperm(30, generator=torch.Generator().manual_seed(i))[:8])
        loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def validate(self):
        return float(self.loss(torch.arange(30, 40)))

    def run(self, path, *, steps=40, patience=1000, identity="same", lr=0.05, anneal=False, force=False):
        weight, bias = self.module.parameters()
        fit = Fit(self.module, [torch.optim.Adam([weight], lr=lr), torch.optim.Adam([bias], lr=lr)])
        schedule = FitSchedule(steps=steps, validate_every=5, patience=patience, clip=10.0, anneal=anneal)
        fit.run(self.step, self.validate, schedule, unfinished=path, identity={"what": identity}, force=force)
        return fit


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.parametrize("anneal", [False, True])
def test_a_killed_run_goes_on_with_the_identical_result(anneal, tmp_path):
    whole, killed, resumed = Problem(), Problem(kill_at=23), Problem()
    wanted = whole.run(tmp_path / "whole", anneal=anneal)
    with pytest.raises(Killed):
        killed.run(tmp_path / "part", anneal=anneal)
    found = resumed.run(tmp_path / "part", anneal=anneal)
    assert same(resumed.module, whole.module)
    assert found.curve == wanted.curve


def test_the_module_ends_with_the_tensors_of_the_best_validation(tmp_path):
    problem = Problem()
    fit = problem.run(tmp_path / "f", steps=60, lr=1.0)  # so large a rate that it does not only fall
    assert fit.best_point.step < 60
    assert problem.validate() == fit.best_point.validation == min(p.validation for p in fit.curve)
    assert [p.step for p in fit.curve] == list(range(0, 61, 5))
    assert fit.curve[0].train is None


def test_it_ends_when_validation_gets_no_better(tmp_path):
    fit = Problem().run(tmp_path / "f", steps=10_000, patience=50, lr=0.05)
    assert fit.curve[-1].step == fit.best_point.step + 50 < 10_000


def test_another_training_is_kept_unless_it_is_to_be_replaced(tmp_path):
    with pytest.raises(Killed):
        Problem(kill_at=23).run(tmp_path / "f")
    kept = (tmp_path / "f").read_bytes()
    with pytest.raises(InvalidSetting, match=r"what: found 'same', wanted 'another'.*name another file, or replace"):
        Problem().run(tmp_path / "f", identity="another")
    assert (tmp_path / "f").read_bytes() == kept
    with pytest.raises(Killed), pytest.warns(RetconWarning, match="training begins anew"):
        Problem(kill_at=7).run(tmp_path / "f", identity="another", force=True)
    assert Problem().run(tmp_path / "f", identity="another", force=True).curve[0].step == 0


def test_what_cannot_be_read_is_made_anew(tmp_path):
    (tmp_path / "f").write_bytes(b"no file of tensors")
    with pytest.warns(RetconWarning, match="training begins anew"):
        assert Problem().run(tmp_path / "f").curve[-1].step == 40


def test_a_loss_that_overflows_is_an_error_and_what_was_kept_stays(tmp_path):
    problem = Problem()
    problem.y[:30] = torch.inf
    with pytest.raises(NonFinite, match="training step 0: the loss is inf"):
        problem.run(tmp_path / "f")
    assert (tmp_path / "f").exists()


def test_rates_fall_to_nothing_where_asked(tmp_path):
    """Adam's steps have about the size of its rate: the last ones are small then."""
    problem, seen = Problem(), []
    step = problem.step
    problem.step = lambda i: seen.append(problem.module.weight.detach().clone()) or step(i)
    problem.run(tmp_path / "u", steps=40, lr=0.05, anneal=True)
    moved = [float((b - a).abs().max()) for a, b in pairwise(seen)]
    assert moved[0] == pytest.approx(0.05, rel=1e-3)
    assert all(change <= 0.06 * (1 - i / 40) for i, change in enumerate(moved))
