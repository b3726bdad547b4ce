"""What differs between two checkpoints: which matrices, by what rank and norm, which settings, and which answers.

found = audit(base, edited, edits=facts, known=deltas)
found.delta.save("difference.safetensors")     # anybody's edit as a delta: measured, undone, exported like any other
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.attachment import list_of_deltas
from retcon.delta import Change, Delta, Dense, LowRank, Region, Rows, sum_of
from retcon.edits import Edit, list_of_edits
from retcon.errors import DeltaMismatch, NonFinite, RetconWarning
from retcon.evaluation.metrics import gen_prefix
from retcon.lm.devices import float64_device
from retcon.lm.fingerprint import settings_that_differ
from retcon.lm.generate import Writing, texts_after
from retcon.lm.model import LM
from retcon.version import __version__


@dataclass(frozen=True)
class Difference:
    """How one parameter differs."""

    parameter: str
    norm: float
    """Frobenius norm of the difference."""
    share: float
    """The same over the norm of the base's values; infinite where those are zero."""
    rank: int | None
    """Singular values above what rounding to the stored dtype explains; of a tensor of experts, those of the expert
    that has most; None for a vector."""
    n_values: int
    """Values that differ."""
    unexplained: float | None
    """Norm of what the known deltas leave unexplained, over the norm; None where none are known."""


@dataclass(frozen=True)
class Answer:
    """What both models say after one fact's prompt."""

    edit: Edit
    base: str
    edited: str

    @property
    def changed(self) -> bool:
        """Whether the two answers differ."""
        return self.base != self.edited

    @property
    def took(self) -> bool:
        """Whether the edited model's answer begins with the fact's new one, as `gen.prefix` has it: in whole words."""
        return gen_prefix(self.edited, ((self.edit.target_new,),))


@dataclass(frozen=True)
class Audit:
    """Everything that was found to differ."""

    differences: tuple[Difference, ...]
    n_parameters: int
    answers: tuple[Answer, ...]
    delta: Delta
    """The difference, so that base + delta are the edited weights."""
    exact: bool
    """Whether that holds bit for bit in the base's dtype (else to float32's rounding)."""
    absent: Mapping[str, float]
    """Norm of what the known deltas change in parameters that do not differ, by parameter: they are not in there."""
    left_out: Mapping[str, str]
    """Parameters and buffers that differ and that no delta can hold, such as tied embeddings, with the reason."""
    settings: Mapping[str, tuple[Any, Any]]
    """Settings of the configs that differ and enter a forward pass: the base's value and the other's."""

    @property
    def unexplained(self) -> float | None:
        """Norm of the difference less the known deltas, over that of the difference; None where none are known, and
        infinite where only known deltas differ from the base."""
        if any(d.unexplained is None for d in self.differences):
            return None
        whole = math.hypot(*(d.norm for d in self.differences))
        left = math.hypot(*(d.norm * (d.unexplained or 0.0) for d in self.differences), *self.absent.values())
        return left / whole if whole else math.inf if left else 0.0


