"""Rows read from JSON with errors that name them; files written whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from retcon import files
from retcon.checked import Kind, write_checked
from retcon.errors import MalformedFile, PlaceBusy
from retcon.files import cache_dir, read_json_rows, read_prose, require, write_atomically

SEPARATORS = "a\u2028b\u2029c\x85d"
"""What `str.splitlines` breaks at and JSON leaves unescaped."""


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """written(content) -> path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "rows.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('[{"a": 1}, {"a": 2}]', [(1, {"a": 1}), (2, {"a": 2})]),
        (' \n[\n{"a": 1},\n\n{"a": 2}\n]\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ('{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ('\n{"a": 1}\n  \n{"a": 2}', [(2, {"a": 1}), (4, {"a": 2})]),
        ('{"a": 1}\r\n{"a": 2}\r\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ('\ufeff{"a": "Łódź 東京"}', [(1, {"a": "Łódź 東京"})]),
    ],
    ids=["list", "spread list", "lines", "blank lines", "Windows lines", "byte order mark"],
)
def test_lists_and_lines_with_their_row_numbers(content: str, rows: list[Any], written: Any) -> None:
    assert read_json_rows(written(content)) == rows


def test_a_line_ends_at_the_line_feed_only(written: Any) -> None:
    content = "".join(json.dumps({"a": SEPARATORS, "i": i}, ensure_ascii=False) + "\n" for i in (1, 2))
    assert read_json_rows(written(content)) == [(i, {"a": SEPARATORS, "i": i}) for i in (1, 2)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty; expected rows"),
        (" \n ", "the file is empty"),
        ("[]", "holds no rows"),
        ('[{"a": 1}, 2]', "row 2: expected an object, found int"),
        ('{"a": 1}\n"text"\n', "row 2: expected an object, found str"),
        ("42", "row 1: expected an object, found int"),
        ('[{"a": 1},\n{"a": }]', "line 2: not valid JSON (Expecting value)"),
        ('{"a": 1}\n\n{"a": \n', "row 3: not valid JSON (Expecting value)"),
        ("subject,target\nFrance,Rome\n", "row 1: not valid JSON (Expecting value)"),
        ('{\n  "a": 1\n}\n', "holds one value, expected a list or one object per line"),
        (b'{"a": "caf\xe9"}', "not UTF-8 text (byte 10)"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_place(content: str | bytes, message: str, written: Any) -> None:
    path = written(content)
    with pytest.raises(MalformedFile) as caught:
        read_json_rows(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_text_for_a_model_is_read_as_python_reads_it(written: Any) -> None:
    content = "One\r\nline\rand\n\n another\u2028one\x85.\n"
    path = written(content)
    assert read_prose(path) == path.read_text("utf-8")
    assert read_prose(written("\ufeffcafé")) == "café"
    with pytest.raises(MalformedFile, match=r"not UTF-8 text \(byte 3\); save it as UTF-8"):
        read_prose(written(b"caf\xe9"))


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(MalformedFile, match=r"none\.json: no such file"):
        read_json_rows(tmp_path / "none.json")
    with pytest.raises(MalformedFile, match="is a directory, expected a file"):
        read_json_rows(tmp_path)


def test_require_gives_the_field_or_names_it() -> None:
    assert require({"a": "x"}, "a", str, "f, row 1") == "x"
    assert require({"a": None}, "a", object, "f, row 1") is None
    with pytest.raises(MalformedFile, match=r"^f, row 1: field 'b' is missing; found: a$"):
        require({"a": "x"}, "b", str, "f, row 1")
    with pytest.raises(MalformedFile, match="field 'b' is missing; found: nothing"):
        require({}, "b", str, "f, row 1")
    with pytest.raises(MalformedFile, match=r"^f, row 1: field 'a' must be str, found int \(5\)$"):
        require({"a": 5}, "a", str, "f, row 1")


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

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_file_that_safetensors_writes_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    write_checked(tmp_path / "checked.safetensors", Kind("some", 1, 1), {}, {"a": torch.zeros(2)})
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "checked.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_dir() == Path("/one")
    monkeypatch.delenv("RETCON_CACHE")
    assert cache_dir() == Path("/two/retcon")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "retcon"


def left_by_a_killed_process(place: Path, part: str) -> Path:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = place.with_name(f".{place.name}.{files._machine()}.{ended.pid}-ab{part}")
    left.mkdir()
    (left / "file").write_text(part)
    return left


def test_a_folder_is_mended_after_a_kill_at_any_point_of_its_exchange(tmp_path: Path) -> None:
    place = tmp_path / "a [folder]"
    new = left_by_a_killed_process(place, ".new")  # killed while writing
    files.mend_folder(place)
    assert not new.exists()
    left_by_a_killed_process(place, ".old")  # killed between the two renames
    left_by_a_killed_process(place, ".new")
    files.mend_folder(place)
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    assert (place / "file").read_text() == ".old"
    left_by_a_killed_process(place, ".old")  # killed before the old one was removed
    (place / "file").write_text("the new one")
    with files.replacing_folder(place) as fresh:
        (fresh / "file").write_text("the next")
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    assert (place / "file").read_text() == "the next"


def test_a_folder_that_must_not_be_replaced_stays(tmp_path: Path) -> None:
    place = tmp_path / "folder"

    def refuse() -> None:
        if place.exists():
            raise MalformedFile("somebody else's")

    with pytest.raises(MalformedFile, match="somebody"), files.replacing_folder(place, check=refuse) as fresh:
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
    with pytest.raises(KeyboardInterrupt), files.replacing_folder(place) as fresh:
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
    with pytest.raises(KeyboardInterrupt), files.replacing_folder(place):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_process_at_a_time_has_the_turn_in_a_folder(tmp_path: Path) -> None:
    other = files.turn_in(tmp_path, wait=False)
    with (
        files.turn_in(tmp_path, wait=False),
        pytest.raises(PlaceBusy, match=rf"{tmp_path}: another process is at work"),
        other,
    ):
        pass
    with files.turn_in(tmp_path, wait=True):
        pass


def test_text_without_a_word_is_no_text_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(MalformedFile, match=r"empty\.txt: holds no text"):
        read_prose(tmp_path / "empty.txt")
