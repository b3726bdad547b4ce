"""Files and folders written whole or not at all; a folder's turn."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from retcon import atomic
from retcon.atomic import write_atomically
from retcon.checked import Kind, write_checked
from retcon.errors import MalformedFile, PlaceBusy


def test_writing_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file.bin"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_half_way_leaves_the_old_file_and_nothing_beside_it(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(atomic.os, step, fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_file_that_safetensors_writes_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    write_checked(tmp_path / "checked.safetensors", Kind("some", 1, 1), {}, {"a": torch.zeros(2)})
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "checked.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def left_by_a_killed_process(place: Path, part: str) -> Path:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = place.with_name(f".{place.name}.{atomic._machine()}.{ended.pid}-ab{part}")
    left.mkdir()
    (left / "file").write_text(part)
    return left


def test_a_folder_is_mended_after_a_kill_at_any_point_of_its_exchange(tmp_path: Path) -> None:
    place = tmp_path / "a [folder]"
    new = left_by_a_killed_process(place, ".new")  # killed while writing
    atomic.mend_folder(place)
    assert not new.exists()
    left_by_a_killed_process(place, ".old")  # killed between the two renames
    left_by_a_killed_process(place, ".new")
    atomic.mend_folder(place)
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    assert (place / "file").read_text() == ".old"
    left_by_a_killed_process(place, ".old")  # killed before the old one was removed
    (place / "file").write_text("the new one")
    with atomic.replacing_folder(place) as fresh:
        (fresh / "file").write_text("the next")
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    assert (place / "file").read_text() == "the next"


def test_a_folder_that_must_not_be_replaced_stays(tmp_path: Path) -> None:
    place = tmp_path / "folder"

    def refuse() -> None:
        if place.exists():
            raise MalformedFile("somebody else's")

    with pytest.raises(MalformedFile, match="somebody"), atomic.replacing_folder(place, check=refuse) as fresh:
        (fresh / "file").touch()
        place.mkdir()
        (place / "theirs").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "theirs"]


@pytest.mark.parametrize("cut", range(4))
def test_an_interrupt_while_a_folder_is_replaced_leaves_the_old_one_or_the_new(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / "a.txt").write_text("old")
    whole, calls = Path.rename, [0]

    def rename(self: Path, target: Path) -> Path:
        calls[0] += 1
        if cut == 2 * calls[0] - 2:
            raise KeyboardInterrupt
        moved = whole(self, target)
        if cut == 2 * calls[0] - 1:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), atomic.replacing_folder(place) as fresh:
        (fresh / "a.txt").write_text("new")
    assert (place / "a.txt").read_text() == ("new" if cut == 3 else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_interrupts_while_a_folder_is_replaced_leave_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    whole, calls = Path.rename, [0]

    def rename(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] in (2, 3):  # the new one's, and the first attempt to put the old one back
            raise KeyboardInterrupt
        return whole(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), atomic.replacing_folder(place):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_process_at_a_time_has_the_turn_in_a_folder(tmp_path: Path) -> None:
    other = atomic.turn_in(tmp_path, wait=False)
    with (
        atomic.turn_in(tmp_path, wait=False),
        pytest.raises(PlaceBusy, match=rf"{tmp_path}: another process is at work"),
        other,
    ):
        pass
    with atomic.turn_in(tmp_path, wait=True):
        pass
