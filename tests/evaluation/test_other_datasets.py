"""Loaders of the other formats on invented files with every kind of dirt."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retcon import world
from retcon.edits import Case, Query, write_edits
from retcon.errors import InvalidSetting, MalformedFile, MissingPackage
from retcon.evaluation import evaluate, read_cases
from retcon.evaluation.datasets import Loaded
from retcon.evaluation.datasets.hub import Address, read_hub_rows
from retcon.evaluation.datasets.ripple import split_sentence
from retcon.lm.model import LM

FIXTURES = Path(__file__).parents[1] / "fixtures"
read: Callable[..., Loaded] = partial(read_cases, on_error="skip")
"""The fixtures hold rows that cannot be used."""


def asked(case: Case, start: str) -> list[Query]:
    return [q for q in case.queries if q.axis.startswith(start)]


@pytest.mark.parametrize("name", ["knowedit", "qaedit", "zsre-ultra", "mquake", "ripple"])
def test_formats_are_recognised_and_loading_twice_is_the_same(name: str) -> None:
    cases, report = read(FIXTURES / f"{name}.json")
    assert report.format == {"zsre-ultra": "zsre"}.get(name, name)
    assert (cases, report) == read(FIXTURES / f"{name}.json")
    assert [c.meta["row"] for c in cases] == sorted(c.meta["row"] for c in cases)


# --- EasyEdit's family ---------------------------------------------------------------------------------------------


def test_knowedit_counts() -> None:
    cases, report = read(FIXTURES / "knowedit.json")
    assert (report.rows, report.cases, report.dropped) == (6, 5, {"empty_target": 1})
    assert report.dropped_queries == {"empty_target": 2, "empty_prompt": 1}
    assert report.flags == {"target_whitespace": 1, "answer_in_prompt": 1}
    assert report.options["answers"] == "all"
    assert {c.meta["family"] for c in cases} == {"easyedit"}


def test_knowedit_fields() -> None:
    cases = read(FIXTURES / "knowedit.json")[0]
    ada, norr, sund, ben, olga = cases
    assert [(q.id, q.answers) for q in asked(ada, "portability")] == [
        ("portability.Logical_Generalization/0", (("no",), ("is dead",))),
        ("portability.reasoning/0", (("Portugal", "PT"),)),
        ("portability.reasoning/1", (("Douro",),)),
        ("portability.Subject_Aliasing/0", (("Porto",),)),
    ]
    assert [q.target for q in asked(ada, "portability")] == ["no", "Portugal", "Douro", "Porto"]
    assert [q.id for q in asked(ada, "locality")] == ["locality.Relation_Specificity/0", "locality.Forgetfulness/0"]
    assert (ada.edits[0].target_true, norr.edits[0].target_true, sund.edits[0].target_true) == (
        "Lyon",
        None,
        "Pia Lund",
    )
    assert [q.prompt for q in asked(ada, "paraphrase")] == ["Ada Quill died in"]
    assert norr.edits[0].target_new == "Ines Holm"
    assert [q.axis for q in norr.queries] == ["rewrite"]
    assert [(q.id, q.target) for q in asked(sund, "portability")] == [("portability.reasoning/2", "42")]
    assert (ben.edits[0].subject, ben.edits[0].target_new) == ("Ben Orr", "was born in Gent.")
    assert [(q.prompt, q.target) for q in asked(olga, "locality")] == [
        ("Tom Reed speaks", "Dutch"),
        ("Ines Holm speaks", "Welsh"),
    ]


def test_knowedit_first_answers_are_easyedits() -> None:
    everything, first = (read(FIXTURES / "knowedit.json", answers=how)[0] for how in ("all", "first"))  # type: ignore[arg-type]
    assert [q.answers for q in asked(first[0], "portability")] == [
        (("no",),),
        (("Portugal",),),
        (("Douro",),),
        (("Porto",),),
    ]
    assert [[q.target for q in c.queries] for c in first] == [[q.target for q in c.queries] for c in everything]


@pytest.mark.parametrize(
    "spoilt",
    [[1], {"Reasoning": "x"}, {"Reasoning": [3]}, {"R": {"prompt": ["a", "b"], "ground_truth": ["x", "y", "z"]}}],
)
def test_knowedit_parts_of_another_shape_are_named(spoilt: Any, tmp_path: Path) -> None:
    row = {"subject": "Norr", "prompt": "The mayor of Norr is", "target_new": "x", "portability": spoilt}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(MalformedFile, match=r"rows\.json, row 1, portability"):
        read_cases(tmp_path / "rows.json", "knowedit")


def test_qaedit() -> None:
    cases, report = read(FIXTURES / "qaedit.json")
    assert [c.id for c in cases] == ["31"]
    assert cases[0].meta["source"] == "NQ"
    assert [(q.axis, q.target) for q in cases[0].queries] == [
        ("rewrite", "Ida Holt"),
        ("paraphrase", "Ida Holt"),
        ("locality.nq", "Pia Lund"),
        ("locality.nq", "1632"),
    ]
    assert report.dropped_queries == {"empty_target": 1}
    assert report.dropped == {"subject_missing": 1}


def test_zsre_without_subjects_is_loaded_and_flagged() -> None:
    cases, report = read(FIXTURES / "zsre-ultra.json")
    assert report.dropped == {"empty_target": 1}
    assert report.flags["no_subject"] == 2
    assert {c.edits[0].subject for c in cases} == {None}
    assert [q.prompt for q in asked(cases[1], "locality")] == ["nq question: where is the marsh?"]
    assert [q.prompt for q in asked(cases[1], "paraphrase")] == ["Norr was founded by whom?"]


def test_zsre_portability(tmp_path: Path) -> None:
    row = {
        "subject": "Norr", "src": "Who founded Norr?", "rephrase": "Norr was founded by?", "alt": "a king",
        "answers": ["the bishop"], "loc": "nq question: x", "loc_ans": "y",
        "portability": {"New Question": "Where was the founder of Norr born?", "New Answer": "Velt"},
    }  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (hop,) = asked(read(tmp_path / "rows.json", case_target="alt")[0][0], "portability")
    assert (hop.id, hop.prompt, hop.target) == ("portability.one_hop/0", row["portability"]["New Question"], "Velt")  # type: ignore[index]


# --- several hops --------------------------------------------------------------------------------------------------


def test_mquake_counts_and_fields() -> None:
    cases, report = read(FIXTURES / "mquake.json")
    assert [c.id for c in cases] == ["3", "4", "7"]
    assert report.dropped == {"conflict": 1, "empty_target": 1}
    assert report.dropped_queries == {"empty_prompt": 1, "empty_target": 2}
    assert report.options["prompting"] == "standard"
    one, two, _ = cases
    assert [e.id for e in two.edits] == ["4", "4/1"]
    assert [q.id for q in one.queries] == [
        "rewrite/0",
        "singlehop/0",
        "singlehop/1",
        *(f"multihop/{i}" for i in range(3)),
    ]
    assert asked(one, "multihop")[0].answers == (("Bern", "Berne"),)
    assert asked(one, "singlehop")[0].answers == (("Norr AG", "Norr"),)
    assert [q.id for q in two.queries] == [
        *("rewrite/0", "rewrite/1", "singlehop/0", "singlehop/1", "singlehop/2", "unedited_hop/2"),
        *("multihop/0", "multihop/2"),
    ]


def test_mquake_questions_stand_behind_demonstrations() -> None:
    found = {how: read(FIXTURES / "mquake.json", prompting=how, limit=1)[0][0] for how in ("standard", "cot", "bare")}  # type: ignore[arg-type]
    question = "In which city is the employer of Ada Quill based?"
    prompts = {how: asked(case, "multihop")[0].prompt for how, case in found.items()}
    assert prompts["bare"] == question
    assert prompts["standard"].endswith(f"\n\nQ: {question}\nA:")
    assert prompts["standard"].count("Q: ") == prompts["cot"].count("Question: ") > 3
    assert prompts["cot"].endswith(f"Question: {question}\nThoughts:")
    employs, based = asked(found["standard"], "singlehop")
    assert "For whom" in employs.prompt  # demonstrations of the relation, P108
    assert "seat of" in based.prompt  # P159, from the triples


def test_ripple_counts_and_fields() -> None:
    cases, report = read(FIXTURES / "ripple.json")
    assert report.dropped == {"sentence_not_split": 1}
    assert report.dropped_queries == {"empty_target": 1, "test_without_queries": 1}
    ada, tom = cases
    edit = ada.edits[0]
    assert (edit.prompt, edit.subject) == ("The name of the country of citizenship of {} is", "Ada Quill")
    assert (edit.target_new, edit.target_true, edit.relation_id) == ("Norr", "Velt", "COUNTRY_OF_CITIZENSHIP")
    assert (tom.edits[0].subject, tom.edits[0].target_new) == ("Tom Reed", "Pia Reed")
    assert [q.id for q in ada.queries] == [
        "rewrite/0",
        "ripple.relation_specificity/0",
        "ripple.logical_generalization/0",
        "ripple.logical_generalization/1",
        "ripple.condition/0",
        "ripple.forgetfulness/0",
    ]
    assert asked(ada, "ripple.relation")[0].answers == (("Ida Holt", "I. Holt"),)
    assert asked(ada, "ripple.logical")[0].answers == (("Sund",), ("Bern", "Berne"))
    assert {q.answers_mode for q in asked(ada, "ripple")} == {"all"}
    assert ada.meta["tests"] == [
        {"axis": "relation_specificity", "rule": "OR", "queries": ["ripple.relation_specificity/0"], "conditions": []},
        {
            "axis": "logical_generalization",
            "rule": "AND",
            "queries": ["ripple.logical_generalization/0", "ripple.logical_generalization/1"],
            "conditions": ["ripple.condition/0"],
        },
        {
            "axis": "forgetfulness",
            "rule": "OR",
            "queries": ["ripple.forgetfulness/0"],
            "conditions": ["ripple.condition/0"],
        },
    ]


@pytest.mark.parametrize(
    ("sentence", "wanted"),
    [
        ("The gender of Ada Quill is female.", ("The gender of {} is", "Ada Quill", "female")),
        ("Part One is followed by Part Two.", ("{} is followed by", "Part One", "Part Two")),
        (
            "The name of the founder of St. Velt Co. is J. K. R..",
            ("The name of the founder of {} is", "St. Velt Co.", "J. K. R."),
        ),
        ("The place of birth of  is Velt.", None),
        ("The gender of Ada Quill is", None),
    ],
)
def test_sentences_are_split_by_their_wording(sentence: str, wanted: Any) -> None:
    assert split_sentence(sentence) == wanted


@pytest.mark.parametrize(
    ("sentence", "others", "wanted"),
    [
        ("The name of the director of This is Spinal Tap is Ida Holt.", ["The editor of This is Spinal Tap is"],
         ("This is Spinal Tap", "Ida Holt")),
        ("The name of the author of This is What is Life?.", ["The gender of This is"], ("This", "What is Life?")),
        ("The name of the author of This is What is Life?.", ["The gender of Ida Holt is"], None),
    ],
)  # fmt: skip
def test_a_wording_inside_a_name_splits_where_other_prompts_name_the_subject(sentence, others, wanted) -> None:
    found = split_sentence(sentence, others)
    assert (found and found[1:]) == wanted


def test_the_old_object_is_after_the_same_subject(tmp_path: Path) -> None:
    of = "The name of the director of This is Spinal Tap is"
    edit = {"prompt": f"{of} Ida Holt.", "relation": "DIRECTOR", "original_fact": {"prompt": f"{of} Tom Reed."}}
    path = tmp_path / "ripple.json"
    path.write_text(json.dumps([{"edit": edit, "Forgetfulness": []}]))
    (case,), _ = read(path)
    (made,) = case.edits
    assert (made.subject, made.target_new, made.target_true) == ("This is Spinal Tap", "Ida Holt", "Tom Reed")


@pytest.mark.parametrize("name", ["knowedit", "qaedit", "zsre-ultra", "mquake", "ripple"])
def test_every_dirty_file_is_measured(name: str, tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=1)
    cases = read(FIXTURES / f"{name}.json", prompting="bare")[0]  # demonstrations are longer than the context
    found = evaluate(lm, cases, max_new_tokens=3)
    assert {r.case_id for r in found.records} == {c.id for c in cases}
    variants = {r.variant for r in found.records if r.status == "ok"}
    family = cases[0].meta["family"]
    assert {"easyedit": "ee.tok", "zsre": "zsre.tok", "mquake": "mq.bare", "ripple": "ripple"}[family] in variants
    if family == "easyedit":
        assert not any(v.startswith("zsre.tok") for v in variants)
        assert any(v.startswith("flu.new") for v in variants)
    summary = found.summary()
    assert summary.family == {"easyedit": "ee", "mquake": "mq"}.get(family, family)
    assert str(summary)


# --- from elsewhere ------------------------------------------------------------------------------------------------


def test_the_embedded_world_is_a_dataset() -> None:
    cases, report = read("world", limit=5, seed=3)
    assert [c.id for c in cases] == [c.id for c in world.cases(5, seed=3)]
    assert (report.format, report.options["seed"]) == ("world", 3)
    assert report.sha256 == read("world", limit=5, seed=3)[1].sha256 != read("world", limit=5, seed=4)[1].sha256
    assert [c.id for c in read("world", start=2, limit=3, seed=3)[0]] == [c.id for c in cases[2:]]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"case_target": "alt"}, "case target 'alt': world has no alternative answers; counterfact, "),
        ({"format": "zsre"}, "format 'zsre': the embedded world .* leave the format out"),
        ({"order": "shuffle"}, "order 'shuffle': the embedded world's cases are drawn by the seed"),
    ],
)
def test_what_the_embedded_world_has_not_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        read("world", limit=2, **setting)
    assert read("world", limit=2, format="world")[0] == read("world", limit=2)[0]


def test_a_plain_list_of_edits_is_a_dataset(tmp_path: Path) -> None:
    edits = [case.edits[0] for case in world.cases(2)]
    write_edits(tmp_path / "edits.jsonl", edits)
    cases, report = read(tmp_path / "edits.jsonl")
    assert report.format == "edits"
    assert [c.edits[0] for c in cases] == edits
    assert [[(q.id, q.prompt, q.target, q.contrast) for q in c.queries] for c in cases] == [
        [("rewrite/0", e.text, e.target_new, e.target_true)] for e in edits
    ]


def test_hub_addresses() -> None:
    assert Address.parse("hub:a/b") == Address("a/b", None, None)
    assert Address.parse("hub:a/b@main/c/d.json") == Address("a/b", "main", "c/d.json")
    with pytest.raises(MalformedFile, match="expected hub:owner/name"):
        Address.parse("hub:alone")


def test_rows_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    answer = partial(monkeypatch.setattr, "huggingface_hub.get_hf_file_metadata")
    answer(lambda *_, **__: None)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *a, **k: (calls.append((a, k)), str(FIXTURES / "knowedit.json"))[1]
    )
    cases, report = read("hub:knowedit/recent")
    assert len(cases) == 5
    assert report.path == "hub:knowedit/recent"
    assert calls == [
        (("zjunlp/KnowEdit", "benchmark/wiki_recent/recent_test.json"), {"repo_type": "dataset", "revision": None})
    ]
    rows = [row for _, row in read_hub_rows("hub:o/n/x.json")]
    library = ModuleType("datasets")
    library.load_dataset = lambda *a, **k: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert [c.edits for c in read("hub:o/n")[0]] == [c.edits for c in cases]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"needs the package 'datasets'"):
        read("hub:o/n")

    def broken(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(MalformedFile, match=r"cannot be read from the hub \(no network\)"):
        read("hub:o/n/x.json")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked again"))
    answer(broken)
    with pytest.raises(MalformedFile, match=r"hub:o/n/x\.json: the hub cannot be asked for it \(no network\)"):
        read("hub:o/n/x.json")
