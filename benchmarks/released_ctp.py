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
from retcon.methods.common.path_nodes import PathNodes
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

    def trainer(self, paths: PathNodes, target: AnswerLoss, original: AnswerLoss | None) -> PathTrainer:
        """Return a trainer whose optimiser forgets nothing."""
        return _LeakingTrainer(self, paths, target, original)


class _LeakingTrainer(PathTrainer):
    """One Adam for both steps; lambda is on the loss; mini-batches are assessed one after the other."""

    def __init__(self, method: Ctp, paths: PathNodes, target: AnswerLoss, original: AnswerLoss | None) -> None:
        super().__init__(method, paths, target, original)
        n_edits = len(target.rows)
        size = method.batch_size or n_edits
        self.groups = [list(range(i, min(i + size, n_edits))) for i in range(0, n_edits, size)]
        self.negative_loss_weight = method.contrast_weight
        self.adam_positive, self.adam_negative = (_LeakingAdam(paths.nodes, method.learning_rate) for _ in range(2))
        self.adam_negative.memory = self.adam_positive.memory


class _LeakingAdam(NodeAdam):
    """Steps everything that was ever trained, so that momentum goes on working where the gradient is zeroed."""

    def choose(self, units: Sequence[Tensor]) -> None:
        """Choose nodes; new ones have no momentum, and as many steps counted as all others."""
        counted = [float(state.steps.max()) for states in self.memory for state in states if len(state.steps)]
        for t, (nodes, wanted) in enumerate(zip(self.nodes, units, strict=True)):
            everyone = torch.ones_like(nodes.index, dtype=torch.bool)
            self.chosen[t] = nodes.chosen(wanted)
            states = zip(self.memory[t], nodes.tensors, strict=True)
            self.memory[t] = [state.grown(tensor, everyone, max(counted, default=0)) for state, tensor in states]

    def step(self) -> None:
        for nodes, memory, chosen in zip(self.nodes, self.memory, self.chosen, strict=True):
            for tensor, state in zip(nodes.tensors, memory, strict=True):
                outside = ~chosen.view(-1, *[1] * (tensor.dim() - 1))
                self.adam.step(tensor, gradient_of(tensor).masked_fill(outside, 0), state, torch.ones_like(chosen))
