"""GGUF exports run by llama.cpp itself; skipped where llama-cpp-python is not installed (docs/export.md says how)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retcon import method
from retcon.edits import Edit
from retcon.export import export
from retcon.lm.load import load
from retcon.lm.model import LM
from tests.export.test_export import checkpoint, edited  # noqa: F401

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
TEXT = "The capital of Łódź is naïve"


def opened(model: Path, adapter: Path | None = None) -> Any:
    return llama_cpp.Llama(
        str(model), lora_path=adapter and str(adapter), n_ctx=256, n_threads=1, logits_all=True, verbose=False
    )


def own_logits(lm: LM, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).logits[0].float().numpy()


def logits(runner: Any, ids: list[int]) -> np.ndarray:
    runner.reset()
    runner.eval(ids)
    return runner.scores[: len(ids)].copy()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_model_and_an_adapter_give_the_live_logits(
    family: str,
    checkpoint: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    lm = edited(checkpoint(family))
    ids = lm.tokenizer(TEXT).input_ids
    export(lm, tmp_path / "edited", format="gguf", gguf_type="f32")
    export(lm, tmp_path / "lora", format="gguf-lora")
    after = own_logits(lm, ids)
    lm.revert_all()
    export(lm, tmp_path / "base", format="gguf", gguf_type="f32")
    before = own_logits(lm, ids)
    merged, base = opened(tmp_path / "edited/model-f32.gguf"), opened(tmp_path / "base/model-f32.gguf")
    adapted = opened(tmp_path / "base/model-f32.gguf", tmp_path / "lora/adapter.gguf")
    assert merged.tokenize(TEXT.encode(), add_bos=ids[0] == lm.tokenizer.bos_token_id) == ids
    little = 1e-2 * np.abs(after - before).max()
    for runner, wanted in ((base, before), (merged, after), (adapted, after)):
        assert np.abs(logits(runner, ids) - wanted).max() < little


@pytest.mark.parametrize("type_name", ["f32", "q8_0"])
def test_llama_cpp_writes_the_new_answer(type_name: str, tmp_path: Path) -> None:
    lm = load("demo:llama")
    edit = Edit("{} lies within the borders of", "Geneva", "Norway")
    assert "Norway" not in lm.complete(edit.text)
    lm.apply(method("memit", for_model=lm).propose(lm, [edit]))
    wanted = lm.complete(edit.text)
    assert wanted.startswith(" Norway")
    export(lm, tmp_path / "gguf", format="gguf", gguf_type=type_name)
    runner = opened(tmp_path / f"gguf/model-{type_name}.gguf")
    written = runner(edit.text, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    assert wanted.startswith(written)
    assert written.startswith(" Norway")
