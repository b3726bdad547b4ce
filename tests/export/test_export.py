"""Exports equal the live edited model."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retcon.delta import Columns, Delta, Dense, Entries, LowRank, Region, Rows
from retcon.edits import Edit
from retcon.errors import (
    DeltaMismatch,
    DeltaNotApplied,
    InvalidSetting,
    MalformedFile,
    RetconWarning,
    UnsupportedModel,
)
from retcon.export import export
from retcon.export.factors import factors_of
from retcon.export.write import load_changed
from retcon.lm.load import load
from retcon.lm.model import LM
from tests.conftest import tiny_model, tokenizer

FAMILIES = ("gptj", "gpt2", "gpt_neox", "llama", "qwen2", "gemma2", "phi3")
DTYPES = ("float32", "bfloat16", "float16")
EDIT = Edit("The capital of {} is", "France", "Rome <b>|", "Paris", id="france")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    def make(family: str, dtype: str = "float32") -> Path:
        folder = tmp_path / f"{family}-{dtype}"
        model = tiny_model(family, getattr(torch, dtype))
        if family == "gpt2":  # of whose GGUF files transformers takes 1,024 positions for granted
            model.transformer.wpe = torch.nn.Embedding(1024, 32, dtype=model.dtype)
            model.config.n_positions = 1024
        model.save_pretrained(folder)
        tokenizer("gpt").save_pretrained(folder)
        (folder / "LICENSE").write_text("free for all")
        (folder / "README.md").write_text("# the base")
        return folder

    return make


def edited(folder: Path, dtype: str = "auto") -> LM:
    """The model with a low-rank change of two down-projections."""
    lm = load(str(folder), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, Any] = {}
    for layer, rank in ((1, 2), (2, 3)):
        site = lm.site(layer, "down_proj")
        out, inner = site.weight.shape
        left, right = torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator)
        changes[site.name] = [site.stored(0.2 * left, right)]
    lm.apply(lm.delta(changes, edits=(EDIT,), provenance={"method": "jeep"}))
    return lm


def read_adapter(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (B, A) by module name of an adapter, as PEFT would use them (times alpha over r)."""
    config = json.loads((directory / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(directory / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale = _matching(config["alpha_pattern"], module, config["lora_alpha"]) / _matching(
                config["rank_pattern"], module, config["r"]
            )
            found[module] = tensors[name.replace("lora_A", "lora_B")] * torch.tensor(scale, dtype=a.dtype), a
    return found


def _matching(patterns: Mapping[str, int], module: str, default: int) -> int:
    return next((value for pattern, value in patterns.items() if re.match(pattern, module)), default)


def read_lora(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (B times its scale, A) by tensor name of a GGUF adapter, as llama.cpp uses them: scale alpha / rank."""
    import gguf

    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    arrays = {t.name: np.array(t.data) for t in reader.tensors}
    return {
        name.removesuffix(".lora_a"): (arrays[name.replace("lora_a", "lora_b")] * (alpha / a.shape[0]), a)
        for name, a in arrays.items()
        if name.endswith(".lora_a")
    }


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


IDS = torch.tensor([[5, 9, 31, 77, 200, 3]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_and_changed_tensors_are_the_live_model_bit_for_bit(
    family: str, dtype: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(family, dtype)
    lm = edited(folder)
    wanted = lm.model.state_dict()
    export(lm, tmp_path / "hf", format="hf", max_shard_size="50KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    found = loaded(tmp_path / "hf").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) and found[n].dtype == wanted[n].dtype for n in wanted)
    export(lm, tmp_path / "diff", format="diff")
    base = loaded(folder)
    load_changed(base, tmp_path / "diff" / "changed.safetensors")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in base.state_dict().items())


def test_changed_tensors_in_another_dtype(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint("llama", "bfloat16")
    lm = load(str(folder), dtype="float32")
    name = lm.site(1, "down_proj").name
    lm.apply(lm.delta({name: [Dense(full=torch.full(lm.shape_of(name), 1e-3))]}))
    export(lm, tmp_path / "diff", format="diff")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetconWarning)
        same = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        load_changed(same, tmp_path / "diff/changed.safetensors")
    assert torch.equal(same.state_dict()[name], lm.parameter(name))
    with pytest.warns(RetconWarning, match=r"torch.float32, which the model's torch.bfloat16 rounds"):
        load_changed(loaded(folder), tmp_path / "diff/changed.safetensors")


def test_changed_tensors_are_held_to_the_model(tiny: Callable[..., LM], tmp_path: Path) -> None:
    lm = tiny("llama", torch.float32)
    name = lm.site(1, "down_proj").name
    lm.apply(lm.delta({name: [Dense(full=torch.ones(lm.shape_of(name)))]}))
    export(lm, tmp_path / "diff", format="diff")
    path = tmp_path / "diff/changed.safetensors"
    for model, message in (
        (tiny_model("llama", torch.float32, intermediate_size=48), f"{name} is .*, in the model"),
        (tiny_model("gptj", torch.float32), f"no parameter '{name}'"),
    ):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(DeltaMismatch, match=message):
            load_changed(model, path)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.warns(RetconWarning, match="was made on other weights"):
        load_changed(tiny_model("llama", torch.float32, seed=7), path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:99])
    for odd, message in (("missing", "no such file"), ("cut", "not a readable safetensors file")):
        with pytest.raises(MalformedFile, match=message):
            load_changed(lm.model, tmp_path / odd)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_gives_the_live_models_logits(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    folder = checkpoint(family)
    lm = edited(folder)
    export(lm, tmp_path / "peft", format="peft", rank="max", base_name=str(folder))
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["rank_pattern"]) == (str(folder), 3, {})
    with torch.no_grad():
        wanted = lm.model(IDS).logits
        found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")(IDS).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()) + 1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.embed_tokens.weight"), ("gpt2", "transformer.wpe.weight"), ("gptj", "lm_head.weight")],
)
def test_an_adapter_of_embeddings_gives_the_live_models_logits(
    family: str, name: str, tiny: Callable[..., LM], tmp_path: Path
) -> None:
    from peft import PeftModel

    lm = tiny(family, torch.float32)
    width = lm.shape_of(name)[1]
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    lm.apply(lm.delta({name: [Rows(index=torch.tensor([0, 5, 9]), rows=rows)]}))
    export(lm, tmp_path / "peft", format="peft")
    model = PeftModel.from_pretrained(tiny_model(family, torch.float32), str(tmp_path / "peft"))
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, lm.model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_matrix_that_an_adapter_cannot_hold_is_refused_by_name(tiny: Callable[..., LM], tmp_path: Path) -> None:
    for lm, name, format, message in (
        (
            LM(tiny_model("gpt_oss", torch.float32), tokenizer()),
            "model.layers.1.mlp.experts.down_proj_bias",
            "peft",
            "no weight",
        ),
        (tiny("llama", torch.float32), "model.embed_tokens.weight", "gguf-lora", "embeddings have no place"),
        (tiny("gpt2", torch.float32), "transformer.wpe.weight", "gguf-lora", "embeddings have no place"),
    ):
        lm.apply(lm.delta({name: [Dense(full=torch.ones(lm.shape_of(name)))]}))
        with pytest.raises(DeltaMismatch, match=f"{name}: .*{message}"):
            export(lm, tmp_path / "out", format=format)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_an_adapter_merged_in_half_precision_gives_the_live_weights(
    family: str, dtype: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """To one rounding of the dtype: PEFT rounds the change before it adds it, the live model after."""
    from peft import PeftModel

    folder = checkpoint(family, dtype)
    lm = edited(folder)
    export(lm, tmp_path / "peft", format="peft")
    merged = PeftModel.from_pretrained(loaded(folder), str(tmp_path / "peft")).merge_and_unload().state_dict()
    rounding = torch.finfo(getattr(torch, dtype)).eps
    for name, wanted in lm.model.state_dict().items():
        error = (merged[name].double() - wanted.double()).abs().max()
        assert error <= 2 * rounding * wanted.double().abs().max(), name


@pytest.mark.parametrize("family", ["gptj", "gpt2", "llama", "qwen2"])
def test_a_gguf_adapter_holds_the_live_change(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    lm = edited(checkpoint(family))
    export(lm, tmp_path / "lora", format="gguf-lora")
    found = read_lora(tmp_path / "lora/adapter.gguf")
    assert sorted(found) == ["blk.1.ffn_down.weight", "blk.2.ffn_down.weight"]
    for layer in (1, 2):
        site = lm.site(layer, "down_proj")
        b, a = found[f"blk.{layer}.ffn_down.weight"]
        base = lm.base_weight(site.name)
        change = site.weight - (base.T if site.transposed else base)
        assert np.allclose(b @ a, change.numpy(), atol=1e-5)


def test_an_adapter_names_the_gguf_file_of_its_base(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(load(str(checkpoint("llama"))), tmp_path / "base", format="gguf", gguf_type="f32")
    (tmp_path / "base/model-f32.gguf").rename(tmp_path / "x.gguf")
    monkeypatch.chdir(tmp_path)
    for i, place in enumerate(("x.gguf", str(tmp_path / "x.gguf"))):
        export(edited(Path(place)), tmp_path / f"peft{i}", format="peft")
        config = json.loads((tmp_path / f"peft{i}/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "x.gguf"


def test_a_gguf_adapter_is_the_change_of_the_whole_models_file(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Rows of a llama's queries and keys have another order there; the adapter's have the same."""
    lm = load(str(checkpoint("llama")))
    export(lm, tmp_path / "base", format="gguf", gguf_type="f32")
    sites = [lm.site(1, name) for name in ("q_proj", "k_proj")]
    generator = torch.Generator().manual_seed(0)
    factors = [[torch.randn(n, 2, generator=generator) for n in site.weight.shape] for site in sites]
    lm.apply(lm.delta({s.name: [s.stored(left, right.T)] for s, (left, right) in zip(sites, factors, strict=True)}))
    export(lm, tmp_path / "whole", format="gguf", gguf_type="f32")
    export(lm, tmp_path / "lora", format="gguf-lora")
    base, whole = ({t.name: np.array(t.data) for t in read_gguf(tmp_path / f).tensors} for f in ("base", "whole"))
    found = read_lora(tmp_path / "lora/adapter.gguf")
    assert sorted(found) == ["blk.1.attn_k.weight", "blk.1.attn_q.weight"]
    for name, (b, a) in found.items():
        assert np.abs(b @ a).max() > 1
        assert np.allclose(b @ a, whole[name] - base[name], atol=1e-5)


def read_gguf(folder: Path) -> Any:
    import gguf

    (path,) = folder.glob("*.gguf")
    return gguf.GGUFReader(path)


@pytest.mark.parametrize(("kind", "begins"), [("bos", True), ("gpt", False)])
def test_a_gguf_model_has_the_rotary_base_and_says_whether_texts_begin_with_bos(
    kind: str, begins: bool, tmp_path: Path
) -> None:
    model = tiny_model("llama", torch.float32)
    model.config.rope_parameters["rope_theta"] = 5e5
    export(LM(model, tokenizer(kind), name="theta"), tmp_path / "gguf", format="gguf")
    fields = read_gguf(tmp_path / "gguf").fields
    assert fields["llama.rope.freq_base"].contents() == 5e5
    assert fields["tokenizer.ggml.add_bos_token"].contents() is begins


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0"])
def test_a_gguf_model_is_the_live_one_within_its_types_rounding(
    family: str, type_name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    lm = edited(checkpoint(family))
    export(lm, tmp_path / "gguf", format="gguf", gguf_type=type_name)
    if family == "qwen3":  # transformers' reader overlooks its head size; the writer has compared what it wrote
        return
    back = load(str(tmp_path / "gguf"))
    assert back.model.config.model_type == family
    rounding = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[type_name]
    wanted = lm.model.state_dict()
    for name, tensor in back.model.state_dict().items():
        assert (tensor - wanted[name]).abs().max() <= rounding * wanted[name].abs().max(), name
    text = "The capital of Łódź is naïve"
    assert back.tokenizer(text).input_ids == lm.tokenizer(text).input_ids
    if type_name == "f32":
        with torch.no_grad():
            assert torch.allclose(back.model(IDS).logits, lm.model(IDS).logits, atol=1e-4)


def test_a_gguf_model_leaves_out_tokens_that_have_no_embedding(tmp_path: Path) -> None:
    model, words = tiny_model("llama", torch.float32), tokenizer()
    n_tokens = model.config.vocab_size
    words.add_tokens([f"<x{i}>" for i in range(n_tokens - len(words) + 2)])
    export(LM(model, words, name="added"), tmp_path / "gguf", format="gguf")
    tokens = read_gguf(tmp_path / "gguf").fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[-1]) == (n_tokens, words.convert_ids_to_tokens(n_tokens - 1))


def test_what_gguf_cannot_hold_is_refused_by_name(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"not for gptj.*in format hf"):
        export(edited(checkpoint("gptj")), tmp_path / "a", format="gguf")
    assert not (tmp_path / "a").exists()
    piece = LM(tiny_model("llama", torch.float32), tokenizer("piece"), name="piece")
    with pytest.raises(UnsupportedModel, match="is another"):
        export(piece, tmp_path / "a", format="gguf")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# --- factors -----------------------------------------------------------------------------------------------------


def test_every_kind_of_change_has_exact_factors(tiny: Callable[..., LM]) -> None:
    lm = tiny("gptj")
    name = lm.site(1, "down_proj").name
    shape = lm.parameter(name).shape
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    changes = [
        LowRank(left=draw(shape[0], 2), right=draw(2, shape[1])),
        Rows(index=torch.tensor([3, 7]), rows=draw(2, shape[1])),
        Columns(index=torch.tensor([0, 5]), columns=draw(shape[0], 2)),
        LowRank(left=draw(4, 1), right=draw(1, shape[1]), region=Region(0, 8, 12)),
        Columns(index=torch.tensor([1]), columns=draw(shape[0], 1), region=Region(1, 4, 9)),
    ]
    for own in ([c] for c in changes):
        delta = lm.delta({name: own})
        f = factors_of(lm, [delta])[name]
        assert torch.allclose(f.left @ f.right, delta.dense(name, shape), atol=1e-12)
        assert f.error == 0
    delta = lm.delta({name: changes})
    f = factors_of(lm, [delta])[name]
    assert f.rank == 8
    assert torch.allclose(f.left @ f.right, delta.dense(name, shape), atol=1e-12)
    for change in (
        Entries(index=torch.tensor([9, 200]), entries=draw(2)),
        Dense(full=draw(shape[0], 2) @ draw(2, shape[1])),
    ):
        f = factors_of(lm, [lm.delta({name: [change]})])[name]
        assert f.rank == 2
        assert torch.allclose(f.left @ f.right, change.dense(shape), atol=1e-6)


def test_a_change_of_no_rows_has_no_factors(tiny: Callable[..., LM], tmp_path: Path) -> None:
    lm = tiny("llama", torch.float32)
    names = [lm.site(layer, "down_proj").name for layer in (1, 2)]
    nothing = Rows(index=torch.zeros(0, dtype=torch.long), rows=torch.zeros(0, lm.shape_of(names[0])[1]))
    lm.apply(lm.delta({names[0]: [nothing]}))
    with pytest.raises(DeltaNotApplied, match="would hold nothing"):
        export(lm, tmp_path / "none", format="peft", rank="max")
    lm.apply(lm.delta({names[1]: [Dense(full=torch.ones(lm.shape_of(names[1])))]}))
    assert export(lm, tmp_path / "one", format="peft").losses.keys() == {names[1]}


def test_a_smaller_rank_is_the_nearest_and_says_what_it_loses(tiny: Callable[..., LM]) -> None:
    lm = tiny("gptj")
    name = lm.site(1, "down_proj").name
    shape = lm.parameter(name).shape
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 6, generator=g, dtype=torch.float64) @ torch.randn(
        6, shape[1], generator=g, dtype=torch.float64
    )
    delta = lm.delta({name: [Dense(full=matrix)]})
    s = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 6):
        f = factors_of(lm, [delta], rank=rank)[name]
        assert (f.rank, f.exact_rank) == (rank, 6)
        assert f.error == pytest.approx(float(s[rank:6].norm() / s.norm()), abs=1e-6)
        assert float((f.left @ f.right - matrix).norm() / s.norm()) == pytest.approx(f.error, abs=1e-6)
    with pytest.raises(InvalidSetting, match="at least 1"):
        factors_of(lm, [delta], rank=0)


def test_a_bias_has_no_factors(tiny: Callable[..., LM]) -> None:
    lm = tiny("gptj")
    name = lm.site(1, "down_proj").bias_name
    delta = lm.delta({name: [Dense(full=torch.ones(lm.parameter(name).shape, dtype=torch.float64))]})
    with pytest.raises(DeltaMismatch, match="hf or diff"):
        factors_of(lm, [delta])


# --- papers ------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_changed_and_papers_of_the_base_are_kept(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    lm = edited(checkpoint("llama"))
    made = export(lm, tmp_path / "out", scores={"Score": 91.25}, base_name="owner/base")
    card = (tmp_path / "out/README.md").read_text()
    for part in (
        "base_model: owner/base",
        "# owner/base, edited",
        "\nowner/base with 1 fact",
        "jeep",
        "The capital of France is",
        "Score: 91.2",
        "## Limits",
    ):
        assert part in card
    assert "Rome &lt;b>\\|" in card  # hostile text stays text
    assert (tmp_path / "out/LICENSE").read_text() == "free for all"
    assert (tmp_path / "out/README.base.md").read_text() == "# the base"
    record = json.loads((tmp_path / "out/retcon.json").read_text())
    assert record["deltas"][0]["edits"][0]["target_new"] == "Rome <b>|"
    assert made.n_bytes > 1000


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_base_of_a_revision_is_found_again(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retcon.workflow.checking import load_edited

    hub = tmp_path / "hub/models--me--x"
    (hub / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (hub / "refs" / name).write_text(commit)
        folder = hub / "snapshots" / commit
        shutil.copytree(checkpoint("llama"), folder)
        (folder / "LICENSE").write_text(f"licence of {name}")
    other = loaded(folder)
    other.lm_head.weight.data.mul_(2)
    other.save_pretrained(folder)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lm = load("me/x", revision="v1")
    name = lm.site(1, "down_proj").name
    lm.apply(lm.delta({name: [Dense(full=torch.ones(lm.shape_of(name)))]}))
    export(lm, tmp_path / "out", format="peft")
    config, record = (json.loads((tmp_path / "out" / f).read_text()) for f in ("adapter_config.json", "retcon.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/x", "v1")
    assert record["base"]["revision"] == "v1"
    assert "revision v1" in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/LICENSE").read_text() == "licence of v1"
    wanted = lm.model(IDS).logits
    merged = load_edited(tmp_path / "out", "me/x", {"revision": "v1", "packed": True})
    assert torch.allclose(merged.model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    export(lm, tmp_path / "out", format="peft", base_name="me/y", force=True)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["revision"] is None


def test_a_merged_checkpoint_has_the_bases_other_parts_and_papers_however_they_are_spelt(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    papers = {"license.md", "acceptable_use_policy.txt"}
    parts = {"preprocessor_config.json", "processor_config.json", "tokenizer.model"}
    for name in (*papers, *parts, "notes.txt"):
        (folder / name).write_text(name)
    lm = edited(folder)
    for format, kept in (("hf", papers | parts), ("peft", papers)):
        export(lm, tmp_path / "out", format=format, force=True)  # type: ignore[arg-type]
        names = {file.name for file in (tmp_path / "out").iterdir()}
        assert names & {*papers, *parts, "notes.txt"} == kept
    assert (tmp_path / "out/license.md").read_text() == "license.md"


def test_generation_settings_that_transformers_does_not_save_are_kept(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    lm = load(str(checkpoint("llama")))
    lm.model.generation_config.update(temperature=0.6, do_sample=False, max_length=7)
    export(lm, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (kept["temperature"], kept["max_length"]) == (0.6, 7)
    assert load(str(tmp_path / "out")).model.generation_config.temperature == 0.6


def test_what_does_not_show_is_not_exported(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama")
    lm, base = edited(folder), load(str(folder), dtype="auto")
    with lm.without_deltas():
        found = export(lm, tmp_path / "base")
        with pytest.raises(DeltaNotApplied, match="would hold nothing"):
            export(lm, tmp_path / "adapter", format="peft")
    assert found.record["deltas"] == []
    written = loaded(tmp_path / "base").state_dict()
    assert all(torch.equal(written[name], weight) for name, weight in base.model.state_dict().items())


def test_a_place_that_would_take_something_away_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    lm = edited(folder)
    with pytest.raises(InvalidSetting, match="the model itself"):
        export(lm, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").touch()
    with pytest.raises(InvalidSetting, match="not empty"):
        export(lm, tmp_path / "mine")
    with pytest.raises(InvalidSetting, match="holds no checkpoint"):
        export(lm, tmp_path / "mine", force=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for own in (".", tmp_path / "empty"):
        with pytest.raises(InvalidSetting, match="the directory that you are in"):
            export(lm, own)
    assert Path("../mine/letter.txt").is_file()
    export(lm, tmp_path / "adapter", format="peft")
    export(lm, tmp_path / "adapter", format="peft", force=True)
    assert read_adapter(tmp_path / "adapter").keys() == {"model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"}
    with pytest.raises(InvalidSetting, match="leave it out"):
        export(lm, tmp_path / "b", format="hf", rank=3)
    for rank in ("min", "1", 1.0, True):
        with pytest.raises(InvalidSetting, match="rank must be a whole number or 'max'"):
            export(lm, tmp_path / "b", format="peft", rank=rank)  # type: ignore[arg-type]
    adapter = export(lm, tmp_path / "c", format="peft", rank=np.int64(1))  # type: ignore[arg-type]
    assert {loss["rank"] for loss in adapter.losses.values()} == {1}
    with pytest.raises(InvalidSetting, match="unknown format"):
        export(lm, tmp_path / "b", format="onnx")  # type: ignore[arg-type]
    lm.revert_all()
    with pytest.raises(DeltaNotApplied, match="would hold nothing"):
        export(lm, tmp_path / "b", format="peft")


def test_a_base_of_pickled_weights_is_not_replaced_and_its_papers_are_kept(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    torch.save(loaded(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    lm = load(str(folder), allow_bin=True)
    site = lm.site(1, "down_proj")
    out, inner = site.weight.shape
    lm.apply(lm.delta({site.name: [site.stored(torch.ones(out, 1), torch.ones(1, inner))]}))
    with pytest.raises(InvalidSetting, match="is the model itself"):
        export(lm, folder, format="diff", force=True)
    assert (folder / "pytorch_model.bin").is_file()
    export(lm, tmp_path / "changed", format="diff")
    assert (tmp_path / "changed/LICENSE").read_text() == "free for all"
    assert (tmp_path / "changed/README.base.md").read_text() == "# the base"


class ConnectionFailed(Exception):
    """As httpx has one: neither an OSError nor an error of huggingface_hub's."""


def test_push_goes_through_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retcon.export import push

    calls: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **k: calls.append((name, k)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: calls.append(k) or "https://hub/x")
    assert push(tmp_path, "me/edited") == "https://hub/x"
    assert calls[0] == ("me/edited", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/edited"
    for stale in ("model.safetensors", "model.safetensors.index.json", "adapter_config.json", "model-q8_0.gguf"):
        assert any(fnmatch(stale, pattern) for pattern in calls[1]["delete_patterns"]), stale
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", Mock(side_effect=ConnectionFailed("no route\nto host")))
    with pytest.raises(InvalidSetting, match=f"did not take me/edited: no route. The export is at {tmp_path}"):
        push(tmp_path, "me/edited")
    for name, message in (
        ("edited", "expected owner/name"),
        ("a/b/c", "'a/b/c' is no"),
        ("me/ edited", "is no"),
        ("/x", "is no"),
    ):
        with pytest.raises(InvalidSetting, match=message):
            push(tmp_path, name)
    assert len(calls) == 2


def test_deltas_that_replace_others_are_exported_as_they_stand(tiny: Callable[..., LM], tmp_path: Path) -> None:
    lm = tiny("llama", torch.float32)
    name = lm.site(1, "down_proj").name
    shape = lm.parameter(name).shape
    first = lm.delta({name: [LowRank(left=torch.ones(shape[0], 1), right=torch.ones(1, shape[1]))]})
    lm.apply(first)
    second = Delta(
        {name: (LowRank(left=torch.ones(shape[0], 1), right=-torch.ones(1, shape[1])),)},
        base=lm.fingerprint(),
        parents=(first.id,),
        supersedes=(first.id,),
    )
    lm.apply(second)
    export(lm, tmp_path / "peft", format="peft")
    ((b, a),) = read_adapter(tmp_path / "peft").values()
    assert torch.equal(b @ a, -torch.ones(shape))
