"""`retcon check`: words, examples, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.cli.conftest import EDIT, ROWS, write_rows

ASK = ("check", "gptj", "--delta", "delta.safetensors", "--cases", "edits.jsonl", "--text", "corpus.txt")


OFF = ("--took", "0", "--generalised", "0", "--local", "0", "--perplexity-ratio", "inf")


@pytest.fixture
def unlearnt(delta: Path, here: Path) -> None:
    """Cases whose answers the edited model does not give."""
    write_rows(here / "edits.jsonl", [{**row, "target_new": "Leonardo da Vinci and São Paulo"} for row in ROWS])


def test_two_cases_prove_little(cli: Callable[..., Any], delta: Path) -> None:
    same = ("check", "gptj", "--edited", "gptj", "--cases", "edits.jsonl", "--text", "corpus.txt", "--took", "0")
    told = cli(*same, "--generalised", "0", code=1).stdout
    assert "Not known to be safe: it stayed local." in told
    assert "no paraphrases are given" in told
    assert "Safe to ship by these thresholds, on 2 cases." in cli(*ASK, *OFF).stdout


def test_failing_is_told_with_examples(cli: Callable[..., Any], unlearnt: None) -> None:
    told = cli(*ASK, *OFF[2:], "--took", "1", code=1).stdout
    assert "Not safe to ship: fell short of: the edit took." in told
    assert "The edit took: where it fell short" in told
    found = json.loads(cli(*ASK, "--took", "1", "--json", code=1).stdout)
    assert found["safe"] is False
    assert set(found["answers"]) == {"took", "generalised", "local", "language"}
    assert found["answers"]["took"]["n"] == 2
    assert len(found["notes"]) == 2


def test_facts_that_contradict_each_other_are_read_as_the_edit_read_them(
    cli: Callable[..., Any], delta: Path, here: Path
) -> None:
    write_rows(
        here / "edits.jsonl", [ROWS[0], {**ROWS[0], "target_new": "Milan", "id": "fr2", "neighbors": ["Lyon is in"]}]
    )
    told = cli(*ASK, *OFF).stdout
    assert "1 of 2 rows kept; dropped: conflict 1" in told
    asked = json.loads(cli(*ASK, "--conflicts", "last", "--took", "1", "--json", code=1).stdout)
    assert "conflicts=last" in asked["read"]
    assert "contradict each other" in cli(*ASK, "--conflicts", "error", code=2).stderr


def test_the_verdict_as_a_file(cli: Callable[..., Any], unlearnt: None, here: Path) -> None:
    for name in ("check.html", "check.md", "check.xml"):
        cli(*ASK, "--took", "1", "--report", name, code=1)
    page, markdown = (here / "check.html").read_text(), (here / "check.md").read_text()
    assert page.startswith("<!doctype html>")
    for text in (page, markdown):
        assert "Not safe to ship" in text
        assert "The edit took" in text
    suite = ElementTree.parse(here / "check.xml").getroot()
    assert suite.tag == "testsuite"
    assert [test.get("name") for test in suite][:2] == ["The edit took", "It generalised"]
    assert int(suite.get("failures", "0")) == len(suite.findall("testcase/failure")) > 0
    cli(*ASK, *OFF, "--report", "off.xml")
    assert len(ElementTree.parse(here / "off.xml").getroot().findall("testcase/skipped")) == 4
    assert "expected a name that ends in .html, .md, .xml" in cli(*ASK, "--report", "check.pdf", code=2).stderr


@pytest.mark.long
def test_two_deltas_are_compared_fact_by_fact(cli: Callable[..., Any], delta: Path, here: Path) -> None:
    cli(*EDIT[:3], "--out", "other.safetensors", *EDIT[5:-1], "low=[0]")
    told = cli(*ASK, *OFF, "--against", "other.safetensors", "--report", "two.html").stdout
    assert "Compared with other.safetensors" in told
    page = (here / "two.html").read_text()
    assert page.count("<tr data-broke=") == 2
    assert page.count('data-passed1="') == 2
    assert "Compared with other.safetensors" in page
    assert "The capital of France is" in page
    asked = cli(*ASK, *OFF, "--against", "other.safetensors", "--report", "two.md", "--json")
    assert "## Compared with other.safetensors" in (here / "two.md").read_text()
    found = json.loads(asked.stdout)
    assert set(found["against"]["answers"]) == set(found["answers"])
    served = cli("check", "m", "--url", "http://127.0.0.1:9", "--cases", "edits.jsonl", "--against", "x", code=2)
    assert "which a served model cannot be given" in served.stderr


def test_a_merged_checkpoint_and_an_adapter_give_what_the_delta_gives(
    cli: Callable[..., Any], delta: Path, here: Path
) -> None:
    def values(*how: str) -> list[Any]:
        asked = ("check", "gptj", *how, "--cases", "edits.jsonl", "--text", "corpus.txt", "--json", *OFF)
        found = json.loads(cli(*asked).stdout)
        return [None if a["value"] is None else round(a["value"], 4) for a in found["answers"].values()]

    wanted = values("--delta", "delta.safetensors")
    cli("apply", "gptj", "delta.safetensors", "--save", "merged")
    assert values("--edited", "merged") == wanted
    assert "no such folder" in cli("check", "gptj", "--edited", "none", "--cases", "edits.jsonl", code=2).stderr
    pytest.importorskip("peft", reason="adapters are merged by peft")
    cli("export", "gptj", "delta.safetensors", "--format", "peft", "--out", "adapter")
    assert values("--edited", "adapter") == wanted


def test_one_thing_is_checked(cli: Callable[..., Any], delta: Path) -> None:
    assert "Give one of --delta DELTA" in cli("check", "gptj", "--cases", "edits.jsonl", code=2).stderr
    both = cli(*ASK, "--url", "http://127.0.0.1:9", code=2)
    assert "Give one of --delta DELTA" in both.stderr
    away = cli("check", "m", "--url", "http://127.0.0.1:9", "--cases", "edits.jsonl", code=2)
    assert "cannot be reached" in away.stderr


def test_an_option_without_what_it_is_about_is_refused(cli: Callable[..., Any], here: Path) -> None:
    served = ("check", "m", "--url", "http://127.0.0.1:9", "--cases", "edits.jsonl")
    for options in (("--text", "corpus.txt"), ("--device", "cpu"), ("--dtype", "float32"), ("--verify-base",)):
        told = cli(*served, *options, code=2).stderr
        assert f"{options[0]} is about a model that is loaded here, not about a server's" in told
    told = cli(*served, "--revision", "main", "--packed", code=2).stderr
    assert "--revision main --packed is about a model that is loaded here" in told
    assert "--other-base goes with --delta" in cli(*served, "--other-base", code=2).stderr
    edited = ("check", "nowhere", "--edited", "gptj", "--cases", "edits.jsonl")
    assert "--other-base goes with --delta" in cli(*edited, "--other-base", code=2).stderr
    assert "--timeout goes with --url" in cli(*edited, "--timeout", "5", code=2).stderr


def test_bad_input_is_refused(cli: Callable[..., Any], delta: Path) -> None:
    cases = ("--cases", "edits.jsonl")
    assert "no such file" in cli("check", "gptj", "--delta", "none.safetensors", *cases, code=2).stderr
    other = cli("check", "llama", "--delta", "delta.safetensors", *cases, code=2)
    assert "was the delta made for another one" in other.stderr
    assert "share from 0 to 1" in cli(*ASK, "--local", "95", code=2).stderr
