"""Means over facts, each with a 95 % interval."""

import torch
from jaxtyping import Float
from torch import Tensor


def mean_and_half_width(rows: Float[Tensor, "n width"]) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
    """Return the mean over rows and 1.96 standard errors, half the width of its interval; NaN for fewer than two."""
    spread = rows.std(0) if len(rows) > 1 else torch.full_like(rows.sum(0), torch.nan)
    return rows.mean(0), 1.96 * spread / max(len(rows), 1) ** 0.5
