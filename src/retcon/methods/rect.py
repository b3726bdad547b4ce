"""RECT: of another method's update, write only the entries that change their weight most, relative to its size.

Gu et al. 2024, arXiv:2401.04700, section 5. Departures: docs/methods/rect.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retcon.delta import Change, Delta, Dense, Entries, Region, sum_of
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.devices import float64_device, in_float64
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import State, made_by
from retcon.methods.common.proposal import report_after
from retcon.methods.common.settings import NotNegative
from retcon.methods.common.wrappers import Filter, by_matrix, edited_matrix
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class Rect(Filter):
    """Relative change in weight: a filter over a base method."""

    name: ClassVar[str] = "rect"
    state_description: ClassVar[str] = "as its base method"

    base_method: str = "memit"
    """Method whose update is filtered."""
    keep_percent: float | None = None
    """k: how much of the update is kept. None: 20 for methods that take one fact (the authors' for ROME), 40 for others
    (AlphaEdit's for MEMIT)."""
    denominator: Literal["absolute", "signed"] = "absolute"
    """Relative to |W| + eps, or to |W + eps| (AlphaEdit's code, where entries near -eps blow up)."""
    count: Literal["exact", "released"] = "exact"
    """Exactly the k % largest, the first of equals; or all from AlphaEdit's threshold on, which is one more."""
    eps: NotNegative = 1e-8
    """Added to the denominator."""
    in_loop: bool = False
    """True: each layer is filtered before the next is solved, so that later ones make up for it (ours)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_percent is not None and not 0 <= self.keep_percent <= 100:
            raise InvalidSetting(f"rect: keep_percent must be from 0 to 100, found {self.keep_percent}")
        if self.in_loop and not self.wrapped.layerwise:
            raise InvalidSetting(
                f"rect: in_loop needs a base method that writes layer by layer; {self.base_method} does not"
            )

    def propose(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        state: State | None = None,
        values: ValueCache | None = None,
        keep_values: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Delta:
        """Return the base method's change, filtered; the model is untouched. The state is the base method's, of the
        weights after the filter."""
        k = self.keep_percent
        if k is None:
            k = 40.0 if self.supports_batches else 20.0

        def update_filter(name: str, change: Change) -> Change:
            return self.filtered_change(lm, name, [change], k)

        while_writing: dict[str, Any] = {"update_filter": update_filter} if self.in_loop else {}
        proposed = self.wrapped.propose(
            lm,
            edits,
            contexts=contexts,
            moments=moments,
            state=state,
            values=values,
            keep_values=keep_values,
            seed=seed,
            progress=progress,
            **while_writing,
        )
        delta = self.update_of_base(proposed)
        about = {**delta.provenance, **made_by(self)}
        record: dict[str, Any] = dict(edits=delta.edits, contexts=delta.contexts, values=delta.values, provenance=about)
        changes = delta.changes if self.in_loop else self._filtered_changes(lm, delta, k)
        filtered = lm.delta(changes, report=delta.report, **record)
        next_state = delta.state
        with lm.edited(filtered):
            report = report_after(lm, edits, filtered.report)
            if not self.in_loop:
                written_with = Contexts(delta.contexts)
                next_state = self.state_as_written(lm, edits, written_with, earlier=state, proposed=delta.state)
        return lm.delta(changes, report=report, state=next_state, **record)

    def _filtered_changes(self, lm: LM, delta: Delta, keep_percent: float) -> dict[str, tuple[Change, ...]]:
        return {
            name: tuple(
                self.filtered_change(lm, name, of_one, keep_percent) for of_one in by_matrix(changes, lm.shape_of(name))
            )
            for name, changes in delta.changes.items()
        }

    def filtered_change(self, lm: LM, name: str, changes: Sequence[Change], keep_percent: float) -> Change:
        """Return what is written in place of the changes of one matrix in a parameter: their sum, filtered."""
        matrix = edited_matrix(lm, name, changes, lm.parameter(name).detach())
        own, counted = matrix.weight, matrix.counted
        update = sum_of(matrix.changes, own.shape)
        if counted is None:
            update = self.filtered(update, own, keep_percent)
        else:
            update[counted] = self.filtered(update[counted], own[counted.to(own.device)], keep_percent)
        return as_change(update, matrix.region)

    def filtered(
        self, update: Float[Tensor, "*shape"], weight: Float[Tensor, "*shape"], keep_percent: float
    ) -> Float[Tensor, "*shape"]:
        """`update` with all but its relatively largest entries zero; any orientation."""
        where = float64_device(weight.device, max(weight.shape))
        size = weight.abs() if self.denominator == "absolute" else weight
        relative = (in_float64(update, where) / (in_float64(size, where) + self.eps)).abs().flatten()
        chosen = self._chosen(relative, keep_percent).view_as(update).to(update.device)
        return torch.where(chosen, update, torch.zeros_like(update))

    def _chosen(self, relative: Float[Tensor, " n"], keep_percent: float) -> Bool[Tensor, " n"]:
        n = relative.numel()
        if self.count == "released":
            rank = int(n * (100 - keep_percent) / 100)
            return relative >= relative.kthvalue(rank).values if rank else torch.ones_like(relative, dtype=torch.bool)
        wanted = math.ceil(keep_percent * n / 100)
        if not wanted:
            return torch.zeros_like(relative, dtype=torch.bool)
        smallest_kept = relative.kthvalue(n - wanted + 1).values
        chosen = relative > smallest_kept
        equal = (relative == smallest_kept).nonzero()[:, 0]
        chosen[equal[: wanted - int(chosen.sum())]] = True  # of equals, the first
        return chosen


def as_change(update: Tensor, region: Region | None = None) -> Change:
    """Return a filtered update in its smallest exact form: its entries, or all of it where those take more room.

    Args:
        region: the part of the parameter that it is added to; None: the whole.
    """
    index = update.flatten().nonzero()[:, 0]
    if len(index) * (8 + update.element_size()) < update.numel() * update.element_size():
        return Entries(region=region, index=index, entries=update.flatten()[index])
    return Dense(region=region, full=update.contiguous())
