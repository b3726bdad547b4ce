"""Writing values into weights: spread what is missing over a group of layers, and solve for each (MEMIT section 4).

For each layer in turn: collect the keys and the current value at the group's last layer on the weights as they are now,
take a share of what is missing, solve, and apply the change for the layers above. How a layer is solved is the
method's choice; `weighted` is MEMIT's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.delta import Change
from retcon.edits import Edit
from retcon.errors import NonFinite
from retcon.lm.forward import Point, TensorName
from retcon.lm.model import LM, Site
from retcon.lm.prompts import Where
from retcon.memory.contexts import Contexts
from retcon.memory.keys import KeyAverage, KeyReader
from retcon.memory.moments import Moments
from retcon.memory.solve import ridge

Spread = Literal["even", "sqrt"]
"""Divisor of what is missing with N - i layers left: N - i (MEMIT) or its root (PMET)."""


@dataclass(frozen=True)
class LayerProblem:
    """One layer's linear problem: store `keys`, and leave alone what the second moment C stands for."""

    site: Site
    """The matrix that is written."""
    keys: Float[Tensor, "m n"]
    """K, float64: each edit's mean key on the weights as they are now."""
    moment: Callable[[], Float[Tensor, "m m"]]
    """Returns C."""
    factor: Callable[[], Float[Tensor, "m m"]]
    """Returns C's Cholesky factor, float64."""
    derived: Callable[[str, Callable[[Tensor], Tensor]], Tensor]
    """derived(what, build) returns build(C), made once and kept; `what` names all else that determines it."""


Solve = Callable[[LayerProblem], Float[Tensor, "n m"]]
"""X^T of a layer's update dW = R X^T, for whatever residuals R (d, n)."""

UpdateFilter = Callable[[str, Change], Change]
"""What is written instead of a change of the parameter of that name, the weight being as it was before."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers written one after the other towards one value."""

    layers: tuple[int, ...]
    """Ascending; the value is measured at the last."""
    where: Where
    """Token position of the keys."""
    target_tensor: TensorName
    """Tensor of the last layer that shall take on the value."""
    spread: Spread
    solve: Solve
    """How a layer's update is found."""
    module: Literal["down_proj", "o_proj"] = "down_proj"
    """Matrix that is written; its input is the key."""


@dataclass(frozen=True)
class Written:
    """What a group's write changed, by parameter name."""

    changes: dict[str, Change] = field(default_factory=dict)
    keys: dict[str, Float[Tensor, "n m"]] = field(default_factory=dict)
    """Keys that were stored, in the precision they were read in. They hold for the weights after the write too: a key
    depends on the layers below alone."""


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
    update_filter: UpdateFilter | None = None,
    reader: KeyReader | None = None,
) -> Written:
    """The changes that bring each edit's value at the group's last layer to `targets`; they stay applied in `scope`.

    Solves to float64's accuracy; changes have the weights' precision, at least float32.

    Args:
        update_filter: may replace each change before it is applied.
        reader: of these edits and contexts, from an earlier write below this one; saves what that has read.

    Raises:
        NonFinite: a key, a residual or a change is NaN or infinite; the message names the layer.
    """
    written = Written()
    reader = reader or KeyReader(lm, edits, contexts, average=key_average)
    value = Point(group.layers[-1], group.target_tensor)
    for i, layer in enumerate(group.layers):
        site = lm.site(layer, group.module)
        point = Point(layer, "key" if group.module == "down_proj" else "attn_key")
        keys, current = reader.read(point, group.where, value)
        share = divisor(group.spread, len(group.layers) - i)
        residuals = (targets.to(current) - current) / share  # r = (v - h) / s(N - i)
        if not (torch.isfinite(keys).all() and torch.isfinite(residuals).all()):
            raise NonFinite(f"layer {layer}: a key or a residual is NaN or infinite; is the model's dtype wide enough?")
        right = group.solve(problem(lm, site, keys, moments))
        if not torch.isfinite(right).all():
            raise NonFinite(f"layer {layer}: the update is NaN or infinite; the keys may be linearly dependent")
        dtype = torch.promote_types(site.weight.dtype, torch.float32)
        change = site.stored(residuals.T.to(dtype).contiguous(), right.to(dtype))
        if update_filter is not None:
            change = update_filter(site.name, change)
        written.changes[site.name] = change
        written.keys[site.name] = keys
        scope.enter_context(lm.edited(lm.delta({site.name: [change]})))
    return written


def problem(lm: LM, site: Site, keys: Float[Tensor, "n m"], moments: Moments) -> LayerProblem:
    """The problem of storing `keys` (one per row) in `site`."""
    return LayerProblem(
        site,
        keys.double().T,
        partial(moments.second_moment, lm, site),
        partial(moments.factor, lm, site),
        partial(moments.derived, lm, site),
    )


def weighted(moment_weight: float, earlier: Mapping[str, Float[Tensor, "n_earlier m"]] | None = None) -> Solve:
    """MEMIT's solver: X^T = K^T (lambda C + Kp Kp^T + K K^T)^-1.

    Args:
        moment_weight: lambda: how many old keys the second moment stands for.
        earlier: Kp, keys of earlier edits by parameter name, one per row: new keys whose residual is zero.
    """

    def solve(layer: LayerProblem) -> Float[Tensor, "n m"]:
        keys = with_earlier(layer, earlier)
        right = ridge(
            keys, layer.moment, moment_weight, factor=layer.factor, device=layer.site.weight.device
        )  # one row per key; the earlier ones' rows meet a residual of zero
        return right[keys.shape[1] - layer.keys.shape[1] :]

    return solve


def with_earlier(
    layer: LayerProblem, earlier: Mapping[str, Float[Tensor, "n_earlier m"]] | None
) -> Float[Tensor, "m n_all"]:
    """[Kp, K]: the keys of earlier edits of that layer, then its own."""
    kept = (earlier or {}).get(layer.site.name)
    return layer.keys if kept is None else torch.cat([kept.to(layer.keys).T, layer.keys], dim=1)


def divisor(spread: Spread, layers_left: int) -> float:
    """s(N - i): what the missing part is divided by."""
    return float(layers_left) if spread == "even" else math.sqrt(layers_left)
