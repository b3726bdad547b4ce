"""A full disk is an error that names the file, whoever writes it."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from retcon.atomic import replacing_folder, write_atomically
from retcon.checked import Kind, write_checked
from retcon.cluster.worker import Source
from retcon.delta import Delta
from retcon.export import export
from retcon.lm.model import LM
from retcon.memory.moments import MomentKey, save_moments
from tests.lm.deltas import random_change

BIG = torch.randn(300, 300)


@contextmanager
def little_room() -> Iterator[None]:
    """Inside, no file can grow beyond 10 kB: the writes fail as on a full disk, in whatever library they are made."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def a_checked_file(place: Path, lm: LM, delta: Delta) -> None:
    write_checked(place, Kind("x", 1, 1), {}, {"x": BIG})


def moments(place: Path, lm: LM, delta: Delta) -> None:
    save_moments(place, {MomentKey("m", "s", "c", 1, 1, "t", "float32"): BIG @ BIG.T + 300 * torch.eye(300)})


def a_delta(place: Path, lm: LM, delta: Delta) -> None:
    delta.save(place)


def text(place: Path, lm: LM, delta: Delta) -> None:
    write_atomically(place, b"x" * 30_000)


def a_folder(place: Path, lm: LM, delta: Delta) -> None:
    with replacing_folder(place) as fresh:
        (fresh / "README.md").write_text("x" * 30_000)


def a_checkpoint(place: Path, lm: LM, delta: Delta) -> None:
    export(lm, place, format="hf")


def changes(place: Path, lm: LM, delta: Delta) -> None:
    export(lm, place, format="diff")


def for_a_worker(place: Path, lm: LM, delta: Delta) -> None:
    try:
        Source.of(lm, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)  # it is in a temporary folder that goes with the workers


WRITERS = (a_checked_file, moments, a_delta, text, a_folder, a_checkpoint, changes, for_a_worker)


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_an_error_that_names_the_file(
    write: Callable[[Path, LM, Delta], None], tiny: Callable[..., LM], tmp_path: Path
) -> None:
    lm, place = tiny("gptj", torch.float32), tmp_path / "folder" / "place"
    place.parent.mkdir()
    site = lm.site(0, "down_proj")
    lm.apply(lm.delta({site.name: [site.stored(torch.ones(32, 1).double(), torch.ones(1, 128).double())]}))
    delta = Delta({"big": (random_change("dense", (300, 300), 0),)}, base="base")
    with little_room(), pytest.raises(OSError, match=r"(?i)file too large|no space") as caught:
        write(place, lm, delta)
    assert str(place) in str(caught.value)
    assert list(place.parent.iterdir()) == []
