"""The examination finds what is right, and what is made wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retcon.lm.model import LM
from retcon.workflow.doctor import Examination, examine
from tests.conftest import everyday

CHECKS = ["layout", "orientation", "experts", "replay", "keys", "rome", "memit", "jeep", "kne", "undo", "save"]


def outcomes(found: Examination) -> dict[str, str]:
    return {f.check: f.outcome for f in found.findings}


@pytest.mark.parametrize("family", everyday("mixtral", of=["llama", "mixtral", "qwen3_5_text"]))
def test_a_sound_model_passes_and_is_as_it_was(
    family: str, tiny: Callable[..., LM], untouched: Callable[[LM], Any]
) -> None:
    lm = tiny(family, torch.float32)
    before = untouched(lm)
    found = examine(lm)
    assert found.passed, found
    assert [f.check for f in found.findings] == CHECKS
    skipped = {c for c, o in outcomes(found).items() if o == "skipped"}
    assert skipped == {"llama": {"experts"}, "mixtral": {"rome"}, "qwen3_5_text": {"experts"}}[family]
    assert untouched(lm) == before


def test_a_model_that_does_something_else_in_passing_fails(
    tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block whose output depends on how many tokens are run: replays and keys part from plain passes."""
    lm = tiny("llama", torch.float32)
    block = lm.block(2)
    own = block.forward
    monkeypatch.setattr(block, "forward", lambda states, *a, **k: own(states, *a, **k) * (1 + 0.1 * states.shape[1]))
    found = examine(lm)
    assert not found.passed
    assert outcomes(found)["replay"] == "failed"
    assert "apart" in next(f.detail for f in found.findings if f.check == "replay")


@pytest.mark.long
def test_an_error_inside_a_check_is_a_finding(tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama", torch.float32)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(lm.model, "save_pretrained", broken)
    found = examine(lm)
    assert next(f for f in found.findings if f.outcome == "failed").detail == "RuntimeError: no room"
    assert found.as_dict()["passed"] is False
