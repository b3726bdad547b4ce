"""CTP: find the paths of key and value vectors that an edit runs through, and tune along them, with a contrast.

Zhai et al. 2025, "Parameter-Aware Contrastive Knowledge Editing: Tracing and Rectifying based on Critical Transmission
Paths"; symbols as there. The released code (SonglinZhai/PAC 1240102) differs from the paper in nearly every detail:
what each says, and what is done here, is in docs/methods/ctp.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.lm.model import LM, require_lm
from retcon.lm.prompts import Row
from retcon.locate.paths import (
    Assess,
    KeyMatrix,
    LayerSteps,
    Score,
    Select,
    Transmission,
    assess,
    choose_paths,
    slots_of,
    step_weights,
)
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import ModelShape, State, check_mlp, lower_layers
from retcon.methods.common.path_nodes import PathNodes, accumulate_attached
from retcon.methods.common.settings import Count, CountFromZero, Layers, NotNegative, Share
from retcon.methods.common.tuning import TuningSettings, tuning
from retcon.training.descent import Step, losses_now, shares
from retcon.training.nodes import NodeAdam
from retcon.training.objective import AnswerLoss, answer_rows, own_answer_tokens, trained_rows
from retcon.training.parts import attached
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class Ctp(TuningSettings):
    """Parameter-aware contrastive editing along critical transmission paths."""

    name: ClassVar[str] = "ctp"
    state_description: ClassVar[str] = ""
    fits_learning_rate: ClassVar[bool] = True
    bytes_per_value: ClassVar[int] = TuningSettings.bytes_per_value + 8
    """T+ and T- have moments of their own."""

    layers: Layers | None = None
    """Layers that paths go through, ascending, counted from 0; None: all, as published. Nodes of the upper layers raise
    the answer whatever the subject is."""
    n_positive: Count = 15
    """|T+|: paths that are tuned towards the new answer; each has one node per matrix."""
    coverage: Share | None = None
    """As many paths into T+, in place of `n_positive`, as hold this share of all paths' scores, counted from the lowest
    path's on (|T+| by the edit: the paper's section 7.2)."""
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
    mlp: Literal["dense", "experts"] | None = None
    """What paths go through in a mixture of experts, as in MEMIT; of routed experts, a node of any of them."""
    contrast: Literal["neg_step", "mirror", "none"] = "neg_step"
    """`neg_step`: after a step on T+ towards the new answer, one on T- towards the original answer (the released code);
    `mirror`: the original answer shall survive if T-'s nodes are changed as T+'s are, on average; T- stays as it is."""
    contrast_weight: NotNegative = 0.1
    """lambda: the second step's learning rate over the first's (`neg_step`), or the second loss's weight (`mirror`)."""
    original: Literal["own", "target_true"] = "own"
    """y: at each answer position the unedited model's own choice, or the edit's true answer."""
    layer_steps: LayerSteps = "equal"
    """Step sizes of layers: equal, as published; by the scores of T+'s nodes there (with `score` l2, since `z_abs` does
    not compare layers); larger in the middle (the paper's 6.2 and 7.2)."""
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
        """Return the change that writes `edits`, along one set of paths for all; the model is untouched.

        Contexts, moments and state are not used. The seed draws mini-batches and random scores.

        Raises:
            InvalidSetting: more paths than a matrix has nodes.
        """
        require_lm(lm)
        layers = range(lm.n_layers) if self.layers is None else self.layers
        check_mlp(self.name, lm, layers, self.mlp)
        slots = [s for s in slots_of(lm, self.key_matrix, routed=self.mlp == "experts") if s.site.layer in layers]
        paths = PathNodes(slots, with_bias=self.train_out_bias)
        with tuning(self, lm, edits, paths.parameter_names, seed=seed, progress=progress) as run:
            if not edits:
                return run.delta()
            rows = trained_rows(lm, edits)
            steps = self.trainer(paths, AnswerLoss(lm, rows), self._original(lm, edits, rows))
            trace = partial(self._trace, lm, edits, steps, seed)
            ended = run.descend(steps.prepare, steps.losses_now, paths.values, stage="paths", before_epoch=trace)
            return run.delta(paths.parts(), ended)

    def trainer(self, paths: PathNodes, target: AnswerLoss, original: AnswerLoss | None) -> "PathTrainer":
        """Return what takes the steps; the benchmarks `released_ctp` and `mirror_gradient` put another in its place."""
        return PathTrainer(self, paths, target, original)

    @property
    def has_contrast(self) -> bool:
        """Whether the second term does anything."""
        return self.contrast != "none" and self.contrast_weight > 0 and self.n_negative > 0

    def _trace(self, lm: LM, edits: Sequence[Edit], steps: "PathTrainer", seed: int, epoch: int) -> None:
        """Find T+ and T- on the weights as they are in this epoch."""
        if epoch and not (self.reassess and epoch % self.reassess == 0):
            return
        with attached(steps.paths.parts()):
            scores = assess(
                lm,
                edits,
                steps.paths.slots,
                self.score,
                pool=self.pool,
                reduction=self.reduction,
                groups=steps.groups,
                seed=seed + epoch,
            )
        found = choose_paths(
            steps.paths.slots, scores, self.n_positive, self.n_negative, self.select, coverage=self.coverage
        )
        steps.set_paths(found)

    def _original(self, lm: LM, edits: Sequence[Edit], rows: Sequence[Row]) -> AnswerLoss | None:
        """Return L(y), the loss of the original answers."""
        if not self.has_contrast:
            return None
        if self.original == "target_true":
            return AnswerLoss(lm, answer_rows(lm, edits, "target_true"))
        with lm.without_deltas():
            return AnswerLoss(lm, rows, own_answer_tokens(lm, rows))


