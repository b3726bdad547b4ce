"""Equality-constrained and null-space solvers against their defining equations (float64, synthetic matrices)."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from retcon.errors import NonFinite
from retcon.memory.solve import (
    NullSpace,
    cholesky,
    equality,
    null_space,
    null_space_ridge,
    ridge,
    whitened,
)

EYE = torch.eye(12, dtype=torch.float64)


def of(c):
    return partial(torch.clone, c)


# --- EMMET ---------------------------------------------------------------------------------------------------------


def test_equality_stores_every_key_exactly_and_at_the_least_cost(problem, randn):
    """Identity 39."""
    k, r, c = problem
    update = r @ equality(k, of(c))
    assert_close(update @ k, r)
    for _ in range(20):
        step = randn(4, 12)
        step -= step @ k @ torch.linalg.solve(k.T @ k, k.T)  # stay on the constraint
        assert torch.trace((update + step) @ c @ (update + step).T) > torch.trace(update @ c @ update.T)


def test_without_a_stabiliser_the_moments_weight_cancels(problem):
    """Identity 40."""
    k, _, c = problem
    assert_close(equality(k, of(c), weight=1.0), equality(k, of(c), weight=1000.0))


@pytest.mark.parametrize(("weight", "a"), [(1.0, 0.1), (1000.0, 0.1), (7.0, 3.0)])
def test_with_a_stabiliser_it_is_memit(problem, weight, a):
    """Identity 41: the released settings are MEMIT's with lambda = a w."""
    k, _, c = problem
    assert_close(equality(k, of(c), weight=weight, stabiliser=a), ridge(k, of(c), a * weight))


def test_one_exact_edit_is_r_romes(problem):
    """Identity 42."""
    k, _, c = problem
    u = torch.linalg.solve(c, k[:, :1])
    assert_close(equality(k[:, :1], of(c)), u.T / (k[:, :1] * u).sum())


def test_repeated_and_too_many_keys_fall_back_on_the_nearest(problem, randn):
    k, r, c = problem
    twice = equality(k[:, [0, 0]], of(c))
    assert_close(r[:, [0, 0]] @ twice @ k[:, 0], r[:, 0])
    many = randn(12, 20)
    wanted = randn(4, 20)
    update = wanted @ equality(many, of(c))
    assert_close(
        update, wanted @ torch.linalg.pinv(many), rtol=1e-6, atol=1e-6
    )  # least squares: 20 facts, 12 dimensions


def test_the_identitys_weight_is_part_of_the_cost(problem):
    k, _, c = problem
    whole = 3.0 * c + 0.5 * EYE
    assert_close(equality(k, of(c), weight=3.0, identity_weight=0.5), equality(k, of(whole)))


def test_factor_and_moment_give_the_same(problem):
    k, _, c = problem
    factor = partial(lambda: cholesky(c)[0])
    assert_close(equality(k, of(c), factor=factor), equality(k, of(c)))
    assert_close(whitened(k, of(c), factor=factor), torch.linalg.solve(c, k))


# --- AlphaEdit -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0.3, 0.7])
def space(request, problem):
    """A null space kept by its own basis, and one kept by the other."""
    return null_space(problem[2], request.param, "rank")


def test_projector_is_one_and_knows_its_rank(problem, space):
    """Identity 43."""
    _, _, c = problem
    p = space.project(EYE)
    assert_close(p, p.T)
    assert_close(p @ p, p)
    assert round(float(p.trace())) == space.rank == int(torch.linalg.matrix_rank(p))
    s, u = torch.linalg.eigh(c)
    assert_close(p @ u[:, space.rank :], torch.zeros(12, 12 - space.rank, dtype=torch.float64))
    assert space.basis.shape[1] <= 6  # the thinner of the two bases
    kept = NullSpace.unpacked(space.packed())
    assert torch.equal(kept.basis, space.basis)
    assert kept.complement == space.complement
    assert s.tolist() == sorted(s.tolist())


def test_thresholds(problem):
    _, _, c = problem
    s = torch.linalg.eigvalsh(c)
    assert null_space(c, float(s[4]) + 1e-9).rank == 5
    assert null_space(c, float(s[0]) * 0.5).rank == 0
    assert null_space(c, 0.25, "rank").rank == 3
    share = float(s[:4].sum() / s.sum())
    assert null_space(c, share + 1e-6, "trace").rank == 4


def test_updates_stay_in_the_null_space_and_leave_known_keys_alone(problem, space, randn):
    """Identity 44."""
    k, r, c = problem
    update = r @ null_space_ridge(k, space, 0.5)
    assert_close(space.project(update.T).T, update)
    known = torch.linalg.eigh(c)[1][:, space.rank :] @ randn(12 - space.rank, 6)
    assert_close(update @ known, torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("n_earlier", [0, 3, 9])
def test_all_forms_agree(problem, space, randn, n_earlier):
    """Identity 45, with earlier keys as keys whose residual is zero."""
    k, r, _ = problem
    keys = torch.cat([randn(12, n_earlier), k], dim=1)
    own = [
        r @ null_space_ridge(keys, space, 2.0, form)[n_earlier:] for form in ("eigenbasis", "keys", "released", "auto")
    ]
    p, eye = space.project(EYE), EYE
    written = torch.linalg.solve(p @ keys @ keys.T + 2.0 * eye, p @ k @ r.T).T  # as the paper has it
    for update in own:
        assert_close(update, written)


def test_a_null_space_of_everything_is_memits_ridge(problem):
    """Identity 46."""
    k, _, c = problem
    everything = null_space(c, 1.0, "rank")
    assert everything.rank == 12
    for form in ("eigenbasis", "keys", "released"):
        assert_close(null_space_ridge(k, everything, 3.0, form), ridge(k, of(EYE), 3.0))


def test_a_null_space_of_nothing_writes_nothing(problem):
    """Identity 47."""
    k, _, c = problem
    for form in ("auto", "eigenbasis", "keys", "released"):
        assert not null_space_ridge(k, null_space(c, 0.0), 3.0, form).any()


def test_the_released_form_without_a_ridge_is_refused_where_it_is_singular(problem):
    k, _, c = problem
    with pytest.raises(NonFinite, match="singular; raise the ridge"):
        null_space_ridge(k, null_space(c, 0.0), 0.0, "released")


def test_keys_kept_often_stay_ever_more_where_they_are(problem, space, randn):
    """Identity 50."""
    k, r, _ = problem
    kept = randn(12, 2)
    moved = []
    for times in (1, 10, 100, 1000):
        keys = torch.cat([kept.repeat(1, times), k], dim=1)
        moved.append(float((r @ null_space_ridge(keys, space, 0.5)[2 * times :] @ kept).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.05 * moved[0]


def test_it_minimises_its_objective_within_the_null_space(problem, space, randn):
    k, r, _ = problem
    update = r @ null_space_ridge(k, space, 0.5)

    def cost(dw):
        return ((dw @ k - r) ** 2).sum() + 0.5 * (dw**2).sum()

    for _ in range(20):
        assert cost(update + 0.01 * space.project(randn(12, 4)).T) > cost(update)
