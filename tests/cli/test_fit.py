"""`retcon fit`, and an edit with what it trained."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from retcon.methods.common.contract import Trainable, recorded
from tests.cli.conftest import write_rows
from tests.cli.test_tune import ROWS

FIT = (
    *("fit", "gptj", "facts.jsonl", "--out", "mend.safetensors", "--set", "steps=4", "--set", "validate_every=2"),
    *("--set", "rank=4", "--set", "batch_size=2", "--set", "step_size=0.01"),
)
EDIT = ("edit", "gptj", "edits.jsonl", "--out", "d.safetensors", "--method", "mend")


@pytest.fixture(autouse=True)
def facts(here: Path) -> None:
    write_rows(here / "facts.jsonl", ROWS)


def test_fit_then_edit(cli: Callable[..., Any], here: Path) -> None:
    result = cli(*FIT)
    assert "validation loss" in result.stdout
    assert "editor kept in mend.safetensors" in result.stdout
    assert (here / "mend.png").stat().st_size > 1000
    assert (here / "mend.svg").exists()
    shown = cli(*EDIT, "--set", "editor=mend.safetensors").stdout
    assert "2 edits" in shown
    assert "search" not in shown.partition("searched")[2], "nothing is searched"
    assert "rank = 4 " in shown, "the settings shown are those of the training"
    assert "settings  those that mend.safetensors was trained with" in shown
    refused = " ".join(cli(*EDIT, "--set", "editor=mend.safetensors", "--set", "rank=5", code=2).stderr.split())
    assert "mend: rank is 5, and the editor mend.safetensors was trained with 4" in refused
    cli(*EDIT, "--set", "editor=mend.safetensors", "--set", "rank=4", "--force")
    assert "is there already" in cli(*FIT, code=2).stderr
    record = json.loads(cli(*FIT, "--force", "--json").stdout)
    assert [point["step"] for point in record["curve"]] == [0, 2, 4]
    assert record["best"]["validation"] == min(point["validation"] for point in record["curve"])


@dataclass(frozen=True, kw_only=True)
class Own(Trainable):
    """As docs/guides/add-a-method.md has it; its file is its own."""

    name: ClassVar[str] = "own"
    editor: str | None = None

    def propose(self, lm: Any, edits: Any, **given: Any) -> Any:
        return lm.delta({}, **recorded(self, lm, edits, seed=given["seed"]))

    def fit(self, lm: Any, cases: Any, out: Any, *, seed: int = 0, force: bool = False, progress: Any = None) -> Path:
        Path(out).write_text(f"{len(cases)} cases")
        return Path(out)

    def n_fitted(self, lm: Any) -> int:
        return 5


def test_a_method_of_ones_own_is_trained_and_keeps_its_own_file(cli: Callable[..., Any], here: Path) -> None:
    shown = cli("fit", "gptj", "facts.jsonl", "--method", f"{__name__}:Own", "--out", "own.editor").stdout
    assert "trains 5 values" in shown
    assert "editor kept in own.editor" in shown
    assert (here / "own.editor").read_text() == f"{len(ROWS)} cases"


@pytest.mark.parametrize("name", ["mend.png", "mend.v1"])
def test_the_picture_is_beside_the_editor_whatever_that_is_called(
    name: str, cli: Callable[..., Any], here: Path
) -> None:
    cli(*FIT, "--out", name)
    assert (here / f"{name}.png").stat().st_size > 1000
    cli(*EDIT, "--set", f"editor={name}")
    assert sorted(path.name for path in here.glob("mend*")) == sorted([name, f"{name}.png", f"{name}.svg"])


def test_the_unfinished_training_of_another_run_is_replaced_where_it_is_said(
    cli: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("retcon.methods.common.hypernetwork.write_editor", lambda *_: exit(1))
        cli(*FIT, code=1)
    unfinished = here / "mend.safetensors.unfinished"
    kept = unfinished.read_bytes()
    refused = cli(*FIT, "--set", "steps=5", code=2).stderr
    assert "steps: found 4, wanted 5" in " ".join(refused.split())
    assert "--force" in refused
    in_halves = " ".join(cli(*FIT, "--dtype", "bfloat16", code=2).stderr.split())
    assert "dtype: found 'float32', wanted 'bfloat16'" in in_halves
    assert unfinished.read_bytes() == kept
    cli(*FIT, "--set", "steps=5", "--force")
    assert not unfinished.exists()


def test_what_cannot_be_trained_or_edited_with_is_said(cli: Callable[..., Any]) -> None:
    assert "nothing to train first; trained are: " in cli(*FIT, "--method", "jeep", code=2).stderr
    assert "retcon fit MODEL CASES --method mend" in cli(*EDIT, code=2).stderr
    assert "no such file; mend's editor is what" in cli(*EDIT, "--set", "editor=nothing", code=2).stderr
    assert "is an input of this command" in cli(*FIT, "--out", "facts.jsonl", code=2).stderr
