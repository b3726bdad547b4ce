"""What a model's identity depends on, what it does not, and the cache beside it."""

import itertools
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from retcon import checked
from retcon.errors import RetconWarning, UnsupportedModel
from retcon.lm import fingerprint as module
from retcon.lm.fingerprint import StoredTensors, checkpoint_fingerprint, fingerprint
from tests.conftest import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_twice_is_the_same(family: str) -> None:
    assert fingerprint(tiny_model(family)) == fingerprint(tiny_model(family))
    assert fingerprint(tiny_model(family)) != fingerprint(tiny_model(family, seed=1))


def test_every_tensor_counts_to_the_last_bit() -> None:
    model = tiny_model("llama", torch.float32)
    found = {fingerprint(model)}
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        old = flat[-1].clone()
        flat[-1] = torch.nextafter(old, old + 1)
        found.add(fingerprint(model))
        flat[-1] = old
    assert len(found) == 1 + len(list(model.parameters()))
    assert fingerprint(model) in found


def test_minus_zero_counts_and_nan_is_itself() -> None:
    model = tiny_model("gptj", torch.float32)
    bias = model.transformer.h[0].mlp.fc_out.bias.data
    prints = []
    for value in (0.0, -0.0, torch.nan, torch.nan):
        bias[0] = value
        prints.append(fingerprint(model))
    assert len(set(prints)) == 3
    assert prints[2] == prints[3]


def test_dtype_counts() -> None:
    assert len({fingerprint(tiny_model("gptj", d)) for d in (torch.float32, torch.float16, torch.bfloat16)}) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rms_norm_eps", 0.1),
        ("num_key_value_heads", 4),
        ("hidden_act", "relu"),
        ("rope_parameters", {"rope_theta": 5.0}),
    ],
)
def test_settings_that_change_what_the_model_computes_count(name: str, value: Any) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    setattr(model.config, name, value)
    assert fingerprint(model) != before


def test_settings_that_do_not_are_left_out() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    model.config._attn_implementation = "eager"
    for name, value in {
        "_name_or_path": "/elsewhere", "transformers_version": "9", "use_cache": False, "architectures": ["X"],
        "output_hidden_states": True, "output_attentions": True, "return_dict": False, "pad_token_id": 7,
        "bos_token_id": 5, "eos_token_id": [1, 2], "id2label": {0: "x"}, "problem_type": None,
    }.items():  # fmt: skip
        setattr(model.config, name, value)
    model.train()
    model.requires_grad_(False)
    assert fingerprint(model) == before


def test_a_new_setting_of_a_later_transformers_at_its_default_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before, full = fingerprint(model), type(model.config).to_dict
    monkeypatch.setattr(type(model.config), "to_dict", lambda self: full(self) | {"brand_new": 0})
    assert "brand_new" in model.config.to_dict()
    assert fingerprint(model) == before


def test_a_saved_and_reloaded_model_is_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for family in ("llama", "gpt2", "gemma2", "opt"):
        model = tiny_model(family, torch.float32)
        model.save_pretrained(tmp_path / family)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32)
        assert fingerprint(again) == fingerprint(model)


def test_a_model_without_data_has_none() -> None:
    model = tiny_model("llama").to("meta")
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight has no data on this machine .* nothing is offloaded"):
        fingerprint(model)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_is_the_same_in_whatever_dtype_it_is_loaded(
    family: str, stored: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model(family, stored).save_pretrained(tmp_path)
    files = StoredTensors(tmp_path.glob("*.safetensors"))
    found = {
        fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), files)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    }
    assert found == {fingerprint(tiny_model(family, stored))}


def test_a_weight_that_is_not_what_the_checkpoint_stores_counts_as_it_is_stored_or_held(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float16)
    model.save_pretrained(tmp_path)
    stored = StoredTensors(tmp_path.glob("*.safetensors"))
    before = fingerprint(model, stored)
    model.model.norm.weight.data[0] += 1  # same dtype: what the model holds is what counts
    assert fingerprint(model, stored) != before


