"""MALMEN: every token of every edit proposes a new value, and one ridge regression merges thousands of them.

Tan et al. 2024, arXiv:2311.04661, sections 3 and 4; symbols as there. Departures: docs/methods/malmen.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.delta import Change, Delta
from retcon.edits import Case, Edit
from retcon.lm.model import LM, Site
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.solve import general_solve
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import State, recorded
from retcon.methods.common.hypernetwork import (
    Drawn,
    HypernetworkSettings,
    at_answers,
    base_log_probs,
    fit_editor,
    gather_pieces,
    in_passes,
    load_editor,
    outer_losses,
)
from retcon.methods.common.proposal import reported
from retcon.methods.common.settings import Count, Matrices, NotNegative, Positive
from retcon.training.hypernetwork import Hypernetwork, ScaleAt
from retcon.training.objective import trained_rows
from retcon.training.parts import TrainedDense
from retcon.work import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Malmen(HypernetworkSettings):
    """Massive language model editing network."""

    name: ClassVar[str] = "malmen"
    scale_at: ClassVar[ScaleAt] = "outside"
    with_ridge: ClassVar[bool] = True
    eps: ClassVar[float] = torch.finfo(torch.float32).eps

    modules: Matrices = ("down_proj",)
    batch_size: Count = 512
    """Edits of a training step, which are written together."""
    n_validation: Count = 512
    """Cases to validate with, which are not trained on; a fifth of the cases at most."""
    step_size: float = 1e-6
    learning_rate: NotNegative = 1e-5
    """Adam's, for everything."""
    locality_weight: NotNegative = 1.0
    """Weight of the divergence on prompts that should stay."""
    clip: Positive = 1.0

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
        """Return the change that writes `edits` as one batch; the model is untouched.

        Only the editor is used: nothing is searched, drawn or kept.

        Raises:
            InvalidSetting: no editor is named.
            MalformedFile, WrongBase: the editor cannot be read, or is another model's.
        """
        method, editor = load_editor(self, lm)
        record = recorded(method, lm, edits, seed=seed, editor_sha256=editor.sha256)
        if not edits:
            return lm.delta({}, **record)
        changes: dict[str, list[Change]] = {}
        with lm.frozen_eval(), torch.no_grad():
            found = gather_pieces(lm, editor.sites, trained_rows(lm, edits), at_answers)
            for i, (site, (u, delta)) in enumerate(zip(editor.sites, found, strict=True)):
                v, ridge = value_differences(editor.network, i, u, delta), editor.network.log_ridge[i].exp()
                if len(u) < u.shape[1]:  # S^T = X^T K, kept as factors
                    change = site.stored(dual_shift(u, v, ridge).T.cpu(), u.cpu())
                else:
                    change = site.stored_dense(shift(u, v, ridge).T.contiguous().cpu())
                changes.setdefault(site.name, []).append(change)
                (progress or silent)("matrices", i + 1, len(found))
        return reported(lm, lm.delta(changes, **record))

    def fit(
        self,
        lm: LM,
        cases: Sequence[Case],
        out: str | Path,
        *,
        seed: int = 0,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Path:
        """Train an editor for the model on cases other than those to be edited, and write it to `out` (algorithm 1).

        Each step writes `batch_size` edits together. The gradient goes through the regression by hand (section 4.2).
        """
        sites, network = self.new_editor(lm, out, seed)
        optimizers = [torch.optim.Adam(network.parameters(), lr=self.learning_rate)]

        backward = partial(self.backward, lm, network, sites)

        @torch.no_grad()
        def loss(drawn: Sequence[Drawn]) -> float:
            return self.outer_step(lm, sites, self.shifts(lm, network, sites, drawn)[1], drawn, backward=False)

        return fit_editor(
            self, lm, cases, out, network, optimizers, backward, loss, seed=seed, force=force, progress=progress
        )

    def backward(self, lm: LM, network: Hypernetwork, sites: Sequence[Site], drawn: Sequence[Drawn]) -> float:
        """Add the gradient of the outer loss to the network's parameters; keys are constants. Returns the loss."""
        found, parts = self.shifts(lm, network, sites, drawn)
        loss = self.outer_step(lm, sites, parts, drawn, backward=True)
        to_ridge = torch.zeros_like(network.log_ridge)
        for i, ((u, delta), part) in enumerate(zip(found, parts, strict=True)):
            assert part.values.grad is not None
            v = value_differences(network, i, u, delta)
            s, to_s = part.values.detach().T.to(u.device), part.values.grad.T.to(u.device)
            to_v, to_ridge[i] = shift_gradients(u, s, network.log_ridge[i].detach(), to_s)
            (to_v * v).sum().backward()
        network.log_ridge.grad = to_ridge
        return loss

    def shifts(
        self, lm: LM, network: Hypernetwork, sites: Sequence[Site], drawn: Sequence[Drawn]
    ) -> tuple[list[tuple[Tensor, Tensor]], list[TrainedDense]]:
        """Return the edits' pieces (u, delta) at each matrix, and S^T as a leaf that a gradient can be taken at."""
        found = gather_pieces(lm, sites, [d.edit for d in drawn], at_answers)
        for i, (u, delta) in enumerate(found):
            network.network(i).observe(u, delta)
        parts = []
        with torch.no_grad():
            for i, (site, (u, delta)) in enumerate(zip(sites, found, strict=True)):
                s = shift(u, value_differences(network, i, u, delta), network.log_ridge[i].exp())
                parts.append(TrainedDense(site, s.T.contiguous().to(site.device).requires_grad_()))
        return found, parts

    def outer_step(
        self, lm: LM, sites: Sequence[Site], parts: Sequence[TrainedDense], drawn: Sequence[Drawn], *, backward: bool
    ) -> float:
        """Return the mean over examples of NLL on the rephrasing plus weighted KL at the answer that should stay."""
        total = 0.0
        for group in in_passes(drawn):
            nll, kl = outer_losses(lm, group, base_log_probs(lm, group, "answers"), parts, "answers")
            loss = (nll + self.locality_weight * kl).sum() / len(drawn)
            if backward:
                loss.backward()
            total += float(loss.detach())
        return total


def value_differences(
    network: Hypernetwork, i: int, u: Float[Tensor, "n in"], delta: Float[Tensor, "n out"]
) -> Float[Tensor, "n out"]:
    """d = -eta (u . u~) delta~ of each token: what the step -eta delta~ u~^T would do to its own key (equation 3)."""
    u_new, delta_new = network.transform(i, u, delta)
    return -network.step_sizes[i] * (u * u_new).sum(-1, keepdim=True) * delta_new


def shift(k: Float[Tensor, "n in"], v: Float[Tensor, "n out"], ridge: Tensor) -> Float[Tensor, "in out"]:
    """S = argmin ||K S - V||^2 + lambda ||S||^2, by the smaller of its two systems, in float64 (equation 4)."""
    if len(k) < k.shape[1]:
        return k.T @ dual_shift(k, v, ridge)
    return _normal_solve(k, k.double().T @ v.double(), ridge).to(v.dtype)


def dual_shift(k: Float[Tensor, "n in"], v: Float[Tensor, "n out"], ridge: Tensor) -> Float[Tensor, "n out"]:
    """X = (K K^T + lambda I)^-1 V, in float64; S = K^T X."""
    gram = k.double() @ k.double().T
    gram.diagonal().add_(ridge.double())
    return general_solve(gram, v.double(), _REMEDY).to(v.dtype)


def shift_gradients(
    k: Float[Tensor, "n in"], s: Float[Tensor, "in out"], log_ridge: Tensor, to_s: Float[Tensor, "in out"]
) -> tuple[Float[Tensor, "n out"], Tensor]:
    """dL/dV = K M and dL/d log lambda = -lambda <M, S>, with M = (K^T K + lambda I)^-1 dL/dS."""
    ridge = log_ridge.exp()
    m = _normal_solve(k, to_s.double(), ridge)
    return (k.double() @ m).to(s.dtype), (-ridge * (m * s.double()).sum()).to(log_ridge.dtype)


def _normal_solve(k: Float[Tensor, "n in"], right: Float[Tensor, "in out"], ridge: Tensor) -> Float[Tensor, "in out"]:
    gram = k.double().T @ k.double()
    gram.diagonal().add_(ridge.double())
    return general_solve(gram, right, _REMEDY)


_REMEDY = "the editor's ridge is 0 or out of range; train it again with a smaller learning rate"
