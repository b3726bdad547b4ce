"""Hypernetworks: statistics, the first step, and what an untrained one does (T45, T47, T48)."""

import pytest
import torch
from torch.testing import assert_close

from retcon.training.hypernetwork import Hypernetwork, Normaliser, not_zero

DOUBLE = torch.float64


def network(shapes=((5, 3), (5, 3), (4, 6)), *, scale_at="inside", normalise=True, n_blocks=2) -> Hypernetwork:
    return Hypernetwork(
        shapes, step_size=0.1, rank=4, n_blocks=n_blocks, scale_at=scale_at, normalise=normalise, eps=1e-7,
        dtype=DOUBLE, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [[20], [1, 19], [7, 1, 1, 11], [1] * 20])
def test_statistics_are_those_of_all_rows_however_they_come(sizes, randn):
    rows = 3 + 2 * randn(20, 6)
    normaliser = Normaliser(6, 1e-7, DOUBLE).train()
    for part in rows.split(sizes):
        normaliser.update(part)
    assert_close(normaliser.mean, rows.mean(0))
    assert_close(normaliser.deviation(), rows.std(0))
    assert_close(normaliser(rows).std(0), torch.ones(6, dtype=DOUBLE), atol=1e-6, rtol=0)


def test_statistics_are_frozen_in_eval_mode_and_finite_after_one_row(randn):
    normaliser = Normaliser(6, 1e-7, DOUBLE).train()
    normaliser.update(randn(1, 6))
    assert torch.isfinite(normaliser(randn(2, 6))).all()
    kept = {name: tensor.clone() for name, tensor in normaliser.state_dict().items()}
    normaliser.eval().update(randn(5, 6))
    normaliser.train().update(randn(0, 6))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in normaliser.state_dict().items())


def test_what_never_varied_in_training_is_not_blown_up_where_it_does(randn):
    """A ReLU's unit that never fired was divided by 1e-7 where it did."""
    rows = randn(20, 6)
    rows[:, 2] = 0
    normaliser = Normaliser(6, 1e-7, DOUBLE).train()
    normaliser.update(rows)
    fired = rows[:1].clone()
    fired[0, 2] = 3.0
    normal = normaliser(fired)
    assert_close(normal[0, 2], torch.tensor(3.0, dtype=DOUBLE))
    assert_close(normal[0, 3:], ((fired - rows.mean(0)) / rows.std(0))[0, 3:])


@pytest.mark.parametrize("scale_at", ["inside", "outside"])
def test_untrained_it_returns_the_pieces_normalised_or_as_they_are(scale_at, randn):
    u, delta = randn(8, 5), randn(8, 3)
    plain = network(scale_at=scale_at, normalise=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.transform(1, u, delta), (u, delta), strict=True))
    trained = network(scale_at=scale_at).train()
    trained.network(1).observe(u, delta)
    u_hat, delta_hat = trained.transform(1, u, delta)
    assert_close(u_hat, (u - u.mean(0)) / (u.std(0) + 1e-7))
    assert_close(delta_hat, (delta - delta.mean(0)) / (delta.std(0) + 1e-7))


@pytest.mark.parametrize("scale_at", ["inside", "outside"])
def test_the_first_step_moves_u_since_a_clamp_passes_gradient_at_zero(scale_at, randn):
    made = network(scale_at=scale_at)
    u_new, delta_new = made.transform(0, randn(8, 5), randn(8, 3))
    (u_new.sum() + delta_new.sum()).backward()
    assert made.network(0).blocks[0].U.grad.abs().min() > 0


def test_matrices_of_one_shape_share_a_network_and_have_scales_of_their_own():
    made = network()
    assert made.network(0) is made.network(1)
    assert made.network(0) is not made.network(2)
    assert [made.number(i) for i in range(3)] == [0, 1, 0]
    assert made.network(0).blocks[0].scale.shape == (2, 8)


def test_tokens_without_a_gradient_or_an_input_have_no_piece(randn):
    u, delta = randn(3, 5), randn(3, 3)
    u[0], delta[1] = 0, 0
    assert not_zero(u, delta).tolist() == [False, False, True]
