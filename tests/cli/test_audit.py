"""`retcon audit`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from retcon.delta import Delta


def test_the_command(cli: Callable[..., Any], delta: Path) -> None:
    cli("apply", "gptj", str(delta), "--save", "edited")
    shown = cli("audit", "gptj", "edited", "--explain", str(delta), "--facts", "edits.jsonl", "--delta", "diff").stdout
    assert "unexplained" in shown
    assert "of 2 answers changed" in shown
    assert "exists" in cli("audit", "gptj", "edited", "--delta", "diff", code=2).stderr
    found = json.loads(cli("audit", "gptj", "edited", "--explain", str(delta), "--json").stdout)
    assert found["unexplained"] < 1e-3
    assert {d["parameter"] for d in found["differences"]} == set(Delta.load(delta).changes)
    assert "The same" in cli("audit", "gptj", "gptj").stdout


def test_other_settings_are_not_the_same(cli: Callable[..., Any], here: Path) -> None:
    shutil.copytree(here / "gptj", "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.5}))
    shown = cli("audit", "gptj", "other").stdout
    assert "The same" not in shown
    assert "layer_norm_epsilon differs, and no delta holds it: 1e-05 in BASE, 0.5 in EDITED" in shown
    assert json.loads(cli("audit", "gptj", "other", "--json").stdout)["settings"] == {"layer_norm_epsilon": [1e-5, 0.5]}


def test_a_model_that_is_not_there_is_refused_before_the_other_is_loaded(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retcon.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", Mock(side_effect=OSError("no network")))
    assert "'./edited': no such directory" in cli("audit", "gptj", "./edited", code=2).stderr
    assert "the hub cannot be asked for it (no network)" in cli("audit", "gptj", "out/edited", code=2).stderr


def test_the_facts_are_read_as_everywhere(cli: Callable[..., Any], here: Path) -> None:
    (here / "facts.csv").write_text("prompt,subject,target_new\n{} is,France,\nThe capital of {} is,France,Rome\n")
    assert "--on-error skip" in cli("audit", "gptj", "gptj", "--facts", "facts.csv", code=2).stderr
    assert "of 1 answer changed" in cli("audit", "gptj", "gptj", "--facts", "facts.csv", "--on-error", "skip").stdout
    told = cli("audit", "gptj", "gptj", "--facts", "edits.jsonl", "--chat", code=2).stderr
    assert "the tokenizer has no chat template" in told
    assert "goes with --facts" in cli("audit", "gptj", "gptj", "--start", "1", code=2).stderr


def test_what_is_no_whole_model_says_what_it_is(cli: Callable[..., Any], delta: Path) -> None:
    for form, said in (("peft", "it is an adapter and no whole model; merge it"), ("diff", "it has no config.json")):
        cli("export", "gptj", str(delta), "--format", form, "--out", form)
        assert said in " ".join(cli("audit", "gptj", form, code=2).stderr.split())
