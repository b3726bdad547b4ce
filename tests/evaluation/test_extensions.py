"""Formats and metrics of the user's own, from a file of the current folder or from an installed package."""

import json
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import retcon
import retcon.attachment
from retcon import LM
from retcon.errors import InvalidSetting, MalformedFile, UnknownMethod
from retcon.evaluation import Measures
from retcon.evaluation.results import Evaluation

CODE = """
def wiki(row):
    made = {"prompt": row["sentence"], "subject": row["who"], "target_new": row["new"]}
    return made | {"paraphrases": row.get("also", [])}

def words(case, texts, unedited):
    return {"words": len(" ".join(texts.values()).split()), "same": float(texts == unedited), "odd": None}

def broken(case, texts, unedited):
    return {"x": 1 / 0}

def odd(case, texts, unedited):
    return {"nan": float("nan"), "inf": float("inf"), "words": 2, 3: 4}

NAME = "no function"
"""
ROWS = [
    {"sentence": "The capital of {} is", "who": "Velmora", "new": "Rome", "also": ["Velmora's capital is"]},
    {"sentence": "The mayor of {} is", "who": "Norr"},
]


@pytest.fixture
def lm() -> LM:
    return retcon.load("demo:gptj")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine_of_tests.py").write_text(CODE)
    (tmp_path / "facts.json").write_text(json.dumps(ROWS[:1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine_of_tests", raising=False)
    return tmp_path


def test_a_function_makes_facts_of_the_rows_of_a_file(here: Path) -> None:
    cases, report = retcon.read_cases("facts.json", "mine_of_tests:wiki")
    assert report.format == "mine_of_tests:wiki"
    assert [(e.statement, e.subject) for case in cases for e in case.edits] == [
        ("The capital of Velmora is Rome", "Velmora")
    ]
    assert [q.prompt for q in cases[0].queries if q.axis == "paraphrase"] == ["Velmora's capital is"]


def test_a_row_that_the_function_cannot_read_is_named(here: Path) -> None:
    (here / "facts.json").write_text(json.dumps(ROWS))
    with pytest.raises(MalformedFile, match=r"row 2: mine_of_tests:wiki ends in KeyError: 'new'"):
        retcon.read_cases("facts.json", "mine_of_tests:wiki")
    cases, report = retcon.read_cases("facts.json", "mine_of_tests:wiki", on_error="skip")
    assert len(cases) == 1
    assert report.dropped == {"malformed": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wiki", "unknown format 'wiki'; known: mquake"),
        ("mine_of_tests:other", "cannot find the format 'mine_of_tests:other'"),
        ("no_such_module:wiki", "No module named 'no_such_module'"),
        ("mine_of_tests:NAME", "is no function but str"),
        (str.split, r"a format is named by text, found <method 'split'.*; one of your own by 'module:function'"),
    ],
)
def test_a_format_that_is_not_there_is_refused(here: Path, name: Any, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        retcon.read_cases("facts.json", name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def wiki(row:", r"broken_of_tests ends in SyntaxError: '\(' was never closed \(broken_of_tests.py, line 1\)"),
        ("\nx = y", r"ends in NameError: name 'y' is not defined \(broken_of_tests.py, line 2\)"),
        ("import sys\nsys.exit(3)", r"ends in SystemExit: 3 \(broken_of_tests.py, line 2\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_clear_error(
    here: Path, code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "broken_of_tests.py").write_text(code)
    with pytest.raises(InvalidSetting, match=message):
        retcon.read_cases("facts.json", "broken_of_tests:wiki")
    with pytest.raises(InvalidSetting, match=message):
        Measures(metrics=("broken_of_tests:wiki",))
    with pytest.raises(UnknownMethod, match=message):
        retcon.method("broken_of_tests:Wiki")
    save_file({"x": torch.zeros(1)}, "kind.safetensors", {"retcon": '{"kind": "wiki"}'})
    point = EntryPoint("wiki", "broken_of_tests:Wiki", "retcon.attachments")
    monkeypatch.setattr("retcon.extensions.entry_points", lambda *, group: [point])
    with pytest.raises(MalformedFile, match=f"cannot find what reads an attachment of the kind 'wiki': .*{message}"):
        retcon.attachment.load("kind.safetensors")
    with pytest.raises(InvalidSetting, match=r"'\./mine_of_tests' is no module's name"):
        retcon.read_cases("facts.json", "./mine_of_tests:wiki")


@pytest.mark.parametrize("name", [None, 5, LM])
def test_a_method_that_is_not_named_is_refused(name: Any) -> None:
    with pytest.raises(UnknownMethod, match=r"a method is named by text, found .*; one of your own by 'module:Class'"):
        retcon.method(name)


def test_what_a_module_adds_to_the_path_stays_and_the_current_folder_goes(here: Path) -> None:
    (here / "lib").mkdir()
    (here / "lib" / "beside_of_tests.py").write_text(CODE)
    (here / "path_of_tests.py").write_text(
        f"import sys\nsys.path.append({str(here / 'lib')!r})\n"
        "def wiki(row):\n    import beside_of_tests\n    return beside_of_tests.wiki(row)"
    )
    before = list(sys.path)
    try:
        assert len(retcon.read_cases("facts.json", "path_of_tests:wiki")[0]) == 1
        assert sys.path == [*before, str(here / "lib")]
    finally:
        sys.path[:] = before


def test_a_package_announces_formats_and_metrics(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"retcon.datasets": ("wiki", "wiki"), "retcon.metrics": ("words", "words")}

    def announced(*, group: str) -> list[EntryPoint]:
        name, attribute = points[group]
        return [EntryPoint(name, f"mine_of_tests:{attribute}", group)]

    monkeypatch.setattr("retcon.extensions.entry_points", announced)
    cases, report = retcon.read_cases("facts.json", "wiki")
    assert len(cases) == 1
    assert report.format == "wiki"
    assert Measures(metrics=("words",)).metrics == ("words",)


def test_a_metric_reads_what_both_models_write(here: Path, lm: LM) -> None:
    cases, _ = retcon.read_cases("facts.json", "mine_of_tests:wiki")
    measures = Measures(metrics=("mine_of_tests:words",), max_new_tokens=3)
    pre = retcon.evaluate(lm, cases, measures=measures)
    delta = retcon.method("memit", for_model=lm).propose(lm, [edit for case in cases for edit in case.edits])
    post = retcon.evaluate(lm, cases, measures=measures, pre=pre, delta=delta)
    asked: dict[str, Any] = {r.metric: r for r in pre.records if r.variant == "mine_of_tests:words"}
    assert asked["words"].value >= 0
    assert asked["same"].value == 1
    odd = asked["odd"]
    assert (odd.status, odd.value, odd.n, odd.detail) == ("skipped", None, 0, "mine_of_tests:words gives no odd")
    assert pre.summary().counts["error"] == 0
    after = {r.metric: r for r in post.records if r.variant == "mine_of_tests:words" and r.when == "final"}
    assert after["words"].value >= 0
    assert after["same"].value == 0
    assert post.summary()


def test_a_metric_is_not_given_nothing_in_place_of_what_the_unedited_model_wrote(here: Path, lm: LM) -> None:
    cases, _ = retcon.read_cases("facts.json", "mine_of_tests:wiki")
    measures = Measures(metrics=("mine_of_tests:words",), max_new_tokens=3)
    retcon.evaluate(lm, cases, measures=measures).write("pre.jsonl")
    pre = Evaluation.read("pre.jsonl")
    with pytest.raises(InvalidSetting, match=r"no text of the unedited model .*, which mine_of_tests:words reads"):
        retcon.evaluate(lm, cases, measures=measures, pre=pre)
    assert retcon.evaluate(lm, cases, measures=replace(measures, metrics=()), pre=pre).records


def test_a_metric_that_fails_is_named_with_its_case(here: Path, lm: LM) -> None:
    cases, _ = retcon.read_cases("facts.json", "mine_of_tests:wiki")
    with pytest.raises(InvalidSetting, match=r"metric mine_of_tests:broken, case .*ZeroDivisionError"):
        retcon.evaluate(lm, cases, measures=Measures(metrics=("mine_of_tests:broken",), max_new_tokens=3))
    with pytest.raises(InvalidSetting, match="generate is off"):
        Measures(metrics=("mine_of_tests:words",), generate=False)


def test_a_metric_that_is_no_number_is_an_error_of_its_case(here: Path, lm: LM) -> None:
    cases, _ = retcon.read_cases("facts.json", "mine_of_tests:wiki")
    found = retcon.evaluate(lm, cases, measures=Measures(metrics=("mine_of_tests:odd",), max_new_tokens=3))
    own = [(r.metric, r.value, r.status, r.detail) for r in found.records if r.variant == "mine_of_tests:odd"]
    assert own == [
        ("nan", None, "error", "nan is nan"),
        ("inf", None, "error", "inf is inf"),
        ("words", 2, "ok", None),
        ("3", 4, "ok", None),
    ]
    found.write(here / "records.jsonl")
    assert found.summary()["nan", "mine_of_tests:odd"].pre.value is None  # type: ignore[union-attr]
