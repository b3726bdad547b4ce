"""Resuming: a search that was killed goes on where it was, bit for bit."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from retcon import checked
from retcon.edits import Edit
from retcon.errors import RetconWarning
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.values import ValueCache, Values, ValueSearch, ValueSite, search_values
from retcon.memory.values import search as search_module
from retcon.memory.values import store as store_module
from retcon.memory.values.plan import ChunkPlan, SearchPlan
from retcon.memory.values.schedule import Chunk
from retcon.memory.values.store import KnownValues, ValueStore
from retcon.work import Here
from tests.conftest import everyday

CONTEXTS = Contexts(("I read. ",))
SITES = (
    ValueSite(Point(1, "mlp"), "subject_last", clamp=1.5, weight_decay=0.02),
    ValueSite(Point(2, "mlp"), "prediction", clamp=0.7, weight_decay=0.02),
)
SEARCH = ValueSearch(steps=5, learning_rate=0.2)
PLAN = SearchPlan((ChunkPlan((2, 0), 2), ChunkPlan((1,), 1), ChunkPlan((3,), 1)))


class Killed(BaseException):
    """What a signal does."""


def same(a: Values, b: Values) -> bool:
    tensors = zip((*a.init, *a.offset, *a.activation), (*b.init, *b.offset, *b.activation), strict=True)
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


@pytest.mark.parametrize("passes", everyday(7, of=[0, 3, 7, 12]))
def test_a_killed_search_goes_on_with_the_identical_result(
    passes: int, tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search_values(tiny("llama", torch.float32), edits, SITES, CONTEXTS, SEARCH, plan=PLAN)
    lm = tiny("llama", torch.float32)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(passes + 2, patch)  # two passes try the replay out
        search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=PLAN, cache=ValueCache(tmp_path))
    finished = len([p for p in tmp_path.glob("*/*.safetensors") if p.stem != "plan"])
    assert finished == {0: 0, 3: 0, 7: 1, 12: 2}[passes]
    ran = []
    real = Chunk.__init__

    def counting(self: Chunk, lm: LM, rows: Any, *args: Any) -> None:
        ran.append(len(rows))
        real(self, lm, rows, *args)

    monkeypatch.setattr(Chunk, "__init__", counting)
    kept = ValueCache(tmp_path)
    resumed = search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=PLAN, cache=kept)
    assert same(resumed, whole)
    assert len(ran) == len(PLAN.chunks) - finished
    kept.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("known", [False, True])
def test_values_that_were_searched_under_another_chat_template_are_not_taken_up(
    known: bool, tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path
) -> None:
    lm = tiny("llama", torch.float32)
    cache = ValueCache(tmp_path, known=KnownValues() if known else None)

    def found_again() -> int:
        """Return how many edits of a search need none."""
        searched = cache.known.searched if cache.known else 0
        before = cache.resumed
        search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=None if known else PLAN, cache=cache)
        return cache.resumed - before if cache.known is None else len(edits) - cache.known.searched + searched

    lm.tokenizer.chat_template = "{{ messages[0].content }}"
    assert [found_again(), found_again()] == [0, len(edits)]
    lm.tokenizer.chat_template = "Q: {{ messages[0].content }}"
    assert found_again() == 0


ONE_CHUNK = SearchPlan((ChunkPlan((2, 0, 3, 1), 2),))


def searched_edits(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ids of the edits that steps are made for, from now on."""
    stepped: set[str] = set()
    real = Chunk.step

    def step(self: Chunk, now: Any, **options: Any) -> None:
        stepped.update(self.rows[e].edit.id for e in now.edits)
        real(self, now, **options)

    monkeypatch.setattr(Chunk, "step", step)
    return stepped


class Elsewhere(Here):
    """Another process, as far as it has a copy of the pieces."""

    def map(self, lm, work, pieces, progress):  # type: ignore[no-untyped-def]
        return super().map(lm, work, copy.deepcopy(pieces), progress)


