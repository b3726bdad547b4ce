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

from retcon.arguments import check_choice
from retcon.delta import Change
from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite
from retcon.lm.forward import Point, TensorName
from retcon.lm.model import LM
from retcon.lm.prompts import Where
from retcon.lm.site import Site
from retcon.memory.contexts import Contexts
from retcon.memory.keys import KeyAverage, KeyReader
from retcon.memory.moments import Moments
from retcon.memory.solve import ridge, ridge_of_experts, whitened

Spread = Literal["even", "sqrt"]
"""Divisor of what is missing with N - i layers left: N - i (MEMIT) or its root (PMET)."""


@dataclass(frozen=True)
class LayerProblem:
    """One layer's linear problem: store `keys`, and leave the old keys alone, whose second moment is C."""

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

    def ridge(self, keys: Float[Tensor, "m n"], weight: float) -> Float[Tensor, "n m"]:
        """K^T (weight C + K K^T)^-1."""
        return ridge(keys, self.moment, weight, factor=self.factor, device=self.site.device)

    def whitened(self, keys: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """C^-1 K."""
        return whitened(keys, self.moment, factor=self.factor, device=self.site.device)


@dataclass(frozen=True)
class ExpertsProblem(LayerProblem):
    """The linear problem of all routed experts of a block: `keys` are stacked, C is block-diagonal and never built."""

    factors: tuple[Callable[[], Float[Tensor, "m m"]], ...] = ()
    """Return the Cholesky factors of each expert's C."""

    def ridge(self, keys: Float[Tensor, "m n"], weight: float) -> Float[Tensor, "n m"]:
        """Do as for one matrix, by one solve that all experts share."""
        by_expert = keys.unflatten(0, (len(self.factors), -1))
        return ridge_of_experts(by_expert, self.factors, weight, self.site.device).transpose(0, 1).flatten(1)


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
    routed: bool = False
    """Write to the routed experts also where a block has a dense or a shared MLP."""


def written_sites(
    lm: LM, layer: int, module: Literal["down_proj", "o_proj"] = "down_proj", *, routed: bool = False
) -> list[Site]:
    """Return the matrices that are written in a layer, one at least; `routed` as in `LM.sites`.

    Raises:
        UnsupportedModel: the block has none; the message says which have one.
    """
    return lm.sites(layer, module, routed=routed) or [lm.site(layer, module)]


def is_routed(lm: LM, layer: int, routed: bool) -> bool:
    """Return whether a layer's routed experts are written: where that is wanted, or where it has no other MLP."""
    return lm.kinds[layer].experts is not None and (routed or not lm.has(layer, "down_proj"))


@dataclass(frozen=True)
class WrittenChanges:
    """What a group's write changed, by parameter name."""

    changes: dict[str, list[Change]] = field(default_factory=dict)
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
) -> WrittenChanges:
    """Return the changes that bring each edit's value at the group's last layer to `targets`, applied in `scope`.

    Solves to float64's accuracy; changes have the weights' precision, at least float32.

    Args:
        update_filter: may replace each change before it is applied.
        reader: of these edits and contexts, from an earlier write below this one; saves what that has read.

    Raises:
        NonFinite: a key, a residual or a change is NaN or infinite; the message names the layer.
    """
    written = WrittenChanges()
    reader = reader or KeyReader(lm, edits, contexts, average=key_average)
    value = Point(group.layers[-1], group.target_tensor)
    for i, layer in enumerate(group.layers):
        sites = written_sites(lm, layer, group.module, routed=group.routed)
        if sites[0].expert is not None:
            by_expert, current = reader.read_experts(layer, group.where, value)
            keys = by_expert.transpose(0, 1).flatten(1)
        else:
            point = Point(layer, "key" if group.module == "down_proj" else "attn_key")
            keys, current = reader.read(point, group.where, value)
        share = divisor(group.spread, len(group.layers) - i)
        residuals = (targets.to(current) - current) / share  # r = (v - h) / s(N - i)
        if not (torch.isfinite(keys).all() and torch.isfinite(residuals).all()):
            raise NonFinite(f"layer {layer}: a key or a residual is NaN or infinite; is the model's dtype wide enough?")
        right = group.solve(problem(lm, sites, keys, moments))
        if not torch.isfinite(right).all():
            raise NonFinite(f"layer {layer}: the update is NaN or infinite; the keys may be linearly dependent")
        dtype = torch.promote_types(sites[0].dtype, torch.float32)
        left = residuals.T.to(dtype).contiguous()
        changes = []
        for site, part in zip(sites, right.to(dtype).chunk(len(sites), 1), strict=True):
            if site.expert is not None and not part.any():
                continue
            change = site.stored(left, part.contiguous())
            changes.append(change if update_filter is None else update_filter(site.name, change))
        name = sites[0].name
        written.changes[name] = changes
        written.keys[name] = keys
        scope.enter_context(lm.edited(lm.delta({name: changes})))
    return written


def problem(lm: LM, sites: Sequence[Site], keys: Float[Tensor, "n m"], moments: Moments) -> LayerProblem:
    """Return the problem of storing `keys` (one per row) in a matrix, or in those of all routed experts of a block."""
    if sites[0].expert is None:
        return LayerProblem(
            sites[0],
            keys.double().T,
            partial(moments.second_moment, lm, sites[0]),
            partial(moments.factor, lm, sites[0]),
            partial(moments.derived, lm, sites[0]),
        )
    return ExpertsProblem(
        sites[0],
        keys.double().T,
        _not_for_experts,
        _not_for_experts,
        _not_for_experts,
        tuple(partial(moments.factor, lm, site) for site in sites),
    )


def _not_for_experts(*_: object) -> Tensor:
    raise InvalidSetting(
        "this method's solve knows one matrix per layer, not the routed experts of a mixture; memit and jeep write to "
        "those"
    )


def weighted(moment_weight: float) -> Solve:
    """Return MEMIT's solver for a first batch: X^T = K^T (lambda C + K K^T)^-1.

    Args:
        moment_weight: lambda: how many old keys the second moment counts as.
    """
    return lambda layer: layer.ridge(layer.keys, moment_weight)


def with_earlier(
    layer: LayerProblem, earlier: Mapping[str, Float[Tensor, "n_earlier m"]] | None
) -> Float[Tensor, "m n_all"]:
    """[Kp, K]: the keys of earlier edits of that layer, then its own."""
    kept = (earlier or {}).get(layer.site.name)
    return layer.keys if kept is None else torch.cat([kept.to(layer.keys).T, layer.keys], dim=1)


def divisor(spread: Spread, layers_left: int) -> float:
    """s(N - i): what the missing part is divided by.

    Raises:
        InvalidSetting: no such spread.
    """
    check_choice(spread, Spread, "spread")
    return float(layers_left) if spread == "even" else math.sqrt(layers_left)
