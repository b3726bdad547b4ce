"""Word sets: BM25 by its formula, what is taken from files and corpora, and words as tokens."""

import json
import math
from pathlib import Path

import pytest

from retcon.edits import Edit
from retcon.errors import MalformedFile
from retcon.locate import WordSets, read_word_sets, retrieve_word_sets
from retcon.locate.wordsets import SETS, Bm25, TokenSets, default_stopwords, words_of
from tests.conftest import tokenizer

DOCUMENTS = [
    "Paris is the capital of France. France borders Spain.",
    "Rome is the capital of Italy, and a large town.",
    "The Seine runs through Paris; a river in France.",
    "Trains run late.",
    "",
]
EDITS = [
    Edit("The capital of {} is", "France", "Rome", "Paris", id="fr", relation_id="P36"),
    Edit("The capital of {} is", "Italy", "Madrid", "Rome", id="it", relation_id="P36"),
    Edit("The capital of {} is", "Atlantis", "Rome", "Poseidonia", id="at"),
    Edit("The capital of {} is", "Mu", "Lemuria", id="mu"),
]


def by_formula(words: set[str], document: str) -> float:
    texts = [[w.lower() for w in words_of(d)] for d in DOCUMENTS]
    mean = sum(map(len, texts)) / len(texts)
    text, score = [w.lower() for w in words_of(document)], 0.0
    for word in words:
        n, f = sum(word in t for t in texts), text.count(word)
        idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
        score += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(text) / mean))
    return score


def test_bm25_is_its_formula() -> None:
    index = Bm25(DOCUMENTS)
    words = {"capital", "france", "nowhere"}
    assert index.scores(["Capital", "France", "nowhere", "france"]).tolist() == pytest.approx(
        [by_formula(words, d) for d in DOCUMENTS], rel=1e-5
    )
    assert index.search(["France"], 5) == [0, 2]  # twice in the first; the others do not hold it
    assert index.search(["France"], 1) == [0]
    assert index.search(["nowhere"], 5) == []


def test_words() -> None:
    assert words_of("São Paulo's 2nd river-boat, (so they say)!") == [
        "São", "Paulo's", "2nd", "river-boat", "so", "they", "say",
    ]  # fmt: skip
    assert {"the", "of", ",", "(", "nor"} <= default_stopwords()
    assert len(default_stopwords()) > 250


def test_without_lists_words_come_from_texts_and_from_the_other_edits() -> None:
    found = retrieve_word_sets(EDITS, DOCUMENTS)
    assert {"capital", "Seine", "river", "borders"} <= found.related["fr"]
    assert "Italy" not in found.related["fr"]  # that text fits the prompt, but does not name the subject
    assert "Paris" not in found.related["fr"]  # the original answer
    assert found.related["at"] == frozenset()
    assert found.factual["fr"] == {"Italy", "Madrid", "Rome"}
    assert found.factual["it"] == {"France", "Paris"}  # of its relation, less its own answer
    assert found.factual["at"] == {"Mu", "Lemuria"}  # no relation is named: edits of the same template
    assert retrieve_word_sets(EDITS, DOCUMENTS, stopwords=["la"]).stopwords == {"la"}


def test_a_text_names_the_subject_by_a_word_of_its_own_and_the_answer_is_left_out_however_written() -> None:
    edit = Edit("{} borders", "Mali", "Chad", "Niger", id="ml")
    texts = ["Somalia borders Kenya.", "MALI borders NIGER, and Mali's Niger is a river."]
    assert retrieve_word_sets([edit], texts).related["ml"] == {"MALI", "borders", "and", "Mali's", "is", "a", "river"}
    japanese = Edit("{} is a town in", "東京", "Peru", id="jp")
    assert "駅" in retrieve_word_sets([japanese], ["a town: 東京都 駅"]).related["jp"]


def test_lists_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sets.jsonl"
    rows = [{"id": "fr", "related": ["Seine river"], "factual": ["euro"]}, {"id": 7, "related": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_word_sets(path, stopwords=["le"])
    assert found == WordSets(
        {"fr": frozenset({"Seine", "river"}), "7": frozenset()},
        {"fr": frozenset({"euro"}), "7": frozenset()},
        frozenset({"le"}),
    )
    assert read_word_sets(path).stopwords == default_stopwords()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"related": ["a"]}, "row 1: field 'id' is missing"),
        ({"id": "a", "relate": []}, r"1 unknown field \(relate\); known: id, related, factual"),
        ({"id": "a", "related": "a b"}, "field 'related' must be a list of words"),
        ({"id": "a", "factual": [" "]}, "field 'factual' must be a list of words"),
    ],
)
def test_damaged_lists(row: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "sets.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(MalformedFile, match=message):
        read_word_sets(path)


@pytest.mark.parametrize("kind", ["gpt", "bos"])
def test_words_become_the_tokens_that_begin_them(kind: str) -> None:
    tok = tokenizer(kind)
    words = WordSets(
        {"fr": frozenset({"train", "Rome", "The", "Italy"})}, {"fr": frozenset({"italy"})}, frozenset({"the", ","})
    )
    original = 42
    sets = dict(zip(SETS, TokenSets(words, tok, 500).of(EDITS[0], original), strict=True))
    text = {name: {tok.decode([i]).strip() for i in sets[name].tolist()} for name in SETS if name != "left"}
    assert "," in text["stopword"]
    assert len(sets["related"]) >= 3
    for name in ("related", "factual", "non_factual"):
        assert all(any(w.startswith(t) for w in ("train", "Rome", "The", "Italy", "italy")) for t in text[name]), text
    assert set(sets["non_factual"].tolist()) < set(sets["related"].tolist())  # without Italy and The, case aside
    assert len(sets["non_factual"]) == len({tok.decode([i]) for i in sets["non_factual"].tolist()}) == 2
    others = {i for name in SETS[:-1] for i in sets[name].tolist()} | {original}
    assert set(sets["left"].tolist()) == set(range(500)) - others


def test_an_edit_without_words_has_stopwords_only() -> None:
    sets = dict(
        zip(SETS, TokenSets(WordSets({}, {}, frozenset({"the"})), tokenizer("gpt"), 500).of(EDITS[0], 3), strict=True)
    )
    assert [len(sets[name]) for name in SETS] == [0, 0, 0, 1, 498]
