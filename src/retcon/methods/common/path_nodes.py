"""The nodes that CTP trains: those along its paths, and those that were on them before."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retcon.locate.paths import Slot, Transmission
from retcon.training.descent import accumulate
from retcon.training.nodes import Nodes
from retcon.training.objective import AnswerLoss
from retcon.training.parts import Part, attached


class PathNodes:
    """The nodes along CTP's paths T+ and T-, matrix by matrix, with all that were trained before."""

    def __init__(self, slots: Sequence[Slot], *, with_bias: bool) -> None:
        """Start with no path.

        Args:
            with_bias: train the whole bias of every value matrix besides, where there is one.
        """
        self.slots = slots
        self.of_slots = [Nodes(slot.sites, "columns" if slot.is_value else "rows") for slot in slots]
        self.biases: list[Nodes] = []
        for slot in slots:
            if with_bias and slot.is_value and slot.site.bias is not None:
                bias = Nodes(slot.sites, "bias")
                bias.add(torch.arange(len(slot.site.bias)))
                self.biases.append(bias)
        self.nodes = [*self.of_slots, *self.biases]
        self.positive: list[Tensor] = []
        """T+'s nodes, per slot."""
        self.negative: list[Tensor] = []
        self.sources: list[Tensor] = []
        """Places of T+ among the nodes, per slot."""

    @property
    def parameter_names(self) -> list[str]:
        """The parameters that may change."""
        return [name for nodes in self.nodes for name in nodes.parameter_names]

    def parts(self) -> list[Part]:
        """Return everything that was ever trained."""
        return [part for nodes in self.nodes for part in nodes.parts()]

    def values(self) -> list[Tensor]:
        """Return the tensors that the parts train."""
        return [tensor for nodes in self.nodes for tensor in nodes.tensors]

    def choose(self, found: Transmission, *, train_negative: bool) -> None:
        """Take in the nodes of these paths, those of T- only where they are trained."""
        self.positive, self.negative = (
            [nodes.at_hand(torch.tensor(paths.in_slot(t), dtype=torch.long)) for t, nodes in enumerate(self.of_slots)]
            for paths in (found.positive, found.negative)
        )
        self.sources = []
        for nodes, positive, negative in zip(self.of_slots, self.positive, self.negative, strict=True):
            nodes.add(positive)
            if train_negative:
                nodes.add(negative)
            self.sources.append(nodes.chosen(positive).nonzero()[:, 0])

    def with_biases(self, units: Sequence[Tensor]) -> list[Tensor]:
        """Return these units of the slots, and all of the biases, as an optimiser of all nodes takes them."""
        return [*units, *(bias.index for bias in self.biases)]

    def mirrored(self) -> list[Part]:
        """Return parts that change T-'s nodes as T+'s changed on average."""
        return [
            part
            for nodes, sources, negative in zip(self.of_slots, self.sources, self.negative, strict=True)
            for part in nodes.averaged(sources, negative)
        ]

    def forget_gradients(self) -> None:
        """Drop the gradients of the values."""
        for tensor in self.values():
            tensor.grad = None


def accumulate_attached(
    loss: AnswerLoss, parts: Callable[[], list[Part]], items: Sequence[int], weight: Callable[[int, float], float]
) -> dict[int, float]:
    """Add the gradient of the weighted losses of `items`, with the parts attached; return the losses."""

    def losses(chunk: Sequence[int]) -> Tensor:
        with attached(parts()):
            return loss(chunk)

    return accumulate(losses, loss.chunks(items), weight)
