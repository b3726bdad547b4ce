"""The command that awaits a card, at the smallest size, on this one."""

import pytest
import torch
from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_command_says_how_to_try_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no card is here; --tiny --device cpu tries the command" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_every_part_runs_and_checks_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    size = gpu.Size(("gptj-128",), (1, 2), steps=2, tokens=1024, n_cases=1)
    assert gpu.measure(gpu.Card(size, "cpu", torch.float32), minutes=60)
    printed = capsys.readouterr().out
    for part in (
        "to the CPU's",
        "fast to plain",
        "search, 2 edits",
        "fingerprint",
        "MEMIT",
        "evaluate",
        "moments of",
        "Cholesky",
    ):
        assert part in printed, part
    assert "| 0.00 / " in printed or " / 0.00 / " in printed  # no step waits


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_result_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: gpu.Card) -> None:
        raise gpu.Failed("a delta parts from the CPU's")

    monkeypatch.setattr(gpu, "parts", lambda card: [("one", 0, lambda: wrong(card)), ("two", 1e9, lambda: wrong(card))])
    assert not gpu.measure(gpu.Card(gpu.FULL, "cpu", torch.float32), minutes=1)
    printed = capsys.readouterr().out
    assert "| **wrong** | | a delta parts from the CPU's | |" in printed
    assert "| two | | left out: 60 s are left" in printed
