"""`retcon methods`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import retcon
from retcon.errors import InvalidEdit, InvalidSetting, RetconWarning
from retcon.methods.common.registry import check_subjects, list_methods
from retcon.workflow.fitting import check_trainable


def test_lists_all_with_paper_and_presets(cli: Callable[..., Any]) -> None:
    record = json.loads(cli("methods", "--json").stdout)
    assert [m["name"] for m in record["methods"]] == list_methods()
    for method in record["methods"]:
        assert method["description"]
        assert "et al." in method["paper"]
    jeep = next(m for m in record["methods"] if m["name"] == "jeep")
    assert "jeep/gpt-j-6b/counterfact" in jeep["presets"]
    assert jeep["paper"] == "Shi et al. 2024, arXiv:2412.17872"
    facts = {m["name"]: (m["facts"], m["keeps"]) for m in record["methods"]}
    assert facts["jeep"] == ("many at once", "")
    assert facts["rome"] == ("one; many in steps, one on top of the other", "")
    assert facts["alphaedit"] == ("many at once", "the keys of earlier edits")
    assert facts["rect"] == ("as its base method", "as its base method")
    assert "gemma2" in record["architectures"]
    out = cli("methods").stdout
    assert "keeps    the keys of earlier edits between batches" in out
    assert "edit low and high layers together" in out
    assert "jeep/gpt-j-6b/zsre" in out


def test_says_what_a_model_gets(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("methods", "gptj")
    assert "gptj: no preset for this model: by its shape and the edits" in result.stdout
    assert "low = [0]" in result.stdout
    record = json.loads(cli("methods", "gptj", "--json").stdout)
    jeep = next(m for m in record["methods"] if m["name"] == "jeep")
    assert jeep["preset"] is None
    assert jeep["settings"]["low"] == [0]


def test_reads_no_weights(cli: Callable[..., Any], here: Any) -> None:
    (here / "config-only").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (here / "config-only" / name).write_bytes((here / "gptj" / name).read_bytes())
    cli("methods", "config-only")
    (here / "config-only" / "config.json").unlink()
    assert "cannot read 'config-only'" in cli("methods", "config-only", code=2).stderr


def test_a_method_is_described_by_its_name_or_its_class(cli: Callable[..., Any]) -> None:
    out = cli("methods", "rome").stdout
    assert "rome  " in out
    assert "\nmemit  " not in out
    assert "gemma2" not in out
    assert "  steps  (default 20)  " in out
    assert "  layer  Block" in out  # it must be given, so there is no default
    assert out == cli("methods", "--method", "rome").stdout
    assert "retcon.methods.rome:Rome" in cli("methods", "retcon.methods.rome:Rome").stdout


def test_a_misspelt_method_is_no_model(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", Mock(side_effect=OSError("no network")))
    assert "Did you mean 'memit'?" in cli("methods", "memti", code=2).stderr
    assert "cannot load 'out/edited': there is no such directory here" in cli("methods", "out/edited", code=2).stderr


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

from retcon.methods.common.contract import Method


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    name: ClassVar[str] = "shift_of_tests"
    examples: tuple[str, ...]

    def propose(self, lm, edits, **given):
        raise NotImplementedError
"""


def test_an_output_of_another_encoding_escapes_what_it_lacks(here: Path) -> None:
    (here / "shift_of_tests.py").write_text('"""Shift: ✓ Übung 😀."""\n' + PLUGIN, "utf-8")
    command = [sys.executable, "-m", "retcon", "methods", "shift_of_tests:Shift"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "cp1252"}
    text = subprocess.run(command, capture_output=True, env=env, check=True).stdout.decode("cp1252")
    assert "\\u2713 Übung \\U0001f600" in text
    found = subprocess.run([*command, "--json"], capture_output=True, env=env, check=True).stdout.decode("cp1252")
    assert json.loads(found)["methods"][0]["description"] == "✓ Übung 😀"


def test_one_installed_method_hides_no_other(
    cli: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "shift_of_tests.py").write_text(PLUGIN)
    points = [EntryPoint("broken", "no_such_module:X", "retcon.methods"),
              EntryPoint("shift", "shift_of_tests:Shift", "retcon.methods")]  # fmt: skip
    monkeypatch.setattr("retcon.extensions.entry_points", lambda *, group: points if "methods" in group else [])
    result = cli("methods")
    assert "\nrome  " in result.stdout
    assert "\nshift  " in result.stdout
    assert "warning: cannot find the method 'broken': No module named 'no_such_module'" in result.stderr
    needs = "shift needs examples, which neither a preset nor the model's shape gives: set it"
    assert f"gptj: {needs}" in cli("methods", "gptj").stdout
    records = {m["name"]: m for m in json.loads(cli("methods", "gptj", "--json").stdout)["methods"]}
    assert records["shift"]["settings"] is None
    assert records["shift"]["problem"].startswith(needs)
    assert records["jeep"]["settings"]["low"] == [0]
    with (
        pytest.warns(RetconWarning, match="'broken'"),
        pytest.raises(InvalidEdit, match=r"take a method that needs none: .*ctp"),
    ):
        check_subjects(retcon.method("rome", layer=0), [retcon.Edit("Hello is", None, "x")])
    with pytest.warns(RetconWarning, match="'broken'"), pytest.raises(InvalidSetting, match=r"trained are: .*mend"):
        check_trainable("rome")
