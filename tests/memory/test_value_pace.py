"""What a step asks of the host, and in how many shapes the steps of a chunk are run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.counting import Counts, launches, uploads, waits

from retcon.edits import Edit
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.values.objective import ValueSearch, ValueSite
from retcon.memory.values.rows import EditRows
from retcon.memory.values.schedule import Chunk, Pace
from retcon.memory.values.step import ActiveBatch

CONTEXTS = Contexts(("The train stood still. ", "I read. "))
SITES = (
    ValueSite(Point(1, "mlp"), "subject_last", clamp=1.5, weight_decay=0.02),
    ValueSite(Point(2, "mlp"), "prediction", clamp=0.7, weight_decay=0.02),
)
FACTS = [
    ("The capital of {} is", "France", "Rome"),
    ("The capital of {} is", "Peru", "a long way from home"),
    ("It was late, and the mother tongue of {} is", "Chad", "Oslo"),
    ("{}", "Zürich", "a town"),
    ("The capital of {} is", "Norway", "Bern"),
    ("Therefore it was late, and the capital of {} is", "Ελλάδα", "French"),
    ("The capital of {} is", "Mali", "Lima"),
]


class Watched(Chunk):
    """A chunk that notes the shapes of its steps, and what each asked of the host."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shapes: list[tuple[int, ...]] = []
        self.asked: list[tuple[int, int, int]] = []
        self.first: list[bool] = []
        """Whether the step is the first one of a batch, which makes masks and positions."""
        self.before: ActiveBatch | None = None

    def step(self, now: ActiveBatch, *, only_measure: bool) -> None:
        parts = [(*p.recorded.states.shape[:2], p.recorded.keys[0].shape[2], p.labels.shape[1]) for p in now.passes]
        self.first.append(now is not self.before)
        self.before = now
        self.shapes.append(tuple(n for part in parts for n in part))
        with Counts() as counts:
            super().step(now, only_measure=only_measure)
        ops = counts.mark()
        self.asked.append((launches(ops), waits(ops), uploads(ops)))


@pytest.mark.parametrize(("family", "look_every"), [("gptj", 8), ("llama", 1), ("gemma2", 2)])
def test_a_card_s_steps_have_few_shapes_and_wait_for_nothing(
    family: str, look_every: int, tiny: Callable[..., LM]
) -> None:
    lm = tiny(family)
    search = ValueSearch(steps=9, learning_rate=0.2, threshold=0.00201)
    with lm.frozen_eval():
        rows = [
            EditRows.of(lm, Edit(prompt, subject, target, id=subject), SITES, CONTEXTS, search)
            for prompt, subject, target in FACTS
        ]
        for _ in Chunk(lm, rows[:1], SITES, search).run(1):  # what is found out about a model once
            pass
        chunk = Watched(lm, rows, SITES, search)
        assert sorted(chunk.run(4, pace=Pace(look_every, max_shapes=4))) == list(range(len(FACTS)))
        assert len({f.report.steps for f in chunk.found.values()}) > 1  # they end at different steps
        assert len(set(chunk.shapes)) <= 4
        assert [n for _, n, _ in chunk.asked] == [0] * len(chunk.asked)
        assert [first or n == 0 for first, (_, _, n) in zip(chunk.first, chunk.asked, strict=True)].count(False) == 0
        assert all(n > 100 for n, _, _ in chunk.asked)


def test_what_the_counts_count() -> None:
    x = torch.arange(6.0)
    with Counts() as counts:
        _ = x.sum().item()
        _ = x[x > 2]
        _ = torch.tensor([1, 2])
        _ = x.view(2, 3)
    ops = counts.mark()
    assert (waits(ops), uploads(ops)) == (2, 1)
    assert launches(ops) >= 3
    assert not counts.mark()