def test_a_tensor_of_another_shape_under_a_weights_name_is_not_that_weight(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float16)
    model.save_pretrained(tmp_path)
    tensors = {"model.norm.weight": torch.ones(3), "lm_head.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    stored = StoredTensors([tmp_path / "model.safetensors", tmp_path / "other.safetensors"])
    assert stored.find(["model.norm.weight"], model.model.norm.weight.shape) is None
    assert fingerprint(model, stored) == fingerprint(model)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_weights_under_other_names_count_in_the_dtype_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    """Older GPT-2 checkpoints are of the bare decoder; experts are stored one by one, and held as one tensor."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(family, torch.bfloat16)
    (model.transformer if family == "gpt2" else model).save_pretrained(tmp_path)
    stored = StoredTensors(tmp_path.glob("*.safetensors"))
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if family == "gpt2" else [])):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert fingerprint(again, stored) == fingerprint(model)


def test_whole_numbers_beside_the_weights_do_not_hide_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("mixtral", torch.bfloat16)
    model.save_pretrained(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    counts = tmp_path / "counts.safetensors"
    save_file({"counts": torch.arange(3), "on": torch.ones(2, dtype=torch.bool)}, counts, metadata={"format": "pt"})
    stored = StoredTensors([*files, counts])
    assert stored.common_dtype == torch.bfloat16
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert fingerprint(again, stored) == fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_changed_value_counts_in_whatever_dtype_the_checkpoint_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(tmp_path)
    stored = StoredTensors(tmp_path.glob("*.safetensors"))
    own, held = fingerprint(model), model.to(dtype)
    assert fingerprint(held, stored) == own
    weight = held.model.norm.weight.data
    kept = weight[0].clone()
    weight[0] = torch.nextafter(kept, torch.tensor(9, dtype=dtype))
    assert fingerprint(held, stored) != own
    weight[0] = kept
    assert fingerprint(held, stored) == own
    (tmp_path / "model.safetensors").unlink()
    assert (fingerprint(held, stored) == own) == (dtype == torch.float32)  # what was narrowed cannot be read again


def test_pieces_of_a_tensor_are_hashed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1000)
    one = fingerprint(tiny_model("llama", torch.float32))
    assert one == fingerprint(tiny_model("llama", torch.float32))
    other = tiny_model("llama", torch.float32)
    weight = other.model.embed_tokens.weight.data.view(-1)
    weight[:250], weight[250:500] = weight[250:500].clone(), weight[:250].clone()
    assert one != fingerprint(other)


def test_several_tensors_are_hashed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most are a piece or two: by themselves they leave all threads but one or two idle."""
    model = tiny_model("llama", torch.float32)
    wanted, alone, met = fingerprint(model), module._digest, threading.Barrier(4)

    def meeting(piece: memoryview) -> bytes:
        if not met.broken and next(calls) < 4:
            met.wait(timeout=20)
        return alone(piece)

    calls = itertools.count()
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(module, "_digest", meeting)
    assert fingerprint(model) == wanted
    assert not met.broken


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    return [tmp_path / "model.safetensors", tmp_path / "config.json"]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fingerprints worked out, not read from the cache."""
    calls: list[str] = []

    def counting(model: Any, stored: Any = None) -> str:
        calls.append(f"value{len(calls)}")
        return calls[-1]

    monkeypatch.setattr(module, "fingerprint", counting)
    return calls


MODEL = torch.nn.Linear(1, 1)
"""Stands in for a model whose fingerprint is counted, not worked out."""


def test_a_fingerprint_is_worked_out_once_per_state_of_the_files(
    files: list[Path], computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(**options: bool) -> str:
        return checkpoint_fingerprint(MODEL, files, **options)

    assert [ask(), ask()] == ["value0", "value0"]
    assert [ask(verify=True), ask()] == ["value1", "value1"]
    assert checkpoint_fingerprint(MODEL, files[::-1]) == "value1"
    monkeypatch.setattr(module, "version", lambda name: f"{name} 99")
    assert ask() == "value2"


def test_a_fingerprint_that_depends_on_the_dtype_loaded_is_kept_for_that_dtype(files: list[Path]) -> None:
    model, stored = tiny_model("llama", torch.float32), StoredTensors(files[:1])
    whole = checkpoint_fingerprint(model, files, stored)
    assert checkpoint_fingerprint(model.to(torch.bfloat16), files, StoredTensors([])) == whole  # from the cache
    other = [files[0], files[0].parent / "more.json"]
    other[1].write_text("{}")
    found = {checkpoint_fingerprint(model.to(d), other, StoredTensors([])) for d in (torch.float16, torch.bfloat16)}
    assert len(found) == 2


def test_a_checkpoint_that_was_exchanged_with_size_and_time_kept_is_noticed(
    files: list[Path], computed: list[str], tmp_path: Path
) -> None:
    path = files[0]
    assert checkpoint_fingerprint(MODEL, files) == "value0"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    other = bytearray(path.read_bytes())
    other[len(other) // 2] ^= 1
    path.write_bytes(other)
    os.utime(path, ns=times)  # as `cp -p` and `rsync -t` do
    assert path.stat().st_mtime_ns == times[1]
    assert checkpoint_fingerprint(MODEL, files) == "value1"


@pytest.mark.parametrize("content", [b"", b"{", b"flipped"])
def test_a_damaged_record_is_worked_out_again(content: bytes, files: list[Path], computed: list[str]) -> None:
    checkpoint_fingerprint(MODEL, files)
    (record,) = (files[0].parent / "cache" / "fingerprints").iterdir()
    record.write_bytes(content if content != b"flipped" else record.read_bytes().replace(b"value0", b"value9"))
    with pytest.warns(RetconWarning, match=record.name):
        assert checkpoint_fingerprint(MODEL, files) == "value1"
    assert checkpoint_fingerprint(MODEL, files) == "value1"


def test_a_cache_that_cannot_be_written_does_not_matter(
    files: list[Path], computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(files[0] / "under a file"))
    checked._warned.clear()
    with pytest.warns(RetconWarning, match="cache cannot be written"):
        assert checkpoint_fingerprint(MODEL, files) == "value0"
