"""`retcon moments`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ASK = ("moments", "gptj", "--corpus", "corpus.txt")


def test_collects_those_of_the_jeep_settings_and_then_finds_them(cli: Callable[..., Any]) -> None:
    first = json.loads(cli(*ASK, "--json").stdout)
    assert [m["layer"] for m in first["moments"]] == [0, 1, 2]
    assert all(not m["found"] and Path(m["file"]).is_file() for m in first["moments"])
    assert first["tokens_read"] > 0
    assert all(0 < m["convergence"] < 1 for m in first["moments"])
    again = json.loads(cli(*ASK, "--json").stdout)
    assert all(m["found"] for m in again["moments"])
    assert again["tokens_read"] == 0
    out = cli(*ASK).stdout
    assert "was there already" in out
    assert f"halves {first['moments'][0]['convergence']:.1%} apart" in out
    assert "nothing left to collect" in out


def test_layers_module_and_tokens(cli: Callable[..., Any]) -> None:
    arguments = ("--layers", "0,2-3", "--module", "o_proj", "--tokens-per-dimension", "12", "--json")
    found = json.loads(cli(*ASK, *arguments).stdout)["moments"]
    assert [m["layer"] for m in found] == [0, 2, 3]
    assert all("attn.out_proj" in m["parameter"] and m["tokens_asked"] == 12 * 32 for m in found)


def test_edit_finds_what_was_collected(cli: Callable[..., Any], here: Path) -> None:
    from tests.cli.conftest import QUICK

    cli(*ASK, "--layers", "0-2")
    files = sorted((here / "cache" / "moments").iterdir())
    cli(*QUICK)
    assert sorted((here / "cache" / "moments").iterdir()) == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "one"), "expected numbers and ranges"),
        (("--layers", "3-1"), "a range that holds no layer"),
        (("--layers", "7"), "has layers 0 to 3"),
        (("--corpus", "none.txt"), "none.txt: no such file"),
        (("--corpus", "no/such.txt"), "no/such.txt: no such file"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, cli: Callable[..., Any]) -> None:
    assert message in cli(*ASK, *arguments, code=2).stderr


def test_too_small_a_corpus(cli: Callable[..., Any], here: Path) -> None:
    (here / "corpus.txt").write_text("The capital.")
    assert "would be singular" in cli(*ASK, code=2).stderr


def test_a_dataset_as_corpus(cli: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (here / "corpus.txt").read_text().split("\n\n")
    rows = [{"text": " ".join(text[i : i + 5])} for i in range(0, len(text), 5)]
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    arguments = ("moments", "gptj", "--corpus", "org/texts:plain", "--json")
    assert json.loads(cli(*arguments).stdout)["tokens_read"] > 0
    assert json.loads(cli(*arguments).stdout)["tokens_read"] == 0
    assert asked == [(("org/texts", "plain"), {"split": "train", "streaming": True})]
