"""The command line in this process, on tiny random models in files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from retcon.cli import app
from retcon.cli.printing import console
from tests.conftest import tiny_model, tokenizer

ROWS = [
    {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome", "target_true": "Paris", "id": "fr"},
    {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "Italian", "id": "dd"},
]
"""Edits that the tiny models' tokenizer can spell."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints, `gptj` and `llama`."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("gptj", "llama"):
        tiny_model(family, torch.float32).save_pretrained(folder / family)
        tokenizer("gpt").save_pretrained(folder / family)
    return folder


@pytest.fixture
def here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a test: links to the models, a corpus, a file of edits, an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COLUMNS", raising=False)  # a test runner's own width would wrap lines elsewhere
    console.cache_clear()  # one that another test made may have that width
    for family in ("gptj", "llama"):
        (tmp_path / family).symlink_to(models / family)
    text = [f"The capital of France is Paris, and {i} of {i * i} trains go home by way of Łódź." for i in range(20)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(text))
    write_rows(tmp_path / "edits.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def cli(here: Path) -> Callable[..., Any]:
    """cli("complete", ..., code=0, stdin=None) -> result with stdout and stderr; a traceback fails the test."""

    def run(*arguments: str, code: int = 0, stdin: str | None = None) -> Any:
        if arguments[0] == "edit" and "--require" not in arguments:  # random models learn little in a few steps
            arguments += ("--require", "0")
        result = CliRunner().invoke(app, arguments, input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def delta(cli: Callable[..., Any], models: Path) -> Path:
    """A delta made for the `gptj` checkpoint, once for all tests, with what making it leaves in the cache."""
    kept, path = models / "made", Path("delta.safetensors")
    if not kept.exists():
        cli(*EDIT)
        shutil.copytree("cache", kept / "cache")
        shutil.copy(path, kept)
    shutil.copytree(kept, ".", dirs_exist_ok=True)
    return path


EDIT = (
    *("edit", "gptj", "edits.jsonl", "--out", "delta.safetensors", "--corpus", "corpus.txt"),
    *("--set", "steps=4", "--set", "low=[0, 1]"),
)
"""An edit in `here` whose settings are found without a preset."""
QUICK = (*EDIT, "--set", "low_clamp=0.5", "--set", "high_clamp=0.25")
"""The same with clamps given, so that none are tried."""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
