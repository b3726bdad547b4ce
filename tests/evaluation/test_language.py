"""Fluency and consistency by hand; what several queries of a case say together."""

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from retcon.edits import Case, Edit, Query
from retcon.errors import InvalidSetting, MalformedFile
from retcon.evaluation.metrics import consistency as cons
from retcon.evaluation.metrics.consistency import References, TfIdf, consistency
from retcon.evaluation.metrics.fluency import _words, fluency, ngram_entropy, plain, word_tokenizer
from retcon.evaluation.metrics.several import multihop, passes, ripple


def test_entropy_of_the_worked_example() -> None:
    assert ngram_entropy(["a", "b", "a", "b", "a", "b"]) == pytest.approx(0.990317, abs=1e-6)


def test_entropy_of_repetition_and_of_distinct_words() -> None:
    assert ngram_entropy(["so"] * 50) == 0
    for k in (4, 9, 30):
        words = [f"w{i}" for i in range(k)]
        assert ngram_entropy(words) == pytest.approx(math.log2(k - 1) / 3 + 2 * math.log2(k - 2) / 3)
        assert ngram_entropy(["x" + w for w in words * 2]) == pytest.approx(ngram_entropy(words * 2))
    assert ngram_entropy(["a"]) == ngram_entropy([]) == 0
    assert ngram_entropy(["a", "b"]) == 0
    assert str(ngram_entropy(["no"] * 6)) == "0.0"  # no sign


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("São Tomé é bonito, não?", ["São", "Tomé", "é", "bonito", ",", "não", "?"]),
        ("Łódź isn't Köln", ["Łódź", "isn't", "Köln"]),
        ("यह हिन्दी है", ["यह", "हिन्दी", "है"]),
        ("It was late.", ["It", "was", "late", "."]),
    ],
)
def test_without_nltk_words_keep_their_accents(text: str, words: list[str]) -> None:
    assert _words(plain(text)) == [unicodedata.normalize("NFKD", word) for word in words]


def test_fluency_names_its_tokenizer_and_flags_short_texts() -> None:
    name, split = word_tokenizer()
    found = fluency("It was late, and it was cold.", "flu.new")
    assert found.variant == f"flu.new.{name}"
    assert found.n == len(split("It was late, and it was cold.")) == 9
    assert found.note is None
    assert fluency("No", "flu.new").note == "few_words"
    assert plain("a\n\nb ﬁ") == "a b fi"


def test_consistency_with_itself_and_with_nothing_in_common() -> None:
    tfidf = TfIdf.fit(["the cat sat", "the dog ran", "a bird sang"])
    assert consistency(["the cat", "sat"], ["the cat sat"], tfidf).value == pytest.approx(1)
    assert consistency(["the cat"], ["bird sang"], tfidf).value == 0
    assert consistency(["of unknown words"], ["bird sang"], tfidf).note == "zero_vector"
    none = consistency(["the cat"], [], tfidf)
    assert (none.value, none.n, none.note) == (None, 0, "no reference passages")


def test_tfidf_is_that_of_the_formula() -> None:
    tfidf = TfIdf.fit(["cat cat dog", "dog bird"])
    assert tfidf.idf == {
        "cat": math.log(3 / 2) + 1,
        "dog": math.log(3 / 3) + 1,
        "bird": math.log(3 / 2) + 1,
    }
    vector = tfidf.vector("Cat CAT dog a")
    length = math.hypot(2 * tfidf.idf["cat"], tfidf.idf["dog"])
    assert vector == pytest.approx({"cat": 2 * tfidf.idf["cat"] / length, "dog": tfidf.idf["dog"] / length})


def test_references_from_files(tmp_path: Path) -> None:
    import numpy

    samples = [{"name": "Pia Lund", "text": "A baker bakes."}, {"name": "Rolf Berg", "text": "Bread is baked."}]
    entry = {"relation_id": "P106", "target_id": "Q1", "samples": samples}
    (tmp_path / "snippets.json").write_text(json.dumps([entry]))
    found = References.from_files(tmp_path / "snippets.json")
    assert found.passages == {("P106", "Q1"): ["A baker bakes.", "Bread is baked."]}
    assert found.about["Pia Lund"] == ["A baker bakes."]
    numpy.save(tmp_path / "idf.npy", numpy.array([1.5, 2.5]))
    (tmp_path / "vocab.json").write_text(json.dumps({"baker": 1, "bread": 0}))
    given = References.from_files(tmp_path / "snippets.json", tmp_path / "idf.npy", tmp_path / "vocab.json")
    assert given.tfidf.idf == {"baker": 2.5, "bread": 1.5}
    (tmp_path / "vocab.json").write_text(json.dumps({"baker": 2}))
    with pytest.raises(MalformedFile, match="does not fit"):
        TfIdf.from_files(tmp_path / "idf.npy", tmp_path / "vocab.json")
    for broken in (b"caf\xe9", b"", b"[1]", b'{"baker": "one"}'):
        (tmp_path / "vocab.json").write_bytes(broken)
        with pytest.raises(MalformedFile, match=r"vocab\.json: expected an object of indices by word"):
            TfIdf.from_files(tmp_path / "idf.npy", tmp_path / "vocab.json")
    for broken in (b"", b"caf\xe9", b"\x93NUMPY"):
        (tmp_path / "idf.npy").write_bytes(broken)
        with pytest.raises(MalformedFile, match=r"idf\.npy: expected an array of numbers"):
            TfIdf.from_files(tmp_path / "idf.npy", tmp_path / "vocab.json")
    (tmp_path / "snippets.json").write_text("{}")
    for alone in ({"idf": tmp_path / "idf.npy"}, {"vocabulary": tmp_path / "vocab.json"}):
        with pytest.raises(InvalidSetting, match=r"without (vocabulary|idf); they go together"):
            References.from_files(tmp_path / "snippets.json", **alone)
    (tmp_path / "other.json").write_text('[{"relation_id": 1}]')
    with pytest.raises(MalformedFile, match="expected objects with relation_id"):
        References.from_files(tmp_path / "other.json")
    assert cons.VARIANT == "cons.tfidf"


