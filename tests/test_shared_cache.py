"""A cache shared by machines, each of which is a cache folder of its own here."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.registry import known_implementations

from retcon import shared_cache, world
from retcon.checked import Kind, cached, keep, write_checked
from retcon.cluster.worker import Source, Worker
from retcon.edits import Edit
from retcon.errors import InvalidSetting, MissingPackage, RetconWarning
from retcon.lm.model import LM
from retcon.memory.corpus import Corpus
from retcon.memory.moments import CorpusMoments
from retcon.memory.values import ValueCache, search_values
from tests.memory.test_value_store import CONTEXTS, PLAN, SEARCH, SITES, Killed, killed_after, same

KIND = Kind("numbers", format=1, computation=1)
IDENTITY = {"of": "five"}
CONTENT = {"x": torch.arange(5.0)}

Machine = Callable[[str], Path]


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "shared")
    else:
        yield f"memory://{tmp_path.name}/shared"
        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Be on this machine from now on; return its cache."""

    def switch(name: str) -> Path:
        monkeypatch.setenv("RETCON_CACHE", str(tmp_path / name))
        return tmp_path / name

    return switch


@pytest.fixture
def on(url: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The same, with storage that the machines share."""
    monkeypatch.setenv(shared_cache.VARIABLE, url)
    return machine


def listed(url: str) -> list[str]:
    files, root = fsspec.core.url_to_fs(url)
    return [path.removeprefix(root + "/") for path in files.find(root)] if files.exists(root) else []


def test_what_one_machine_makes_another_has(on: Machine, url: str) -> None:
    assert keep(on("one") / "pre" / "a.safetensors", KIND, IDENTITY, CONTENT)
    assert listed(url) == ["pre/a.safetensors"]
    path = on("two") / "pre" / "a.safetensors"
    found = cached(path, KIND, IDENTITY)
    assert found is not None
    assert torch.equal(found[0]["x"], CONTENT["x"])
    assert path.is_file()
    assert cached(path.with_stem("b"), KIND, IDENTITY) is None
    for _ in range(2):  # what is gone already is no matter
        shared_cache.remove(path.parent)
    shared_cache.put(path.with_stem("gone"))
    assert listed(url) == []


def test_a_file_takes_the_place_of_an_older_one(on: Machine, url: str) -> None:
    for content in (CONTENT, {"x": torch.zeros(2)}):
        keep(on("one") / "values" / "s" / "plan.safetensors", KIND, IDENTITY, content)
    found = cached(on("two") / "values" / "s" / "plan.safetensors", KIND, IDENTITY)
    assert found is not None
    assert torch.equal(found[0]["x"], torch.zeros(2))
    assert len(listed(url)) == 1


@pytest.mark.parametrize("name", ["fingerprints/a.safetensors", "moments/a.partial", "../a.safetensors"])
def test_what_is_this_machines_own_stays_here(name: str, on: Machine, url: str) -> None:
    keep(on("one") / name, KIND, IDENTITY, CONTENT)
    assert listed(url) == []
    if ".." not in name:
        assert cached(on("two") / name, KIND, IDENTITY) is None


def test_a_damaged_file_is_named_and_made_again_for_all(on: Machine, url: str) -> None:
    path = on("one") / "pre" / "a.safetensors"
    write_checked(path, KIND, IDENTITY, CONTENT)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    shared_cache.put(path)
    path = on("two") / "pre" / "a.safetensors"
    with pytest.warns(RetconWarning, match=r"two/pre/a\.safetensors: damaged.*made again"):
        assert cached(path, KIND, IDENTITY) is None
    keep(path, KIND, IDENTITY, CONTENT)
    assert cached(on("three") / "pre" / "a.safetensors", KIND, IDENTITY) is not None


class Silent(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Storage that does not answer."""

    protocol = "silent"
    asked = 0

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        type(self).asked += 1
        raise TimeoutError("no answer within 60 s")


def test_storage_that_does_not_answer_is_said_once_and_done_without(machine: Machine, monkeypatch: Any) -> None:
    fsspec.register_implementation("silent", Silent, clobber=True)
    monkeypatch.setenv(shared_cache.VARIABLE, "silent://bucket")
    path = machine("one") / "pre" / "a.safetensors"
    with pytest.warns(RetconWarning, match="shared cache silent://bucket cannot be used: no answer within 60 s"):
        assert cached(path, KIND, IDENTITY) is None
    assert keep(path, KIND, IDENTITY, CONTENT)
    assert cached(path, KIND, IDENTITY) is not None
    assert cached(path.with_stem("b"), KIND, IDENTITY) is None
    assert Silent.asked == 1


def test_a_name_that_cannot_be_a_storage_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shared_cache.VARIABLE, "sthree://bucket")
    with pytest.raises(InvalidSetting, match=r"RETCON_SHARED_CACHE=sthree://bucket: Protocol not known.*name a folder"):
        cached(machine("one") / "pre" / "a.safetensors", KIND, IDENTITY)
    monkeypatch.setitem(known_implementations, "absent", {"class": "absent.Files", "err": "Install absent"})
    monkeypatch.setenv(shared_cache.VARIABLE, "absent://bucket")
    with pytest.raises(MissingPackage, match="RETCON_SHARED_CACHE=absent://bucket: Install absent"):
        shared_cache.shared_cache()


def test_without_one_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(shared_cache.VARIABLE, raising=False)
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path))
    assert shared_cache.shared_cache() is None
    assert not shared_cache.fetch(tmp_path / "pre" / "a.safetensors")


def test_moments_are_collected_on_one_machine_only(
    on: Machine, tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(tuple(list(world.corpus())[:200]))
    lm = tiny("llama", torch.float32)
    site = lm.site(1, "down_proj")
    on("one")
    first = CorpusMoments(corpus, 500).second_moment(lm, site)
    on("two")
    monkeypatch.setattr("retcon.memory.moments.collect", lambda *args, **options: pytest.fail("collected again"))
    again = CorpusMoments(corpus, 500)
    assert torch.equal(again.second_moment(lm, site), first)


def test_a_search_whose_machine_is_lost_goes_on_on_another(
    on: Machine, url: str, tiny: Callable[..., LM], edits: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search_values(tiny("llama", torch.float32), edits, SITES, CONTEXTS, SEARCH, plan=PLAN)
    lm = tiny("llama", torch.float32)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(14, patch)
        search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=PLAN, cache=ValueCache(on("one") / "values"))
    kept = ValueCache(on("two") / "values")
    assert same(search_values(lm, edits, SITES, CONTEXTS, SEARCH, plan=PLAN, cache=kept), whole)
    assert kept.resumed == 3
    assert listed(url)
    kept.discard()
    assert listed(url) == []


def test_workers_share_it_too(on: Machine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import retcon

    on("one")
    source = Source.of(retcon.load("demo:gptj"), tmp_path)
    assert source.shared_cache == shared_cache.shared_cache()
    monkeypatch.delenv(shared_cache.VARIABLE)
    Worker(replace(source))
    assert shared_cache.shared_cache() == source.shared_cache


def test_a_relative_folder_is_the_same_for_workers_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(shared_cache.VARIABLE, "team")
    assert shared_cache.shared_cache() == f"file://{tmp_path}/team"


def test_the_command_says_where_it_is(on: Machine, url: str) -> None:
    on("one")
    shown = subprocess.run(
        [sys.executable, "-m", "retcon", "cache"], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert shown.stdout.startswith(f"shared through {shared_cache.shared_cache()}\n")
