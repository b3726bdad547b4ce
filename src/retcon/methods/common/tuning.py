"""Masked tuning as a scope: what its methods share around their own choice of what may change.

A method says which parameters it may touch, builds the trainable parts, and asks for the delta:

    with tuning(self, lm, edits, names, seed=seed, progress=progress) as run:
        parts = [...]
        return run.delta(parts, run.train(parts))

The model is frozen inside the scope, its weights are never touched, and every flag is as it was afterwards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, get_args

import torch
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting, OutOfMemory
from retcon.lm.capacity import free_bytes
from retcon.lm.model import LM
from retcon.lm.site import Site, SiteName
from retcon.methods.common.contract import Method, check_depth, check_settings, recorded
from retcon.methods.common.proposal import report_after
from retcon.methods.common.settings import Count, CountFromZero, NotNegative
from retcon.training.descent import Descent, EditLoss, Reduction, Schedule, Step, descend, losses_now, stepping
from retcon.training.objective import AnswerLoss, trained_rows
from retcon.training.parts import Part, attached, changes
from retcon.work import Progress, silent


@dataclass(frozen=True, kw_only=True)
class TuningSettings(Method):
    """What every method of masked tuning lets one set: Adam, how long, and when an edit is left alone."""

    learning_rate: NotNegative = 5e-4
    """Adam's; betas (0.9, 0.999), no decay."""
    epochs: CountFromZero = 25
    """Passes over the edits at most; steps, where all edits are one batch."""
    batch_size: Count | None = None
    """Edits per step; None: all of the call."""
    stop_loss: NotNegative = 1e-2
    """An edit is left alone once its loss is below this; 0: never."""
    reduction: Reduction = "per_edit"
    """What a batch's loss is the mean of: edits, or answer tokens."""

    def __post_init__(self) -> None:
        check_settings(self)
        self.schedule(1)

    def schedule(self, n_edits: int) -> Schedule:
        """Return how long to go on, for so many edits."""
        return Schedule(epochs=self.epochs, batch_size=self.batch_size, stop_loss=self.stop_loss)

    def for_next_try(self) -> Self:
        """Return the method for the same edits once more, the state of the delta before being handed over."""
        return self


@dataclass(frozen=True)
class Tuning:
    """One batch of edits inside its `tuning` scope."""

    method: TuningSettings
    lm: LM
    edits: Sequence[Edit]
    seed: int
    progress: Progress

    def train(
        self,
        parts: Sequence[Part],
        *,
        edits: Sequence[Edit] | None = None,
        loss: EditLoss | None = None,
        stop: EditLoss | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        beside: Sequence[Part] = (),
        stage: str = "tuning",
        **hooks: Any,
    ) -> Descent:
        """Train the parts, attached, on the edits' loss; by default Adam on the answers' negative log-likelihood.

        Args:
            edits: others than the call's own, which `loss` then belongs to.
            stop: the loss that ends an edit, and that is reported, in place of the one that is trained.
            beside: parts that are attached too and stay as they are.
            hooks: `before_epoch`, `after_step` of `training.descent.descend`.

        Raises:
            OutOfMemory: what is trained and the optimiser's state do not fit beside the model.
            NonFinite: the model gives an edit no finite probability.
        """
        values = [tensor for part in parts for tensor in part.trained()]
        n_values = sum(tensor.numel() for tensor in values)
        check_memory(self.method.name, self.lm, n_values, self.method.bytes_per_value)
        edits = self.edits if edits is None else edits
        loss = loss or AnswerLoss(self.lm, trained_rows(self.lm, edits))
        optimizer = optimizer or torch.optim.Adam(values, lr=self.method.learning_rate)
        prepare = stepping(loss, optimizer, self.method.schedule(len(edits)), self.method.reduction, stop)
        evaluate = partial(losses_now, stop or loss)
        with attached([*parts, *beside]):
            return self.descend(prepare, evaluate, lambda: values, edits=edits, stage=stage, **hooks)

    def descend(
        self,
        prepare: Callable[[list[int]], Step],
        evaluate: Callable[[], Mapping[int, float]],
        values: Callable[[], Sequence[Tensor]],
        *,
        edits: Sequence[Edit] | None = None,
        stage: str = "tuning",
        **hooks: Any,
    ) -> Descent:
        """`training.descent.descend` with the settings, seed and progress of this call, for a step of one's own."""
        edits = self.edits if edits is None else edits
        schedule, report = self.method.schedule(len(edits)), partial(self.progress, stage)
        return descend(edits, prepare, evaluate, values, schedule, seed=self.seed, progress=report, **hooks)

    def delta(
        self,
        parts: Iterable[Part] = (),
        ended: Descent | None = None,
        *,
        state: Mapping[str, Tensor] | None = None,
        supersedes: Sequence[str] = (),
        **notes: Any,
    ) -> Delta:
        """Return what the parts add, as a delta; its report says how the descent ended and what the model says with it.

        Without a descent, which is for an empty batch, nothing is reported.
        """
        record = recorded(self.method, self.lm, self.edits, seed=self.seed, **notes)
        report = ended.report(self.edits) if ended is not None else ()
        delta = self.lm.delta(changes(parts), report=report, state=state, supersedes=tuple(supersedes), **record)
        if not report:
            return delta
        with self.lm.edited(delta):
            return replace(delta, report=report_after(self.lm, self.edits, report))