# --- several queries -----------------------------------------------------------------------------------------------


def query(axis: str, index: int, answer: str, mode: Any = "any") -> Query:
    return Query(f"{axis}/{index}", axis, "Q?", None, None, ((answer,),), mode)


HOPS = Case(
    "m",
    (Edit("{} is", "Ada", "x"),),
    (
        query("rewrite", 0, "Velt"),
        query("rewrite", 1, "Bern"),
        query("singlehop", 0, "Velt"),
        query("singlehop", 1, "Bern"),
        query("unedited_hop", 1, "Bern"),
        *(query("multihop", i, "Ghent") for i in range(3)),
    ),
    meta={"prompting": "cot"},
)


def numbers(case: Case, texts: dict[str, str]) -> dict[str, float | None]:
    found = multihop(case, texts)
    assert {m.variant for m in found} <= {"mq.cot"}
    return {m.metric: m.value for m in found}


def test_multihop_needs_one_wording_and_all_hops() -> None:
    texts = {q.id: "no" for q in HOPS.queries}
    assert numbers(HOPS, texts) == {
        "edit_wise": 0,
        "instance_wise": 0,
        "multi_hop": 0,
        "hop_wise": 0,
        "unedited_hops": 0,
    }
    texts |= {"rewrite/0": "Velt, a city in", "singlehop/0": "velt.", "multihop/2": "The Ghent"}
    assert numbers(HOPS, texts)["edit_wise"] == 0.5
    assert numbers(HOPS, texts)["instance_wise"] == 0
    assert numbers(HOPS, texts)["multi_hop"] == 1
    assert numbers(HOPS, texts)["hop_wise"] == 0
    texts |= {"singlehop/1": "Bern", "unedited_hop/1": "Bern"}
    assert numbers(HOPS, texts)["hop_wise"] == numbers(HOPS, texts)["unedited_hops"] == 1
    del texts["multihop/0"]
    assert "multi_hop" not in numbers(HOPS, texts)


RIPPLE = Case(
    "r",
    (Edit("{} is", "Ada", "Porto"),),
    (
        query("rewrite", 0, "Porto"),
        query("ripple.forgetfulness", 0, "Lyon", "all"),
        query("ripple.forgetfulness", 1, "Bern", "all"),
        query("ripple.condition", 0, "Ghent", "all"),
    ),
    meta={
        "tests": [
            {"axis": "forgetfulness", "rule": "OR", "queries": ["ripple.forgetfulness/0"], "conditions": []},
            {
                "axis": "forgetfulness",
                "rule": "AND",
                "queries": ["ripple.forgetfulness/0", "ripple.forgetfulness/1"],
                "conditions": ["ripple.condition/0"],
            },
        ]
    },
)


def test_ripple_tests_run_where_their_conditions_held_before() -> None:
    after = {"rewrite/0": "it is Porto", "ripple.forgetfulness/0": "Lyon", "ripple.forgetfulness/1": "Rome"}
    unmet = {"ripple.condition/0": "Rome"}
    without = {(m.metric, m.variant): m.value for m in ripple(RIPPLE, unmet, after)}
    assert without == {
        ("edit_success", "ripple"): 1,
        ("ripple.forgetfulness", "ripple.executed"): 0.5,
        ("ripple.forgetfulness", "ripple.all"): 1,
        ("ripple.forgetfulness", "ripple.taken"): 1,
    }
    held = {(m.metric, m.variant): m.value for m in ripple(RIPPLE, {"ripple.condition/0": "Ghent"}, after)}
    assert held["ripple.forgetfulness", "ripple.executed"] == 1
    assert held["ripple.forgetfulness", "ripple.all"] == 0.5
    failed = {m.variant for m in ripple(RIPPLE, unmet, {**after, "rewrite/0": "Lyon"})}
    assert "ripple.taken" not in failed
    assert passes("OR", [False, True])
    assert not passes("AND", [False, True])


def test_ripple_numbers_of_which_a_text_is_missing_have_no_value() -> None:
    after = {"rewrite/0": "it is Porto", "ripple.forgetfulness/0": "Lyon", "ripple.forgetfulness/1": "Rome"}
    unasked = [m for m in ripple(RIPPLE, {}, after) if m.value is None]
    assert [m.variant for m in unasked] == ["ripple.executed", "ripple.all", "ripple.taken"]
    assert {(m.n, m.note) for m in unasked} == {(0, "no text of the unedited model for a condition")}
    held = {"ripple.condition/0": "Ghent"}
    found = {m.variant: m.value for m in ripple(RIPPLE, held, {"ripple.forgetfulness/0": "Lyon"})}
    assert found == {"ripple": None, "ripple.executed": 1, "ripple.all": None}