class PathTrainer:
    """One step on a mini-batch: on the nodes of T+, then (`neg_step`) on those of T-."""

    groups: list[list[int]] | None = None
    """Edits whose gradients are summed before their scores are taken; None: all."""
    negative_loss_weight = 1.0
    """lambda is in the learning rate of the step on T-, where Adam does not divide it out."""

    def __init__(self, method: Ctp, paths: PathNodes, target: AnswerLoss, original: AnswerLoss | None) -> None:
        self.method, self.paths, self.target, self.original = method, paths, target, original
        self.moves_negative = method.contrast == "neg_step" and method.has_contrast
        self.adam_positive = NodeAdam(paths.nodes, method.learning_rate)
        self.adam_negative = NodeAdam(paths.nodes, method.contrast_weight * method.learning_rate)

    def set_paths(self, found: Transmission) -> None:
        """Train the nodes of these paths from now on; others keep the change they have."""
        self.paths.choose(found, train_negative=self.moves_negative)
        self.adam_positive.choose(self.paths.with_biases(self.paths.positive))
        self.adam_negative.choose(self.paths.with_biases(self.paths.negative))
        weights = [*step_weights(found, self.method.layer_steps), *(1.0 for _ in self.paths.biases)]
        self.adam_positive.weigh(weights)
        self.adam_negative.weigh(weights)

    def losses_now(self) -> dict[int, float]:
        """Return L(y*) of every edit."""
        with attached(self.paths.parts()):
            return losses_now(self.target)

    def prepare(self, items: list[int]) -> Step:
        """Compute L(y*) and its gradient; the step is one on T+ towards y*, then (`neg_step`) one on T- towards y."""
        method = self.method
        share = dict(zip(items, shares(self.target.rows, items, method.reduction).tolist(), strict=True))
        self.paths.forget_gradients()

        def of_share(i: int, loss: float) -> float:
            return share[i] if loss >= method.stop_loss else 0.0

        now = accumulate_attached(self.target, self.paths.parts, items, of_share)
        active = [i for i in items if now[i] >= method.stop_loss]
        return Step(now, active, partial(self._take, active, share))

    def _take(self, active: list[int], share: Mapping[int, float]) -> None:
        """Take the step of a mini-batch whose gradient towards y* is there."""
        method, paths = self.method, self.paths
        if self.original is not None and method.contrast == "mirror":  # one step on both terms
            weight = method.contrast_weight
            accumulate_attached(self.original, paths.mirrored, active, lambda i, _: weight * share[i])
        self.adam_positive.step()
        if self.original is not None and self.moves_negative:
            weight = self.negative_loss_weight
            paths.forget_gradients()
            accumulate_attached(self.original, paths.parts, active, lambda i, _: weight * share[i])
            self.adam_negative.step()
