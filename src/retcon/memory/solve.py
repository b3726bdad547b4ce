"""The linear problem behind a write, as pure functions of tensors (MEMIT, arXiv:2210.07229, Eq. 14).

K: (m, n) keys as columns, R: (d, n) residuals, C: (m, m) second moment, lambda: weight of the old keys. All in float64,
in math orientation. An update is returned as its right factor X^T (n, m): dW = R X^T, rank at most n.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.errors import NonFinite


def ridge(k: Float[Tensor, "m n"], c: Float[Tensor, "m m"], weight: float) -> Float[Tensor, "n m"]:
    """X^T = K^T (lambda C + K K^T)^-1: R X^T minimises ||dW K - R||^2 + lambda tr(dW C dW^T).

    The small-n form is used where n < m / 4.
    """
    return ridge_small(k, c, weight) if k.shape[1] * 4 < k.shape[0] else ridge_direct(k, c, weight)


def ridge_direct(k: Float[Tensor, "m n"], c: Float[Tensor, "m m"], weight: float) -> Float[Tensor, "n m"]:
    """`ridge` by one (m x m) solve: the reference."""
    return spd_solve(lambda: (weight * c).addmm_(k, k.T), k).T


def ridge_small(k: Float[Tensor, "m n"], c: Float[Tensor, "m m"], weight: float) -> Float[Tensor, "n m"]:
    """`ridge` by an (n x n) solve beside the factor of C: Y = C^-1 K, X^T = (lambda I + K^T Y)^-1 Y^T (Woodbury)."""
    y = spd_solve(c.clone, k)
    inner = k.T @ y
    inner = (inner + inner.T) / 2
    inner.diagonal().add_(weight)
    return spd_solve(inner.clone, y.T)


def spd_solve(build: Callable[[], Float[Tensor, "m m"]], b: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """A^-1 B for the symmetric positive definite A that `build` makes afresh.

    Cholesky, in A's own memory; where it fails, again with a little jitter on the diagonal, and LU at the last.

    Raises:
        NonFinite: an input or the solution is NaN or infinite.
    """
    jitter = 0.0
    for _ in range(6):
        a = build().mT  # symmetric; column order lets the factor take its place
        if not (torch.isfinite(a.sum()) and torch.isfinite(b).all()):
            raise NonFinite("the linear problem holds NaN or infinity: check the second moment and the keys")
        scale = float(a.diagonal().mean())
        a.diagonal().add_(jitter * scale)
        failed = torch.empty((), dtype=torch.int32, device=a.device)
        torch.linalg.cholesky_ex(a, out=(a, failed))
        if not int(failed):
            return torch.cholesky_solve(b, a)
        jitter = 10 * jitter or 1e-10
    solution = torch.linalg.solve(build(), b)
    if not torch.isfinite(solution).all():
        raise NonFinite("the linear problem is singular; use more tokens for the second moment or more weight on it")
    return solution
