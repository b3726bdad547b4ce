"""Which edits of a chunk are active when: as one ends, the next takes its place."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from retcon.delta import EditReport
from retcon.errors import NonFinite
from retcon.lm.model import LM
from retcon.memory.values.objective import ValueSearch, ValueSite, norm_names
from retcon.memory.values.rows import EditRows
from retcon.memory.values.state import SearchState, ValueOf
from retcon.memory.values.step import ActiveBatch, Recorded


@dataclass(frozen=True)
class Snapshot:
    """A chunk's search between two steps: all that it takes to go on to the identical result."""

    found: dict[int, ValueOf]
    """By place in the chunk."""
    active: list[int]
    made: list[int]
    """Steps that each active edit has made."""
    waiting: list[int]
    """The last one is next."""
    fresh: bool
    """Whether some active edits have yet to make their first step."""
    state: SearchState


def forget(found: int, snapshot: Callable[[], Snapshot]) -> None:
    """Keep no snapshot."""


class Chunk(Recorded):
    """Some edits that are searched together, and what was found for them."""

    def __init__(self, lm: LM, rows: Sequence[EditRows], sites: Sequence[ValueSite], search: ValueSearch) -> None:
        super().__init__(lm, rows, sites, search)
        self.found: dict[int, ValueOf] = {}

    def activate(self, edits: list[int]) -> ActiveBatch:
        """Return these edits before their first step."""
        return self.batch(edits, self.state(edits))

    def run(
        self,
        max_active: int,
        *,
        look_every: int = 1,
        start: Snapshot | None = None,
        hear: Callable[[int, Callable[[], Snapshot]], None] = forget,
    ) -> Iterator[int]:
        """Optimise all, `max_active` at a time; gives the place of each edit in the chunk as it ends.

        Args:
            look_every: steps after which the host looks which edits have ended; in between it waits for nothing, and
                edits that have ended stay as they are.
            start: where an earlier search of the chunk was; it goes on from there.
            hear: is told after every look how many edits are found, and how to get a snapshot.

        Raises:
            NonFinite: a loss came out NaN or infinite; the message names the edit.
        """
        if start is None:
            waiting = list(range(len(self.rows)))[::-1]
            now = self.activate([waiting.pop() for _ in range(min(max_active, len(waiting)))])
            made = [0] * len(now.edits)
        else:
            self.found, waiting, made = dict(start.found), list(start.waiting), list(start.made)
            now = self.batch(list(start.active), start.state)
            now.fresh = start.fresh
            yield from list(self.found)

        def snapshot() -> Snapshot:
            return Snapshot(dict(self.found), list(now.edits), list(made), list(waiting), now.fresh, now.state)

        while now.edits:
            left = max(self.search.steps - n for n in made)
            for i in range(min(look_every, left)):
                self.step(now, only_measure=i == left - 1)
            made = [n + min(look_every, left) for n in made]
            if ended := self._look(now):
                yield from [now.edits[place] for place in ended]
                stay = [place for place in range(len(now.edits)) if place not in ended]
                new = [waiting.pop() for _ in range(min(max_active - len(stay), len(waiting)))]
                if not stay and not new:
                    return
                made = [made[place] for place in stay] + [0] * len(new)
                state = now.state.followed_by(torch.tensor(stay, dtype=torch.long), self.state(new))
                now = self.batch([now.edits[place] for place in stay] + new, state)
                now.fresh = bool(new)
            hear(len(self.found), snapshot)

    def _look(self, now: ActiveBatch) -> list[int]:
        """Return the places whose edits have ended, once their results are on the CPU."""
        state = now.state
        columns = torch.stack([state.going.double(), state.reached.double(), state.steps.double(), *state.terms]).cpu()
        going, reached, steps, *terms = columns.tolist()
        ended = [place for place, on in enumerate(going) if not on]
        if not ended:
            return []
        init, offset, activation = (
            [x[ended].cpu() for x in vectors] for vectors in (state.init, state.offset, state.activation)
        )
        for k, place in enumerate(ended):
            edit, n_steps = self.rows[now.edits[place]].edit, int(steps[place])
            probability, *parts = (term[place] for term in terms)
            detail = dict(zip(("nll", "kl", "loss"), parts, strict=True))
            if not math.isfinite(detail["loss"]):
                raise NonFinite(f"edit {edit.id!r} ({edit.subject!r}): the loss is {detail['loss']} at step {n_steps}")
            stopped = "reached" if reached[place] else "steps"
            for s, (site, name) in enumerate(zip(self.sites, norm_names(self.sites), strict=True)):
                length, clean = float(offset[s][k].norm()), float(init[s][k].norm())
                detail[f"{name}_offset"], detail[f"{name}_init"] = length, clean
                if stopped == "steps" and length >= site.clamp * clean * (1 - 1e-4):
                    stopped = "clamped"
            of_one = [tuple(x[k].clone() for x in vectors) for vectors in (init, offset, activation)]
            report = EditReport(edit.id, probability, n_steps, stopped, detail)
            self.found[now.edits[place]] = ValueOf(of_one[0], of_one[1], of_one[2], report)
        return ended
