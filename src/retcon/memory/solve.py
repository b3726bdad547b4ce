"""The linear problem of a write, as pure functions of tensors (MEMIT, arXiv:2210.07229, Eq. 14).

K: (m, n) keys as columns, R: (d, n) residuals, C: (m, m) second moment, lambda: weight of the old keys. All in float64,
in math orientation. An update is returned as its right factor X^T (n, m): dW = R X^T, rank at most n.

What is large is made when it is asked for: `moment` and `factor` are functions that return C and its Cholesky factor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.arguments import check_choice
from retcon.errors import NonFinite
from retcon.lm.devices import CPU, explained_oom, float64_device, good_at_float64, in_float64, solve_device

Build = Callable[[], Float[Tensor, "m m"]]
ThresholdMode = Literal["absolute", "trace", "rank"]
Form = Literal["auto", "eigenbasis", "keys", "released"]
NEGLIGIBLE = 1e-8
"""Trace of lambda C over that of K K^T up to which their sum loses C: about the root of float64's precision."""
STORED = 1e-6
"""Norm of (X^T K - I) K^T over that of K up to which the keys count as stored."""


def ridge(
    k: Float[Tensor, "m n"], moment: Build, weight: float, *, factor: Build | None = None, device: torch.device = CPU
) -> Float[Tensor, "n m"]:
    """X^T = K^T (lambda C + K K^T)^-1: R X^T minimises ||dW K - R||^2 + lambda tr(dW C dW^T).

    By `equality`, an (n x n) system beside the factor of C (Woodbury), where n < m / 4, and up to n = m where lambda C
    is negligible beside K K^T: their sum is then singular in float64, and `equality` has the limit, the least
    tr(dW C dW^T) that stores the keys. Where C is so nearly singular that they are not stored by it, the direct form
    stores them. More keys than that leave C no say there: what fits them best is written. The result is on K's device,
    whatever device does the work.

    Args:
        moment: returns C, float32 or float64.
        factor: returns C's Cholesky factor where it is at hand; used where the work is done on the CPU.
        device: where the model is; see `lm/devices.py`.
    """
    m, n = k.shape
    if 4 * n < m:
        return equality(k, moment, stabiliser=weight, factor=factor, device=device)
    if n <= m and weight * float(moment().diagonal().sum()) <= NEGLIGIBLE * float(k.square().sum()):
        with suppress(NonFinite):
            right = equality(k, moment, stabiliser=weight, factor=factor, device=device)
            if float((right @ k @ k.T - k.T).norm()) <= STORED * float(k.norm()):
                return right
    return ridge_direct(k, moment, weight, device=device)


def ridge_direct(
    k: Float[Tensor, "m n"], moment: Build, weight: float, *, device: torch.device = CPU
) -> Float[Tensor, "n m"]:
    """Solve `ridge` by one (m x m) system: the reference."""

    def build(where: torch.device) -> Float[Tensor, "m m"]:
        there = k.to(where)
        return in_float64(moment(), where).mul_(weight).addmm_(there, there.T)

    return solve_on(device, build, k).T


def ridge_of_experts(
    keys: Float[Tensor, "n_experts m n"], factors: Sequence[Build], weight: float, device: torch.device = CPU
) -> Float[Tensor, "n_experts n m"]:
    """X_e^T of one joint solve over routed experts, dW_e = R X_e^T.

    `ridge` for the stacked keys Phi = [Phi_1; ...; Phi_E], Phi_e = g_e k_e, with the block-diagonal second moment of
    the C_e, which is never built. Y_e = C_e^-1 Phi_e, X_e^T = (weight I + sum_e Phi_e^T Y_e)^-1 Y_e^T. An expert
    without a key is left alone, and its factor is not asked for.

    Args:
        factors: return the Cholesky factors of C_e.
        device: where the model is; the work is done there if it is good at float64.
    """
    where = float64_device(device, keys.shape[1])
    y = torch.zeros(keys.shape, dtype=keys.dtype, device=where)
    inner = torch.zeros(keys.shape[2], keys.shape[2], dtype=keys.dtype, device=where)
    known = keys.any(2).any(1).tolist()
    for e, phi in enumerate(keys):
        if known[e]:
            there = phi.to(where)
            y[e] = torch.cholesky_solve(there, factors[e]().to(where))
            inner += there.T @ y[e]
    right = _of_keys(inner, weight, y.transpose(1, 2).transpose(0, 1).flatten(1))
    return right.view(keys.shape[2], len(keys), keys.shape[1]).transpose(0, 1).to(keys.device)