@pytest.mark.parametrize("settled", [None, 0.5])
@pytest.mark.parametrize("passes", everyday(5, of=[1, 3, 5, 7]))
def test_a_search_that_was_killed_in_the_middle_of_a_chunk_goes_on_there(
    passes: int,
    settled: float | None,
    tiny: Callable[..., LM],
    edits: list[Edit],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = replace(SEARCH, threshold=0.002, settled_factor=settled)  # some end early, and others follow
    monkeypatch.setattr(store_module, "KEEP_SECONDS", 0.0)
    whole = search_values(tiny("llama", torch.float32), edits, SITES, CONTEXTS, search, plan=ONE_CHUNK)
    lm = tiny("llama", torch.float32)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(passes + 2, patch)
        search_values(lm, edits, SITES, CONTEXTS, search, plan=ONE_CHUNK, cache=ValueCache(tmp_path))
    (begun,) = tmp_path.glob("*/*.begun")
    found_before = json.loads(_metadata(begun))["about"]["places"]
    stepped, cache = searched_edits(monkeypatch), ValueCache(tmp_path)
    lm.workers = Elsewhere()
    assert same(search_values(lm, edits, SITES, CONTEXTS, search, plan=ONE_CHUNK, cache=cache), whole)
    assert stepped == {edits[i].id for k, i in enumerate((2, 0, 3, 1)) if k not in found_before}
    assert cache.resumed == len(found_before)
    assert not list(tmp_path.glob("*/*.begun"))


def test_a_begun_chunk_that_is_damaged_or_anothers_is_begun_again(
    tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "KEEP_SECONDS", 0.0)
    lm = tiny("llama", torch.float32)
    whole = search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=ONE_CHUNK)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(8, patch)
        search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=ONE_CHUNK, cache=ValueCache(tmp_path))
    (begun,) = tmp_path.glob("*/*.begun")
    content = begun.read_bytes()
    begun.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.warns(RetconWarning, match=begun.name):
        found = search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=ONE_CHUNK, cache=ValueCache(tmp_path))
    assert same(found, whole)


def test_a_chunk_is_kept_every_minute_or_every_32_edits(
    tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, now, kept_at = tiny("llama", torch.float32), [0.0], []
    real = Chunk.step

    def step(self: Chunk, batch: Any, **options: Any) -> None:
        real(self, batch, **options)
        now[0] += 20.0

    monkeypatch.setattr(Chunk, "step", step)
    monkeypatch.setattr(store_module.time, "monotonic", lambda: now[0])
    write = store_module.keep

    def noting(path: Path, kind: Any, *args: Any, **kwargs: Any) -> bool:
        if kind == store_module.BEGUN:
            kept_at.append(now[0])
        return write(path, kind, *args, **kwargs)

    monkeypatch.setattr(store_module, "keep", noting)
    search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=ONE_CHUNK, cache=ValueCache(tmp_path))
    assert kept_at == [60.0, 120.0, 180.0]
    kept_at.clear()
    many = [replace(edits[i % 3], id=f"{i}", target_new=f"Rome {i}") for i in range(70)]
    one = SearchPlan((ChunkPlan(tuple(range(70)), 7),))
    search = replace(SEARCH, steps=1)
    monkeypatch.setattr(store_module, "KEEP_SECONDS", 1e9)
    search_values(lm, many, SITES, Contexts(), search, plan=one, cache=ValueCache(tmp_path))
    assert len(kept_at) == 1  # with 35 found; the other 35 end with the chunk


