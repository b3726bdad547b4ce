"""Corpora: text files, JSON lines, datasets; and their tokens."""

import builtins
import json
import sys
from types import SimpleNamespace

import pytest

from retcon.errors import MalformedFile, TooFewTokens
from retcon.lm.prompts import Row
from retcon.memory import corpus as module
from retcon.memory.corpus import Corpus, check_corpus
from retcon.memory.moments import document_rows
from tests.conftest import TEXT

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package that streams numbered documents, every third one short, and remembers what was asked."""
    asked = []

    def load_dataset(name, config, *, split, streaming):
        assert streaming
        asked.append((name, config, split))
        if name == "a/broken":
            raise ConnectionError("no route to the hub")
        return ({"text": f"{i} " + "word " * (10 if i % 3 == 0 else 100), "other": 1} for i in builtins.range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(module, "DATASET_CHARACTERS", 5_000)
    return asked


def test_documents_are_cut_and_counted(tiny):
    lm = tiny("gptj")
    rows = document_rows(lm, ["", "  ", TEXT[0], TEXT[1]], 25, 10)
    assert [len(r.ids) for r in rows] == [10, 10]
    assert sum(len(r.ids) for r in document_rows(lm, TEXT, 25, 1024)) == 25
    assert all(isinstance(r, Row) for r in rows)


def test_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("One.\n\nTwo\nlines.\n \nThree.", encoding="utf-8")
    assert Corpus.named(text).documents == ("One.", "Two\nlines.", "Three.")
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "One."}\n{"text": "Two."}\n', encoding="utf-8")
    assert Corpus.named(str(lines)).documents == ("One.", "Two.")
    lines.write_text('{"text": "One."}\n{"body": "Two."}\n', encoding="utf-8")
    with pytest.raises(MalformedFile, match="row 2: field 'text'"):
        Corpus.from_file(lines)
    with pytest.raises(MalformedFile, match="holds no text"):
        text.write_text(" \n\n ")
        Corpus.from_file(text)


def test_a_dataset_is_streamed_as_far_as_needed_and_kept(hub, cache):
    found = Corpus.named("org/name:some-config:validation[:5%]")
    assert hub == [("org/name", "some-config", "validation[:5%]")]
    assert all(len(d) >= 200 for d in found.documents)
    assert [d.split()[0] for d in found.documents[:4]] == ["1", "2", "4", "5"]
    assert 5_000 <= sum(map(len, found.documents)) < 5_600
    again = Corpus.named("org/name:some-config:validation[:5%]")
    assert again.documents == found.documents
    assert again.id == found.id
    assert len(hub) == 1, "read from the hub a second time"
    assert Corpus.named("org/name").documents == found.documents  # another corpus to ask for, of the same text here
    assert hub[1:] == [("org/name", None, "train")]


def test_a_dataset_that_cannot_be_read_says_why(hub, monkeypatch):
    with pytest.raises(TooFewTokens, match=r"a/broken cannot be read.*no route to the hub"):
        Corpus.named("a/broken")
    with pytest.raises(TooFewTokens, match=r"KeyError.*'body'"):
        Corpus.from_dataset("org/name", field="body")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: [{"text": "short"}]))
    with pytest.raises(TooFewTokens, match="no document of 200 characters in field 'text'"):
        Corpus.named("org/short")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TooFewTokens, match=r"pip install 'retcon-lm\[hub\]'"):
        Corpus.named("org/other")


@pytest.mark.parametrize("name", ["none.txt", "no/such.jsonl", "./here/not", "word", "a/b/c"])
def test_what_is_neither_file_nor_dataset_is_refused(name):
    with pytest.raises(MalformedFile, match="no such file"):
        check_corpus(name)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(MalformedFile, match="is a directory"):
        Corpus.named(tmp_path)


def test_the_real_package_reads_a_local_dataset(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the package 'datasets' is an optional dependency")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "texts"
    folder.mkdir(parents=True)
    rows = [{"text": f"{i} " + "word " * 100} for i in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Corpus.from_dataset("org/texts")
    assert [d.split()[0] for d in found.documents] == [str(i) for i in range(20)]
