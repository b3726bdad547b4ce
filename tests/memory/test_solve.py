"""The solver against its defining equations (float64)."""

import pytest
import torch
from torch.testing import assert_close

from retcon.errors import NonFinite
from retcon.memory.solve import ridge, ridge_direct, ridge_small, spd_solve


@pytest.fixture
def problem(randn):
    """K (12, 5), R (4, 5), C (12, 12) of full rank."""
    x = randn(12, 200)
    return randn(12, 5), randn(4, 5), x @ x.T / 200


def test_ridge_meets_the_normal_equation(problem):
    k, r, c = problem
    update = r @ ridge(k, c, 3.0)
    assert_close(update @ (3.0 * c + k @ k.T), r @ k.T)  # dW (lambda C + K K^T) = R K^T


def test_ridge_minimises_its_objective(problem, randn):
    k, r, c = problem
    update = r @ ridge(k, c, 3.0)

    def cost(dw):
        return ((dw @ k - r) ** 2).sum() + 3.0 * torch.trace(dw @ c @ dw.T)

    for _ in range(20):
        assert cost(update + 0.01 * randn(4, 12)) > cost(update)


def test_small_form_equals_direct_form(problem):
    k, _, c = problem
    assert_close(ridge_small(k, c, 0.7), ridge_direct(k, c, 0.7))
    assert_close(ridge(k[:, :2], c, 0.7), ridge_direct(k[:, :2], c, 0.7))  # n < m / 4 takes the small form


def test_no_weight_on_old_keys_stores_the_new_ones_exactly(problem):
    k, r, c = problem
    assert_close(r @ ridge_small(k, c, 0.0) @ k, r)
    assert_close(r @ ridge_direct(k, c, 1e-9) @ k, r, rtol=1e-6, atol=1e-6)


def test_update_shrinks_to_nothing_as_the_weight_grows(problem):
    k, r, c = problem
    norms = [float((r @ ridge(k, c, w)).norm()) for w in (0.01, 0.1, 1.0, 10.0, 1e3, 1e6)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-4 * norms[0]


def test_only_the_product_of_weight_and_moment_counts(problem):
    k, _, c = problem
    assert_close(ridge(k, c, 6.0), ridge(k, 3 * c, 2.0))


def test_duplicate_edits_equal_one_edit_with_less_weight_on_old_keys(problem):
    k, r, c = problem
    thrice = r[:, :1].repeat(1, 3) @ ridge(k[:, :1].repeat(1, 3), c, 3.0)
    assert_close(thrice, r[:, :1] @ ridge(k[:, :1], c, 1.0))


def test_order_of_edits_does_not_matter(problem):
    k, r, c = problem
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(r[:, order] @ ridge(k[:, order], c, 1.0), r @ ridge(k, c, 1.0))


def test_one_edit_points_along_the_whitened_key(problem):
    k, r, c = problem
    u = torch.linalg.solve(c, k[:, 0])
    for weight in (0.1, 10.0):
        update = r[:, :1] @ ridge(k[:, :1], c, weight)
        assert_close(update / update[:, :1], (u / u[0]).expand(4, -1))


def test_rank_and_zero_residual(problem):
    k, r, c = problem
    assert int(torch.linalg.matrix_rank(r[:, :2] @ ridge(k[:, :2], c, 1.0))) <= 2
    assert not (torch.zeros(4, 5, dtype=torch.float64) @ ridge(k, c, 1.0)).any()


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


def test_nan_is_refused(problem):
    k, _, c = problem
    c[0, 0] = float("nan")
    with pytest.raises(NonFinite, match="second moment"):
        ridge(k, c, 1.0)
