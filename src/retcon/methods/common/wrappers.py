"""What methods share that filter another method's change: the base method, its settings and what follows from them, and
the way through the matrices of the change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from retcon.attachment import Attachment
from retcon.delta import Change, Delta, Dense, Region, disjoint_regions, only_deltas, sum_of
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.model import LM
from retcon.lm.site import Site, SiteName
from retcon.memory.contexts import Contexts
from retcon.methods.common.contract import Method, State, check_settings
from retcon.methods.common.registry import build


def _as_base(name: str) -> Any:
    """Return a property of a filter that is what the base method has by that name."""
    return property(lambda self: getattr(self.wrapped, name))


@dataclass(frozen=True, kw_only=True)
class Filter(Method):
    """A filter over what a base method writes."""

    base_method: str
    """Method that writes the edits."""
    base_settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The base method's settings; for a model, its preset's with these over them."""

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def base_of(cls, settings: Mapping[str, Any]) -> str:
        """Return the base method that settings name; the filter's default where they name none."""
        return settings.get("base_method", {f.name: f.default for f in fields(cls)}["base_method"])

    @property
    def wrapped(self) -> Method:
        """The base method with its settings.

        Raises:
            InvalidSetting: it goes on with its own change, of which the filter leaves less in the weights.
        """
        base = build(self.base_method, self.base_settings)
        if base.state_is_change:
            raise InvalidSetting(
                f"{self.name}: {self.base_method} with these base_settings trains its own change from batch to batch "
                f"({base.state_description}), of which {self.name} leaves less in the weights; turn that off"
            )
        return base

    def update_of_base(self, proposed: Attachment) -> Delta:
        """Return what the base method proposed, which has to be a change on top of the applied deltas.

        Raises:
            InvalidSetting: it acts beside the weights, or replaces earlier deltas.
        """
        (delta,) = only_deltas([proposed], self.name)
        if delta.supersedes:
            raise InvalidSetting(
                f"{self.name}: {self.base_method} replaces earlier deltas, so its change is no update to filter; take "
                "another base_method, or revert those deltas first"
            )
        return delta

    def state_as_written(
        self, lm: LM, edits: Sequence[Edit], contexts: Contexts, *, earlier: State | None, proposed: State | None
    ) -> State | None:
        """Return what the base method does."""
        return self.wrapped.state_as_written(lm, edits, contexts, earlier=earlier, proposed=proposed)

    supports_batches = _as_base("supports_batches")
    keeps_state = _as_base("keeps_state")
    state_layers = _as_base("state_layers")
    uses_moments = _as_base("uses_moments")
    needs_subject = _as_base("needs_subject")
    takes_shrunk_moments = _as_base("takes_shrunk_moments")

    def check_takes_state(self) -> None:
        """Check that the base method takes it."""
        self.wrapped.check_takes_state()


# --- the matrices of an update -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditedMatrix:
    """One edited matrix: a parameter, or that part of it which its changes are of."""

    region: Region | None
    """The part of the parameter; None: all of it."""
    weight: Tensor
    """As it is stored."""
    changes: list[Change]
    """Those of the parameter, with no region: they are added to a matrix like `weight`."""
    counted: Tensor | None
    """Entries of the fused projections that the changes can touch, where there are others; None: all are."""


def by_matrix(changes: Sequence[Change], shape: torch.Size) -> list[list[Change]]:
    """Return the changes of one parameter of that shape, grouped by the matrix in it that they are of: a projection of
    a fused parameter, or one expert's. Where regions overlap, all are of one matrix, the parameter; of stacked experts
    the sum is taken apart."""
    regions = disjoint_regions(changes)
    if regions is not None:
        return [[c for c in changes if c.region == part] for part in regions]
    if len(shape) != 3:
        return [list(changes)]
    return [[Dense(region=Region(0, e, e + 1), full=own)] for e, own in enumerate(sum_of(changes, shape)) if own.any()]


def edited_matrix(lm: LM, name: str, changes: Sequence[Change], parameter: Tensor) -> EditedMatrix:
    """Return the matrix that changes of one group of `by_matrix` are of; `parameter` holds the weights that are asked
    for: the present ones, or the base's."""
    region = changes[0].region if len({c.region for c in changes}) == 1 else None
    own = parameter if region is None else changes[0].part_of(parameter)
    inside = [change if region is None else replace(change, region=None) for change in changes]
    whole = own.dim() == 2 and (region is None or parameter.dim() == 3)  # not a projection by itself
    counted = counted_entries(inside, own.shape, fused_projections(lm, name)) if whole else None
    return EditedMatrix(region, own, inside, counted)


def fused_projections(lm: LM, name: str) -> list[Site]:
    """Return the projections that share a parameter, of experts those of the first; none where it is not fused."""
    found: list[Site] = []
    for layer in range(lm.n_layers):
        if not name.startswith(lm.layout.block.format(layer) + "."):
            continue
        for kind in get_args(SiteName):
            if lm.parameter(name).dim() == 3:
                found += lm.expert_sites(layer, kind)[:1] if kind in ("gate_proj", "up_proj", "down_proj") else []
            elif lm.has(layer, kind):
                found.append(lm.site(layer, kind))
    return [site for site in found if site.name == name and site.rows is not None]


def counted_entries(changes: Sequence[Change], shape: torch.Size, fused: Sequence[Site]) -> Tensor | None:
    """Return the entries of those fused projections that the changes can touch; None: they are not confined to any."""
    if not fused:
        return None
    touched = torch.zeros(shape, device=changes[0].values().device)
    for change in changes:
        ones: dict[str, Any] = {n: torch.ones_like(t) for n, t in change.tensors().items() if t.is_floating_point()}
        replace(change, **ones).add_to(touched)
    counted = torch.zeros(shape, dtype=torch.bool, device=touched.device)
    for site in fused:
        seen, taken = (t.T if site.transposed else t for t in (touched, counted))
        if bool(seen[site.rows].any()):
            taken[site.rows] = True
    return None if bool(counted.all()) or bool((touched != 0)[~counted].any()) else counted
