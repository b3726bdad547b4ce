"""Resuming: a search that was killed goes on where it was, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retcon.edits import Edit
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.values import Values, ValueSearch, ValueSite, keeping_values, search_values
from retcon.memory.values.chunk import Chunk
from retcon.memory.values.plan import ChunkPlan, Plan

CONTEXTS = Contexts(("I read. ",))
SITES = (
    ValueSite(Point(1, "mlp"), "subject_last", clamp=1.5, weight_decay=0.02),
    ValueSite(Point(2, "mlp"), "prediction", clamp=0.7, weight_decay=0.02),
)
SEARCH = ValueSearch(steps=5, learning_rate=0.2)
PLAN = Plan((ChunkPlan((2, 0), 2), ChunkPlan((1,), 1), ChunkPlan((3,), 1)))


class Killed(BaseException):
    """What a signal does."""


def same(a: Values, b: Values) -> bool:
    tensors = zip((*a.init, *a.delta, *a.live), (*b.init, *b.delta, *b.live), strict=True)
    return a.report == b.report and all(torch.equal(x, y) for x, y in tensors)


def killed_after(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = Chunk.logits, 0

    def logits(self: Chunk, now: Any, vectors: Any) -> Any:
        nonlocal count
        count += 1
        if count > passes:
            raise Killed
        return real(self, now, vectors)

    monkeypatch.setattr(Chunk, "logits", logits)


@pytest.mark.parametrize("passes", [0, 3, 7, 12])
def test_a_killed_search_goes_on_with_the_identical_result(
    passes: int, tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search_values(tiny("llama", torch.float32), edits, SITES, CONTEXTS, SEARCH, plan=PLAN)
    lm = tiny("llama", torch.float32)
    with monkeypatch.context() as patch, pytest.raises(Killed), keeping_values(tmp_path):
        killed_after(passes + 2, patch)  # two passes try the replay out
        search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=PLAN)
    finished = len(list(tmp_path.glob("*/*.safetensors")))
    assert finished == {0: 0, 3: 0, 7: 1, 12: 2}[passes]
    ran = []
    real = Chunk.__init__

    def counting(self: Chunk, lm: LM, rows: Any, *args: Any) -> None:
        ran.append(len(rows))
        real(self, lm, rows, *args)

    monkeypatch.setattr(Chunk, "__init__", counting)
    with keeping_values(tmp_path) as kept:
        resumed = search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=PLAN)
    assert same(resumed, whole)
    assert len(ran) == len(PLAN.chunks) - finished
    kept.discard()
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_takes_over_the_plan(tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path) -> None:
    lm = tiny("llama")
    with keeping_values(tmp_path):
        first = search_values(lm, edits, SITES, CONTEXTS, SEARCH)
        path = next(tmp_path.glob("*/plan.json"))
        path.write_text(path.read_text().replace('"oom_retries": 0', '"oom_retries": 3'))
        assert search_values(lm, edits, SITES, CONTEXTS, SEARCH).plan["oom_retries"] == 3
    assert first.plan["oom_retries"] == 0


def test_whatever_determines_the_values_is_in_the_key(
    tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path
) -> None:
    lm = tiny("llama")
    site = lm.site(0, "down_proj")
    change = lm.delta({site.name: [site.stored(torch.ones(32, 1).double(), torch.ones(1, 64).double())]})
    with keeping_values(tmp_path) as kept:
        search_values(lm, edits, SITES, CONTEXTS, SEARCH)
        search_values(lm, edits[:2], SITES, CONTEXTS, SEARCH)
        search_values(lm, edits, SITES[:1], CONTEXTS, SEARCH)
        search_values(lm, edits, SITES, Contexts(), SEARCH)
        search_values(lm, edits, SITES, CONTEXTS, replace(SEARCH, steps=4))
        search_values(tiny("llama", seed=1), edits, SITES, CONTEXTS, SEARCH)
        with lm.edited(change):
            search_values(lm, edits, SITES, CONTEXTS, SEARCH)
    assert len(set(kept.used)) == 7


def test_a_damaged_file_is_made_again(tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path) -> None:
    lm = tiny("llama")
    with keeping_values(tmp_path):
        first = search_values(lm, edits, SITES, CONTEXTS, SEARCH)
        path = next(tmp_path.glob("*/*.safetensors"))
        path.write_bytes(path.read_bytes()[:50])
        assert same(search_values(lm, edits, SITES, CONTEXTS, SEARCH), first)
        next(tmp_path.glob("*/plan.json")).write_text("{")
        assert same(search_values(lm, edits, SITES, CONTEXTS, SEARCH), first)


def test_nothing_is_written_outside_the_scope(
    tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path))
    search_values(tiny("llama"), edits, SITES, CONTEXTS, SEARCH)
    assert not list(tmp_path.iterdir())
