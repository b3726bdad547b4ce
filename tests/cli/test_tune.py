"""`retcon tune`."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retcon.workflow import tuning
from tests.cli.conftest import write_rows

TUNE = (
    "tune",
    "gptj",
    "facts.jsonl",
    "--corpus",
    "corpus.txt",
    "--method",
    "memit",
    "--trials",
    "3",
    "--set",
    "steps=3",
)
ROWS = [
    {
        "prompt": "The capital of {} is",
        "subject": subject,
        "target_new": "Rome",
        "target_true": "Paris",
        "paraphrases": [f"{subject}'s seat of government is"],
        "neighbors": ["The Louvre is in"],
    }
    for subject in ("France", "Spain", "Norway", "Chile", "Kenya", "Japan")
]


@pytest.fixture(autouse=True)
def facts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_PRESETS", str(here / "mine"))
    write_rows(here / "facts.jsonl", ROWS)


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that ends with other settings than it began at, whatever a model of random weights makes of them."""
    real = tuning._halving
    monkeypatch.setattr(tuning, "_halving", lambda *search: replace(found := real(*search), clamp=2 * found.clamp))


@pytest.mark.usefixtures("finds")
@pytest.mark.filterwarnings("ignore:.*larger than the weight")
def test_searches_reports_and_keeps_a_preset_that_edit_then_takes(cli: Callable[..., Any], here: Path) -> None:
    result = cli(*TUNE)
    assert "where it begins" in result.stdout
    assert "by the rule" in result.stdout
    assert "on 3 other cases" in result.stdout
    assert (here / "mine" / "memit.toml").is_file()
    edited = cli("edit", "gptj", "facts.jsonl", "--out", "d", "--corpus", "corpus.txt", "--method", "memit")
    assert "tuned by retcon tune on facts.jsonl (3 facts" in edited.stdout
    again = json.loads(cli(*TUNE, "--json").stdout)
    assert Path(again["start"]).match("memit/*/facts")
    assert json.loads(cli(*TUNE, "--preset", "none", "--json").stdout)["start"] == "rule"


@pytest.mark.usefixtures("finds")
@pytest.mark.filterwarnings("ignore:.*larger than the weight")
def test_json(cli: Callable[..., Any], here: Path) -> None:
    record = json.loads(cli(*TUNE, "--json", "--presets", "elsewhere").stdout)
    assert record["settings"]["steps"] == 3
    assert (record["n_searched"], record["n_reported"]) == (3, 3)
    assert 1 <= len(record["trials"]) <= 3
    assert Path(record["preset"]) == Path("elsewhere/memit.toml")


@pytest.mark.filterwarnings("ignore:.*larger than the weight")
def test_a_search_without_time_tries_where_it_begins(cli: Callable[..., Any], here: Path) -> None:
    record = json.loads(cli(*TUNE, "--budget", "0", "--dataset", "mine", "--json").stdout)
    assert [trial["changes"] for trial in record["trials"]] == [{}]
    assert record["preset"] is None  # there is nothing to keep
    assert not (here / "mine").exists()


def test_what_is_clearly_worse_on_the_other_half_is_not_kept(
    cli: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_halving", lambda search, given, draw: replace(search.start, clamp=1e-3))
    result = cli("tune", "demo:gptj", "world", "--limit", "12", "--method", "memit", "--set", "steps=6", "--json")
    assert "not kept: worse than memit/demo-gptj/world on cases that chose nothing" in result.stderr
    assert json.loads(result.stdout)["preset"] is None
    assert not (here / "mine").exists()


@pytest.mark.parametrize(("text", "folder"), [("", "facts.jsonl"), ("[[preset]]\nmodel = 3", "broken")])
def test_where_the_preset_cannot_be_written_is_said_before_the_search(
    text: str, folder: str, cli: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retcon.cli.tune.search", None)
    if text:
        (here / folder).mkdir()
        (here / folder / "memit.toml").write_text(text)
    result = cli(*TUNE, "--presets", folder, code=2)
    assert f"{folder}/memit.toml" in result.stderr
