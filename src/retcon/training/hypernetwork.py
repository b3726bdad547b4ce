"""Networks that turn the rank-one pieces of a gradient into better ones: what MEND and MALMEN train.

At a matrix W (out x in), token t contributes the piece delta_t u_t^T to the weight gradient: u_t enters W, delta_t is
the gradient at its output. A network maps [u; delta] to [u~; delta~]. One network serves all matrices of one shape; a
scale and a shift per matrix make them differ.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from retcon.seed import generator_of

ScaleAt = Literal["inside", "outside"]
"""Where a block's scale and shift act: before the nonlinearity (MEND), or after it (MALMEN)."""


class Normaliser(nn.Module):
    """Mean and deviation of all rows seen in training, entry by entry; buffers, so that they are saved and resumed."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=dtype))
        self.register_buffer("squares", torch.zeros(width, dtype=dtype))
        """Sum of squared distances from the mean."""

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "n width"]) -> None:
        """Take in rows, in any division into calls (Chan et al. 1979); does nothing in eval mode."""
        if not self.training or not len(rows):
            return
        n, before, mean = len(rows), float(self.count), rows.mean(0)
        apart = mean - self.mean
        self.squares += (rows - mean).square().sum(0) + apart.square() * (before * n / (before + n))
        self.mean += apart * (n / (before + n))
        self.count += n

    def deviation(self) -> Float[Tensor, " width"]:
        """Return the unbiased standard deviation; 1 before two rows have been seen, and of what never varied.

        A ReLU's unit that was 0 in all of training may fire in an edit, which nearly nothing would then be divided by.
        """
        n = max(float(self.count), 2.0)
        return (self.squares / (n - 1)).sqrt().masked_fill(self.squares == 0, 1.0)

    def forward(self, rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Return the rows with mean 0 and deviation 1."""
        return (rows - self.mean) / (self.deviation() + self.eps)


class Block(nn.Module):
    """z + max(0, scale_m * (U V z + b) + shift_m), or z + scale_m * max(0, U V z + b) + shift_m.

    The nonlinearity is a clamp: at 0 it passes the gradient on, which a ReLU does not, and U starts at 0.
    """

    def __init__(
        self, width: int, rank: int, n_matrices: int, scale_at: ScaleAt, dtype: torch.dtype, seed: torch.Generator
    ) -> None:
        super().__init__()
        self.scale_at = scale_at
        rank = min(rank, width)
        self.U = nn.Parameter(torch.zeros(width, rank, dtype=dtype))
        self.V = nn.Parameter(torch.randn(rank, width, generator=seed, dtype=torch.float64).to(dtype))
        self.b = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(n_matrices, width, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(n_matrices, width, dtype=dtype))

    def forward(self, z: Float[Tensor, "*rows width"], matrix: int) -> Float[Tensor, "*rows width"]:
        """Return z of the next block."""
        inner = z @ self.V.T @ self.U.T + self.b
        if self.scale_at == "inside":
            return z + (self.scale[matrix] * inner + self.shift[matrix]).clamp(min=0)
        return z + self.scale[matrix] * inner.clamp(min=0) + self.shift[matrix]


class PieceNetwork(nn.Module):
    """[u; delta] to [u~; delta~], for every matrix of one shape. Untrained and not normalised it is the identity."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        n_matrices: int,
        *,
        rank: int,
        n_blocks: int,
        scale_at: ScaleAt,
        normalise: bool,
        eps: float,
        dtype: torch.dtype,
        seed: torch.Generator,
    ) -> None:
        super().__init__()
        width = width_in + width_out
        self.width_in, self.normalise = width_in, normalise
        self.normaliser = Normaliser(width, eps, dtype)
        self.blocks = nn.ModuleList(Block(width, rank, n_matrices, scale_at, dtype, seed) for _ in range(n_blocks))

    def forward(
        self, u: Float[Tensor, "*tokens in"], delta: Float[Tensor, "*tokens out"], matrix: int
    ) -> tuple[Float[Tensor, "*tokens in"], Float[Tensor, "*tokens out"]]:
        """Return u~ and delta~. Nothing is learned here about the statistics: that is `observe`."""
        z = torch.cat([u, delta], -1)
        if self.normalise:
            z = self.normaliser(z)
        for block in self.blocks:
            z = block(z, matrix)
        return z[..., : self.width_in], z[..., self.width_in :]

    def observe(self, u: Float[Tensor, "n in"], delta: Float[Tensor, "n out"]) -> None:
        """Let the normaliser see these pieces; does nothing in eval mode."""
        self.normaliser.update(torch.cat([u, delta], -1))


class Hypernetwork(nn.Module):
    """A network for each shape, and what is learned of each matrix by itself."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        step_size: float,
        with_ridge: bool = False,
        rank: int,
        n_blocks: int,
        scale_at: ScaleAt,
        normalise: bool,
        eps: float,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        """Make an untrained one.

        Args:
            shapes: (in, out) of every matrix that is edited, in order.
            step_size: where eta, one per matrix, starts.
            with_ridge: learn lambda, one per matrix, from 1 on.
            seed: draws V.
        """
        super().__init__()
        generator = generator_of(seed)
        self.shapes = list(shapes)
        self.step_sizes = nn.Parameter(torch.full((len(shapes),), step_size, dtype=dtype))
        if with_ridge:
            self.log_ridge = nn.Parameter(torch.zeros(len(shapes), dtype=dtype))
        self.networks = nn.ModuleDict(
            {
                _key(shape): PieceNetwork(
                    *shape,
                    self.shapes.count(shape),
                    rank=rank,
                    n_blocks=n_blocks,
                    scale_at=scale_at,
                    normalise=normalise,
                    eps=eps,
                    dtype=dtype,
                    seed=generator,
                )
                for shape in dict.fromkeys(self.shapes)
            }
        )

    def network(self, i: int) -> PieceNetwork:
        """Return the network of the i-th matrix."""
        found = self.networks[_key(self.shapes[i])]
        assert isinstance(found, PieceNetwork)
        return found

    def number(self, i: int) -> int:
        """Return which of the matrices of its shape the i-th matrix is."""
        return self.shapes[:i].count(self.shapes[i])

    def transform(
        self, i: int, u: Float[Tensor, "*tokens in"], delta: Float[Tensor, "*tokens out"]
    ) -> tuple[Float[Tensor, "*tokens in"], Float[Tensor, "*tokens out"]]:
        """Return u~ and delta~ of pieces of the i-th matrix."""
        u_new, delta_new = self.network(i)(u, delta, self.number(i))
        return u_new, delta_new


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def not_zero(u: Float[Tensor, "*tokens in"], delta: Float[Tensor, "*tokens out"]) -> Bool[Tensor, "*tokens"]:
    """Return which tokens have a piece at all: padding has none, nor has what the loss does not depend on."""
    return (u != 0).any(-1) & (delta != 0).any(-1)
