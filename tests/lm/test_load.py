"""Loading from a directory: dtypes, what is refused, the fingerprint on record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import retcon
from retcon.errors import RetconWarning, UnsupportedModel
from retcon.lm import fingerprint as fingerprint_module
from retcon.lm.fingerprint import fingerprint
from retcon.lm.layouts import LAYOUTS
from retcon.lm.load import load
from retcon.lm.model import LM
from tests.conftest import tiny_model, tokenizer


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a tiny llama stored in bfloat16, and its tokenizer."""
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny"
    tiny_model("llama", torch.bfloat16).save_pretrained(path)
    tokenizer("bos").save_pretrained(path)
    return path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fingerprints worked out, not read from the record."""
    calls: list[str] = []

    def counting(model: Any, stored: Any = None) -> str:
        calls.append(fingerprint(model, stored))
        return calls[-1]

    monkeypatch.setattr(fingerprint_module, "fingerprint", counting)
    return calls


def test_float32_is_the_default_on_a_cpu(saved: Path) -> None:
    lm = load(str(saved), device="cpu")
    assert isinstance(lm, LM)
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}
    assert lm.device == torch.device("cpu")
    assert not lm.model.training
    assert lm.name == str(saved)
    stored = dict(tiny_model("llama", torch.bfloat16).named_parameters())
    assert all(torch.equal(p, stored[n].float()) for n, p in lm.model.named_parameters())
    assert lm.encode("Rome").ids == tuple(tokenizer("bos")("Rome")["input_ids"])
    lm.complete("The capital of France is", max_new_tokens=2)


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        ("bfloat16", torch.bfloat16), ("float16", torch.float16), (torch.float64, torch.float64),
        ("auto", torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_the_dtype_asked_for(dtype: Any, found: torch.dtype, saved: Path) -> None:
    lm = load(str(saved), dtype=dtype, device="cpu")
    assert {p.dtype for p in lm.model.parameters()} == {found}
    assert lm.dtype == found


@pytest.mark.parametrize("dtype", ["float31", "int8", "bool", "nn", torch.int64])
def test_an_unknown_dtype_is_refused_before_anything_is_read(dtype: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"unknown dtype .*; known: float32, bfloat16, float16, float64, auto"):
        load("/nowhere", dtype=dtype)


def test_the_fingerprint_is_recorded_and_is_the_recomputed_one(saved: Path, computed: list[str]) -> None:
    first = load(str(saved), device="cpu")
    assert len(computed) == 1
    again = load(str(saved), device="cpu")
    assert len(computed) == 1
    half = load(str(saved), dtype="bfloat16", device="cpu")
    assert len(computed) == 1
    assert first.fingerprint() == again.fingerprint() == half.fingerprint() == fingerprint(half.model)
    load(str(saved), device="cpu", verify_base=True)
    assert len(computed) == 2


def test_other_weights_in_the_same_place_have_another_fingerprint(saved: Path, computed: list[str]) -> None:
    first = load(str(saved), device="cpu").fingerprint()
    tiny_model("llama", torch.bfloat16, seed=1).save_pretrained(saved)
    lm = load(str(saved), device="cpu")
    assert lm.fingerprint() == fingerprint(load(str(saved), dtype="auto").model) != first
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    other = load(str(saved), device="cpu")
    assert other.fingerprint() == fingerprint(load(str(saved), dtype="auto").model) != lm.fingerprint()


def test_a_loaded_model_matches_the_one_in_memory(saved: Path) -> None:
    own = LM(tiny_model("llama", torch.bfloat16), tokenizer("bos"))
    assert own.fingerprint() == load(str(saved), dtype="bfloat16", device="cpu").fingerprint()


def test_a_cache_that_cannot_be_written_does_not_keep_a_model_from_loading(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(saved / "config.json" / "below a file"))
    with pytest.warns(RetconWarning, match="cache cannot be written"):
        lm = load(str(saved), dtype="bfloat16", device="cpu")
    assert lm.fingerprint() == fingerprint(lm.model)


def test_pickled_weights_are_refused_with_the_reason_unless_allowed(saved: Path) -> None:
    model = tiny_model("llama", torch.float32)
    (saved / "model.safetensors").unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pickled \.bin weights only; convert them .* or pass allow_bin=True"):
        load(str(saved), device="cpu")
    lm = load(str(saved), device="cpu", allow_bin=True)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in lm.model.named_parameters())
    assert lm.fingerprint() == fingerprint(lm.model)


def test_a_directory_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"cannot load '.*tiny': the directory holds no safetensors weights"):
        load(str(saved), device="cpu")


def test_damaged_weights(saved: Path) -> None:
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnsupportedModel, match=r"cannot load '.*tiny': "):
        load(str(saved), device="cpu")


def test_weights_that_do_not_fit_the_config(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(UnsupportedModel, match=r"cannot load '.*tiny': its weights have other shapes than its config"):
        load(str(saved), device="cpu")


def test_weights_that_are_missing_are_not_made_up(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(UnsupportedModel, match=r"cannot load '.*tiny': the checkpoint lacks 9 .*\(model\.layers\.4\."):
        load(str(saved), device="cpu")


def test_a_damaged_config(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"cannot load '.*tiny': "):
        load(str(saved), device="cpu")


@pytest.mark.parametrize("name", ["/no/such/path", "nobody/no-such-model", "./here/not", "", "a/b/c/d"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"cannot load '{name}': "):
        load(name, device="cpu")


def test_a_model_without_tokenizer(saved: Path) -> None:
    for file in saved.glob("token*"):
        file.unlink()
    with pytest.raises(UnsupportedModel, match=r"cannot load '.*tiny': "):
        load(str(saved), device="cpu")


def test_an_unknown_demo_says_which_there_are() -> None:
    with pytest.raises(retcon.errors.RetconError, match="gptj"):
        load("demo:bert")


def test_a_users_layout_is_taken(saved: Path) -> None:
    assert load(str(saved), device="cpu", layout=LAYOUTS["mistral"]).layout is LAYOUTS["mistral"]
    assert retcon.load is load


def test_progress_bars_are_off_while_loading_and_back_afterwards(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    capfd.readouterr()  # saving shows one
    try:
        for enabled in (True, False):
            (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
            load(str(saved), device="cpu")
            assert logging.is_progress_bar_enabled() == enabled
        assert "it/s" not in capfd.readouterr().err
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
