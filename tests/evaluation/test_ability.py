"""General ability: what a stand-in for the harness is handed, what is done about its acts; then the harness itself."""

import json
import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch

import retcon
from retcon.errors import InvalidSetting, MissingPackage, NotEditable
from retcon.evaluation.ability import ability
from retcon.lm.model import LM

RESULTS = {
    "results": {
        "sst2": {"alias": "sst2", "acc,none": 0.75, "acc_stderr,none": 0.03125},
        "mrpc": {"acc,none": 0.5, "f1,strict": 0.625, "acc_stderr,none": "N/A"},
    },
    "n-samples": {"sst2": {"original": 872, "effective": 40}},
}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for lm_eval; what it was called with."""
    called: dict[str, Any] = {}

    class HFLM:
        def __init__(self, **given: Any) -> None:
            called["wrapped"] = given
            given["tokenizer"].pad_token = "<unk>"  # the real one does such things

    def simple_evaluate(**given: Any) -> Any:
        called["asked"] = given
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)
        return called.get("act", lambda: RESULTS)()

    package, models, hf = (ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))
    package.simple_evaluate, hf.HFLM = simple_evaluate, HFLM  # type: ignore[attr-defined]
    for module in (package, models, hf):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return called


def test_the_live_model_is_wrapped_and_left_alone(
    harness: dict[str, Any], tiny: Callable[..., LM], untouched: Callable[[LM], Any]
) -> None:
    lm = tiny(n_layers=1)
    lm.model.train()
    look, numbers = untouched(lm), numpy.random.get_state()[1].tolist()
    pad = lm.tokenizer.pad_token
    found = ability(lm, ["sst2", "mrpc"], n_shot=2, limit=40, seed=5, when="checkpoint", step=3)
    assert untouched(lm) == look
    assert numpy.random.get_state()[1].tolist() == numbers
    assert random.getstate() != random.Random(1).getstate()  # (checked types draw from it too)
    assert lm.tokenizer.pad_token == pad
    assert harness["wrapped"]["pretrained"] is lm.model
    assert harness["wrapped"]["tokenizer"] is not lm.tokenizer
    asked = harness["asked"]
    assert "use_cache" not in asked
    assert (asked["tasks"], asked["num_fewshot"], asked["limit"]) == (["sst2", "mrpc"], 2, 40)
    assert {asked[f"{name}_seed"] for name in ("random", "numpy_random", "torch_random", "fewshot_random")} == {5}
    assert [(r.metric, r.variant, r.value, r.n, r.detail) for r in found] == [
        ("sst2", "lm_eval.acc", 0.75, 40, "standard error 0.03125"),
        ("mrpc", "lm_eval.acc", 0.5, 0, None),
        ("mrpc", "lm_eval.f1.strict", 0.625, 0, None),
    ]
    assert {(r.when, r.step, r.case_id) for r in found} == {("checkpoint", 3, None)}


def test_a_metric_that_is_no_number_is_an_error(harness: dict[str, Any], tiny: Callable[..., LM]) -> None:
    harness["act"] = lambda: {"results": {"cola": {"mcc,none": float("nan"), "mcc_stderr,none": 0.1}}}
    (record,) = ability(tiny(n_layers=1), ["cola"])
    assert (record.value, record.status, record.detail) == (None, "error", "lm_eval.mcc is nan")


def test_weights_that_the_harness_changed_are_noticed(harness: dict[str, Any], tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=1)

    def tie() -> Any:
        with torch.no_grad():
            lm.head.weight.copy_(lm.head.weight + 1)  # type: ignore[operator]
        return RESULTS

    harness["act"] = tie
    with pytest.raises(NotEditable, match="changed the model's weights"):
        ability(lm, ["sst2"])


def test_errors_say_what_to_do(
    harness: dict[str, Any], tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny(n_layers=1)

    def unknown() -> Any:
        raise KeyError("sst3")

    harness["act"] = unknown
    with pytest.raises(InvalidSetting, match="cannot run sst3"):
        ability(lm, ["sst3"])
    harness["act"] = lambda: None  # another process than the one that reports
    assert ability(lm, ["sst2"]) == []
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingPackage, match=r"pip install 'retcon-lm\[ability\]'"):
        ability(lm, ["sst2"])


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval (pip install 'retcon-lm[ability]')")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_itself_sees_an_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (edit,) = retcon.world.cases(1, seed=0)[0].edits
    item = {"prompt": edit.text, "choices": [edit.target_true, edit.target_new], "answer": 0}
    (tmp_path / "items.jsonl").write_text("\n".join([json.dumps(item)] * 12))
    (tmp_path / "task.yaml").write_text(
        f"""
task: kept
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path / "items.jsonl"}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    lm = retcon.load("demo:gptj")
    delta = retcon.method("jeep", for_model=lm).propose(lm, [edit])
    task = str(tmp_path / "task.yaml")
    (before,) = ability(lm, [task], limit=8)
    with lm.edited(delta):
        (after,) = ability(lm, [task], limit=8)
    assert (before.metric, before.variant, before.n) == ("kept", "lm_eval.acc", 8)
    assert (before.value, after.value) == (1.0, 0.0)
