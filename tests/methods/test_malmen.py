"""MALMEN: the regression against brute force, its gradients against autograd, edits, training (T52 to T57)."""

import random

import pytest
import torch
from torch.testing import assert_close

from retcon.edits import Case
from retcon.errors import NonFinite, OutOfMemory
from retcon.lm.model import LM
from retcon.methods.common import hypernetwork
from retcon.methods.common.hypernetwork import base_log_probs, draw, examples, outer_losses, pieces
from retcon.methods.malmen import Malmen, dual_shift, shift, shift_gradients, value_differences
from retcon.training.objective import answer_rows
from retcon.training.parts import TrainedDense
from tests.methods.test_mend import cases, drawn

SMALL = dict(layers=(1, 3), rank=6, steps=0, n_validation=1, batch_size=3)
SIZES = [(4, 7), (7, 7), (12, 7)]
"""Tokens and width of keys: fewer, as many, and more tokens than the keys are wide."""


def ridge_of(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(("n", "width"), SIZES)
def test_the_shift_is_brute_force_ridge_and_meets_the_normal_equations(n, width, randn):
    k, v, ridge = randn(n, width), randn(n, 5), ridge_of(0.7)
    s = shift(k, v, ridge)
    assert_close(k.T @ (k @ s - v) + ridge * s, torch.zeros_like(s), atol=1e-10, rtol=0)
    stacked = torch.cat([k, ridge.sqrt() * torch.eye(width, dtype=torch.float64)])  # ridge as least squares
    assert_close(s, torch.linalg.lstsq(stacked, torch.cat([v, torch.zeros(width, 5, dtype=torch.float64)])).solution)
    assert_close(k.T @ dual_shift(k, v, ridge), s)


def test_the_limits_of_the_ridge(randn):
    k, v = randn(4, 7), randn(4, 5)
    assert_close(k @ shift(k, v, ridge_of(1e-12)), v)  # independent keys: every value is met
    assert_close(1e9 * shift(k, v, ridge_of(1e9)), k.T @ v, atol=1e-6, rtol=1e-6)
    one = shift(k[:1], v[:1], ridge_of(0.3))
    assert_close(one, torch.outer(k[0], v[0]) / (k[0] @ k[0] + 0.3))


@pytest.mark.parametrize(("n", "width"), SIZES)
def test_a_singular_system_is_refused(n, width):
    with pytest.raises(NonFinite, match="singular; the editor's ridge is 0"):
        shift(torch.zeros(n, width), torch.ones(n, 5), ridge_of(0.0))


@pytest.mark.parametrize(("n", "width"), SIZES)
def test_the_gradients_by_hand_are_autograds(n, width, randn):
    k, v, slope = randn(n, width), randn(n, 5).requires_grad_(), randn(width, 5)
    log_ridge = ridge_of(-0.4).requires_grad_()
    gram = k.T @ k + log_ridge.exp() * torch.eye(width, dtype=torch.float64)
    (torch.linalg.solve(gram, k.T @ v) * slope).sum().backward()
    s = shift(k, v.detach(), log_ridge.detach().exp())
    to_v, to_ridge = shift_gradients(k, s, log_ridge.detach(), slope)
    assert_close(to_v, v.grad)
    assert_close(to_ridge, log_ridge.grad)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_untrained_each_token_proposes_a_gradient_step_at_its_own_key(family, tiny, edits, tmp_path):
    lm = tiny(family)
    method = Malmen(**SMALL, normalise=False, step_size=0.1)
    method.fit(lm, cases(edits), tmp_path / "e")
    delta = Malmen(editor=str(tmp_path / "e")).propose(lm, edits)
    with lm.frozen_eval():
        for site in method.sites(lm):
            keys, values = [], []
            for row in answer_rows(lm, edits):
                ((u, g),) = pieces(lm, [site], [row])
                u, g = u[0, row.n_prompt - 1 :], g[0, row.n_prompt - 1 :]
                keys.append(u)
                values.append(-0.1 * u.square().sum(1, keepdim=True) * g)
            k, v = torch.cat(keys), torch.cat(values)
            wanted = torch.linalg.solve(k.T @ k + torch.eye(k.shape[1], dtype=torch.float64), k.T @ v)
            found = delta.dense(site.name, lm.parameter(site.name).shape)
            assert_close(found if site.transposed else found.T, wanted)
    assert len(delta.provenance["editor_sha256"]) == 64


def test_the_outer_gradient_is_autograds_through_everything(tiny, edits):
    lm, method = tiny("gpt2"), Malmen(**SMALL, step_size=1e-3)
    sites, facts = method.sites(lm), drawn(lm, edits)
    network = shaken(method, lm)
    with lm.frozen_eval():
        loss = method.backward(lm, network, sites, facts)
        found = {name: p.grad.clone() for name, p in network.named_parameters()}
        network.zero_grad()
        network.eval()  # the statistics have been seen
        factors, _ = method.shifts(lm, network, sites, facts)
        parts = []
        for i, (site, (k, delta)) in enumerate(zip(sites, factors, strict=True)):
            gram = k.T @ k + network.log_ridge[i].exp() * torch.eye(k.shape[1], dtype=torch.float64)
            s = torch.linalg.solve(gram, k.T @ value_differences(network, i, k, delta))
            parts.append(TrainedDense(site, s.T))
        nll, kl = outer_losses(lm, facts, base_log_probs(lm, facts, "answers"), parts, "answers")
        (nll + kl).mean().backward()
    assert_close(torch.tensor(loss, dtype=torch.float64), (nll + kl).mean().detach())
    for name, parameter in network.named_parameters():
        assert_close(found[name], parameter.grad, msg=name)


def shaken(method: Malmen, lm: LM):
    """A network that is no longer as it was made, in training mode."""
    network = method.untrained(lm, method.sites(lm)).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network


def test_what_training_takes_is_counted(tiny, monkeypatch, tmp_path):
    from retcon.methods.mend import Mend

    for family in ("gpt2", "llama"):
        lm = tiny(family)
        for method in (Malmen(rank=6), Mend(rank=6, n_blocks=3)):
            network = method.untrained(lm, method.sites(lm))
            assert method.n_fitted(lm) == sum(p.numel() for p in network.parameters())
    monkeypatch.setattr("retcon.methods.common.tuning.free_bytes", lambda device: 1000)
    monkeypatch.setattr(hypernetwork, "Hypernetwork", None)  # nothing is made before it is known to fit
    for method in (Malmen(rank=6), Mend(rank=6)):
        with pytest.raises(OutOfMemory, match=rf"{method.name} trains {method.n_fitted(lm):,} values"):
            method.fit(lm, [], tmp_path / "editor")


def test_without_neighbours_what_should_stay_is_not_edited_in_the_same_step(tiny, edits):
    pool = examples(tiny("llama"), [Case(edit.id, (edit,), ()) for edit in edits])
    for n in (1, 2, 3):
        for seed in range(5):
            found = draw(pool, pool[:n], random.Random(seed))
            assert not {d.other for d in found} & {e.edit for e in pool[:n]}
    assert all(d.other != d.edit for d in draw(pool, pool, random.Random(0))), "where all are edited, another one"


def test_training_lowers_the_loss(tiny, edits, untouched, tmp_path):
    lm = tiny("llama", torch.float32)
    before = untouched(lm)
    trained = Malmen(**{**SMALL, "steps": 20, "validate_every": 5, "learning_rate": 1e-3, "step_size": 1e-3})
    trained.fit(lm, cases(edits), tmp_path / "e")
    assert untouched(lm) == before
    delta = Malmen(editor=str(tmp_path / "e")).propose(lm, edits)
    assert delta.provenance["settings"]["layers"] == [1, 3]
    assert {r.id for r in delta.report} == {e.id for e in edits}
