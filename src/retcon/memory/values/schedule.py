"""The order in which the edits of a chunk are searched: some are active, and as one ends, the next takes its place."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from retcon.errors import NonFinite
from retcon.lm.model import LM
from retcon.memory.values.captured import Capture, Steps, cuda_graphs
from retcon.memory.values.objective import ValueOf, ValueSearch, ValueSite, ended_search
from retcon.memory.values.rows import EditRows
from retcon.memory.values.state import SearchState
from retcon.memory.values.step import ActiveBatch, Recorded, Shape

LOOK_EVERY = {"cpu": 1}
"""Steps after which the CPU reads which edits have ended. On a CPU that costs nothing."""
LOOK_EVERY_ON_ACCELERATOR = 8
MAX_SHAPES: dict[str, int | None] = {"cpu": None}
"""Shapes of a chunk's steps at most; None: any, so that every edit that ends makes the next steps smaller."""
MAX_SHAPES_ON_ACCELERATOR = 4
CAPTURED = {"cuda": cuda_graphs}
"""How a device captures a step, so that later ones are launched as one (`captured.py`)."""


@dataclass(frozen=True)
class Pace:
    """How often the CPU and the device wait for each other; values differ by it in their last bits only."""

    look_every: int
    """Steps after which the CPU reads which edits have ended; in between it waits for nothing, and the values of edits
    that have ended no longer change."""
    max_shapes: int | None
    """Shapes of a chunk's steps at most; None: every step has the smallest shape for the edits that are searched."""
    capture: Callable[[], Capture] | None = None
    """Records a step, to be launched as a whole when it comes again; None: it is launched kernel by kernel."""

    @classmethod
    def on(cls, device_type: str) -> "Pace":
        """Return the pace for a kind of device ("cpu", "cuda")."""
        return cls(
            LOOK_EVERY.get(device_type, LOOK_EVERY_ON_ACCELERATOR),
            MAX_SHAPES.get(device_type, MAX_SHAPES_ON_ACCELERATOR),
            CAPTURED.get(device_type),
        )


@dataclass(frozen=True)
class Snapshot:
    """The state of a chunk's search between two steps, from which it goes on to the identical result."""

    found: dict[int, ValueOf]
    """By place in the chunk."""
    active: list[int]
    """The edit at each place of the batch; one that has ended only keeps the batch's shape."""
    made: list[int]
    """Steps that the edit at each place has taken."""
    waiting: list[int]
    """Edits that have yet to begin; the last one is next."""
    fresh: bool
    """Whether some active edits have yet to make their first step."""
    state: SearchState


def keep_nothing(found: int, snapshot: Callable[[], Snapshot]) -> None:
    """Keep no snapshot."""