def audit(
    base: LM, edited: LM, *, edits: Iterable[Edit] = (), known: Iterable[Delta] = (), max_new_tokens: int = 12
) -> Audit:
    """Compare the base's own weights with those of `edited`, as it is now.

    Args:
        edits: facts whose prompts both models are asked.
        known: deltas that may explain the difference; one that was made for another base is warned of.

    Raises:
        DeltaMismatch: the two are no models of one shape, or a known delta does not fit it.
        NotEditable: they differ in a parameter that is quantised.
        NonFinite: they differ in a parameter that holds NaN or infinity.
    """
    edits, known = list_of_edits(edits), list_of_deltas(known)
    theirs = {name for name, _ in edited.model.named_parameters()}
    names = [name for name, _ in base.model.named_parameters()]
    if set(names) != theirs:
        odd = sorted(set(names) ^ theirs)
        raise DeltaMismatch(f"the models have other parameters ({odd[0]}, ...); an audit compares two of one shape")
    explained: dict[str, list[Change]] = {}
    for delta in known:
        base.check_shapes(delta)
        if delta.base != base.fingerprint():
            warnings.warn(
                f"delta {delta.id} was made for other weights than those of {base.label}; it may explain less of the "
                "difference than it does on its own base",
                RetconWarning,
                stacklevel=2,
            )
        for name, own in delta.changes.items():
            explained.setdefault(name, []).extend(own)
    found: list[Difference] = []
    changes: dict[str, list[Change]] = {}
    absent: dict[str, float] = {}
    left_out: dict[str, str] = {}
    exact = True
    with base.without_deltas(), torch.no_grad():
        for name in names:
            ours, other = base.parameter(name).detach().cpu(), edited.parameter(name).detach().cpu()
            if ours.shape != other.shape:
                raise DeltaMismatch(f"{name}: shapes differ, {tuple(ours.shape)} and {tuple(other.shape)}")
            wider = torch.promote_types(ours.dtype, other.dtype)
            if torch.equal(ours.to(wider), other.to(wider)):
                if name in explained:
                    norm = _left(torch.zeros(ours.shape, dtype=torch.float64), explained[name], other)
                    if norm > 0:
                        absent[name] = norm
                continue
            if not ours.is_floating_point():
                base.check_editable(name)
            difference = other.double() - ours.double()
            if not torch.isfinite(difference).all():
                broken = base if not torch.isfinite(ours).all() else edited
                raise NonFinite(
                    f"{name} of {broken.label} holds NaN or infinity, which has no norm; an audit compares numbers. "
                    "Mend that checkpoint, or take another one"
                )
            where = float64_device(base.parameter(name).device, max(ours.shape))
            ranks = _ranks(difference, other, where)
            found.append(_difference(name, difference, ours, other, explained.get(name, []) if known else None, ranks))
            if name in base.not_editable:
                left_out[name] = base.not_editable[name]
                continue
            for region, rank in ranks.items():
                part = slice(None) if region is None else region.start
                change, is_exact = _change(difference[part], ours[part], other[part], rank, where)
                changes.setdefault(name, []).append(replace(change, region=region))
                exact &= is_exact
        left_out |= _buffers_that_differ(base, edited)
    settings = settings_that_differ(base.model.config, edited.model.config)
    answers = _answers(base, edited, edits, max_new_tokens) if edits else ()
    delta = Delta(
        {name: tuple(c) for name, c in changes.items()},
        base=base.fingerprint(),
        provenance={
            "method": "audit",
            "edited": edited.label,
            "model": base.label,
            "versions": {"retcon": __version__},
        },
    )
    return Audit(tuple(found), len(names), answers, delta, exact and not left_out, absent, left_out, settings)


def _difference(
    name: str,
    difference: Tensor,
    ours: Tensor,
    other: Tensor,
    known: Sequence[Change] | None,
    ranks: Mapping[Region | None, int | None],
) -> Difference:
    norm, whole = float(difference.norm()), float(ours.double().norm())
    unexplained = None
    if known is not None:
        unexplained = _left(difference, known, other) / norm
    return Difference(
        name,
        norm,
        norm / whole if whole else math.inf,
        max((rank for rank in ranks.values() if rank is not None), default=None),
        int((difference != 0).sum()),
        unexplained,
    )


def _buffers_that_differ(base: LM, edited: LM) -> dict[str, str]:
    """Return the buffers, such as a router's biases, that checkpoints hold and that differ, with why no delta can."""
    ours, others = (
        {name: state[name].cpu() for name, _ in lm.model.named_buffers() if name in state}
        for lm, state in ((each, each.model.state_dict()) for each in (base, edited))
    )
    return {
        name: "it is a buffer, and deltas change parameters"
        for name in sorted(ours.keys() | others.keys())
        if name not in ours or name not in others or not torch.equal(ours[name], others[name])
    }