def solve_on(
    device: torch.device, build: Callable[[torch.device], Float[Tensor, "m m"]], b: Float[Tensor, "m n"]
) -> Float[Tensor, "m n"]:
    """Return A^-1 B to float64's accuracy; the result is on B's device.

    At `solve_device`: by `spd_solve` on a CPU or a card that is good at float64, on other cards by `refined_solve`, and
    on the CPU where that does not reach its tolerance.

    Args:
        build: makes A afresh in float64 on the device it is given.

    Raises:
        OutOfMemory: the card has no room beside what else runs there.
    """
    where = solve_device(device, len(b))
    with explained_oom(where, len(b)):
        if good_at_float64(where):
            return spd_solve(lambda: build(where), b.to(where)).to(b.device)
        x = refined_solve(build(where), b.to(where))
    return (spd_solve(lambda: build(CPU), b.to(CPU)) if x is None else x).to(b.device)


def refined_solve(
    a: Float[Tensor, "m m"],
    b: Float[Tensor, "m n"],
    *,
    backward: float = 1e-14,
    forward: float = 1e-10,
    max_steps: int = 40,
) -> Float[Tensor, "m n"] | None:
    """Return A^-1 B for A and B in float64, by a Cholesky factor in float32 and residuals in float64.

    Each step adds the float32 solution for what is missing (iterative refinement; Higham, Accuracy and Stability of
    Numerical Algorithms, chapter 12), A's diagonal scaled to one before it is rounded. Done when for every column, in
    maximum norms, ||b - A x|| is at most `backward` of ||A|| ||x|| + ||b||, and the last step at most `forward` of x.

    Returns:
        The solution, or None: no factor in float32, or the tolerances not reached (a badly conditioned A).

    Raises:
        NonFinite: an input is NaN or infinite.
    """
    if not (torch.isfinite(a.sum()) and torch.isfinite(b).all()):
        raise NonFinite(_NOT_FINITE)
    diagonal = a.diagonal()
    if not (diagonal > 0).all():
        return None
    scale = diagonal.rsqrt()[:, None]
    lower, failed = torch.linalg.cholesky_ex((a * scale * scale.T).to(torch.float32))
    if int(failed):
        return None
    size = torch.linalg.matrix_norm(a, float("inf"))
    x, residual = torch.zeros_like(b), b
    for _ in range(max_steps):
        wanted = residual * scale
        height = wanted.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)  # float32 has no room for tiny columns
        step = scale * torch.cholesky_solve((wanted / height).to(torch.float32), lower) * height
        x += step
        residual = b - a @ x
        solved = residual.abs().amax(0) <= backward * (size * x.abs().amax(0) + b.abs().amax(0))
        settled = step.abs().amax(0) <= forward * x.abs().amax(0)
        if bool((solved & settled).all()):
            return x
        if not torch.isfinite(residual).all():
            return None
    return None


_JITTERS = (0.0, *(10.0**e for e in range(-10, 1)))
"""Shares of the mean diagonal that are added to it, one after the other, until there is a Cholesky factor."""
_NOT_FINITE = "the linear problem holds NaN or infinity: check the second moment and the keys"


