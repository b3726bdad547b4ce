"""AdaLoRA: low-rank changes in the form of singular values, whose number is allotted where it pays.

Zhang et al. 2023, arXiv:2303.10512, section 3; symbols as there. EasyEdit's "LoRA" is this one with nothing allotted
(`allocate=False`): docs/methods/lora.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.model import LM
from retcon.lm.site import Site
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import State
from retcon.methods.common.settings import AnyLayers, Count, CountFromZero, Matrices, NotNegative
from retcon.methods.common.tuning import TuningSettings, sites_named, tuning
from retcon.seed import generator_of
from retcon.training.nodes import gradient_of
from retcon.training.parts import TrainedTriplets, fresh
from retcon.work import Progress


@dataclass(frozen=True, kw_only=True)
class AdaLora(TuningSettings):
    """Adaptive low-rank adaptation: dW = (alpha / rank) P diag(E) Q, with singular values allotted by importance."""

    name: ClassVar[str] = "adalora"
    state_description: ClassVar[str] = ""

    rank: Count = 12
    """Singular values of each matrix at the start."""
    target_rank: Count = 8
    """Singular values per matrix at the end, on average."""
    alpha: float = 32.0
    """The change is alpha / rank times P diag(E) Q."""
    layers: AnyLayers = ()
    """Blocks that are adapted, ascending, counted from 0; none: all that have such a matrix."""
    modules: Matrices = ("q_proj", "v_proj")
    """Matrices that are adapted: kinds of sites, or a module's path inside a block (`attn.c_attn`)."""
    learning_rate: NotNegative = 5e-3
    epochs: CountFromZero = 70
    orthogonality: NotNegative = 0.5
    """Weight of the mean norm of P'P - I and QQ' - I."""
    allocate: bool = True
    """False: every singular value stays, as in EasyEdit, which never asks for the allotment."""
    warmup: NotNegative = 0.2
    """Share of the steps before singular values are taken away."""
    cooldown: NotNegative = 0.3
    """Share of the steps, the last ones, in which those that are left are trained and none is taken; one step at
    least."""
    smoothing: float = 0.85
    """Of the importance and of its uncertainty (both betas of the paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_rank > self.rank:
            raise InvalidSetting(
                f"adalora: target_rank must be from 1 to rank, found {self.target_rank} and {self.rank}"
            )
        if self.warmup + self.cooldown >= 1:
            raise InvalidSetting(
                f"adalora: warmup and cooldown leave no step between them, found {self.warmup} and {self.cooldown}"
            )
        if not 0 < self.smoothing < 1:
            raise InvalidSetting(f"adalora: smoothing must be between 0 and 1, found {self.smoothing}")

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
        """Return the change that writes `edits` as one adapter; contexts, moments and state are not used.

        The seed draws P, Q and mini-batches.
        """
        sites = sites_named(self.name, lm, self.layers, self.modules)
        with tuning(self, lm, edits, [site.name for site in sites], seed=seed, progress=progress) as run:
            if not edits:
                return run.delta()
            generator = generator_of(seed)
            parts = [self._part(site, generator) for site in sites]
            adam = torch.optim.Adam([t for part in parts for t in part.trained()], lr=self.learning_rate)
            if self.orthogonality:
                adam.register_step_pre_hook(lambda *_: add_penalty(parts, self.orthogonality))
            if self.allocate:
                schedule = self.schedule(len(edits))
                batches = -(-len(edits) // (schedule.batch_size or len(edits)))
                allotment = Allotment(self, parts, schedule.epochs * batches)
                adam.register_step_post_hook(lambda *_: allotment.update())
            return run.delta(parts, run.train(parts, optimizer=adam))

    def n_trained(self, lm: LM) -> int:
        """Return how many values are trained, those that the budget takes away among them."""
        sites = sites_named(self.name, lm, self.layers, self.modules)
        return self.rank * sum(sum(site.shape) + 1 for site in sites)

    @property
    def bytes_per_value(self) -> int:  # type: ignore[override]
        """Where the budget is allotted, sensitivity and its deviation besides, in float32."""
        return TuningSettings.bytes_per_value + (8 if self.allocate else 0)

    def _part(self, site: Site, generator: torch.Generator) -> TrainedTriplets:
        """P and Q normal with a deviation of 0.02, E = 0."""
        out, into = site.shape
        p, e, q = fresh(site, out, self.rank), fresh(site, self.rank), fresh(site, self.rank, into)
        with torch.no_grad():
            for tensor in (p, q):
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        return TrainedTriplets(site, p, e, q, self.alpha / (self.rank + 1e-5))


def add_penalty(parts: Sequence[TrainedTriplets], weight: float) -> None:
    """Add the gradient of weight * mean(‖P'P - I‖, ‖QQ' - I‖ over all matrices) to that of every P and Q (Eq. 4)."""
    factors = [tensor for part in parts for tensor in (part.left.T, part.right)]
    with torch.enable_grad():
        norms = [(f @ f.T - torch.eye(len(f), dtype=f.dtype, device=f.device)).norm() for f in factors]
        (weight * sum(norm.to(norms[0].device) for norm in norms) / len(norms)).backward()


class Allotment:
    """Which singular values are left: after each step, the least important of all matrices together are set to 0."""

    def __init__(self, settings: AdaLora, parts: Sequence[TrainedTriplets], n_steps: int) -> None:
        self.settings, self.parts, self.n_steps = settings, parts, n_steps
        self.warmup = int(settings.warmup * n_steps)
        self.cooldown = min(max(int(settings.cooldown * n_steps), 1), n_steps - 1)  # the last step has the last budget
        self.step = 0
        self.mean = [[torch.zeros_like(t, requires_grad=False) for t in part.trained()] for part in parts]
        """Smoothed sensitivity |w dL/dw| of P, E and Q (Eq. 8)."""
        self.spread = [[t.clone() for t in tensors] for tensors in self.mean]
        """Its smoothed deviation (Eq. 9)."""
        self.dropped: list[Tensor] | None = None
        """Per matrix, the singular values that are taken away for good."""

    @property
    def budget(self) -> int:
        """Singular values that may be left after this step (Eq. 12)."""
        first, last = (r * len(self.parts) for r in (self.settings.rank, self.settings.target_rank))
        if self.step >= (end := self.n_steps - self.cooldown):
            return last
        if self.step <= self.warmup:
            return first
        return int((first - last) * (1 - (self.step - self.warmup) / (end - self.warmup)) ** 3 + last)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the gradients of the step just taken, and set to 0 what is beyond the budget."""
        if self.step < self.n_steps - self.cooldown:
            self._observe()
        if self.dropped is None and (taken := self.settings.rank * len(self.parts) - self.budget) > 0:
            scores = self.scores()
            threshold = torch.cat([score.to(scores[0].device) for score in scores]).kthvalue(taken).values
            dropped = [score <= threshold.to(score.device) for score in scores]
            for part, gone in zip(self.parts, dropped, strict=True):
                part.singular.masked_fill_(gone, 0.0)
            if self.step >= self.n_steps - self.cooldown:
                self.dropped = dropped
        elif self.dropped is not None:
            for part, gone in zip(self.parts, self.dropped, strict=True):
                part.singular.masked_fill_(gone, 0.0)
        self.step += 1

    def scores(self) -> list[Tensor]:
        """Return the importance of every triplet: of its singular value, and the mean over its vectors (Eq. 7)."""
        found = []
        for mean, spread in zip(self.mean, self.spread, strict=True):
            p, e, q = (m * s for m, s in zip(mean, spread, strict=True))
            found.append(e + p.mean(0) + q.mean(1))
        return found

    def _observe(self) -> None:
        beta = self.settings.smoothing
        for part, means, spreads in zip(self.parts, self.mean, self.spread, strict=True):
            for w, mean, spread in zip(part.trained(), means, spreads, strict=True):
                sensitivity = (w * gradient_of(w)).abs()
                mean.mul_(beta).add_((1 - beta) * sensitivity)
                spread.mul_(beta).add_((1 - beta) * (sensitivity - mean).abs())
