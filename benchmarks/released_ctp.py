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
from jaxtyping import Bool
from torch import Tensor

from retcon.errors import InvalidSetting
from retcon.locate.paths import Slot
from retcon.methods.ctp import Ctp, PathTrainer
from retcon.training.descent import Reduction
from retcon.training.nodes import RowAdam, RowState
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
    def __init__(
        self, method: ReleasedCtp, slots: Sequence[Slot], target: AnswerLoss, original: AnswerLoss | None
    ) -> None:
        super().__init__(method, slots, target, original)
        self.adam_negative = RowAdam(learning_rate=method.learning_rate)
        self.memory_negative = self.memory_positive
        self.negative_loss_weight = method.contrast_weight
        self.n_steps = 0

    def remember(self, before: tuple[list[Tensor], list[Tensor]]) -> None:
        """Everything that was ever trained goes on, its steps counted from the start."""
        everyone = [torch.ones_like(nodes.index, dtype=torch.bool) for nodes in self.nodes]
        self.memory_positive = self.memory_negative = self.grown(self.memory_positive, everyone, self.n_steps)

    def _step(self, adam: RowAdam, memory: list[list[RowState]], chosen: list[Tensor]) -> None:
        self.n_steps += 1
        super()._step(adam, memory, chosen)

    def step_nodes(self, adam: RowAdam, tensor: Tensor, state: RowState, here: Bool[Tensor, " n"]) -> None:
        """All rows are stepped, so that momentum goes on working where the gradient is zeroed."""
        assert tensor.grad is not None
        outside = ~here.view(-1, *[1] * (tensor.dim() - 1))
        adam.step(tensor, tensor.grad.masked_fill(outside, 0), state, torch.ones_like(here))
