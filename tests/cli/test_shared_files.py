"""Files that people share name a model by the last part of its path and its fingerprint: no folder of this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retcon.bench.manifest import command_line
from retcon.methods.common.contract import recorded
from retcon.methods.kne import Kne

QUICK = ("--set", "steps=1", "--set", "low=[0, 1]", "--set", "high=[2, 3]")


@pytest.mark.long
def test_no_file_names_a_folder_of_this_machine(cli: Callable[..., Any], here: Path, models: Path) -> None:
    model, edits, corpus = (str(p) for p in (models / "gptj", here / "edits.jsonl", here / "corpus.txt"))
    delta = str(here / "d.safetensors")
    cli("edit", model, edits, "--out", delta, "--corpus", corpus, *QUICK)
    cli("apply", model, delta, "--save", str(here / "applied"))
    cli("export", model, delta, "--format", "peft", "--out", str(here / "peft"))
    cli("check", model, "--delta", delta, "--cases", edits, "--report", str(here / "check.html"), code=1)
    cli("audit", model, str(here / "applied"), "--delta", str(here / "found.safetensors"))
    cli("init", model, "--store", str(here / "store"))
    cli("edit", model, edits, "--store", str(here / "store"), "--corpus", corpus, *QUICK)
    cli(
        "verify",
        "--store",
        str(here / "store"),
        "--markdown",
        str(here / "v.md"),
        "--html",
        str(here / "v.html"),
        code=1,
    )
    cli("checkout", "--store", str(here / "store"), "--save", str(here / "state"))
    bench = ("bench", "--model", model, "--method", "rome", "--dataset", edits, "--corpus", corpus, "--n", "1")
    cli(*bench, "--out", str(here / "bench"))
    cli("report", str(here / "bench"), "--no-pictures")
    inputs = {"edits.jsonl", "corpus.txt", "gptj", "llama", "cache"}
    made = [p for p in here.rglob("*") if p.is_file() and p.relative_to(here).parts[0] not in inputs]
    assert len(made) > 20
    folders = [str(here).encode(), str(models).encode()]
    named = {
        str(p.relative_to(here)): data[max(0, at - 60) : at + 80]
        for p in made
        for data in [p.read_bytes()]
        for folder in folders
        if (at := data.find(folder)) >= 0
    }
    assert named == {}


def test_a_command_is_recorded_without_folders(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["/opt/x/retcon", "bench", "--model", "/opt/models/gptj", f"--out={here}/a/b", "--n", "3", "https://x/y"]
    monkeypatch.setattr("sys.argv", typed)
    assert command_line() == "retcon bench --model gptj --out=a/b --n 3 https://x/y"


def test_a_setting_that_is_a_path_is_recorded_by_its_last_part(tiny: Any, edits: Any) -> None:
    method = Kne(locate_on="/opt/facts/some.jsonl")
    made = recorded(method, tiny("gptj"), edits, seed=0)["provenance"]
    assert (method.locate_on, made["settings"]["locate_on"]) == ("/opt/facts/some.jsonl", "some.jsonl")
