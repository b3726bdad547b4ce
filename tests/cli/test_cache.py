"""`retcon cache`, and `--verify-base`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retcon.lm import fingerprint as module


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


VERIFYING = (
    *("edit", "apply", "export", "complete", "chat", "check", "moments", "tune", "audit", "bench"),
    *("init", "verify", "checkout", "revert", "amend"),
)


@pytest.mark.parametrize("verb", VERIFYING)
def test_whatever_believes_a_fingerprint_can_be_told_not_to(verb: str, cli: Callable[..., Any]) -> None:
    assert "--verify-base" in cli(verb, "--help").stdout
