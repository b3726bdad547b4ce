"""What a step asks of the host, and in how many shapes the steps of a chunk are run."""

from collections.abc import Callable

import pytest
import torch
from benchmarks.counting import CountedChunk, Counts, launches, uploads, waits

from retcon.edits import Edit
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.values import step
from retcon.memory.values.objective import ValueSearch, ValueSite
from retcon.memory.values.rows import EditRows
from retcon.memory.values.schedule import Chunk, Pace
from tests.conftest import everyday

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


PACES = [("gptj", 8), ("llama", 1), ("gemma2", 2)]
"""Families, and after how many steps the host looks for edits that have ended."""


@pytest.mark.parametrize(("family", "look_every"), everyday(("gptj", 8), of=PACES, rows=True))
def test_a_card_s_steps_have_few_shapes_and_wait_for_nothing(
    family: str, look_every: int, tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "MAX_KL_PADDING_TOKENS", {"cpu": -1 if look_every == 1 else 64})  # KL rows apart, or not
    lm = tiny(family)
    search = ValueSearch(steps=9, learning_rate=0.2, threshold=0.00201)
    with lm.frozen_eval():
        rows = [
            EditRows.of(lm, Edit(prompt, subject, target, id=subject), SITES, CONTEXTS, search)
            for prompt, subject, target in FACTS
        ]
        for _ in Chunk(lm, rows[:1], SITES, search).run(1):  # what is found out about a model once
            pass
        chunk = CountedChunk(lm, rows, SITES, search)
        assert sorted(chunk.run(4, pace=Pace(look_every, max_shapes=4))) == list(range(len(FACTS)))
    assert len({f.report.steps for f in chunk.found.values()}) > 1  # they end at different steps
    assert len({s.shape for s in chunk.steps}) <= 4
    assert sum(s.waits for s in chunk.steps) == 0
    assert sum(s.uploads for s in chunk.steps if not s.first) == 0
    assert all(s.launches > 100 for s in chunk.steps)


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
