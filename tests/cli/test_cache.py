"""`retcon cache`, and `--verify-base`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retcon import checked
from retcon.delta import Delta
from retcon.lm import fingerprint as module
from tests.cli.conftest import QUICK
from tests.conftest import everyday


def test_lists_and_prunes_what_is_kept(cli: Callable[..., Any], delta: Path) -> None:
    shown = cli("cache").stdout
    assert "second moments" in shown
    assert "searched values" not in shown  # the edit ended, so its values are gone
    before = json.loads(cli("cache", "--json").stdout)
    assert {row["kind"] for row in before["kept"]} == {"moments", "fingerprints"}
    assert before["bytes"] == sum(row["n_bytes"] for row in before["kept"])
    assert "removed" in cli("cache", "moments", "--prune").stdout
    after = json.loads(cli("cache", "--prune", "--json").stdout)
    assert {row["kind"] for row in after["kept"]} == {"fingerprints"}
    assert after["removed"] == []
    assert "--days says what --prune removes" in cli("cache", "--days", "3", code=2).stderr
    assert "holds no 'x'" in cli("cache", "x", code=2).stderr


def test_a_shared_cache_that_cannot_be_one_is_refused_before_a_model_is_loaded(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETCON_SHARED_CACHE", "sthree://bucket")
    monkeypatch.setattr("retcon.load", lambda *args, **options: pytest.fail("loaded"))
    said = cli("complete", "demo:gptj", "The capital of France is", code=2).stderr
    assert "RETCON_SHARED_CACHE=sthree://bucket: Protocol not known" in said


def test_a_fingerprint_that_is_kept_is_not_believed_where_that_is_asked(
    cli: Callable[..., Any], delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = Path("cache/fingerprints").iterdir()
    hashed: list[str] = []
    real = module.fingerprint

    def counting(*args: Any) -> str:
        hashed.append(real(*args))
        return hashed[-1]

    monkeypatch.setattr(module, "fingerprint", counting)
    cli("complete", "gptj", "The capital of France is", "--delta", str(delta))
    assert hashed == []
    cli("complete", "gptj", "The capital of France is", "--delta", str(delta), "--verify-base")
    cli("apply", "gptj", str(delta), "--save", "edited", "--verify-base")
    assert len(hashed) == 2
    assert kept.exists()


@pytest.mark.parametrize("where", everyday("a file", of=["a file", "no home"]))
def test_a_cache_that_cannot_be_written_costs_one_warning(
    where: str, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli(*QUICK)
    Path("wanted").write_bytes(Path("delta.safetensors").read_bytes())
    Path("delta.safetensors").unlink()
    if where == "a file":
        Path("a file").touch()
        monkeypatch.setenv("RETCON_CACHE", str(Path("a file").absolute()))
    else:
        monkeypatch.delenv("RETCON_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/proc/none")
    checked._warned.clear()
    said = cli(*QUICK).stderr
    assert said.count("warning: the cache cannot be written") == 1
    assert len([line for line in said.splitlines() if line.startswith("warning:") and "cache" in line]) == 1
    assert Delta.load("delta.safetensors").id == Delta.load("wanted").id
