r"""CTP as its released code runs it (SonglinZhai/PAC 1240102), where that departs from the paper and from `ctp`.

One Adam takes both steps, and gradients outside a step's nodes are zeroed rather than left out. So nodes with momentum
move in the other's step, and go on moving after they were deselected. lambda is on the loss, where Adam divides it out
again, and paths are assessed from gradients batch by batch. `tests/parity/test_tuning.py` holds it to the released loop
written down on whole weights.

    retcon edit PATH edits.jsonl --out d.safetensors --method benchmarks.released_ctp:ReleasedCtp \
        --preset benchmarks.released_ctp:ReleasedCtp/gpt-j-6b/consecutive

`consecutive` is the released schedule; without naming it, a model with presets gets `ctp`'s first, which is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retcon.errors import InvalidSetting
from retcon.locate.paths import Slot
from retcon.methods.ctp import Ctp, PathTrainer
from retcon.training.descent import Reduction
from retcon.training.nodes import NodeAdam, gradient_of
from retcon.training.objective import AnswerLoss


@dataclass(frozen=True, kw_only=True)
class ReleasedCtp(Ctp):
    """The released loop; the defaults are its schedule."""

    name: ClassVar[str] = "released_ctp"

    learning_rate: float = 1e-5
    epochs: int = 12
    batch_size: int | None = 2
    reassess: int = 2
    stop_loss: float = 0.0
    reduction: Reduction = "per_token"
    train_out_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast == "mirror":
            raise InvalidSetting("released_ctp: the released code takes a second step; contrast='mirror' has none")

    def trainer(self, slots: Sequence[Slot], target: AnswerLoss, original: AnswerLoss | None) -> PathTrainer:
        """One whose optimiser forgets nothing."""
        return _LeakingTrainer(self, slots, target, original)

    def assessed_together(self, n_edits: int) -> list[list[int]]:
        """The mini-batches, in order."""
        size = self.batch_size or n_edits
        return [list(range(i, min(i + size, n_edits))) for i in range(0, n_edits, size)]


class _LeakingTrainer(PathTrainer):
    def optimizers(self) -> tuple[NodeAdam, NodeAdam]:
        """One Adam for both steps; lambda is on the loss."""
        self.negative_loss_weight = self.method.contrast_weight
        positive, negative = (_LeakingAdam(self.paths.nodes, self.method.learning_rate) for _ in range(2))
        negative.memory = positive.memory
        return positive, negative


class _LeakingAdam(NodeAdam):
    """Steps everything that was ever trained, so that momentum goes on working where the gradient is zeroed."""

    def choose(self, units: Sequence[Tensor]) -> None:
        """Nodes that are new have no momentum, and as many steps counted as all others."""
        counted = [float(state.steps.max()) for states in self.memory for state in states if len(state.steps)]
        for t, nodes in enumerate(self.nodes):
            everyone = torch.ones_like(nodes.index, dtype=torch.bool)
            self.chosen[t] = nodes.chosen(units[t]) if t < len(units) else everyone
            states = zip(self.memory[t], nodes.tensors, strict=True)
            self.memory[t] = [state.grown(tensor, everyone, max(counted, default=0)) for state, tensor in states]

    def step(self) -> None:
        for nodes, memory, chosen in zip(self.nodes, self.memory, self.chosen, strict=True):
            for tensor, state in zip(nodes.tensors, memory, strict=True):
                outside = ~chosen.view(-1, *[1] * (tensor.dim() - 1))
                self.adam.step(tensor, gradient_of(tensor).masked_fill(outside, 0), state, torch.ones_like(chosen))
