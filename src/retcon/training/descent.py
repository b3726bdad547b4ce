"""The loop of masked tuning: epochs over edits in mini-batches, each edit until its own loss is small.

The loop knows nothing of parts, optimisers or methods: `prepare` gives it a mini-batch's losses and the step that is
to be taken on it. `accumulate` is the gradient of a mini-batch, computed in pieces that fit in memory.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.arguments import check_choice
from retcon.delta import EditReport
from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite, RetconWarning
from retcon.lm.prompts import Row
from retcon.seed import generator_of
from retcon.work import silent

Reduction = Literal["per_edit", "per_token"]
"""How losses of a mini-batch become one: the mean over edits, or over answer tokens (longer answers weigh more)."""
Skip = Literal["edit", "batch"]

Losses = Callable[[Sequence[int]], Float[Tensor, " n"]]
"""Loss L_e of each of these edits, differentiable."""


@runtime_checkable
class EditLoss(Protocol):
    """A loss per edit, for any of them at a time: `AnswerLoss`, or another objective of the same shape."""

    @property
    def rows(self) -> Sequence[Row]:
        """The edits' rows; the lengths of their answers weigh under `per_token`."""

    def __call__(self, items: Sequence[int]) -> Float[Tensor, " n"]:
        """Return the losses of these edits, differentiable."""

    def chunks(self, items: Sequence[int]) -> list[list[int]]:
        """Return `items` in groups that fit in memory."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to go on."""

    epochs: int = 25
    """Passes over the edits, at most."""
    batch_size: int | None = None
    """Edits per step, drawn anew each epoch; None: all of a call, so that an epoch is a step."""
    stop_loss: float = 1e-2
    """An edit whose loss is below this leaves the gradient, and comes back if it rises again; 0: never."""
    skip: Skip = "edit"
    """`batch`: a mini-batch is left out whole once its mean loss is below `stop_loss`, and counts whole until then.
    That is the end where the edits are one mini-batch; where they are several, the next epoch draws others."""

    def __post_init__(self) -> None:
        check_choice(self.skip, Skip, "skip")
        if self.epochs < 0 or self.stop_loss < 0:
            raise InvalidSetting(f"epochs and stop_loss must not be negative, found {self.epochs} and {self.stop_loss}")
        if self.batch_size is not None and self.batch_size < 1:
            raise InvalidSetting(f"batch_size must be at least 1, or None for all edits; found {self.batch_size}")


@dataclass(frozen=True)
class Step:
    """A mini-batch whose losses are known, before its step is taken."""

    losses: dict[int, float]
    """L_e of each of its edits."""
    active: Sequence[int] = ()
    """The edits that take part in the step; none: there is no step to take."""
    take: Callable[[], None] = lambda: None
    """Takes the step."""


@dataclass(frozen=True)
class Descent:
    """How a descent ended, per edit."""

    loss: tuple[float, ...]
    """L_e with the final values in place."""
    steps: tuple[int, ...]
    """Steps that the edit took part in; with `skip="batch"` those of its mini-batches, whatever its own loss was."""
    stopped: tuple[str, ...]
    """`reached` (below `stop_loss`), `steps` (out of epochs) or `non_finite` (a loss overflowed; the last finite values
    are kept)."""

    def first(self, n: int) -> "Descent":
        """Return how it ended for the first `n` edits."""
        return Descent(self.loss[:n], self.steps[:n], self.stopped[:n])

    def report(self, edits: Sequence[Edit]) -> tuple[EditReport, ...]:
        """Return the edits' reports; probability is exp(-L_e)."""
        each = zip(edits, self.loss, self.steps, self.stopped, strict=True)
        return tuple(EditReport(e.id, math.exp(-loss), n, why, {"nll": loss}) for e, loss, n, why in each)


def shares(rows: Sequence[Row], items: Sequence[int], reduction: Reduction) -> Float[Tensor, " n"]:
    """Return what each edit of a mini-batch contributes to its loss; sums to 1.

    Raises:
        InvalidSetting: no such reduction.
    """
    check_choice(reduction, Reduction, "reduction")
    if reduction == "per_edit":
        return torch.full((len(items),), 1 / len(items), dtype=torch.float64)
    lengths = torch.tensor([len(rows[i].target_ids) for i in items], dtype=torch.float64)
    return lengths / lengths.sum()


def accumulate(
    losses: Losses, chunks: Sequence[Sequence[int]], weight: Callable[[int, float], float]
) -> dict[int, float]:
    """Add the gradient of sum_e weight(e, L_e) L_e to `.grad` of whatever the losses depend on; gives back every L_e.

    `weight` sees the loss, so that an edit below its threshold can be left out (0). Nothing is added for a chunk with a
    loss that is NaN or infinite, nor for one that depends on nothing that is trained: no token of it may be routed to a
    trained expert.
    """
    found: dict[int, float] = {}
    for chunk in chunks:
        with torch.enable_grad():
            now = losses(chunk)
            values = now.detach().tolist()
            found |= dict(zip(chunk, values, strict=True))
            weights = [weight(i, value) for i, value in zip(chunk, values, strict=True)]
            if any(weights) and now.requires_grad and all(map(math.isfinite, values)):
                (now * torch.tensor(weights, dtype=now.dtype, device=now.device)).sum().backward()
    return found


@torch.no_grad()
def losses_now(loss: EditLoss, items: Sequence[int] | None = None) -> dict[int, float]:
    """Return the losses of these edits, None: of all, as they are now."""
    chunks = loss.chunks(range(len(loss.rows)) if items is None else items)
    return {i: x for chunk in chunks for i, x in zip(chunk, loss(chunk).tolist(), strict=True)}


