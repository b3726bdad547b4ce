"""What is kept in the cache: listed, and removed where it is half written, damaged, old or asked for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from retcon import atomic, checked, files
from retcon.checked import Kind, write_checked
from retcon.errors import InvalidSetting
from retcon.memory.moments import MomentKey, save_moments
from retcon.workflow.cache import kept_files, prune

KIND = Kind("something", format=1, computation=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path))
    for name in ("values/run/plan.safetensors", "values/run/one.safetensors", "fingerprints/a.safetensors"):
        write_checked(tmp_path / name, KIND, {"of": name}, {"x": torch.ones(3)})
    key = MomentKey("model", "site", "corpus", 10, 10, "tokenizer", "float32")
    save_moments(key.file, {key: torch.eye(4)})
    write_checked(key.file_of("factor"), KIND, {}, {"x": torch.ones(3)})
    write_checked(tmp_path / "moments/begun.partial", KIND, {}, {"x": torch.ones(3)})
    return tmp_path


def names(found: list[object]) -> set[tuple[str, str]]:
    return {(each.kind, each.path.suffix or each.path.name) for each in found}  # type: ignore[attr-defined]


def test_a_search_is_one_thing_and_everything_has_a_size(cache: Path) -> None:
    found = kept_files()
    assert names(found) == {
        *(("values", "run"), ("fingerprints", ".safetensors"), ("passes", ".partial")),
        *(("moments", ".safetensors"), ("moments", ".derived")),
    }
    assert len(found) == 5
    on_disk = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
    assert sum(each.n_bytes for each in found) == on_disk
    assert [each.kind for each in kept_files(["values"])] == ["values"]
    with pytest.raises(InvalidSetting, match=r"holds no 'value'; it may hold moments"):
        kept_files(["value"])


def test_an_empty_cache_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "none"))
    assert kept_files() == []
    assert prune() == []


def test_pruning_takes_what_is_damaged_and_nothing_else(cache: Path) -> None:
    assert prune() == []
    for path in (
        cache / "values/run/one.safetensors",
        *cache.glob("moments/*.safetensors"),
        *cache.glob("moments/*.derived"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    assert {each.kind for each in prune()} == {"values", "moments"}
    assert {each.kind for each in kept_files()} == {"passes", "fingerprints"}


def test_pruning_takes_what_is_asked_for_or_old(cache: Path) -> None:
    old = time.time() - 40 * 86_400
    os.utime(cache / "fingerprints/a.safetensors", (old, old))
    assert [each.kind for each in prune(days=30)] == ["fingerprints"]
    assert prune(["moments"], days=30) == []
    assert [each.kind for each in prune(["values"])] == ["values"]
    assert not (cache / "values/run").exists()


def dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_what_a_killed_save_left_is_gone_with_the_next_run_that_touches_the_cache(cache: Path) -> None:
    here = atomic._machine()
    ours = cache / f"values/run/.x.safetensors.{here}.{os.getpid()}-ab.tmp"
    dead = cache / f"values/run/.x.safetensors.{here}.{dead_process()}-ab.tmp"
    elsewhere, old = (cache / f"moments/.x.elsewhere.1-{c}b.tmp" for c in "ab")
    for path in (ours, dead, elsewhere, old):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    files._tidied.cache_clear()
    assert checked.cached(cache / "nothing", KIND, {}) is None
    assert (ours.exists(), dead.exists(), elsewhere.exists(), old.exists()) == (True, False, True, False)