def test_what_is_searched_plainly_is_kept_edit_by_edit(
    tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny("llama", torch.float32)
    monkeypatch.setattr("retcon.memory.values.search.replays", lambda *_: False)
    whole = search_values(lm, edits, SITES, CONTEXTS, SEARCH)
    real, searched = search_module.search_values_reference, []

    def killing(lm: LM, some: Any, *args: Any, **kwargs: Any) -> Values:
        searched.append(some[0].id)
        if len(searched) == 3:
            raise Killed
        return real(lm, some, *args, **kwargs)

    monkeypatch.setattr(search_module, "search_values_reference", killing)
    with pytest.raises(Killed):
        search_values(lm, edits, SITES, CONTEXTS, SEARCH, cache=ValueCache(tmp_path))
    assert same(search_values(lm, edits, SITES, CONTEXTS, SEARCH, cache=ValueCache(tmp_path)), whole)
    assert searched == [edits[i].id for i in (0, 1, 2, 2, 3)]


def test_a_run_that_goes_on_takes_over_the_plan(tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path) -> None:
    lm, cache = tiny("llama"), ValueCache(tmp_path)
    first = search_values(lm, edits, SITES, CONTEXTS, SEARCH, cache=cache)
    store = ValueStore.of(cache, lm, edits, SITES, CONTEXTS, SEARCH)
    plan = store.plan(lambda: PLAN)
    store.change_plan(replace(plan, oom_retries=3))
    assert search_values(lm, edits, SITES, CONTEXTS, SEARCH, cache=cache).plan["oom_retries"] == 3
    assert first.plan["oom_retries"] == 0


def test_whatever_determines_the_values_is_in_the_key(
    tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path
) -> None:
    lm, cache = tiny("llama"), ValueCache(tmp_path)
    site = lm.site(0, "down_proj")
    change = lm.delta({site.name: [site.stored(torch.ones(32, 1).double(), torch.ones(1, 64).double())]})
    search_values(lm, edits, SITES, CONTEXTS, SEARCH, cache=cache)
    search_values(lm, edits[:2], SITES, CONTEXTS, SEARCH, cache=cache)
    search_values(lm, edits, SITES[:1], CONTEXTS, SEARCH, cache=cache)
    search_values(lm, edits, SITES, Contexts(), SEARCH, cache=cache)
    search_values(lm, edits, SITES, CONTEXTS, replace(SEARCH, steps=4), cache=cache)
    search_values(tiny("llama", seed=1), edits, SITES, CONTEXTS, SEARCH, cache=cache)
    with lm.edited(change):
        search_values(lm, edits, SITES, CONTEXTS, SEARCH, cache=cache)
    assert len(set(cache.used)) == 7


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_file_is_made_again_and_named(
    damage: str, tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path
) -> None:
    lm, cache = tiny("llama"), ValueCache(tmp_path)
    first = search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=PLAN, cache=cache)
    path, other = [p for p in sorted(tmp_path.glob("*/*.safetensors")) if p.stem != "plan"][:2]
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "flipped": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
            "foreign": other.read_bytes(),
        }[damage]
    )
    with pytest.warns(RetconWarning, match=path.name):
        again = search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=PLAN, cache=cache)
    assert same(again, first)


def test_a_cache_that_cannot_be_written_does_not_stop_a_search(
    tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path
) -> None:
    lm = tiny("llama")
    (tmp_path / "a file").write_text("")
    checked._warned.clear()
    with pytest.warns(RetconWarning, match="cache cannot be written"):
        found = search_values(lm, edits, SITES, CONTEXTS, SEARCH, cache=ValueCache(tmp_path / "a file"))
    assert same(found, search_values(lm, edits, SITES, CONTEXTS, SEARCH))


def test_nothing_is_written_without_a_cache(
    tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path))
    search_values(tiny("llama"), edits, SITES, CONTEXTS, SEARCH)
    assert not list(tmp_path.iterdir())


def test_an_ordinary_run_is_kept_every_32_edits(tiny: Callable[..., LM], edits: list[Edit], tmp_path: Path) -> None:
    lm = tiny("llama", torch.float32)
    many = [replace(edits[i % 3], id=f"{i}", target_new=f"Rome {i}") for i in range(70)]
    search_values(lm, many, SITES, Contexts(), replace(SEARCH, steps=1), cache=ValueCache(tmp_path))
    kept = [len(json.loads(_metadata(p))["about"]["reports"]) for p in tmp_path.glob("*/*") if p.stem != "plan"]
    assert sum(kept) == 70
    assert max(kept) <= 32


def _metadata(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()["retcon"]
