"""The solver against its defining equations (float64)."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from retcon.errors import NonFinite
from retcon.memory import solve as module
from retcon.memory.solve import (
    cholesky,
    definite,
    equality,
    refined_solve,
    ridge,
    ridge_direct,
    spd_solve,
)


def test_ridge_meets_the_normal_equation(problem):
    k, r, c = problem
    update = r @ ridge(k, lambda: c, 3.0)
    assert_close(update @ (3.0 * c + k @ k.T), r @ k.T)  # dW (lambda C + K K^T) = R K^T


def test_ridge_minimises_its_objective(problem, randn):
    k, r, c = problem
    update = r @ ridge(k, lambda: c, 3.0)

    def cost(dw):
        return ((dw @ k - r) ** 2).sum() + 3.0 * torch.trace(dw @ c @ dw.T)

    for _ in range(20):
        assert cost(update + 0.01 * randn(4, 12)) > cost(update)


def test_small_form_equals_direct_form(problem):
    k, _, c = problem
    assert_close(equality(k, lambda: c, stabiliser=0.7), ridge_direct(k, lambda: c, 0.7))
    few = k[:, :2]
    assert torch.equal(ridge(few, lambda: c, 0.7), equality(few, lambda: c, stabiliser=0.7))  # n < m / 4


def test_no_weight_on_old_keys_stores_the_new_ones_exactly(problem):
    k, r, c = problem
    assert_close(r @ equality(k, lambda: c) @ k, r)
    assert_close(r @ ridge_direct(k, lambda: c, 1e-9) @ k, r, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 11, 12])
@pytest.mark.parametrize("weight", [0.0, 1e-13, 1e-10, 1e-7])
def test_without_weight_it_is_the_least_disturbance_that_stores_the_keys(weight, n, randn):
    """The limit keeps C, however many keys there are: by `ridge_direct` the sum of both has lost it (n >= m / 4)."""
    x, k = randn(12, 200) * torch.logspace(0, -2, 12, dtype=torch.float64)[:, None], randn(12, n)
    c = x @ x.T / 200
    y = torch.linalg.solve(c, k)
    limit = torch.linalg.solve(k.T @ y, y.T)
    found = ridge(k, lambda: c, weight)
    assert_close(found, limit, rtol=1e-4, atol=1e-4 * float(limit.abs().max()))


@pytest.mark.parametrize("n", [16, 32, 48, 60, 64])
@pytest.mark.parametrize("weight", [0.0, 1e-10])
@pytest.mark.parametrize("kind", ["few samples", "ill-conditioned", "zero"])
def test_without_weight_keys_are_stored_whatever_the_moment(kind, weight, n, randn):
    x = randn(64, 20 if kind == "few samples" else 64) * (kind != "zero")
    if kind == "ill-conditioned":
        x = torch.linalg.qr(x)[0] * torch.logspace(0, -6, 64, dtype=torch.float64)
    k = randn(64, n)
    assert_close(ridge(k, lambda: x @ x.T, weight) @ k, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-5)


def test_without_weight_one_key_twice_stores_the_mean_of_both(problem, randn):
    k, r, c = problem
    r = torch.cat([randn(4, 1), r], dim=1)
    found = r @ ridge(torch.cat([k[:, :1], k], dim=1), lambda: c, 0.0)
    assert_close(found, torch.cat([r[:, :2].mean(1, keepdim=True), r[:, 2:]], dim=1) @ ridge(k, lambda: c, 0.0))


@pytest.mark.parametrize("n", [1, 2, 8, 14])
def test_it_does_so_however_few_keys_there_are(n, randn):
    x, k, r = randn(64, 200), randn(64, n), randn(4, n + 1)
    c = x @ x.T / 200
    mean = torch.cat([r[:, :2].mean(1, keepdim=True), r[:, 2:]], dim=1)
    for factor in (None, lambda: torch.linalg.cholesky(c)):
        found = ridge(torch.cat([k[:, :1], k], dim=1), lambda: c, 0.0, factor=factor)
        assert_close(r @ found, mean @ ridge(k, lambda: c, 0.0))


def test_more_keys_than_dimensions_are_fitted_as_well_as_they_can_be(problem, randn):
    k, _, c = randn(12, 20), *problem[1:]
    assert_close(ridge(k, lambda: c, 0.0), torch.linalg.pinv(k))


def test_update_shrinks_to_nothing_as_the_weight_grows(problem):
    k, r, c = problem
    norms = [float((r @ ridge(k, lambda: c, w)).norm()) for w in (0.01, 0.1, 1.0, 10.0, 1e3, 1e6)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-4 * norms[0]


def test_only_the_product_of_weight_and_moment_counts(problem):
    k, _, c = problem
    assert_close(ridge(k, lambda: c, 6.0), ridge(k, lambda: 3 * c, 2.0))


def test_duplicate_edits_equal_one_edit_with_less_weight_on_old_keys(problem):
    k, r, c = problem
    thrice = r[:, :1].repeat(1, 3) @ ridge(k[:, :1].repeat(1, 3), lambda: c, 3.0)
    assert_close(thrice, r[:, :1] @ ridge(k[:, :1], lambda: c, 1.0))


def test_order_of_edits_does_not_matter(problem):
    k, r, c = problem
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(r[:, order] @ ridge(k[:, order], lambda: c, 1.0), r @ ridge(k, lambda: c, 1.0))


def test_one_edit_points_along_the_whitened_key(problem):
    k, r, c = problem
    u = torch.linalg.solve(c, k[:, 0])
    for weight in (0.1, 10.0):
        update = r[:, :1] @ ridge(k[:, :1], lambda: c, weight)
        assert_close(update / update[:, :1], (u / u[0]).expand(4, -1))


def test_rank_and_zero_residual(problem):
    k, r, c = problem
    assert int(torch.linalg.matrix_rank(r[:, :2] @ ridge(k[:, :2], lambda: c, 1.0))) <= 2
    assert not (torch.zeros(4, 5, dtype=torch.float64) @ ridge(k, lambda: c, 1.0)).any()


def test_spd_solve_copes_with_a_singular_matrix(randn):
    x = randn(6, 3)
    a = x @ x.T
    b = a @ randn(6, 2)
    assert_close(a @ spd_solve(a.clone, b), b, rtol=1e-4, atol=1e-4)


def test_spd_solve_equals_lu_and_keeps_its_inputs(problem, randn):
    _, _, c = problem
    b, kept = randn(12, 3), c.clone()
    assert_close(spd_solve(c.clone, b), torch.linalg.solve(c, b))
    assert torch.equal(c, kept)


def test_what_no_jitter_solves_is_refused(problem):
    with pytest.raises(NonFinite, match="singular; use more tokens"):
        ridge(problem[0][:, :2], lambda: torch.zeros(12, 12), 1.0)


def test_nan_is_refused(problem):
    k, _, c = problem
    c[0, 0] = float("nan")
    with pytest.raises(NonFinite, match="second moment"):
        ridge(k, lambda: c, 1.0)
    k[0, 0] = float("nan")
    for solve in (equality, partial(ridge, weight=1.0)):
        with pytest.raises(NonFinite, match="and the keys"):
            solve(k, lambda: torch.eye(len(k)).double(), factor=lambda: torch.eye(len(k)).double())


# --- where the work is done ----------------------------------------------------------------------------------------


@pytest.fixture
def weak_float64(monkeypatch):
    """As if on a card that is not good at float64; holds what refinement gave back."""
    given = []
    whole = module.refined_solve

    def watched(a, b, **settings):
        given.append(whole(a, b, **settings))
        return given[-1]

    monkeypatch.setattr(module, "good_at_float64", lambda device: False)
    monkeypatch.setattr(module, "refined_solve", watched)
    return given


@pytest.mark.parametrize("n", [2, 5])  # the small-n form and the direct form
def test_float32_with_refinement_gives_what_float64_gives(n, problem, weak_float64):
    k, _, c = problem
    scale = torch.logspace(-3, 3, 12, dtype=torch.float64)  # widths apart, as between rare and common keys
    k, c = scale[:, None] * k[:, :n], scale[:, None] * c * scale
    found = ridge(k, lambda: c, 0.7)
    assert len(weak_float64) == 1
    assert weak_float64[0] is not None
    assert_close(found, k.T @ torch.linalg.inv(0.7 * c + k @ k.T), rtol=1e-8, atol=0)


def test_refinement_meets_its_residual_on_a_large_ill_conditioned_matrix(randn):
    q = torch.linalg.qr(randn(300, 300))[0]
    a = (q * torch.logspace(0, -5, 300, dtype=torch.float64)) @ q.T
    a, b = (a + a.T) / 2, randn(300, 7) * torch.logspace(-40, 40, 7, dtype=torch.float64)
    kept = a.clone(), b.clone()
    x = refined_solve(a, b)
    assert x is not None
    bound = 1e-14 * (a.abs().sum(1).max() * x.abs().amax(0) + b.abs().amax(0))
    assert ((a @ x - b).abs().amax(0) <= bound).all()
    wanted = torch.linalg.solve(a, b)
    assert ((x - wanted).abs().amax(0) <= 1e-9 * wanted.abs().amax(0)).all()
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])


def test_what_float32_cannot_refine_is_solved_in_float64(randn, weak_float64, monkeypatch):
    q = torch.linalg.qr(randn(40, 40))[0]
    c = (q * torch.logspace(0, -11, 40, dtype=torch.float64)) @ q.T
    c = (c + c.T) / 2
    k = randn(40, 2)
    found = ridge(k, lambda: c, 0.7)
    assert weak_float64 == [None]
    monkeypatch.undo()
    assert torch.equal(found, ridge(k, lambda: c, 0.7))


def test_a_zero_column_stays_zero_in_refinement(problem):
    _, _, c = problem
    b = torch.zeros(12, 2, dtype=torch.float64)
    b[:, 1] = 1
    x = refined_solve(c, b)
    assert x is not None
    assert not x[:, 0].any()
    assert_close(x, torch.linalg.solve(c, b))


def test_the_factor_at_hand_is_used_and_gives_the_same(problem):
    k, _, c = problem
    lower, jitter = cholesky(c)
    assert jitter == 0.0
    assert_close(lower @ lower.T, c)
    few, used = k[:, :2], []
    found = ridge(few, lambda: pytest.fail("C is not needed"), 0.7, factor=lambda: used.append(1) or lower)
    assert used == [1]
    assert_close(found, ridge_direct(few, lambda: c, 0.7))


def test_a_moment_that_rounding_left_indefinite_gets_jitter_and_all_forms_see_the_same(randn):
    x = randn(12, 8)
    c = (x @ x.T).float()  # singular, and rounded to either side of it
    made = definite(c)
    assert made.dtype == torch.float64
    lower, jitter = cholesky(c)
    assert 0 < jitter <= 1e-5 * c.diagonal().mean()
    assert_close(made, c.double() + jitter * torch.eye(12, dtype=torch.float64))
    assert_close(lower @ lower.T, made)
    assert definite(made) is made
    k = randn(12, 2)
    small = equality(k, lambda: made, stabiliser=0.7, factor=lambda: lower)
    direct = ridge_direct(k, lambda: made, 0.7)
    assert_close(small, direct, rtol=1e-6, atol=1e-8)
    with pytest.raises(NonFinite, match="far from positive definite"):
        cholesky(-torch.eye(3))