class Chunk(Recorded):
    """Edits that share their recorded states, and the values found for them."""

    def __init__(
        self, lm: LM, rows: Sequence[EditRows], sites: Sequence[ValueSite], search: ValueSearch, offload: bool = False
    ) -> None:
        super().__init__(lm, rows, sites, search, offload)
        self.found: dict[int, ValueOf] = {}

    def activate(self, edits: list[int]) -> ActiveBatch:
        """Return these edits before their first step."""
        return self.batch(edits, self.state(edits))

    def run(
        self,
        max_active: int,
        *,
        pace: Pace | None = None,
        start: Snapshot | None = None,
        on_ended: Callable[[int, Callable[[], Snapshot]], None] = keep_nothing,
    ) -> Iterator[int]:
        """Search the values of all edits, `max_active` at a time; yields the number of each in the chunk as it ends.

        Args:
            pace: how often the CPU reads which edits have ended, and in how many shapes steps are run.
            start: the state of an earlier search of the chunk, from which this one goes on.
            on_ended: called each time that has been read, with how many edits have ended and a function that makes a
                snapshot.

        Raises:
            NonFinite: a loss came out NaN or infinite; the message names the edit.
        """
        pace = pace or Pace.on(self.lm.device.type)
        shapes = self._shapes(min(max_active, len(self.rows)), pace)
        step = Steps(self, pace.capture() if pace.capture is not None and self._stays() else None)
        if start is None:
            waiting = list(range(len(self.rows)))[::-1]
            edits = [waiting.pop() for _ in range(min(max_active, len(waiting)))]
            now, made = self.batch(edits, self.state(edits), _smallest_shape(shapes, len(edits))), [0] * len(edits)
        else:
            self.found, waiting, made = dict(start.found), list(start.waiting), list(start.made)
            now = self.batch(list(start.active), start.state, _smallest_shape(shapes, len(start.active)))
            now.fresh = start.fresh
            yield from list(self.found)

        def snapshot() -> Snapshot:
            return Snapshot(dict(self.found), list(now.edits), list(made), list(waiting), now.fresh, now.state)

        while True:
            going = [place for place, edit in enumerate(now.edits) if edit not in self.found]
            left = max(self.search.steps - made[place] for place in going)
            for i in range(min(pace.look_every, left)):
                step(now, only_measure=i == left - 1)
            made = [n + min(pace.look_every, left) for n in made]
            if ended := self._read_ended(now, going):
                yield from [now.edits[place] for place in ended]
                new = [waiting.pop() for _ in range(min(len(ended), len(waiting)))]
                stay = [place for place in going if place not in ended]
                if not stay and not new:
                    return
                shape = _smallest_shape(shapes, len(stay) + len(new))
                order = _order(len(now.edits), stay, len(new), ended, shape)
                if order != list(range(len(now.edits))):
                    edits, made = [*now.edits, *new], [*made, *[0] * len(new)]
                    state = now.state.rearranged(torch.tensor(order), self.state(new))
                    now = self.batch([edits[place] for place in order], state, shape)
                    now.fresh = bool(new)
                    made = [made[place] for place in order]
            on_ended(len(self.found), snapshot)

    def _stays(self) -> bool:
        """Return whether all that a step works on stays on one device."""
        return not self.offload and len({x.device for x in self.lm.model.parameters()}) == 1

    def _shapes(self, places: int, pace: Pace) -> list[Shape]:
        """Return the shapes that steps are run in, each with half as many places as the one before; empty for any."""
        n_places = [places >> i for i in range(pace.max_shapes or 0) if places >> i]
        return [self.shape_for_any(n) for n in n_places]

    def _read_ended(self, now: ActiveBatch, searched: Sequence[int]) -> list[int]:
        """Move the results of edits that have ended to the CPU; return their places, out of those `searched`."""
        state = now.state
        columns = torch.stack([state.going.double(), state.reached.double(), state.steps.double(), *state.terms]).cpu()
        going, reached, steps, *terms = columns.tolist()
        ended = [place for place in searched if not going[place]]
        if not ended:
            return []
        init = [x[ended].cpu() for x in state.init]
        offset = [x[ended].cpu() for x in state.offset]
        activation = [x[ended].cpu() for x in state.activation]
        for k, place in enumerate(ended):
            edit, n_steps = self.rows[now.edits[place]].edit, int(steps[place])
            probability, nll, kl, loss = (term[place] for term in terms)
            if not math.isfinite(loss):
                raise NonFinite(f"edit {edit.id!r} ({edit.subject!r}): the loss is {loss} at step {n_steps}")
            self.found[now.edits[place]] = ended_search(
                edit,
                self.sites,
                init=tuple(x[k].clone() for x in init),
                offset=tuple(x[k].clone() for x in offset),
                activation=tuple(x[k].clone() for x in activation),
                reached=bool(reached[place]),
                probability=probability,
                steps=n_steps,
                terms={"nll": nll, "kl": kl, "loss": loss},
            )
        return ended


def _smallest_shape(shapes: Sequence[Shape], places: int) -> Shape | None:
    """Return the smallest shape for so many edits; None where any shape will do."""
    return min((shape for shape in shapes if shape.places >= places), default=None)


def _order(n: int, stay: Sequence[int], n_new: int, ended: Sequence[int], shape: Shape | None) -> list[int]:
    """Return, for each place of the next steps, the place that it is filled from; from n on, a new edit.

    If the shape stays, new edits take the places of those that have ended.
    """
    if shape is not None and shape.places == n:
        order = list(range(n))
        for j, place in enumerate(ended[:n_new]):
            order[place] = n + j
        return order
    order = [*stay, *range(n, n + n_new)]
    fill = [place for place in range(n) if place not in stay]
    return order if shape is None else order + fill[: shape.places - len(order)]
