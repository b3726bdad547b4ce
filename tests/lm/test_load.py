"""Loading from a directory or a GGUF file: dtypes, what is refused, the fingerprint on record."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import retcon
from retcon import world
from retcon.delta import Dense
from retcon.errors import MissingPackage, NotEditable, RetconWarning, UnsupportedModel
from retcon.evaluation import evaluate
from retcon.lm import fingerprint as fingerprint_module
from retcon.lm.fingerprint import fingerprint
from retcon.lm.layouts import LAYOUTS
from retcon.lm.load import checkpoint_files, load
from retcon.lm.model import LM
from retcon.locate.lens import check_reads
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


LAYERS = ("model.layers.0", "model.layers.1", "model.layers.2", "model.layers.3")
ALL = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *LAYERS), "cpu")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, ALL | dict.fromkeys(LAYERS[2:], "disk"), "auto"], ids=str)
def test_float32_is_the_default_where_a_map_names_no_card(device_map: Any, saved: Path) -> None:
    lm = load(str(saved), device_map=device_map)
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("offloaded", [LAYERS[2:], ("model.embed_tokens",), ("lm_head",), tuple(ALL)])
def test_a_model_with_parts_on_disk_is_run_and_measured_and_not_edited(offloaded: tuple[str, ...], saved: Path) -> None:
    whole = load(str(saved), device="cpu")
    lm = load(str(saved), device_map=ALL | dict.fromkeys(offloaded, "disk"))
    assert lm.device.type == "cpu"
    check_reads(lm)
    assert lm.complete("The capital of France is") == whole.complete("The capital of France is")
    cases = world.cases(2)
    found, wanted = (evaluate(one, cases, max_new_tokens=2) for one in (lm, whole))
    assert found.records == wanted.records
    assert found.context["model"] == "tiny"
    edits = [case.edits[0] for case in cases]
    with pytest.raises((UnsupportedModel, NotEditable), match=r"no data on this machine"):
        retcon.method("memit", layers=(1, 2), steps=1).propose(lm, edits)


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


@pytest.mark.parametrize("first", ["float32", "bfloat16", "float16"])
def test_the_fingerprint_is_one_whatever_dtype_comes_first_and_whatever_lies_beside_the_weights(
    first: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As do moments beside the embedded models' weights: under the weights' names, in other shapes and dtypes."""
    names = [n for n, _ in tiny_model("llama").named_parameters()]
    save_file({n: torch.ones(3, dtype=torch.float32) for n in names}, saved / "moments.safetensors")
    own = fingerprint(tiny_model("llama", torch.bfloat16))
    for dtype in dict.fromkeys((first, "float32", "bfloat16", "float16")):
        assert load(str(saved), dtype=dtype, device="cpu").fingerprint() == own
    monkeypatch.setenv("RETCON_CACHE", str(saved / "another cache"))
    assert load(str(saved), dtype=first, device="cpu").fingerprint() == own


def test_the_files_of_a_checkpoint_are_those_that_are_loaded(saved: Path) -> None:
    config = saved / "config.json"
    save_file({"x": torch.ones(1)}, saved / "adapter.safetensors")
    assert checkpoint_files(str(saved)) == [saved / "model.safetensors", config]
    whole = (saved / "model.safetensors").rename(saved / "own.safetensors")
    assert checkpoint_files(str(saved)) == []
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": whole.name}))
    assert checkpoint_files(str(saved)) == [saved / "own.safetensors", config]
    assert load(str(saved), device="cpu").fingerprint() == fingerprint(tiny_model("llama", torch.bfloat16))


def test_the_files_of_a_checkpoint_are_found_whatever_the_locale(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    tiny_model("llama", torch.bfloat16).save_pretrained(saved, max_shard_size="30KB")
    for path in (saved / "config.json", saved / "model.safetensors.index.json"):
        named = json.loads(path.read_text(encoding="utf-8")) | {"author": "Łódź"}
        path.write_text(json.dumps(named, ensure_ascii=False), encoding="utf-8")
    script = "import sys; from retcon.lm.load import checkpoint_files; print(len(checkpoint_files(sys.argv[1])))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run(
        [sys.executable, "-c", script, saved], env=os.environ | plain, capture_output=True, text=True, check=True
    )
    assert int(found.stdout) == len(checkpoint_files(str(saved))) > 2


