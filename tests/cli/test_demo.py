"""`retcon demo`, on the models that the package carries."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retcon import world
from retcon.delta import Delta
from tests.conftest import everyday

shipped = pytest.mark.skipif(
    not all((world.model_path(name) / "model.safetensors").is_file() for name in world.MODELS),
    reason="the embedded models' weights are not here (python -m recipes.world makes them)",
)


@shipped
@pytest.mark.parametrize("model", everyday("gptj", of=world.MODELS))
def test_edits_measures_saves_and_undoes(model: str, cli: Callable[..., Any]) -> None:
    result = cli("demo", "--model", model, "--edits", "4", "--json")
    record = json.loads(result.stdout)
    (story,) = record["models"]
    assert record["ok"]
    assert story["undone"]
    assert story["delta"]["read_back"]
    assert story["fingerprints"]["before"] == story["fingerprints"]["reverted"] != story["fingerprints"]["edited"]
    assert story["metrics"]["ES"]["after"]["value"] >= story["metrics"]["ES"]["before"]["value"] + 0.5
    assert len(story["said"]["rewrite"]) == 4
    assert all(said["before"] != said["wanted"] for said in story["said"]["rewrite"])
    file = Path(story["delta"]["file"])
    assert file == Path(f"retcon-demo-{model}.safetensors")
    assert Delta.load(file).id == story["delta"]["id"]
    assert len(result.stderr.splitlines()) > 20  # the story itself


@shipped
def test_prints_a_story_that_fits_and_commands_that_work(cli: Callable[..., Any]) -> None:
    out = cli("demo", "--edits", "2").stdout
    assert all(word in out for word in ("before", "asked", "after", "ES", "GS", "LS", "Score", "an edit"))
    assert "the base's, bit for bit" in out
    story, _, commands = out.partition("Try next")
    assert max(map(len, story.splitlines())) <= 100
    tried = []
    for words in (shlex.split(line, comments=True) for line in commands.splitlines()):
        if words and words[0] == "echo":
            Path(words[3]).write_text(words[1])
        elif words and "demo" not in words:
            start = next(i for i, word in enumerate(words) if word in ("complete", "apply", "edit"))
            cli(*words[start:])
            tried.append(words[start])
    assert tried == ["complete", "apply", "edit"]


@shipped
def test_a_run_in_which_the_edits_do_not_take_fails(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retcon.cli.demo.TOOK", 1.1)
    assert "did not take" in cli("demo", "--edits", "1", code=1).stdout


def test_where_the_delta_goes(cli: Callable[..., Any], here: Path) -> None:
    assert "give a directory that exists" in cli("demo", "--model", "both", "--out", "d.safetensors", code=2).stderr
    assert "is not a directory" in cli("demo", "--out", "edits.jsonl/d.safetensors", code=2).stderr


def test_more_edits_than_facts(cli: Callable[..., Any]) -> None:
    assert "asked for 99999 cases" in cli("demo", "--edits", "99999", code=2).stderr
