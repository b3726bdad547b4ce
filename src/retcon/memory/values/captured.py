"""Steps that are captured once and launched as one: on a card the CPU then costs next to nothing (CUDA graphs).

A captured step reads and writes fixed memory; a batch of the captured shapes is copied into it. Of each kind of batch
one step is run first in the ordinary way, in which the device plans its work. Where a step cannot be captured the
search says so and goes on in the ordinary way, to the same values.
"""

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from retcon.errors import RetconWarning
from retcon.memory.values.state import SearchState
from retcon.memory.values.step import ActiveBatch, Recorded

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""From a function that works on the device to one that does the same again, in the same memory."""


def cuda_graphs() -> Capture:
    """Return a capture of CUDA graphs that share their memory, since one is run at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        return graph.replay

    return capture


class Steps:
    """The steps of a chunk, captured by the shapes of their tensors, or made in the ordinary way.

    Args:
        capture: None: all are made in the ordinary way.
    """

    def __init__(self, chunk: Recorded, capture: Capture | None) -> None:
        self.chunk, self.capture = chunk, capture
        self.n_captured = 0
        """Steps that were launched as one."""
        self._ran: set[Hashable] = set()
        self._captured: dict[Hashable, CapturedStep] = {}

    def __call__(self, now: ActiveBatch, *, only_measure: bool) -> None:
        """As `Recorded.step`; a captured step leaves batch and state in its own tensors."""
        if self.capture is not None and (held := self._held(now, only_measure)) is not None:
            held(now)
            self.n_captured += 1
        else:
            self.chunk.step(now, only_measure=only_measure)

    def _held(self, now: ActiveBatch, last: bool) -> "CapturedStep | None":
        """Return the captured step for such a batch; None where there is none yet that is worth it, or ever."""
        kind = tuple((name, x.shape, x.dtype) for name, x in tensors_of(self.chunk, now).items())
        if kind in self._captured:
            return self._captured[kind]
        if last or kind not in self._ran:
            self._ran.add(kind)
            return None
        held = CapturedStep(self.chunk, now)
        assert self.capture is not None
        try:
            held.replay = self.capture(held.work)
        except RuntimeError as error:
            self.capture = None
            warnings.warn(
                f"a step of the search could not be captured ({str(error).strip().splitlines()[0]}); steps are "
                "launched piece by piece, which gives the same values and takes longer",
                RetconWarning,
                stacklevel=4,
            )
            return None
        self._captured[kind] = held
        return held


class CapturedStep:
    """One step on tensors that stay where they are; it is that of any batch of these shapes, a fresh one included.

    Args:
        now: the batch whose tensors are kept for this; its state is copied.
    """

    def __init__(self, chunk: Recorded, now: ActiveBatch) -> None:
        self.chunk = chunk
        self.inputs = {name: x.clone() for name, x in now.state.tensors().items()}
        self.batch = ActiveBatch(now.edits, now.passes, now.labels, SearchState(**vars(now.state)))
        self.batch.state.hold(self.inputs)
        self.replay: Callable[[], None] | None = None
        """Launches the step; None until it is captured."""

    def work(self) -> None:
        """Make the step, and leave its results where its inputs were."""
        self.batch.fresh = True  # places that have made no step take in what they find first; others keep it
        self.chunk.step(self.batch, only_measure=False)
        with torch.no_grad():
            for name, found in self.batch.state.tensors().items():
                self.inputs[name].copy_(found)
        self.batch.state.hold(self.inputs)

    def __call__(self, now: ActiveBatch) -> None:
        """Make the step of a batch of these shapes, whose tensors are these from then on."""
        if now.state is not self.batch.state:
            here, there = tensors_of(self.chunk, self.batch), tensors_of(self.chunk, now)
            for name, x in here.items():
                if x is not there[name]:
                    x.copy_(there[name])
            now.passes, now.labels, now.state = self.batch.passes, self.batch.labels, self.batch.state
        assert self.replay is not None
        self.replay()
        now.fresh = False


def tensors_of(chunk: Recorded, now: ActiveBatch) -> dict[str, Tensor]:
    """Return all tensors that a step of the batch reads beside the model's, by name."""
    labels = now.labels
    found = {"tokens": labels.tokens, "label_rows": labels.rows, "per_row": labels.per_row, **now.state.tensors()}
    for i, part in enumerate(now.passes):
        given = part.recorded.arguments(chunk.lm, part.recorded.cache(chunk.lm))
        own = {
            "states": part.recorded.states,
            "labels": part.labels,
            "ends": part.ends,
            **{name: x for name, x in given.items() if isinstance(x, Tensor) and name != "inputs_embeds"},
            **{f"keys.{layer}": x for layer, x in enumerate(part.recorded.keys)},
            **{f"values.{layer}": x for layer, x in enumerate(part.recorded.values)},
            **{f"changed.{s}": x for s, x in enumerate(part.changed)},
        }
        found |= {f"{i}.{name}": x for name, x in own.items()}
    return found
