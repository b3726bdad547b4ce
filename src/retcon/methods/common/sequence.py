"""Edits in steps: batch after batch, each proposed with those before it in the weights, as one delta.

This is how many facts are written by a method that takes one (ROME), and how a sequential method's memory of earlier
batches comes into play. One delta comes out, since that is what can be saved, undone and measured as a whole. Where
every step shall be undone by itself, apply each delta before the next is proposed:

    for batch in batches:
        delta = method.propose(lm, batch, state=delta.state if delta else None)
        lm.apply(delta)
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from retcon.attachment import Attachment, Beside
from retcon.delta import Change, Delta, Dense, LowRank, only_deltas, smallest, sum_of
from retcon.edits import Edit, check_edits
from retcon.errors import InvalidSetting, RetconWarning, UnknownMethod
from retcon.lm.model import LM, require_lm
from retcon.memory.contexts import Contexts
from retcon.memory.defaults import default_moments
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import Method, made_by
from retcon.methods.common.proposal import report_after
from retcon.methods.common.registry import check_subjects
from retcon.methods.common.settings import fitted
from retcon.work import Progress


def in_steps(
    method: Method,
    lm: LM,
    edits: Iterable[Edit],
    *,
    batch_size: int | None = None,
    contexts: Contexts | None = None,
    moments: Moments | None = None,
    state: Mapping[str, Tensor] | None = None,
    values: ValueCache | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Attachment:
    """Return one delta for all `edits`, made in batches of `batch_size`, each on top of those before.

    The report says what the model makes of every edit after the last step, so an edit that a later one has undone
    counts as a conflict. All steps share one set of contexts and moments.

    Args:
        values: where searched values are kept on disk, so that a run that was killed goes on where it was.
        batch_size: None: all at once, or one by one where the method takes one fact.

    Raises:
        UnknownMethod: `method` is none.
        InvalidSetting: `batch_size` does not suit the method.
        InvalidEdit, ConflictingEdits: as `propose`, and across batches too.
    """
    require_lm(lm)
    edits = check_edits(edits)
    size = batch_size_for(method, len(edits), batch_size)
    check_subjects(method, edits)
    for edit in edits:
        lm.check_edit_length(edit)
    if len(edits) <= size or not edits:
        return method.propose(
            lm, edits, contexts=contexts, moments=moments, state=state, values=values, seed=seed, progress=progress
        )
    if moments is None and method.uses_moments:
        moments = default_moments(lm)  # once for all batches
    done: Attachment | None = None
    for first in range(0, len(edits), size):
        with nullcontext() if done is None else lm.edited(done):
            step = method.propose(
                lm,
                edits[first : first + size],
                contexts=contexts,
                moments=moments,
                state=state,
                values=values,
                seed=seed,
            )
        contexts, state = Contexts(step.contexts), step.state
        done = step if done is None else _on_top(lm, done, step)
        if progress is not None:
            progress("values", min(first + size, len(edits)), len(edits))
    assert done is not None
    with lm.edited(done):
        report = report_after(lm, done.edits, done.report)
    if isinstance(done, Beside):
        return done.with_report(report, batch_size=size)
    assert isinstance(done, Delta)
    return lm.delta(
        done.changes,
        report=report,
        state=done.state,
        supersedes=done.supersedes,
        edits=done.edits,
        contexts=done.contexts,
        provenance={**done.provenance, "batch_size": size},
    )


def batch_size_for(method: Method, n: int, asked: int | None = None) -> int:
    """Return how many of `n` facts are written at once: as asked for, else all, or 1 where the method takes one."""
    if not isinstance(method, Method):
        raise UnknownMethod(f"{method!r:.60} given where a method is wanted: retcon.method('memit', for_model=lm), say")
    asked = fitted(method.name, {"batch_size": int | None}, {"batch_size": asked})["batch_size"]
    size = asked
    if size is None:
        size = max(n, 1) if method.supports_batches else 1
    if size < 1 or (min(size, n) > 1 and not method.supports_batches):
        allowed = "any number from 1" if method.supports_batches else "1"
        raise InvalidSetting(f"batch_size {size}: {method.name} takes {allowed}")
    return size


def state_after(deltas: Sequence[Attachment], method: Method) -> Mapping[str, Tensor] | None:
    """Return what a sequential method takes up from the last of these deltas; None where it keeps nothing, or where
    that delta is another method's or base method's (an earlier version's has no class, and goes by the name alone) or
    of other layers (said in a warning)."""
    if not deltas or not method.keeps_state or deltas[-1].state is None:
        return None
    made, now = deltas[-1].provenance, made_by(method)
    if made.get("method") != now["method"] or made.get("class", now["class"]) != now["class"]:
        return None
    settings, new = made.get("settings", {}), method.state_layers
    if settings.get("base_method") != method.settings.get("base_method"):
        return None
    old = settings.get("base_settings", settings).get("layers")
    if new is not None and list(old or ()) != list(new):
        warnings.warn(
            f"delta {deltas[-1].id} was made in layers {list(old or ())}, this edit is in {list(new)}: what "
            f"{method.name} remembers of it ({method.state_description}) is left out",
            RetconWarning,
            stacklevel=2,
        )
        return None
    return deltas[-1].state


def _on_top(lm: LM, done: Attachment, step: Attachment) -> Attachment:
    """Return both as one, where `step` was proposed with `done` in force (and may replace it)."""
    if isinstance(done, Beside) and type(done) is type(step):
        return done.joined(step)
    (done, step) = only_deltas((done, step), "editing in steps")
    replaced = done.id in step.supersedes
    names = dict.fromkeys([*({} if replaced else done.changes), *step.changes])
    changes = {
        name: combined(
            [*(() if replaced else done.changes.get(name, ())), *step.changes.get(name, ())], lm.shape_of(name)
        )
        for name in names
    }
    earlier = () if replaced else done.edits  # what replaces a delta has taken its edits over
    return lm.delta(
        changes,
        report=(*(() if replaced else done.report), *step.report),
        state=step.state,
        supersedes=(*done.supersedes, *(i for i in step.supersedes if i != done.id)),
        edits=(*earlier, *step.edits),
        contexts=step.contexts,
        provenance=step.provenance,
    )


def combined(changes: Sequence[Change], shape: torch.Size) -> tuple[Change, ...]:
    """Return the sum of changes to one parameter, in its smallest exact form; changes of slices stay as they are."""
    if len(changes) < 2 or any(change.region is not None for change in changes):
        return tuple(changes)
    factors = list(_factors(changes))
    if len(factors) == len(changes):
        left, right = zip(*factors, strict=True)
        return (smallest(torch.cat(left, dim=1), torch.cat(right, dim=0)),)
    return (Dense(full=sum_of(changes, shape)),)


def _factors(changes: Sequence[Change]) -> Iterator[tuple[Tensor, Tensor]]:
    for change in changes:
        if isinstance(change, LowRank):
            yield change.left, change.right
