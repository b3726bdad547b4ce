"""Writing values into weights: spread what is missing over a group of layers, and solve for each (MEMIT section 4).

For each layer in turn: collect the keys and the current value at the group's last layer on the weights as they are now,
take a share of what is missing, solve, and let the change be live for the layers above.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.delta import Change
from retcon.edits import Edit
from retcon.errors import NonFinite
from retcon.lm.model import LM
from retcon.lm.prompts import Where
from retcon.lm.trace import Point, TensorName
from retcon.memory.contexts import Contexts
from retcon.memory.keys import KeyAverage, mean_keys
from retcon.memory.moments import Moments
from retcon.memory.solve import ridge

Spread = Literal["even", "sqrt"]
"""Divisor of what is missing with N - i layers left: N - i (MEMIT) or its root (PMET)."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers written one after the other towards one value."""

    layers: tuple[int, ...]
    """Ascending; the value is measured at the last."""
    where: Where
    """Token position of the keys."""
    measured: TensorName
    """Tensor of the last layer that shall take on the value."""
    spread: Spread
    moment_weight: float
    """lambda: how many old keys the second moment stands for."""
    module: Literal["down_proj", "o_proj"] = "down_proj"
    """Matrix that is written; its input is the key."""


def write(
    lm: LM,
    edits: Sequence[Edit],
    targets: Float[Tensor, "n_edits d_model"],
    group: LayerGroup,
    contexts: Contexts,
    moments: Moments,
    scope: ExitStack,
    *,
    key_average: KeyAverage = "two_level",
) -> dict[str, Change]:
    """The changes that bring each edit's value at the group's last layer to `targets`; they stay live in `scope`.

    Solves in float64 on the CPU; changes have the weights' precision, at least float32.

    Raises:
        NonFinite: a key, a residual or a change is NaN or infinite; the message names the layer.
    """
    changes: dict[str, Change] = {}
    value = Point(group.layers[-1], group.measured)
    for i, layer in enumerate(group.layers):
        site = lm.site(layer, group.module)
        point = Point(layer, "key" if group.module == "down_proj" else "attn_key")
        keys, current = mean_keys(lm, edits, contexts, point, group.where, value=value, average=key_average)
        assert current is not None
        share = divisor(group.spread, len(group.layers) - i)
        residuals = (targets.to(current) - current) / share  # r = (v - h) / s(N - i)
        if not (torch.isfinite(keys).all() and torch.isfinite(residuals).all()):
            raise NonFinite(f"layer {layer}: a key or a residual is NaN or infinite; is the model's dtype wide enough?")
        right = ridge(keys.double().T, moments.second_moment(lm, site).to(torch.float64), group.moment_weight)
        dtype = torch.promote_types(site.weight.dtype, torch.float32)
        change = site.stored(residuals.T.to(dtype).contiguous(), right.to(dtype))
        changes[site.name] = change
        scope.enter_context(lm.edited(lm.delta({site.name: [change]})))
    return changes


def divisor(spread: Spread, layers_left: int) -> float:
    """s(N - i): what the missing part is divided by."""
    return float(layers_left) if spread == "even" else math.sqrt(layers_left)
