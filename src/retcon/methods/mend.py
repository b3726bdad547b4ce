"""MEND: a trained network turns the gradient of an edit into the change of the weights.

Mitchell et al. 2022, arXiv:2110.11309v2, section 3; symbols as there. Departures: docs/methods/mend.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.delta import Change, Delta
from retcon.edits import Case, Edit
from retcon.lm.model import LM, Site
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import State, recorded
from retcon.methods.common.hypernetwork import (
    ComparedAt,
    Drawn,
    HypernetworkSettings,
    base_log_probs,
    fit_editor,
    gather_pieces,
    load_editor,
    outer_losses,
    pieces,
    with_a_piece,
)
from retcon.methods.common.proposal import reported
from retcon.methods.common.settings import NotNegative, Positive
from retcon.training.hypernetwork import Hypernetwork, ScaleAt, not_zero
from retcon.training.objective import trained_rows
from retcon.training.parts import LowRankByRow, Part
from retcon.work import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Mend(HypernetworkSettings):
    """Model editor networks with gradient decomposition."""

    name: ClassVar[str] = "mend"
    scale_at: ClassVar[ScaleAt] = "inside"
    eps: ClassVar[float] = 1e-7

    sign: Literal[-1, 1] = -1
    """W' = W + sign eta G~. 1: as released, where training has to find out that a loss is to go down."""
    learning_rate: NotNegative = 1e-6
    """Adam's, for the networks."""
    step_size_learning_rate: NotNegative = 1e-4
    """Adam's, for eta."""
    edit_weight: NotNegative = 0.1
    """c_e: weight of the loss on rephrasings."""
    locality_weight: NotNegative = 1.0
    """Weight of the divergence on prompts that should stay; the paper's is 1."""
    locality_at: ComparedAt = "everywhere"
    """After which tokens of those prompts the model is compared with itself: all, or those that predict the answer."""
    clip: Positive = 100.0

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
        """Return the change that writes `edits`, whose pieces are added up; the model is untouched.

        Only the editor is used: nothing is searched, drawn or kept.

        Raises:
            InvalidSetting: no editor is named.
            MalformedFile, WrongBase: the editor cannot be read, or is another model's.
        """
        method, editor = load_editor(self, lm)
        record = recorded(method, lm, edits, seed=seed, editor_sha256=editor.sha256)
        if not edits:
            return lm.delta({}, **record)
        with lm.frozen_eval():
            found = gather_pieces(lm, editor.sites, trained_rows(lm, edits), with_a_piece)
            changes: dict[str, list[Change]] = {}
            for i, (site, (u, delta)) in enumerate(zip(editor.sites, found, strict=True)):
                left, right = method.pseudo_gradient(editor.network, i, u, delta)
                changes.setdefault(site.name, []).append(site.stored(left.T.cpu(), right.cpu()))
                (progress or silent)("matrices", i + 1, len(found))
        return reported(lm, lm.delta(changes, **record))

    @torch.no_grad()
    def pseudo_gradient(
        self, network: Hypernetwork, i: int, u: Float[Tensor, "n in"], delta: Float[Tensor, "n out"]
    ) -> tuple[Float[Tensor, "n out"], Float[Tensor, "n in"]]:
        """sign eta G~ of the i-th matrix as its two factors: G~ = sum_t delta~_t u~_t^T (equation 5)."""
        u_new, delta_new = network.transform(i, u, delta)
        return delta_new, self.sign * network.step_sizes[i] * u_new

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

        Each step takes `batch_size` edits, each by itself: the gradient on its prompt, a loss on one of its rephrasings
        and one on a prompt that should stay. A run that was killed goes on when it is given the same again.
        """
        sites, network = self.new_editor(lm, out, seed)
        others = [p for p in network.parameters() if p is not network.step_sizes]
        rates = ((others, self.learning_rate), ([network.step_sizes], self.step_size_learning_rate))
        optimizers = [torch.optim.Adam(values, lr=rate) for values, rate in rates if values]  # without blocks eta alone

        def backward(drawn: Sequence[Drawn]) -> float:
            total = self.loss(lm, network, sites, drawn)
            total.backward()
            return float(total.detach())

        @torch.no_grad()
        def loss(drawn: Sequence[Drawn]) -> float:
            return float(self.loss(lm, network, sites, drawn))

        return fit_editor(
            self, lm, cases, out, network, optimizers, backward, loss, seed=seed, force=force, progress=progress
        )

    def loss(self, lm: LM, network: Hypernetwork, sites: Sequence[Site], drawn: Sequence[Drawn]) -> Tensor:
        """c_e L_e + L_loc (equation 4), the mean over examples that are each edited by itself.

        u and delta are constants here, so that no second derivative is taken.
        """
        found = pieces(lm, sites, [d.edit for d in drawn])
        counted = [not_zero(u, delta) for u, delta in found]
        for i, (u, delta) in enumerate(found):
            network.network(i).observe(u[counted[i]], delta[counted[i]])
        parts: list[Part] = []
        for i, (site, (u, delta)) in enumerate(zip(sites, found, strict=True)):
            u_new, delta_new = network.transform(i, u, delta)
            left = (delta_new * counted[i][..., None]).to(site.device)
            right = (self.sign * network.step_sizes[i] * u_new).to(site.device)
            parts.append(LowRankByRow(site, torch.cat([left, left]), torch.cat([right, right])))
        nll, kl = outer_losses(lm, drawn, base_log_probs(lm, drawn, self.locality_at), parts, self.locality_at)
        return self.edit_weight * nll.mean() + self.locality_weight * kl.mean()
