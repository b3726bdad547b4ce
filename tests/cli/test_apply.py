"""`retcon apply`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import retcon
from retcon.delta import Delta, Dense


def test_saves_a_checkpoint_that_transformers_loads(cli: Callable[..., Any], delta: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cli("apply", "gptj", str(delta), "--save", "edited")
    lm, change = retcon.load("gptj"), Delta.load(delta)
    lm.apply(change)
    saved = AutoModelForCausalLM.from_pretrained("edited", dtype=torch.float32).state_dict()
    wanted = lm.model.state_dict()
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    assert AutoTokenizer.from_pretrained("edited")("Łódź").input_ids == lm.tokenizer("Łódź").input_ids
    assert cli("complete", "edited", "The capital of France is").stdout == (
        cli("complete", "gptj", "The capital of France is", "--delta", str(delta)).stdout
    )


def test_a_change_without_a_method_is_said_to_be_of_none(cli: Callable[..., Any], here: Path) -> None:
    lm = retcon.load("gptj")
    lm.delta({"transformer.ln_f.weight": [Dense(full=torch.ones(32))]}).save("own.safetensors")
    assert ": unknown method, 0 edits" in cli("apply", "gptj", "own.safetensors", "--save", "edited").stdout


def test_records_what_is_in_it(cli: Callable[..., Any], delta: Path) -> None:
    result = cli("apply", "gptj", str(delta), "--save", "edited", "--json")
    record, change = json.loads(Path("edited/retcon.json").read_text()), Delta.load(delta)
    assert record["base"] == {"model": "gptj", "revision": None, "fingerprint": change.base, "dtype": "float32"}
    assert [d["id"] for d in record["deltas"]] == [change.id]
    assert record["deltas"][0]["file"] == "delta.safetensors"
    found = json.loads(result.stdout)
    assert {name: found[name] for name in record if name != "export"} == {
        n: v for n, v in record.items() if n != "export"
    }


def test_weights_may_be_read_by_others(cli: Callable[..., Any], delta: Path) -> None:
    cli("apply", "gptj", str(delta), "--save", "edited")
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in Path("edited").iterdir())


def test_several_deltas_in_order(cli: Callable[..., Any], delta: Path) -> None:
    from tests.cli.conftest import QUICK

    cli(*QUICK, "--seed", "5", "--out", "second.safetensors")
    result = cli("apply", "gptj", str(delta), "second.safetensors", "--save", "edited")
    names = [d["file"] for d in json.loads(Path("edited/retcon.json").read_text())["deltas"]]
    assert names == ["delta.safetensors", "second.safetensors"]
    assert "was proposed on top of [the base]" in result.stderr


def test_an_existing_directory_is_replaced_by_force_only(cli: Callable[..., Any], delta: Path) -> None:
    cli("apply", "gptj", str(delta), "--save", "edited")
    Path("edited/changed.safetensors").touch()
    assert "not empty" in cli("apply", "gptj", str(delta), "--save", "edited", code=2).stderr
    assert Path("edited/changed.safetensors").exists()
    cli("apply", "gptj", str(delta), "--save", "edited", "--force")
    assert not Path("edited/changed.safetensors").exists()
    Path("empty").mkdir()
    cli("apply", "gptj", str(delta), "--save", "empty")


def test_force_takes_nothing_that_is_no_checkpoint(cli: Callable[..., Any], delta: Path, here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine/letter.txt").touch()
    message = cli("apply", "gptj", str(delta), "--save", "mine", "--force", code=2).stderr
    assert "holds no checkpoint" in message
    assert "the directory that you are in" in cli("apply", "gptj", str(delta), "--save", ".", code=2).stderr
    assert delta.exists()
    message = cli("apply", "gptj", str(delta), "--save", "gptj", "--force", code=2).stderr
    assert "is the model itself" in message
    assert "is a file" in cli("apply", "gptj", str(delta), "--save", str(delta), code=2).stderr


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_what_was_there(
    error: BaseException, existing: bool, cli: Callable[..., Any], delta: Path, here: Path, monkeypatch: Any
) -> None:
    if existing:
        cli("apply", "gptj", str(delta), "--save", "edited")
        Path("edited/changed.safetensors").touch()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("retcon.atomic.sync", fail)
    before = sorted(here.rglob("*"))
    cli("apply", "gptj", str(delta), "--save", "edited", "--force", code=1 if isinstance(error, OSError) else 130)
    assert sorted(here.rglob("*")) == before


def test_a_wrong_base_is_refused(cli: Callable[..., Any], delta: Path) -> None:
    assert "llama" in cli("apply", "llama", str(delta), "--save", "edited", code=2).stderr
    cli("apply", "gptj", str(delta), "--save", "edited")
    refused = cli("apply", "edited", str(delta), "--save", "twice", code=2).stderr
    assert f"delta {Delta.load(delta).id} was made for gptj" in refused
    assert not Path("twice").exists()
    cli("apply", "edited", str(delta), "--save", "twice", "--other-base")


def test_damaged_and_missing_deltas(cli: Callable[..., Any], delta: Path) -> None:
    assert "no such file" in cli("apply", "gptj", "none.safetensors", "--save", "edited", code=2).stderr
    delta.write_bytes(delta.read_bytes()[:-9])
    assert "not a readable safetensors file" in cli("apply", "gptj", str(delta), "--save", "edited", code=2).stderr
    message = cli("apply", "gptj", "gptj/model.safetensors", "--save", "edited", code=2).stderr
    assert "not a retcon delta" in message


def test_a_delta_fits_the_checkpoint_in_whatever_dtype_it_was_made(cli: Callable[..., Any], delta: Path) -> None:
    assert Delta.load("delta.safetensors").provenance["dtype"] == "float32"
    record = json.loads(cli("apply", "gptj", "delta.safetensors", "--save", "edited", "--json").stdout)
    stored = json.loads((Path("gptj") / "config.json").read_text())["dtype"]
    assert record["base"]["dtype"] == stored  # what is saved has the stored dtype
    cli("complete", "gptj", "I", "--delta", "delta.safetensors", "--dtype", "bfloat16")
