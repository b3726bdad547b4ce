"""PRUNE: after many edits, hold down the large singular values of the whole change.

Ma et al. 2024, arXiv:2405.16821, section 4; symbols as there. Departures: docs/methods/prune.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.arguments import check_choice
from retcon.delta import Change, Delta, LowRank, only_deltas, smallest, sum_of
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.devices import CPU, float64_device, in_float64
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import State, made_by, recorded
from retcon.methods.common.proposal import report_after
from retcon.methods.common.sequence import combined
from retcon.methods.common.wrappers import Filter, by_matrix, edited_matrix
from retcon.work import Progress

Restraint = Literal["log", "linear"]


@dataclass(frozen=True, kw_only=True)
class Prune(Filter):
    """Perturbation restraint on the upper bound of the condition number: a filter over all edits so far."""

    name: ClassVar[str] = "prune"
    state_description: ClassVar[str] = "as its base method; the base weights are the model's own"
    replaces_applied: ClassVar[bool] = True

    base_method: str = "rome"
    """Method that writes the edits given; with none given, the applied deltas are restrained."""
    alpha: float = math.e
    """Base of the logarithm; smaller restrains less (published: e, 2, 1.5, 1.2)."""
    restraint: Restraint = "log"
    """F(s) of singular values s above sigma: log_alpha(s) - log_alpha(sigma) + sigma, or (s + sigma) / 2."""
    guard: bool = True
    """min(s, F(s)): F raises values just above sigma where sigma ln(alpha) < 1. False: F as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 1:
            raise InvalidSetting(f"prune: alpha must be above 1, found {self.alpha}")

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
        """Return one delta in place of all applied ones and the base method's for `edits`: their sum, restrained.

        Applying it reverts those, reverting it restores them. The model is untouched. Reports are those of
        the deltas it replaces, with what the model says after the restraint.
        """
        fresh: Delta | None = None
        if edits:
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
            )
            fresh = self.update_of_base(proposed)
        parts = [*only_deltas(lm.applied, "prune"), *([fresh] if fresh else [])]
        changes, n_lowered = self._restrained_changes(lm, parts)
        all_edits = [edit for part in parts for edit in part.edits]
        made = recorded(self, lm, all_edits, seed=seed) if fresh is None else {"provenance": dict(fresh.provenance)}
        about = {**made_by(self), "singular_values_restrained": n_lowered}
        report = tuple(r for part in parts for r in part.report)
        kept: dict[str, Any] = dict(
            state=fresh.state if fresh else state,
            supersedes=tuple(d.id for d in lm.applied),
            edits=tuple(all_edits),
            contexts=fresh.contexts if fresh else (),
            values=fresh.values if fresh else None,
            provenance=made["provenance"] | about,
        )
        delta = lm.delta(changes, report=report, **kept)
        with lm.edited(delta):
            if fresh and any(n_lowered.values()):
                written_with = Contexts(fresh.contexts)
                kept["state"] = self.state_as_written(lm, edits, written_with, earlier=state, proposed=fresh.state)
            if len(all_edits) == len(report):  # a delta without a record of its edits cannot be asked about them
                report = report_after(lm, all_edits, report)
        return lm.delta(changes, report=report, **kept)

    def _restrained_changes(self, lm: LM, parts: Sequence[Delta]) -> tuple[dict[str, Sequence[Change]], dict[str, int]]:
        """Return the sum of the parts after the restraint, by parameter, and how many singular values it lowered."""
        changes: dict[str, Sequence[Change]] = {}
        n_lowered: dict[str, int] = {}
        for name in dict.fromkeys(name for part in parts for name in part.changes):
            own = [change for part in parts for change in part.changes.get(name, ())]
            of_each = [self._restrained(lm, name, of_one) for of_one in by_matrix(own, lm.shape_of(name))]
            changes[name] = [change for held, _ in of_each for change in held]
            n_lowered[name] = sum(n for _, n in of_each)
        return changes, n_lowered

    def _restrained(self, lm: LM, name: str, changes: Sequence[Change]) -> tuple[Sequence[Change], int]:
        """Return the sum of one matrix's changes after the restraint, and how many singular values it lowered."""
        matrix = edited_matrix(lm, name, changes, lm.base_weight(name))
        base = matrix.weight
        if matrix.counted is not None:
            base = torch.where(matrix.counted.to(base.device), base, 0)
        if base.dim() != 2:
            return combined(changes, base.shape), 0
        where = float64_device(lm.parameter(name).device, max(base.shape))
        u, s, vh = singular_values(matrix.changes, base.shape, where)
        sigma = torch.linalg.matrix_norm(in_float64(base, where), ord=2)
        above = int((s > sigma).sum())
        if not above:
            return combined(changes, base.shape), 0
        dtype = torch.promote_types(base.dtype, torch.float32)
        left = u * restrain(s, float(sigma), self.alpha, self.restraint, guard=self.guard)
        return (replace(smallest(left.to("cpu", dtype), vh.to("cpu", dtype)), region=matrix.region),), above


def restrain(
    s: Float[Tensor, " rank"], sigma: float, alpha: float = math.e, restraint: Restraint = "log", *, guard: bool = True
) -> Float[Tensor, " rank"]:
    """F(s): singular values up to sigma as they are, larger ones held down (Eq. 5).

    Raises:
        InvalidSetting: no such restraint.
    """
    check_choice(restraint, Restraint, "restraint")
    high = s.clamp_min(sigma)
    f = (high / sigma).log() / math.log(alpha) + sigma if restraint == "log" else (high + sigma) / 2
    f = torch.where(s > sigma, f, s)
    return torch.minimum(f, s) if guard else f


def singular_values(
    changes: Sequence[Change], shape: torch.Size, device: torch.device = CPU
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, " rank"], Float[Tensor, "rank columns"]]:
    """U, s, V^T of the sum of changes, float64, found on `device`; through its factors where those are thin."""
    parts = combined(changes, shape)
    whole = parts[0]
    if len(parts) > 1 or not isinstance(whole, LowRank) or whole.region is not None:
        return torch.linalg.svd(sum_of(parts, shape, torch.float64).to(device), full_matrices=False)
    ql, rl = torch.linalg.qr(whole.left.to(device, torch.float64))
    qr, rr = torch.linalg.qr(whole.right.to(device, torch.float64).T)
    u, s, vh = torch.linalg.svd(rl @ rr.T, full_matrices=False)
    return ql @ u, s, vh @ qr.T
