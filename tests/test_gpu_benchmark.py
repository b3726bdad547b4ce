"""The command that awaits a card, at the smallest size, on this one."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import evaluation, gpu, released_jeep
from benchmarks.compiled_steps import CompiledSteps

from retcon.edits import Case, Query
from retcon.errors import InvalidSetting, OutOfMemory
from retcon.evaluation import Measures
from retcon.lm.model import LM


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_command_says_how_to_try_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no card is here; --tiny --device cpu tries the command" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_every_part_runs_and_checks_its_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "CompiledSteps", partial(CompiledSteps, backend="aot_eager"))  # others take a compiler
    size = gpu.Size(("gptj-128",), (1, 2), steps=4, tokens=1024, n_cases=1)
    assert gpu.measure(gpu.Card(size, "cpu", torch.float32), minutes=60)
    printed = capsys.readouterr().out
    for part in (
        "to the CPU's",
        "fast to plain",
        "search, 2 edits",
        "fingerprint",
        "MEMIT",
        "evaluate, 1 cases of the world",
        "evaluate, 1 cases as native CounterFact has",
        "ms a case; floor",
        "plain path, one edit",
        "moments of",
        "Cholesky",
        "s of compiling",
    ):
        assert part in printed, part
    assert "| 0.00 / " in printed or " / 0.00 / " in printed  # no step waits


def test_the_floor_of_an_evaluation_counts_each_beginning_once(tiny: Callable[..., LM]) -> None:
    lm = tiny("gptj", torch.float32)
    counter = evaluation.Counter(lm)
    queries = Query("rewrite/0", "rewrite", "a b c", " d", " e"), Query("two_hop/0", "two_hop", "a b f")
    ids = [lm.encode(text).ids for text in ("a b c d", "a b c e", "a b f")]
    assert list(map(len, ids)) == [6, 7, 5]
    found = evaluation.floor_of(lm, [Case("a", (), queries)], Measures(), [4, 1])
    read, predicted = 6 + 1, 2  # "a b c", the space before "e", and "f" after "a b "; what follows "c" and that space
    assert found.read == counter.per_token * read + counter.per_position * predicted
    assert found.written == counter.per_token * 3 + counter.per_position * 5
    assert found.seconds(found.read, 7.0) == 1 + 3 * 7.0  # weights are read in every pass


def test_native_cases_have_counterfact_s_shape() -> None:
    cases = evaluation.native_cases(2)
    for case in cases:
        assert Counter(q.axis for q in case.queries) == Counter(rewrite=1, paraphrase=2, neighborhood=10, generation=1)
    asked = [q.prompt for case in cases for q in case.queries if q.axis == "neighborhood"]
    assert len(set(asked)) == 20


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_result_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: gpu.Card) -> None:
        raise gpu.Failed("a delta parts from the CPU's")

    def no_room() -> None:
        raise OutOfMemory("memory ran out with 64 edits active.\nFree some")

    monkeypatch.setattr(
        gpu, "parts", lambda card: [("zero", 0, no_room), ("one", 0, lambda: wrong(card)), ("two", 1e9, no_room)]
    )
    assert not gpu.measure(gpu.Card(gpu.FULL, "cpu", torch.float32), minutes=1)
    printed = capsys.readouterr().out
    assert "| **wrong** | | zero: OutOfMemory: memory ran out with 64 edits active. | |" in printed
    assert "| **wrong** | | a delta parts from the CPU's | |" in printed
    assert re.search(r"\| two \| \| left out: (60|5\d) s are left", printed)


RELEASED = """
def compute_z_joint(model, tok, request, hparams, layer_low, layer_high, templates):
    print("much is said")
    assert "gpt-j" in tok.name_or_path and tok.pad_token
    assert request["prompt"].count("{}") == 1 and request["target_new"]["str"].startswith(" ")
    assert templates[0] == ["{}"] and all("{}" in t for t in templates[1])
    assert (hparams.v_num_grad_steps, hparams.min_loss) == (2, 2.0) and 0 <= layer_low < layer_high
    CALLS.append(request["case_id"])

CALLS = []
"""


def test_a_checkout_of_the_released_code_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidSetting, match=r"no jeep/compute_z\.py there; give a checkout of JEEP's released code"):
        gpu.main(["--tiny", "--device", "cpu", "--released", str(tmp_path)])
    (tmp_path / "jeep").mkdir()
    (tmp_path / "jeep/compute_z.py").write_text(RELEASED)
    (tmp_path / "jeep/jeep_hparams.py").write_text("from types import SimpleNamespace as JEEPHyperParams")
    (tmp_path / released_jeep.SETTINGS).parent.mkdir(parents=True)
    (tmp_path / released_jeep.SETTINGS).write_text('{"v_num_grad_steps": 30, "min_loss": 0.9}')
    card = gpu.Card(gpu.Size(("llama-256", "gptj-128"), (1,), steps=2, tokens=8, n_cases=1), "cpu", torch.float32)
    assert "released code" not in [name for name, *_ in gpu.parts(card)]
    card.released, card.an_edit["gptj-128"] = tmp_path, 1e-9
    ((what, _, measured, wanted),) = card.by_released_code("gptj-128")
    assert what == "released code, one edit"
    assert measured.endswith("times ours")
    assert wanted == "60 times"
    assert "jeep.compute_z" not in sys.modules
    (tmp_path / "jeep/compute_z.py").write_text("compute_z_joint = None")
    ((_, _, measured, _),) = card.by_released_code("gptj-128")
    assert measured.startswith("did not run: TypeError")
    assert "much is said" not in capsys.readouterr().out
