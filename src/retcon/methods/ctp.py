"""CTP: find the paths of key and value vectors that an edit runs through, and tune along them, with a contrast.

Zhai et al. 2025, "Parameter-Aware Contrastive Knowledge Editing: Tracing and Rectifying based on Critical Transmission
Paths"; symbols as there. The released code (SonglinZhai/PAC 1240102) differs from the paper in nearly every detail:
what each says, and what is done here, is in docs/methods/ctp.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.locate.paths import Assess, KeyMatrix, Score, Select, Slot, Transmission, assess, choose, slots_of
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import (
    ModelShape,
    Progress,
    State,
    check_depth,
    lower_layers,
)
from retcon.methods.common.settings import Count, CountFromZero, Layers, NotNegative
from retcon.methods.common.tuning import TuningSettings, tuning
from retcon.training.descent import accumulate, shares
from retcon.training.nodes import Nodes, RowAdam, RowState
from retcon.training.objective import AnswerLoss, answer_rows, own_answers
from retcon.training.parts import Part, attached


@dataclass(frozen=True, kw_only=True)
class Ctp(TuningSettings):
    """Parameter-aware contrastive editing along critical transmission paths."""

    name: ClassVar[str] = "ctp"
    fits_learning_rate: ClassVar[bool] = True

    layers: Layers | None = None
    """Layers that paths go through, ascending, counted from 0; None: all, as published. Nodes of the upper layers raise
    the answer whatever the subject is."""
    n_positive: Count = 15
    """|T+|: paths that are tuned towards the new answer; each has one node per matrix."""
    n_negative: CountFromZero = 1
    """|T-|: paths for the contrast."""
    score: Score = "z_abs"
    """What makes a node critical; the paper's `signed_sum` is 0 on every value node of models with LayerNorm. `random`
    is a control."""
    select: Select = "rank_aligned"
    """Paths from node scores: by rank in every matrix, or the best sums (the paper's wording)."""
    pool: Assess = "pooled"
    """Scores of the summed gradient of all edits, or the mean of every edit's own."""
    key_matrix: KeyMatrix = "up"
    """Where key vectors are, in a gated MLP."""
    contrast: Literal["neg_step", "mirror", "none"] = "neg_step"
    """`neg_step`: after a step on T+ towards the new answer, one on T- towards the original answer (the released code);
    `mirror`: the original answer shall survive if T-'s nodes are changed as T+'s are, on average; T- stays as it is."""
    contrast_weight: NotNegative = 0.1
    """lambda: the second step's learning rate over the first's (`neg_step`), or the second loss's weight (`mirror`)."""
    original: Literal["own", "target_true"] = "own"
    """y: at each answer position the unedited model's own choice, or the edit's true answer."""
    batch_size: Count | None = 16
    """Edits per step; None: all of the call."""
    reassess: CountFromZero = 0
    """Epochs between assessments of the paths, on the weights as they then are; 0: once, at the start."""
    train_out_bias: bool = False
    """Also train the whole bias of the value matrix, where there is one, in both steps (the released code)."""

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Lower layers; the learning rate is the smallest to try."""
        return {"layers": lower_layers(shape.n_layers), "learning_rate": 5e-4, "epochs": 40, "stop_loss": 0.1}

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
        """The change that writes `edits`, along one set of paths for all; the model is untouched.

        Contexts, moments and state are not used. The seed draws mini-batches and random scores.

        Raises:
            InvalidEdit, ConflictingEdits: an edit cannot mean anything, or contradicts another.
            InvalidSetting: a matrix the model does not have, or more paths than a matrix has nodes.
            NonFinite: the model gives an edit no finite probability, or a gradient overflows.
        """
        slots = slots_of(lm, self.key_matrix)
        if self.layers is not None:
            check_depth(self.name, lm, self.layers)
            slots = [slot for slot in slots if slot.site.layer in self.layers]
        with_bias = [s for s in slots if s.site.bias is not None and (self.train_out_bias or not s.is_value)]
        names = [slot.site.name for slot in slots] + [slot.site.bias_name for slot in with_bias]
        with tuning(self, lm, edits, names, seed=seed, progress=progress) as run:
            if not edits:
                return run.delta()
            rows = answer_rows(lm, edits)
            paths = self.trainer(slots, AnswerLoss(lm, rows), self._original(lm, edits, rows))
            trace = partial(self._trace, lm, edits, paths, seed)
            ended = run.descend(paths.update, paths.losses_now, paths.values, stage="paths", before_epoch=trace)
            return run.delta(paths.parts(), ended)

    def trainer(self, slots: Sequence[Slot], target: AnswerLoss, original: AnswerLoss | None) -> "PathTrainer":
        """What takes the steps."""
        return PathTrainer(self, slots, target, original)

    def assessed_together(self, n_edits: int) -> list[list[int]] | None:
        """Edits whose gradients are summed before their scores are; None: all."""
        return None

    @property
    def has_contrast(self) -> bool:
        """Whether the second term does anything."""
        return self.contrast != "none" and self.contrast_weight > 0 and self.n_negative > 0

    def _trace(self, lm: LM, edits: Sequence[Edit], paths: "PathTrainer", seed: int, epoch: int) -> None:
        """T+ and T- on the weights as they are in this epoch."""
        if epoch and not (self.reassess and epoch % self.reassess == 0):
            return
        with attached(paths.parts()):
            scores = assess(
                lm,
                edits,
                paths.slots,
                self.score,
                pool=self.pool,
                reduction=self.reduction,
                groups=self.assessed_together(len(edits)),
                seed=seed + epoch,
            )
        paths.set_paths(choose(paths.slots, scores, self.n_positive, self.n_negative, self.select))

    def _original(self, lm: LM, edits: Sequence[Edit], rows: Sequence[Row]) -> AnswerLoss | None:
        """L(y): the loss of the original answers."""
        if not self.has_contrast:
            return None
        if self.original == "target_true":
            return AnswerLoss(lm, answer_rows(lm, edits, "target_true"))
        return AnswerLoss(lm, rows, own_answers(lm, rows))


class PathTrainer:
    """The nodes along T+ and T-, and one step on a mini-batch."""

    negative_loss_weight = 1.0
    """lambda is in the learning rate of the step on T-, where Adam does not divide it out."""

    def __init__(self, method: Ctp, slots: Sequence[Slot], target: AnswerLoss, original: AnswerLoss | None) -> None:
        self.method, self.slots, self.target, self.original = method, slots, target, original
        self.nodes = [Nodes(slot.site, "columns" if slot.is_value else "rows") for slot in slots]
        self.positive: list[Tensor] = []
        self.negative: list[Tensor] = []
        if method.train_out_bias:
            for slot in slots:
                if slot.is_value and slot.site.bias is not None:
                    bias = Nodes(slot.site, "bias")
                    bias.add(torch.arange(len(slot.site.bias)))
                    self.nodes.append(bias)
        self.moves_negative = method.contrast == "neg_step" and method.has_contrast
        self.adam_positive = RowAdam(learning_rate=method.learning_rate)
        self.adam_negative = RowAdam(learning_rate=method.contrast_weight * method.learning_rate)
        self.memory_positive, self.memory_negative = self.fresh_memory(), self.fresh_memory()

    def parts(self) -> list[Part]:
        """Everything that was ever trained."""
        return [part for nodes in self.nodes for part in nodes.parts()]

    def values(self) -> list[Tensor]:
        """The tensors that the parts train."""
        return [tensor for nodes in self.nodes for tensor in nodes.tensors]

    def losses_now(self) -> list[float]:
        """L(y*) of every edit."""
        with attached(self.parts()):
            return self.target.now()

    def set_paths(self, found: Transmission) -> None:
        """Train the nodes of these paths from now on; others keep the change they have.

        Nodes that go on being trained keep their momentum, others start without.
        """
        before = self.positive, self.negative
        self.positive = [torch.tensor(found.positive.in_slot(t)) for t in range(len(self.slots))]
        self.negative = [torch.tensor(found.negative.in_slot(t)) for t in range(len(self.slots))]
        for t in range(len(self.slots)):
            self.nodes[t].add(self.positive[t])
            if self.moves_negative:
                self.nodes[t].add(self.negative[t])
        self.remember(before)

    def remember(self, before: tuple[list[Tensor], list[Tensor]]) -> None:
        """Fit the optimisers' memory to the nodes that are there now; `before`: T+ and T- until now."""
        kept = [self._still(t, before[0], self.positive) for t in range(len(self.nodes))]
        self.memory_positive = self.grown(self.memory_positive, kept)
        kept = [self._still(t, before[1], self.negative) for t in range(len(self.nodes))]
        self.memory_negative = self.grown(self.memory_negative, kept)

    def update(self, items: list[int]) -> dict[int, float]:
        """A step on T+ towards y*, then (`neg_step`) one on T- towards y; the losses L(y*) before them."""
        method = self.method
        share = dict(zip(items, shares(self.target.rows, items, method.reduction).tolist(), strict=True))

        def towards(loss: AnswerLoss, parts: Callable[[], list[Part]]) -> Callable[[Sequence[int]], Tensor]:
            def losses(chunk: Sequence[int]) -> Tensor:
                with attached(parts()):
                    return loss(chunk)

            return losses

        now = accumulate(
            towards(self.target, self.parts),
            self.target.chunks(items),
            lambda i, loss: share[i] if loss >= method.stop_loss else 0.0,
        )
        active = [i for i in items if now[i] >= method.stop_loss]
        if not all(map(math.isfinite, now.values())) or not active:
            self._forget_gradients()
            return now
        if self.original is not None and method.contrast == "mirror":  # one step on both terms
            weight = method.contrast_weight
            accumulate(
                towards(self.original, self._mirrored), self.original.chunks(active), lambda i, _: weight * share[i]
            )
        self._step(self.adam_positive, self.memory_positive, self.positive)
        if self.original is not None and self.moves_negative:
            weight = self.negative_loss_weight
            accumulate(towards(self.original, self.parts), self.original.chunks(active), lambda i, _: weight * share[i])
            self._step(self.adam_negative, self.memory_negative, self.negative)
        return now

    def _mirrored(self) -> list[Part]:
        """Delta': T-'s nodes changed as T+'s are on average, all else as in the model."""
        return [
            part
            for nodes, positive, negative in zip(self.nodes, self.positive, self.negative, strict=False)
            for part in nodes.averaged(nodes.chosen(positive), negative)
        ]

    def _step(self, adam: RowAdam, memory: list[list[RowState]], chosen: list[Tensor]) -> None:
        for t, nodes in enumerate(self.nodes):
            here = nodes.chosen(chosen[t]) if t < len(chosen) else torch.ones_like(nodes.index, dtype=torch.bool)
            for tensor, state in zip(nodes.tensors, memory[t], strict=True):
                self.step_nodes(adam, tensor, state, here)
        self._forget_gradients()

    def step_nodes(self, adam: RowAdam, tensor: Tensor, state: RowState, here: Bool[Tensor, " n"]) -> None:
        """One step of the nodes `here`, the tensor's others stay."""
        assert tensor.grad is not None
        adam.step(tensor, tensor.grad, state, here)

    def _forget_gradients(self) -> None:
        for tensor in self.values():
            tensor.grad = None

    def fresh_memory(self) -> list[list[RowState]]:
        """The optimiser's memory before the first step."""
        return [[RowState.fresh(tensor) for tensor in nodes.tensors] for nodes in self.nodes]

    def grown(
        self, memory: list[list[RowState]], kept: Sequence[Bool[Tensor, " n"]], steps: float = 0.0
    ) -> list[list[RowState]]:
        return [
            [state.grown(tensor, keep, steps) for state, tensor in zip(states, nodes.tensors, strict=True)]
            for states, nodes, keep in zip(memory, self.nodes, kept, strict=True)
        ]

    def _still(self, t: int, before: list[Tensor], now: list[Tensor]) -> Bool[Tensor, " n"]:
        """Nodes that are trained now and were before."""
        nodes = self.nodes[t]
        if t >= len(now):  # a whole bias
            return torch.ones_like(nodes.index, dtype=torch.bool)
        return nodes.chosen(now[t]) & nodes.chosen(before[t]) if before else torch.zeros_like(nodes.index).bool()
