"""Rows read from JSON with errors that name them."""

import json
from pathlib import Path
from typing import Any

import pytest

from retcon.errors import MalformedFile
from retcon.files import cache_dir, read_json_rows, read_prose, require

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


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_dir() == Path("/one")
    monkeypatch.delenv("RETCON_CACHE")
    assert cache_dir() == Path("/two/retcon")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "retcon"


def test_text_without_a_word_is_no_text_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(MalformedFile, match=r"empty\.txt: holds no text"):
        read_prose(tmp_path / "empty.txt")