def _left(difference: Tensor, known: Sequence[Change], other: Tensor) -> float:
    """Return the norm of a difference less the known changes, and less what rounding to the stored dtype explains."""
    if not known:
        return float(difference.norm())
    made = sum_of(known, difference.shape, torch.float64, "cpu")
    moved = (difference != 0) | (made != 0)  # no edit has rounded the others
    rounding = _rounding(other[moved]) * math.sqrt(int(moved.sum())) if moved.any() else 0.0
    return max(0.0, float((difference - made).norm()) - rounding)


def _rounding(stored: Tensor) -> float:
    """Return the root mean square of what rounding to the stored dtype adds to a value."""
    return torch.finfo(stored.dtype).eps * float(stored.double().square().mean().sqrt()) / math.sqrt(12)


def _ranks(difference: Tensor, stored: Tensor, where: torch.device) -> dict[Region | None, int | None]:
    """Return the rank of a difference: of a tensor of experts by the region of each that differs; None of a vector."""
    if difference.dim() == 2:
        return {None: _rank(difference, stored, where)}
    if difference.dim() == 3 and min(difference.shape[1:]) > 1:  # else the kernels of a convolution
        experts = difference.flatten(1).any(1).nonzero()[:, 0].tolist()
        return {Region(0, e, e + 1): _rank(difference[e], stored[e], where) for e in experts}
    return {None: None}


def _rank(difference: Float[Tensor, "rows columns"], stored: Tensor, where: torch.device) -> int:
    """Count the singular values above twice the largest that rounding has in the rows and columns that differ.

    Its entries are independent and each is as large as the value that was rounded (Bandeira and van Handel 2016).
    """
    moved = difference != 0
    rows, columns = moved.any(1), moved.any(0)
    variance = (torch.finfo(stored.dtype).eps * stored[rows][:, columns].double()).square() / 12
    largest = variance.sum(1).max().sqrt() + variance.sum(0).max().sqrt()
    singular = torch.linalg.svdvals(difference[rows][:, columns].to(where))
    return max(1, int((singular > 2 * float(largest)).sum()))


def _change(
    difference: Tensor, ours: Tensor, other: Tensor, rank: int | None, where: torch.device
) -> tuple[Change, bool]:
    """Return the difference in the smallest form that gives the edited values exactly; whether there is one."""
    dtype = torch.promote_types(ours.dtype, torch.float32)
    full = Dense(full=difference.to(dtype).contiguous())
    candidates: list[Change] = []
    if difference.dim() == 2:
        rows = difference.ne(0).any(1).nonzero()[:, 0]
        if len(rows) < len(difference) // 2:
            candidates.append(Rows(index=rows, rows=difference[rows].to(dtype).contiguous()))
        if rank is not None and rank * sum(difference.shape) < difference.numel():
            u, s, v = (x.cpu() for x in torch.linalg.svd(difference.to(where), full_matrices=False))
            root = s[:rank].sqrt()
            left, right = (u[:, :rank] * root).to(dtype), (root[:, None] * v[:rank]).to(dtype)
            candidates.insert(0, LowRank(left=left.contiguous(), right=right.contiguous()))
    for change in [*candidates, full]:
        total = ours.to(dtype) + change.dense(ours.shape, dtype)
        if torch.equal(total.to(ours.dtype), other.to(ours.dtype)):
            return change, True
    return full, False


def _answers(base: LM, edited: LM, edits: Sequence[Edit], max_new_tokens: int) -> tuple[Answer, ...]:
    asked = [(edit.text, edit.chat) for edit in edits]
    how = Writing(max_new_tokens=max_new_tokens, skip_newlines=True)
    with base.without_deltas():
        before = texts_after(base, asked, how)
    after = texts_after(edited, asked, how)
    return tuple(Answer(e, b, a) for e, b, a in zip(edits, before, after, strict=True))
