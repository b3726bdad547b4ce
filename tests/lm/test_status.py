"""What was verified: the file says what `recipes.verify` found, the page shows it, and loading anything else warns."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers
from recipes import verify
from recipes.tiny import FAMILIES, UNLIKE, WRAPPED, WRAPPERS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retcon.errors import RetconWarning
from retcon.lm import status
from retcon.lm.layouts import LAYOUTS
from retcon.lm.model import LM
from retcon.workflow.doctor import Examination, Finding


def test_the_page_shows_the_file() -> None:
    page = verify.PAGE.read_text(encoding="utf-8")
    assert verify.with_table(page, status.read_status()) == page
    assert status.STATUS.read_text(encoding="utf-8") == verify.as_text(status.read_status())


def test_every_family_was_verified_and_passes() -> None:
    for version, families in status.read_status().items():
        assert set(families) == {*FAMILIES, *UNLIKE, *WRAPPERS} == {*set(LAYOUTS) - set(WRAPPED), *WRAPPERS}
        for model_type, dtypes in families.items():
            assert set(dtypes) == set(verify.DTYPES), (version, model_type)
            for found in dtypes.values():
                assert not found["failed"], (version, model_type, found)
                assert {"layout", "orientation", "undo", "save"} <= set(found["passed"]), (version, model_type)


def test_every_causal_family_is_on_the_page() -> None:
    """In a table of rows or, with a reason, among what is refused."""
    if transformers.__version__ not in status.read_status():
        pytest.skip("another version of transformers than the page speaks of")
    page = verify.PAGE.read_text(encoding="utf-8")
    assert [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if f"`{name}`" not in page] == []


@pytest.fixture
def small_status(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = {"passed": ["undo"], "skipped": {}, "failed": {}}
    record = {"5.1.0": {"llama": {"float32": sound}, "opt": {"float32": sound | {"failed": {"keys": "0.5 apart"}}}}}
    monkeypatch.setattr(status, "read_status", lambda: record)


@pytest.mark.parametrize(
    ("model_type", "version", "reason"),
    [
        ("llama", "5.1.0", None),
        ("llama", "5.9.1", None),
        ("llama", "6.0.0rc1", "retcon was verified with transformers 5.1.0, not with 6.0.0rc1"),
        ("gptj", "5.1.0", "model_type 'gptj' is not among those that retcon was verified with"),
        ("opt", "5.1.0", "model_type 'opt' did not pass all checks when retcon was verified (keys)"),
    ],
)
def test_what_is_not_known_to_hold(small_status: None, model_type: str, version: str, reason: str | None) -> None:
    assert status.unverified(model_type, version) == reason


def test_loading_a_family_outside_the_file_warns(small_status: None, tiny: Callable[..., LM]) -> None:
    with pytest.warns(RetconWarning, match=r"'gptj' is not among .*; `retcon doctor tiny-gptj` tries it on the model"):
        tiny("gptj")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny("llama")


def test_an_examination_becomes_a_row_of_the_file_and_of_the_page() -> None:
    found = Examination("tiny", "llama", "float32", 2, (Finding("undo", "passed", "bit for bit"),))
    with_gap = replace(found, findings=(*found.findings, Finding("experts", "skipped", "no routed experts")))
    broken = replace(found, findings=(Finding("keys", "failed", "0.5 apart"),))
    assert verify.outcomes(with_gap) == {"passed": ["undo"], "skipped": {"experts": "no routed experts"}, "failed": {}}
    rows = {name: {"float32": verify.outcomes(with_gap)} for name in ("llama", "mistral")}
    rows["opt"] = {"float32": verify.outcomes(broken)}
    table = verify.table({"5.1.0": rows}).splitlines()
    assert table[2:] == [
        "| `llama`, `mistral` | all passed | experts: no routed experts | float32 | 5.1.0 |",
        "| `opt` | keys: 0.5 apart |  | float32 | 5.1.0 |",
    ]
    assert json.loads(verify.as_text({"5.1.0": rows})) == {"5.1.0": rows}


@pytest.mark.long
def test_a_run_examines_a_tiny_model() -> None:
    assert "undo" in verify.outcomes(verify.verify("opt", torch.float32))["passed"]