def spd_solve(build: Build, b: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Return A^-1 B for the symmetric positive definite A that `build` makes afresh.

    Cholesky, in A's own memory; where it fails, again with a little jitter on the diagonal, and LU at the last.

    Raises:
        NonFinite: an input or the solution is NaN or infinite.
    """
    if not torch.isfinite(b).all():
        raise NonFinite(_NOT_FINITE)
    for lower, _ in _factors(build, _JITTERS[:6]):
        return torch.cholesky_solve(b, lower)
    return general_solve(build(), b, "use more tokens for the second moment or more weight on it")


def general_solve(a: Float[Tensor, "m m"], b: Float[Tensor, "m n"], remedy: str) -> Float[Tensor, "m n"]:
    """Return A^-1 B by LU.

    Raises:
        NonFinite: A is singular, or the solution is not finite; the message ends with `remedy`.
    """
    solution, failed = torch.linalg.solve_ex(a, b)
    if int(failed) or not torch.isfinite(solution).all():
        raise NonFinite(f"the linear problem is singular; {remedy}")
    return solution


def cholesky(c: Float[Tensor, "m m"], device: torch.device = CPU) -> tuple[Float[Tensor, "m m"], float]:
    """Return L and j of C + j I = L L^T in float64, j the least jitter that makes C definite; on C's device.

    Computed at the `float64_device` of a model on `device`.

    0 nearly always; not where the text repeats itself so often that C is singular to its stored precision.

    Raises:
        NonFinite: C holds NaN or infinity, or is nothing like positive definite.
        OutOfMemory: the card has no room beside what else runs there.
    """
    if (where := float64_device(device, len(c))) not in (CPU, c.device):
        with explained_oom(where, len(c)):
            lower, jitter = cholesky(c.to(where))
            return lower.to(c.device), jitter
    for found in _factors(lambda: in_float64(c, c.device), _JITTERS):
        return found
    raise NonFinite("the second moment is far from positive definite, so it is none; collect it again")


def definite(c: Float[Tensor, "m m"], jitter: float | None = None, device: torch.device = CPU) -> Float[Tensor, "m m"]:
    """Return C itself where it has a Cholesky factor, else in float64 with `cholesky`'s jitter (or the one given)."""
    j = cholesky(c, device)[1] if jitter is None else jitter
    if j == 0:
        return c
    c = in_float64(c, c.device)
    c.diagonal().add_(j)
    return c


def _factors(build: Build, shares: Sequence[float]) -> Iterator[tuple[Float[Tensor, "m m"], float]]:
    """Yield (Cholesky factor of A + j I, j) for those jitters that give one, in ascending order."""
    for share in shares:
        a = build().mT  # symmetric; column order lets the factor take its place
        if not torch.isfinite(a.sum()):
            raise NonFinite(_NOT_FINITE)
        jitter = share * float(a.diagonal().mean())
        a.diagonal().add_(jitter)
        failed = torch.empty((), dtype=torch.int32, device=a.device)
        torch.linalg.cholesky_ex(a, out=(a, failed))
        if not int(failed):
            yield a, jitter


# --- other ways of writing than ridge ----------------------------------------------------------------------------


def whitened(
    k: Float[Tensor, "m n"], moment: Build, *, factor: Build | None = None, device: torch.device = CPU
) -> Float[Tensor, "m n"]:
    """C^-1 K; arguments as for `ridge`."""
    if factor is not None and device.type == "cpu":
        return torch.cholesky_solve(k, factor())
    return solve_on(device, lambda where: in_float64(moment(), where), k)


def equality(
    k: Float[Tensor, "m n"],
    moment: Build,
    *,
    stabiliser: float = 0.0,
    weight: float = 1.0,
    identity_weight: float = 0.0,
    factor: Build | None = None,
    device: torch.device = CPU,
) -> Float[Tensor, "n m"]:
    """X^T = D^-1 K^T C'^-1 with D = K^T C'^-1 K + a I and C' = w C + mu I (EMMET, arXiv:2403.14236).

    With a = 0, R X^T minimises tr(dW C' dW^T) subject to dW K = R; where keys are linearly dependent, D's
    pseudo-inverse gives the nearest there is. `stabiliser` is a, `weight` is w, `identity_weight` is mu.
    """

    def build(where: torch.device) -> Float[Tensor, "m m"]:
        c = in_float64(moment(), where).mul_(weight)
        c.diagonal().add_(identity_weight)
        return c

    there = k.to(float64_device(device, len(k)))
    if identity_weight:
        x = solve_on(device, build, there)
    else:
        x = whitened(there, moment, factor=factor, device=device) / weight
    return _of_keys(there.T @ x, stabiliser, x.T).to(k.device)


def _of_keys(d: Float[Tensor, "n n"], weight: float, b: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """(D + weight I)^-1 B for D = K^T C^-1 K; by the pseudo-inverse where keys are linearly dependent."""
    if not torch.isfinite(d).all():
        raise NonFinite(_NOT_FINITE)
    d = _plus_identity(d, weight)
    lower, failed = torch.linalg.cholesky_ex(d)
    pivots = lower.diagonal()
    if not int(failed) and bool(pivots.min() > 1e-7 * pivots.max()):
        return torch.cholesky_solve(b, lower)
    return torch.linalg.pinv(d, hermitian=True) @ b


@dataclass(frozen=True)
class NullSpace:
    """The projection P onto directions that the second moment hardly knows, by the thinner of two bases."""

    basis: Float[Tensor, "m q"]
    """Orthonormal columns, float64."""
    complement: bool
    """The basis spans what is projected away: P = I - B B^T; otherwise P = B B^T."""

    @property
    def rank(self) -> int:
        """Dimensions of the null space."""
        return len(self.basis) - self.basis.shape[1] if self.complement else self.basis.shape[1]

    def project(self, x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """P x."""
        seen = self.basis @ (self.basis.T @ x)
        return x - seen if self.complement else seen

    def packed(self) -> Float[Tensor, "m q1"]:
        """Return one tensor for a file: a first column that says what the basis spans, then the basis."""
        head = torch.full((len(self.basis), 1), float(self.complement), dtype=self.basis.dtype)
        return torch.cat([head, self.basis.cpu()], dim=1)

    @classmethod
    def unpacked(cls, tensor: Float[Tensor, "m q1"]) -> "NullSpace":
        """Return what `packed` gave."""
        return cls(tensor[:, 1:].double(), bool(tensor[0, 0]))


def null_space(
    c: Float[Tensor, "m m"], threshold: float, mode: ThresholdMode = "absolute", device: torch.device = CPU
) -> NullSpace:
    """Return the eigenvectors of C with small eigenvalues s (AlphaEdit, arXiv:2410.02355), in float64 on the device if
    it is good at that, else on the CPU.

    `absolute`: s < threshold; `trace`: the smallest ones, as long as their sum is under that share of C's trace;
    `rank`: that share of all, the smallest.

    Raises:
        InvalidSetting: no such mode.
    """
    check_choice(mode, ThresholdMode, "mode of the null space")
    where = float64_device(device, len(c))
    with explained_oom(where, len(c)):
        s, u = torch.linalg.eigh(in_float64(c, where))
    if mode == "absolute":
        r = int((s < threshold).sum())
    elif mode == "trace":
        r = int((s.clamp_min(0).cumsum(0) < threshold * s.sum()).sum())
    else:
        r = min(len(s), round(threshold * len(s)))
    complement = 2 * r > len(s)
    return NullSpace((u[:, r:] if complement else u[:, :r]).contiguous().cpu(), complement)


def null_space_ridge(
    k: Float[Tensor, "m n"], space: NullSpace, identity_weight: float, form: Form = "auto", device: torch.device = CPU
) -> Float[Tensor, "n m"]:
    """X^T = K^T P (K K^T P + L2 I)^-1: dW = R X^T minimises ||dW K - R||^2 + L2 ||dW||^2 over dW = dW P.

    `keys` solves in the space of the keys, `eigenbasis` in the null space (or in P's own, where the other basis is the
    thinner), `auto` takes the smaller of the two; `released` is the authors' non-symmetric system by LU. All agree.

    Raises:
        InvalidSetting: no such form.
    """
    check_choice(form, Form, "form of the update")
    m, n = k.shape
    where = float64_device(device, m)
    space = NullSpace(space.basis.to(where), space.complement)
    k_there = k.to(where)
    pk = space.project(k_there)
    if form == "released":
        p = space.project(torch.eye(m, dtype=k.dtype, device=where))
        system = p @ k_there @ k_there.T + identity_weight * torch.eye(m, dtype=k.dtype, device=where)
        return general_solve(system, pk, "raise the ridge, or take another form than released").T.to(k.device)
    if form == "keys" or (form == "auto" and n < (m if space.complement else space.rank)):
        return spd_solve(lambda: _plus_identity(pk.T @ pk, identity_weight), pk.T).to(k.device)
    if space.complement:  # P M P + L2 I does in the null space what the smaller system would
        return spd_solve(lambda: _plus_identity(pk @ pk.T, identity_weight), pk).T.to(k.device)
    a = space.basis.T @ k_there
    inner = spd_solve(lambda: _plus_identity(a @ a.T, identity_weight), a)
    return (space.basis @ inner).T.to(k.device)


def _plus_identity(a: Float[Tensor, "q q"], weight: float) -> Float[Tensor, "q q"]:
    a = (a + a.T) / 2
    a.diagonal().add_(weight)
    return a
