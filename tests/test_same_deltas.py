"""The net under refactoring finds what it is there to find."""

from pathlib import Path

import pytest
import torch
from benchmarks import same_deltas


@pytest.mark.long
def test_the_same_code_compares_equal_and_a_nudged_setting_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(same_deltas, "N_CASES", 2)
    assert same_deltas.record(tmp_path, ["rome"], ["demo:gptj"]) == 0
    assert same_deltas.compare(tmp_path, ["rome"], ["demo:gptj"]) == 0
    monkeypatch.setitem(same_deltas.SETTINGS, "rome", dict(steps=4, learning_rate=0.5001))
    assert same_deltas.compare(tmp_path, ["rome"], ["demo:gptj"]) == 1
    said = capsys.readouterr().out
    assert "the same  rome/demo:gptj/steps" in said
    assert "differs   rome/demo:gptj/steps" in said
    assert "mlp.fc_out.weight/0/low_rank/left: by up to" in said


def test_differences_are_named() -> None:
    one = torch.tensor([1.0, -0.0])
    assert list(same_deltas.tensor_differences({"a": one}, {"a": one.clone()})) == []
    assert list(same_deltas.tensor_differences({"a": one}, {"a": one.abs()})) == ["a: by up to 0"]  # a sign of zero
    assert list(same_deltas.tensor_differences({"a": one}, {})) == ["a: only before"]
    old = same_deltas.renamed({"report": [{"said": True, "steps": 3}]})
    now = {"report": [{"greedy_match": True, "steps": 4}]}
    assert list(same_deltas.figure_differences(old, now)) == ["/report/0/steps: 3 -> 4"]