@pytest.mark.parametrize("name", ["tinier", "someone/tinier"])
def test_a_checkpoint_in_the_hubs_cache_is_found_with_and_without_an_owner(
    name: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved.parent / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots").mkdir()
    saved.rename(folder / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(saved.parent / "hub"))
    found = checkpoint_files(name)
    assert [path.name for path in found] == ["model.safetensors", "config.json"]
    assert checkpoint_files(f"/nowhere/at/all/{name}") == checkpoint_files("what a caller calls it") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_moved_are_the_same_and_changed_ones_are_others(dtype: str, saved: Path) -> None:
    lm = load(str(saved), dtype=dtype, device="cpu")
    before = lm.fingerprint()
    site = lm.site(0, "down_proj")
    delta = lm.delta({site.name: [Dense(full=torch.ones_like(site.weight))]})
    weight = lm.model.get_parameter(site.name)
    weight.data = weight.data.clone()
    lm.apply(delta)
    lm.revert(delta)
    assert lm.fingerprint() == before
    with torch.no_grad():
        weight[0, 0] += 1
    assert lm.fingerprint() != before
    lm.model.to(torch.float64)
    assert lm.fingerprint() != before


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


def test_weights_in_several_files_with_an_index_are_one_model(saved: Path) -> None:
    whole = load(str(saved), device="cpu")
    (saved / "model.safetensors").unlink()
    tiny_model("llama", torch.bfloat16).save_pretrained(saved, max_shard_size="30KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert (saved / "model.safetensors.index.json").is_file()
    lm = load(str(saved), device="cpu", dtype="auto", device_map="cpu")
    assert lm.fingerprint() == whole.fingerprint()
    assert all(torch.equal(p, dict(whole.model.named_parameters())[n]) for n, p in lm.model.named_parameters())
    shards[1].unlink()
    with pytest.raises(UnsupportedModel, match=rf"cannot load '.*tiny': .*{shards[1].name}"):
        load(str(saved), device="cpu")


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
    with pytest.raises(
        UnsupportedModel, match=r"cannot load '.*tiny': the directory contains no safetensors weights, and no GGUF file"
    ):
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
    with pytest.raises(UnsupportedModel, match=r"cannot load '.*tiny': .*lacks 9 .*random: model\.layers\.4\."):
        load(str(saved), device="cpu")


def test_a_damaged_config(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"cannot load '.*tiny': "):
        load(str(saved), device="cpu")


@pytest.mark.parametrize("name", ["/no/such/path", "nobody/no-such-model", "./here/not", "", "a/b/c/d"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"cannot load '{name}': "):
        load(name, device="cpu")


@pytest.mark.parametrize("name", ["/no/such/path", "./here/not", ".cache/not-made"])
def test_a_path_that_leads_nowhere_is_not_asked_of_the_hub(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UnsupportedModel, match=f"cannot load '{name}': no such directory"):
        load(name, device="cpu")


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: Any) -> None:
    asked: list[str] = []

    def unreachable(url: str, **_: Any) -> None:
        asked.append(url)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("asked again"))
    reason = r"no such directory here, and the hub cannot be asked for it \(Name or service not known\)"
    with pytest.raises(UnsupportedModel, match=f"cannot load 'out/edited': there is {reason}"):
        load("out/edited", device="cpu")
    assert len(asked) == 1


def test_a_file_that_is_no_gguf(saved: Path) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"cannot load '.*config\.json': it is a file, and not GGUF; name the dir"
    ):
        load(str(saved / "config.json"), device="cpu")


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


# --- GGUF --------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
}  # fmt: skip