@contextmanager
def tuning(
    method: TuningSettings, lm: LM, edits: Sequence[Edit], names: Iterable[str], *, seed: int, progress: Progress | None
) -> Iterator[Tuning]:
    """Check parameters, and freeze the model for the scope; it is as it was afterwards.

    Args:
        names: parameters that the method may change.

    Raises:
        NotEditable: a parameter that must not be edited.
    """
    for name in names:
        lm.check_editable(name)
    with lm.frozen_eval():
        yield Tuning(method, lm, edits, seed, progress or silent)


def check_no_end(name: str, edits: Sequence[Edit], why: str) -> None:
    """Check that no edit's chat asks for the end of its turn (`Chat.train_end`), where a method does not train it.

    Args:
        why: what the method does instead, after its name.

    Raises:
        InvalidSetting: one does; the message names the edit.
    """
    asking = next((edit for edit in edits if edit.chat is not None and edit.chat.train_end), None)
    if asking is not None:
        raise InvalidSetting(
            f"{name} {why}, so it cannot train the end of a turn, which edit {asking.id!r} asks for; leave train_end "
            "(--train-end) out, or take a method that trains each token of the answer after those before it (ft with "
            "objective='target_new', say)"
        )


def sites_named(name: str, lm: LM, layers: Sequence[int], modules: Sequence[str]) -> list[Site]:
    """Return the matrices that settings name, layer by layer; where every expert is routed, those of all of them.

    Args:
        name: the method, for messages.
        layers: blocks, counted from 0; none: all that have such a matrix.
        modules: kinds of sites (`q_proj`), or a module's path inside a block (`attn.c_attn`: a fused matrix, whole).

    Raises:
        InvalidSetting: a layer or a matrix that the model does not have.
    """
    check_depth(name, lm, layers)
    found: list[Site] = []
    for layer in layers or range(lm.n_layers):
        for kind in modules:
            here = _sites_at(lm, layer, kind)
            if layers and not here:
                raise _none_there(name, lm, kind, [layer])
            found += here
    for kind in modules:
        if not any(site.kind == kind for site in found):
            raise _none_there(name, lm, kind, range(lm.n_layers))
    return found


def _sites_at(lm: LM, layer: int, kind: str) -> list[Site]:
    """Return a block's matrices of a kind, or the one at a path inside the block; none where it has none."""
    if kind in get_args(SiteName):
        return lm.sites(layer, kind)  # type: ignore[arg-type]
    path = f"{lm.layout.block.format(layer)}.{kind}"
    module = dict(lm.model.named_modules()).get(path)
    if module is None or getattr(module, "weight", None) is None or module.weight.dim() != 2:
        return []
    own = f"{path}.weight"
    return [Site(layer, kind, own, module, type(module).__name__ == "Conv1D", packed=lm.packed.get(own))]


def _none_there(name: str, lm: LM, kind: str, layers: Sequence[int]) -> InvalidSetting:
    """Return the error of layers that lack a matrix, with those that they have."""
    having = [k for k in get_args(SiteName) if any(lm.sites(layer, k) for layer in layers)]
    where = "its blocks" if len(layers) > 1 else f"layer {layers[0]}"
    return InvalidSetting(
        f"{name}: {lm.name!r} ({lm.model.config.model_type}) has no {kind} in {where}; name one of "
        f"{', '.join(having)}, or a matrix's path inside a block"
    )


def sites_of_kinds(
    name: str, lm: LM, layers: Sequence[int], kinds: Sequence[SiteName], *, routed: bool = False
) -> list[Site]:
    """Return the matrices of these kinds, layer by layer, as far as blocks have them.

    Args:
        routed: as in `LM.sites`.

    Raises:
        InvalidSetting: no layer has a matrix of a kind.
    """
    found = [site for layer in layers for kind in kinds for site in lm.sites(layer, kind, routed=routed)]
    for kind in kinds:
        if not any(site.kind == kind for site in found):
            where = "" if len(layers) == lm.n_layers else " in these layers"
            raise InvalidSetting(f"{name}: {lm.name!r} ({lm.model.config.model_type}) has no {kind}{where}")
    return found


def memory_note(n_values: int, bytes_per_value: int = Method.bytes_per_value) -> str:
    """Return what training so many values takes, in words."""
    n_bytes = bytes_per_value * n_values
    shown = f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
    return f"trains {n_values:,} values, {shown} with gradients, Adam's moments and copies"


def check_memory(name: str, lm: LM, n_values: int, bytes_per_value: int = Method.bytes_per_value) -> None:
    """Check that `n_values` trained values and their optimiser state fit into the free memory beside the model.

    Raises:
        OutOfMemory: they do not; the message gives the figures.
    """
    needed, free = bytes_per_value * n_values, free_bytes(lm.device)
    if needed > free:
        raise OutOfMemory(
            f"{name} trains {n_values:,} values, which take {needed / 2**30:.1f} GiB with gradients, Adam's moments "
            f"and copies, and {free / 2**30:.1f} GiB are free on {lm.device}; train fewer matrices, or take a machine "
            "with more memory"
        )