def stepping(
    loss: EditLoss,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    reduction: Reduction,
    stop: EditLoss | None = None,
) -> Callable[[list[int]], Step]:
    """Return `prepare` for `descend`: optimiser steps on the edits whose loss is not yet below the threshold.

    Args:
        stop: the loss that is held against the threshold in place of the one that is trained.
    """

    def prepare(items: list[int]) -> Step:
        share = dict(zip(items, shares(loss.rows, items, reduction).tolist(), strict=True))
        threshold = schedule.stop_loss
        if schedule.skip == "batch":  # its mean must be known before anything is left out
            before = losses_now(loss, items)
            if sum(share[i] * x for i, x in before.items()) < threshold:
                return Step(before)
            threshold = 0.0
        judged = {} if stop is None else losses_now(stop, items)
        optimizer.zero_grad()
        now = accumulate(
            loss, loss.chunks(items), lambda i, value: share[i] if judged.get(i, value) >= threshold else 0.0
        )
        if not all(map(math.isfinite, now.values())):
            return Step(now)
        held = {**now, **judged}
        return Step(held, [i for i, value in held.items() if value >= threshold], lambda: optimizer.step())

    return prepare


def descend(
    edits: Sequence[Edit],
    prepare: Callable[[list[int]], Step],
    evaluate: Callable[[], Mapping[int, float]],
    values: Callable[[], Sequence[Tensor]],
    schedule: Schedule,
    *,
    seed: int = 0,
    before_epoch: Callable[[int], None] = lambda epoch: None,
    after_step: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = silent,
) -> Descent:
    """Minimise the edits' losses until each is below its threshold, or the epochs are over.

    Where a loss is NaN or infinite after a step, the last one included, the descent ends there, with a warning and with
    the last values that gave finite losses.

    Args:
        prepare: computes a mini-batch's losses and gradient; its step is taken where all losses are finite.
        evaluate: every edit's loss as it is now.
        values: the tensors being trained; `before_epoch` may replace one by a longer one, with zeros in the rows at its
            end.
        seed: draws the mini-batches.
        after_step: projections, reallocation and the like.
        progress: called with (epochs done, epochs at most).

    Raises:
        NonFinite: a loss is NaN or infinite before any step was taken; the message names the edit.
    """
    n = len(edits)
    size = n if schedule.batch_size is None else min(schedule.batch_size, n)
    generator = generator_of(seed)
    steps = [0] * n
    kept: list[Tensor] = []  # the values before the last step, with which its losses were finite
    for epoch in range(schedule.epochs):
        before_epoch(epoch)
        losses: dict[int, float] = {}
        order = torch.randperm(n, generator=generator).tolist() if size < n else list(range(n))
        for first in range(0, n, size):
            step = prepare(order[first : first + size])
            bad = next((i for i, loss in step.losses.items() if not math.isfinite(loss)), None)
            if bad is not None:
                return _give_up(edits, bad, step.losses[bad], values(), kept, evaluate, steps)
            losses |= step.losses
            if step.active:
                keep_values(values(), kept)
                step.take()
                after_step()
            for i in step.active:
                steps[i] += 1
        progress(epoch + 1, schedule.epochs)
        if all(loss < schedule.stop_loss for loss in losses.values()):  # then no step was taken in this epoch
            return Descent(_in_order(losses), tuple(steps), ("reached",) * n)
        if size == n and not step.active:  # the batch was left out, and nothing of it will change
            break
    final = evaluate()
    bad = next((i for i, loss in final.items() if not math.isfinite(loss)), None)
    if bad is not None:
        return _give_up(edits, bad, final[bad], values(), kept, evaluate, steps)
    loss = _in_order(final)
    return Descent(loss, tuple(steps), tuple("reached" if x < schedule.stop_loss else "steps" for x in loss))


def _in_order(losses: Mapping[int, float]) -> tuple[float, ...]:
    return tuple(losses[i] for i in range(len(losses)))


def _give_up(
    edits: Sequence[Edit],
    bad: int,
    loss: float,
    values: Sequence[Tensor],
    kept: Sequence[Tensor],
    evaluate: Callable[[], Mapping[int, float]],
    steps: Sequence[int],
) -> Descent:
    """Restore the last values that gave finite losses, warn, and return how the descent ended."""
    named = f"edit {edits[bad].id!r} ({edits[bad].subject!r})"
    if not any(steps):
        raise NonFinite(f"{named}: the loss is {loss} before any step; the model itself gives no finite probability")
    warnings.warn(
        f"{named}: the loss became {loss} after {max(steps)} steps; the last finite values are kept. Lower the "
        "learning rate.",
        RetconWarning,
        stacklevel=3,
    )
    restore_values(values, kept)
    return Descent(_in_order(evaluate()), tuple(steps), ("non_finite",) * len(edits))


@torch.no_grad()
def keep_values(values: Sequence[Tensor], kept: list[Tensor]) -> None:
    """Copy the values to `kept`, into the copies that are there but where a value has grown."""
    if not kept:
        kept.extend(torch.empty_like(tensor, requires_grad=False) for tensor in values)
    for i, tensor in enumerate(values):
        if kept[i].shape != tensor.shape:
            kept[i] = torch.empty_like(tensor, requires_grad=False)
        kept[i].copy_(tensor)


@torch.no_grad()
def restore_values(values: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """Put earlier values back; rows that have joined at the end since then are zero again."""
    for tensor, before in zip(values, kept, strict=True):
        if tensor.shape == before.shape:
            tensor.copy_(before)
        else:
            tensor[: len(before)] = before
            tensor[len(before) :] = 0