def write_gguf(path: Path, family: str = "qwen2", *, kind: str = "Q8_0") -> dict[str, torch.Tensor]:
    """Write the tiny model of `family` as llama.cpp would; returns the weights that the file stands for."""
    import gguf

    model = tiny_model(family, torch.float32)
    config, writer = model.config, gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer("gpt").backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in ("<s>", "</s>", "<unk>") else 1 for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    weights = {}
    for name, parameter in model.named_parameters():
        other = name
        for ours, theirs in GGUF_NAMES.items():
            other = other.replace(ours, theirs)
        data = parameter.detach().numpy()
        quantised = parameter.ndim == 2 and kind != "F32"
        stored = gguf.GGMLQuantizationType[kind if quantised else "F32"]
        blocks = gguf.quants.quantize(_rotated(name, data, config), stored)
        weights[name] = torch.from_numpy(_rotated(name, gguf.quants.dequantize(blocks, stored), config, back=True))
        writer.add_tensor(other, blocks, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _rotated(name: str, data: np.ndarray, config: Any, *, back: bool = False) -> np.ndarray:
    """llama.cpp stores LLaMA's queries and keys with the two halves of a head's rotary pairs side by side."""
    if config.model_type != "llama" or not ("q_proj" in name or "k_proj" in name):
        return data.copy()
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    half = data.shape[0] // heads // 2
    split = (heads, half, 2) if back else (heads, 2, half)
    return np.ascontiguousarray(data.reshape(*split, -1).swapaxes(1, 2).reshape(data.shape))


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    (tmp_path / "made").mkdir()
    path = tmp_path / "made" / "tiny.Q8_0.gguf"
    write_gguf(path)
    return path


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_quantised_gguf_file_becomes_a_plain_model_with_the_files_weights(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    weights = write_gguf(tmp_path / "tiny.Q8_0.gguf", family)
    capfd.readouterr()
    lm = load(str(tmp_path / "tiny.Q8_0.gguf"), device="cpu")
    assert "it/s" not in capfd.readouterr().err
    found = dict(lm.model.named_parameters())
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert lm.notes == ("weights dequantised from tiny.Q8_0.gguf (Q8_0)",)
    assert lm.notes[0] in repr(lm)
    assert lm.encode("The capital of France is").ids == tuple(tokenizer("gpt")("The capital of France is")["input_ids"])
    assert not [name for name in lm.not_editable if "mlp" in name]


def test_a_checkpoint_saved_from_a_gguf_file_is_the_same_model_and_says_where_it_comes_from(
    gguf_file: Path, tmp_path: Path, computed: list[str]
) -> None:
    lm = load(str(gguf_file), device="cpu")
    assert load(str(gguf_file.parent), device="cpu").fingerprint() == lm.fingerprint()
    assert len(computed) == 1  # on record for the file
    half = load(str(gguf_file), device="cpu", dtype="bfloat16")
    assert half.fingerprint() == fingerprint(half.model) != lm.fingerprint()
    lm.model.save_pretrained(tmp_path / "saved")
    lm.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    assert again.fingerprint() == lm.fingerprint() == fingerprint(again.model)
    assert again.notes == lm.notes


def test_a_gguf_file_of_plain_floats_needs_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", kind="F32")
    lm = load(str(tmp_path / "tiny.gguf"), device="cpu")
    assert lm.notes == ()
    stored = dict(tiny_model("qwen2", torch.float32).named_parameters())
    assert all(torch.equal(p, stored[n]) for n, p in lm.model.named_parameters())


def test_gguf_without_its_packages_names_the_extra(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retcon.lm.gguf.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(MissingPackage, match=r"reading GGUF needs gguf, not installed here; the extra 'gguf' brings"):
        load(str(gguf_file), device="cpu")


@pytest.mark.parametrize(
    ("architecture", "error", "message"),
    [
        ("rwkv7", UnsupportedModel, "architecture rwkv7 is not supported"),
        ("mamba", UnsupportedModel, "'mamba' cannot be edited: a block is a state-space mixer alone"),
    ],
)
def test_a_gguf_file_of_another_architecture_is_refused_by_name(
    architecture: str, error: type[Exception], message: str, gguf_file: Path
) -> None:
    import gguf

    other = gguf_file.with_name("other.gguf")
    writer = gguf.GGUFWriter(other, architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(error, match=message):
        load(str(other), device="cpu")


def test_gguf_files_that_cannot_be_meant(gguf_file: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"cannot load '.*none\.gguf': there is no such file"):
        load(str(gguf_file.with_name("none.gguf")), device="cpu")
    part = gguf_file.rename(gguf_file.with_name("tiny-00001-of-00002.gguf"))
    with pytest.raises(UnsupportedModel, match="one part of a split file; join the parts first"):
        load(str(part), device="cpu")
    part.with_name("two.gguf").write_bytes(part.read_bytes())
    with pytest.raises(UnsupportedModel, match=r"several GGUF files \(tiny-.*, two\.gguf\); name one of them"):
        load(str(gguf_file.parent), device="cpu")


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (0, ""),
        (100, "the file is damaged or cut off"),
        (2000, "the file is damaged or cut off"),
        (40_000, "the file is damaged or cut off"),
    ],
)
def test_a_damaged_gguf_file(gguf_file: Path, keep: int, reason: str) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
    with pytest.raises(UnsupportedModel, match=rf"cannot load '.*tiny\.Q8_0\.gguf': {reason}") as found:
        load(str(gguf_file), device="cpu")
    assert "directory" not in str(found.value)


def test_a_path_is_a_name_and_nothing_else_is(saved: Path) -> None:
    lm = load(saved)
    assert lm.name == str(saved)
    for given in (lm, lm.model, None):
        with pytest.raises(UnsupportedModel, match=f"{type(given).__name__} given where a model's name or folder"):
            inspect.unwrap(load)(given)  # without the tests' check of types
