"""Quantised checkpoints: dequantised at load, edited, saved as plain ones; what cannot be is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retcon.edits import Edit
from retcon.errors import MissingPackage, UnsupportedModel
from retcon.export import export
from retcon.lm import quantised
from retcon.lm.load import load, load_plain
from retcon.memory.contexts import Contexts
from retcon.methods.memit import Memit
from tests.conftest import random_moments, tiny_model, tokenizer

LINEAR = ("_proj.weight",)
IDS = torch.tensor([[5, 9, 31, 77, 200, 3]])
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*larger than the weight", "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore::UserWarning",
    "ignore::DeprecationWarning",
)  # fmt: skip


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny llama with its tokenizer."""
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def packed(plain: Path, method: str) -> dict[str, torch.Tensor]:
    """Quantise the checkpoint in place; return the weights that it then stands for."""
    stored, wanted = load_file(plain / "model.safetensors"), {}
    for name in [n for n in stored if n.endswith(LINEAR)]:
        weight = stored.pop(name)
        if method == "compressed-tensors":
            scale = weight.abs().amax(1, keepdim=True) / 127
            stored[name] = (weight / scale).round().to(torch.int8)
            stored[f"{name}_scale"] = scale
            wanted[name] = stored[name].float() * scale
        else:
            blocks = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))  # (rows / 16, 16, columns / 16, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            scaled = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name] = scaled.flatten(2, 3).flatten(0, 1)
            stored[f"{name}_scale_inv"] = scale
            wanted[name] = (scaled.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    save_file(stored, plain / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    settings: dict[str, dict[str, Any]] = {
        "compressed-tensors": {
            "format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
        "fp8": {"weight_block_size": [16, 16], "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]},
    }  # fmt: skip
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings[method]}
    (plain / "config.json").write_text(json.dumps(config))
    return wanted


def test_a_bitnet_checkpoint_of_floats_says_what_rounds_them(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "quantization_mode": "online"}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"rounds to -1, 0 and 1 in every pass.*remove quantization_config from"):
        load(str(plain), device="cpu")


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_a_packed_checkpoint_becomes_a_plain_model_with_the_weights_it_stands_for(method: str, plain: Path) -> None:
    wanted = packed(plain, method)
    lm = load(str(plain), device="cpu")
    assert len(wanted) == 4 * 7
    for name, weight in wanted.items():
        torch.testing.assert_close(lm.parameter(name).detach(), weight, rtol=0.01 if method == "fp8" else 1e-6, atol=0)
        assert name not in lm.not_editable
    assert lm.notes == (f"weights dequantised from {method} weights",)
    assert lm.dtype == torch.float32
    lm.model.save_pretrained(plain.parent / "saved")
    tokenizer().save_pretrained(plain.parent / "saved")
    again = load(str(plain.parent / "saved"), device="cpu")
    assert again.notes == lm.notes
    assert all(torch.equal(p, lm.parameter(n)) for n, p in again.model.named_parameters())


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The values of four bits in mxfp4; groups of 32 inputs share a power of two."""


@pytest.mark.filterwarnings("ignore:.*attn_output")
def test_experts_packed_in_mxfp4_become_floats(plain: Path) -> None:
    tiny_model("gpt_oss", torch.float32).save_pretrained(plain)
    stored, wanted = load_file(plain / "model.safetensors"), {}
    for name in [n for n in stored if n.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        groups = stored.pop(name).mT.unflatten(2, (-1, 32))  # (experts, out, in / 32, 32)
        exponent = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
        codes = ((groups / 2**exponent)[..., None] - FP4).abs().argmin(-1)
        stored[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = (exponent.squeeze(-1) + 127).to(torch.uint8)
        wanted[name] = (FP4[codes] * 2**exponent).flatten(2).mT
    save_file({n: t.contiguous() for n, t in stored.items()}, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (plain / "config.json").write_text(json.dumps(config))
    lm = load(str(plain), device="cpu")
    assert lm.notes == ("weights dequantised from mxfp4 weights",)
    assert len(wanted) == 2 * lm.n_layers
    for name, weight in wanted.items():
        assert torch.equal(lm.parameter(name).detach(), weight)
        assert name not in lm.not_editable
    lm.model.save_pretrained(plain.parent / "saved")
    tokenizer().save_pretrained(plain.parent / "saved")
    again = load(str(plain.parent / "saved"), device="cpu")
    assert all(torch.equal(p, lm.parameter(n)) for n, p in again.model.named_parameters())


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.long)])
def test_a_bitsandbytes_checkpoint_is_edited_and_the_edit_fits_it_as_an_adapter(
    bits: int, plain: Path, tiny: Callable[..., Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"load_in_8bit": True} if bits == 8 else {
        "load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32
    }  # fmt: skip
    given = BitsAndBytesConfig(**settings)
    wide = tiny_model("llama", torch.float32, hidden_size=64, head_dim=16, intermediate_size=128)
    wide.save_pretrained(plain)  # the kernel wants a block of 64 values in every row
    folder = plain.parent / "packed"
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=given, dtype=torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    lm = load(str(folder), device="cpu")
    assert lm.notes == (f"weights dequantised from bitsandbytes {bits}-bit weights",)
    before = load(str(plain), device="cpu").site(1, "down_proj").weight
    assert 0 < float((lm.site(1, "down_proj").weight - before).norm() / before.norm()) < 0.2
    method = Memit(layers=(0, 1), moment_weight=1.0, clamp=8.0, weight_decay=0.0, steps=6)
    edits = [Edit("You know {}", "France", "Rome", id="france")]
    lm.apply(method.propose(lm, edits, contexts=Contexts(("I read. ",)), moments=random_moments(lm)))
    with torch.no_grad():
        edited = lm.model(IDS).logits
    export(lm, plain.parent / "hf", format="hf")
    with torch.no_grad():
        assert torch.equal(load_plain(plain.parent / "hf", dtype=torch.float32)(IDS).logits, edited)
    export(lm, plain.parent / "adapter", format="peft", rank="max")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert base.is_quantized
    beside = PeftModel.from_pretrained(base, plain.parent / "adapter")
    with torch.no_grad():
        found = beside(IDS).logits
    assert float((found - edited).abs().max()) <= 0.05 * float(edited.abs().max())  # the kernels round too


def test_what_cannot_be_dequantised_is_refused_by_name_before_weights_are_read(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (plain / "config.json").write_text(json.dumps(config))
    (plain / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(
        UnsupportedModel, match=r"quantised by gptq, which cannot be dequantised here .*take the unquan"
    ):
        load(str(plain), device="cpu")


def test_torchao_is_asked_for_by_name(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"torchao weights needs torchao, not installed here; pip install torchao"):
        load(str(plain), device="cpu")


def test_a_missing_package_is_named_with_the_extra(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(plain, "compressed-tensors")
    monkeypatch.setattr(quantised, "find_spec", lambda name: None if name == "compressed_tensors" else object())
    with pytest.raises(MissingPackage, match=r"needs compressed_tensors, not installed here; the extra 'quantised'"):
        load(str(plain), device="cpu")


def test_a_family_with_its_own_linear_layers_is_turned_back_and_cannot_stay_packed(plain: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("gpt2", torch.float32).save_pretrained(plain)
    folder = plain.parent / "packed"
    given = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=given, dtype=torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    before, lm = load(str(plain), device="cpu"), load(str(folder), device="cpu")
    site, old = lm.site(1, "down_proj"), before.site(1, "down_proj")
    assert type(site.module) is type(old.module)
    assert 0 < float((site.weight - old.weight).norm() / old.weight.norm()) < 0.02
    with torch.no_grad():
        found, wanted = lm.model(IDS).logits, before.model(IDS).logits
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    with pytest.raises(UnsupportedModel, match=r"bitsandbytes turns the matrices of gpt2 round.*leave packed=True out"):
        load(str(folder), device="cpu", packed=True)
