"""Models whose quantised matrices stay packed: the dequantised model's numbers, and its deltas, in less memory."""

import copy
import json
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.fast_path import plain_path
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import retcon
from retcon.errors import UnsupportedModel
from retcon.export import export
from retcon.lm.load import load, load_plain
from retcon.lm.model import LM
from retcon.lm.packed import PackedMatrix
from retcon.locate import Tracing, causal_trace, contrast_probe
from retcon.methods.common.registry import METHODS
from retcon.methods.common.sequence import in_steps
from tests.conftest import everyday, random_moments, tiny_model, tokenizer
from tests.contract.test_methods import CONTEXTS, ENDING, made

IDS = torch.tensor([[5, 9, 31, 77, 200, 3]])
BITS = [4, 8]
pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra `quantised`)"),
    pytest.mark.filterwarnings(
        "ignore:.*larger than the weight", "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore::UserWarning",
        "ignore::DeprecationWarning",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A tiny llama, packed in 4 and in 8 bits; 4-bit scales are quantised, too."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    root = tmp_path_factory.mktemp("packed")
    wide = tiny_model("llama", torch.float32, hidden_size=64, head_dim=16, intermediate_size=128)
    wide.save_pretrained(root / "plain")  # the kernel wants a block of 64 values in every row
    settings: dict[int, dict[str, Any]] = {
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        8: {"load_in_8bit": True},
    }
    for bits, own in settings.items():
        given = BitsAndBytesConfig(**own)
        model = AutoModelForCausalLM.from_pretrained(root / "plain", quantization_config=given, dtype=torch.float32)
        model.save_pretrained(root / str(bits))
        tokenizer().save_pretrained(root / str(bits))
    tokenizer().save_pretrained(root / "plain")
    return {bits: root / str(bits) for bits in settings} | {32: root / "plain"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))


def both(checkpoints: dict[int, Path], bits: int) -> tuple[LM, LM]:
    """The dequantised model and the packed one."""
    place = str(checkpoints[bits])
    return load(place, device="cpu"), load(place, device="cpu", packed=True)


def packed_bytes(lm: LM) -> dict[str, list[Any]]:
    """Everything that a packed model has in memory: codes, scales, the rest; and what its modules are."""
    return {
        name: [[t.clone() for t in lm._parameters.stored(name)], type(lm.model.get_submodule(name.rpartition(".")[0]))]
        for name in lm._parameters
    }


def same_bytes(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> bool:
    return all(
        a[1] is b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def logits(lm: LM) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm.model(IDS, use_cache=False).logits
    return found


def some_delta(lm: LM, layer: int = 1) -> retcon.Delta:
    site = lm.site(layer, "down_proj")
    full = torch.randn(site.shape, generator=torch.Generator().manual_seed(0))
    return lm.delta({site.name: [site.stored_dense(0.1 * full)]})


@pytest.mark.parametrize("bits", BITS)
def test_a_block_of_packed_matrices_with_biases_is_trained_whole(bits: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wide = tiny_model("qwen2", torch.float32, hidden_size=64, intermediate_size=128)
    wide.save_pretrained(tmp_path / "plain")
    given = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=given, dtype=torch.float32)
    model.save_pretrained(tmp_path / "packed")
    tokenizer().save_pretrained(tmp_path / "packed")
    lm = load(str(tmp_path / "packed"), device="cpu", packed=True)
    method = retcon.method("ft", layers=[0], modules=["block"], epochs=1)
    delta = method.propose(lm, [retcon.Edit("The capital of France is", "France", "Rome")])
    assert {"model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.weight"} <= set(delta.changes)


@pytest.mark.parametrize("bits", BITS)
def test_it_computes_what_the_dequantised_model_does_forwards_and_backwards(
    bits: int, checkpoints: dict[int, Path]
) -> None:
    plain, packed = both(checkpoints, bits)
    assert len(packed.packed) == 4 * 7
    assert not packed.not_editable
    assert packed.notes == (f"bitsandbytes {bits}-bit weights, packed",)
    assert packed.model_bytes() < 0.6 * plain.model_bytes()
    assert packed.dtype == torch.float32
    assert packed.fingerprint() == plain.fingerprint()
    assert torch.equal(logits(packed), logits(plain))
    gradients = []
    for lm in (plain, packed):
        x = lm.model.get_input_embeddings()(IDS).detach().requires_grad_(True)
        gradients += torch.autograd.grad(lm.model(inputs_embeds=x).logits[0, -1].logsumexp(0), x)
    assert torch.equal(*gradients)
    for name in packed.packed:
        assert torch.equal(packed.parameter(name), plain.parameter(name))
        assert packed.shape_of(name) == plain.parameter(name).shape
    seen = packed._look()
    logits(packed)
    assert packed._look() == seen  # else the fingerprint would be computed again after every pass


EDITED = ("jeep", "kne", "full_c")


@pytest.mark.parametrize("name", everyday(*EDITED, of=METHODS))
@pytest.mark.parametrize("bits", BITS)
def test_every_method_gives_the_dequantised_model_s_delta_and_undoes_it(
    name: str, bits: int, checkpoints: dict[int, Path]
) -> None:
    plain, packed = both(checkpoints, bits)
    moments = random_moments(plain)
    before = packed_bytes(packed)
    wanted, found = (in_steps(made(name, lm), lm, ENDING, contexts=CONTEXTS, moments=moments) for lm in (plain, packed))
    assert same_bytes(packed_bytes(packed), before)  # proposing writes nothing
    assert found.base == wanted.base
    assert found.id == wanted.id
    with plain.edited(wanted):
        edited = logits(plain)
    packed.apply(found)
    touched = {name for name in found.changes if name in packed.packed}
    inside = {name: type(packed.model.get_submodule(name.rpartition(".")[0])) for name in packed.packed}
    assert {name for name, kind in inside.items() if kind is nn.Linear} == touched
    assert torch.equal(logits(packed), edited)
    packed.revert(found)
    assert same_bytes(packed_bytes(packed), before)
    assert torch.equal(logits(packed), logits(plain))


@pytest.mark.parametrize("bits", BITS)
def test_the_fast_path_is_the_plain_one(bits: int, checkpoints: dict[int, Path]) -> None:
    _, packed = both(checkpoints, bits)
    moments = random_moments(packed)
    method: Any = made("jeep", packed)
    fast = method.propose(packed, ENDING[:2], contexts=CONTEXTS, moments=moments)
    with plain_path():
        plain = method.propose(packed, ENDING[:2], contexts=CONTEXTS, moments=moments)
    assert fast.provenance["values"] != plain.provenance["values"]
    for name in plain.changes:
        a, b = (delta.dense(name, packed.shape_of(name)) for delta in (fast, plain))
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()), name


@pytest.mark.parametrize("bits", BITS)
def test_other_dtypes_are_those_of_the_dequantised_model(bits: int, checkpoints: dict[int, Path]) -> None:
    place = str(checkpoints[bits])
    plain, packed = (load(place, device="cpu", dtype="bfloat16", packed=packed) for packed in (False, True))
    assert packed.dtype == plain.dtype == torch.bfloat16
    assert packed.fingerprint() == plain.fingerprint()
    assert torch.equal(logits(packed), logits(plain))
    buffers = [{n: b.dtype for n, b in lm.model.named_buffers()} for lm in (plain, packed, load(str(checkpoints[32])))]
    assert buffers[0] == buffers[1] == buffers[2]  # positions are in float32 whatever the weights are


def test_probes_find_what_they_find_in_the_dequantised_model(checkpoints: dict[int, Path]) -> None:
    plain, packed = both(checkpoints, 4)
    wanted, found = (contrast_probe(lm, ENDING[:2], norms=(False,)) for lm in (plain, packed))
    assert found.means() == wanted.means()
    settings = Tracing(samples=2)
    wanted_traces, found_traces = (causal_trace(lm, ENDING[3:], settings) for lm in (plain, packed))
    assert len(found_traces) == len(wanted_traces) == 1
    for kind, scores in wanted_traces.traces[0].scores.items():
        assert torch.equal(found_traces.traces[0].scores[kind], scores)


def test_scopes_nest_and_the_base_shows_where_it_is_asked_for(checkpoints: dict[int, Path]) -> None:
    plain, packed = both(checkpoints, 4)
    before = packed_bytes(packed)
    one, two = some_delta(packed), some_delta(packed, layer=2)
    base = logits(packed)
    with packed.edited(one):
        edited = logits(packed)
        assert not torch.equal(edited, base)
        with packed.without_deltas():
            assert same_bytes(packed_bytes(packed), before)
            assert torch.equal(logits(packed), base)
            assert torch.equal(packed.base_weight("model.layers.1.mlp.down_proj.weight"),
                               plain.parameter("model.layers.1.mlp.down_proj.weight"))  # fmt: skip
        assert torch.equal(logits(packed), edited)
        with packed.edited(two):
            assert not torch.equal(logits(packed), edited)
        assert torch.equal(logits(packed), edited)
        assert packed.undo_bytes() == 3 * 4 * 64 * 128  # floats in place, their base, and the sum
    assert same_bytes(packed_bytes(packed), before)


def test_an_interrupt_while_floats_are_put_in_place_leaves_the_packed_model(
    checkpoints: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed = both(checkpoints, 4)
    before = packed_bytes(packed)
    delta = some_delta(packed)
    for step in ("hold", "_exchange"):
        with monkeypatch.context() as patch:
            whole = getattr(PackedMatrix, step)

            def cut(self: PackedMatrix, *args: Any, whole: Any = whole, patch: Any = patch) -> None:
                whole(self, *args)
                if self._values is not None:
                    patch.undo()
                    raise KeyboardInterrupt

            patch.setattr(PackedMatrix, step, cut)
            with pytest.raises(KeyboardInterrupt):
                packed.apply(delta)
        assert packed.applied == ()
        assert same_bytes(packed_bytes(packed), before)


def test_hooks_stay_on_a_module_that_is_edited(checkpoints: dict[int, Path]) -> None:
    _, packed = both(checkpoints, 4)
    seen: list[int] = []
    handle = packed.site(1, "down_proj").module.register_forward_hook(lambda *_: seen.append(1))
    with packed.edited(some_delta(packed)):
        logits(packed)
    logits(packed)
    handle.remove()
    logits(packed)
    assert len(seen) == 2


@pytest.mark.parametrize("bits", BITS)
def test_an_edited_packed_model_is_saved_as_floats_and_stays_packed(
    bits: int, checkpoints: dict[int, Path], tmp_path: Path
) -> None:
    plain, packed = both(checkpoints, bits)
    before = packed_bytes(packed)
    delta = some_delta(packed)
    packed.apply(delta)
    edited = logits(packed)
    marks = {name: getattr(packed.model, name) for name in ("hf_quantizer", "is_quantized", "quantization_method")}
    export(packed, tmp_path / "hf", format="hf")
    assert f"weights dequantised from bitsandbytes {bits}-bit weights" in (tmp_path / "hf/README.md").read_text()
    assert "packed" not in (tmp_path / "hf/README.md").read_text()
    again = load_plain(tmp_path / "hf", dtype=torch.float32)
    assert not getattr(again.config, "quantization_config", None)
    with torch.no_grad():
        assert torch.equal(again(IDS, use_cache=False).logits, edited)
    assert load(str(tmp_path / "hf"), device="cpu").notes == plain.notes
    export(packed, tmp_path / "diff", format="diff")
    export(packed, tmp_path / "peft", format="peft", rank="max")
    assert f"{bits}-bit weights, packed" in (tmp_path / "peft/README.md").read_text()
    assert torch.equal(logits(packed), edited)
    assert {name: getattr(packed.model, name) for name in marks} == marks
    packed.revert_all()
    assert same_bytes(packed_bytes(packed), before)
    plain.apply(retcon.Delta(changes=delta.changes, base=delta.base))  # and its delta fits the dequantised model


def test_a_model_that_the_caller_loaded_is_given_back_as_it_was(checkpoints: dict[int, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints[8], dtype=torch.float32).eval()
    kind = type(model.model.layers[1].mlp.down_proj)
    lm = LM(model, tokenizer())
    assert type(model.model.layers[1].mlp.down_proj) is not kind
    copied = LM(copy.deepcopy(model), tokenizer())
    with copied.edited(some_delta(copied)):
        assert not torch.equal(logits(copied), logits(lm))
    lm.release()
    assert type(model.model.layers[1].mlp.down_proj) is kind
    assert "_retcon_matrix" not in vars(model.model.layers[1].mlp.down_proj)
    assert torch.equal(logits(copied), logits(LM(model, tokenizer())))


@pytest.mark.parametrize("bits", BITS)
def test_a_packed_model_is_copied_with_its_deltas_and_not_pickled(bits: int, checkpoints: dict[int, Path]) -> None:
    lm = load(str(checkpoints[bits]), packed=True, device="cpu")
    base, delta = logits(lm), some_delta(lm)
    for edited in (False, True):
        if edited:
            lm.apply(delta)
        copied = copy.deepcopy(lm)
        assert torch.equal(logits(copied), logits(lm))
        copied.revert_all()
        assert torch.equal(logits(copied), base)
        assert copied.fingerprint() == lm.fingerprint()
        matrix = lm.packed[next(iter(delta.changes))]
        for one in (matrix, matrix.module):
            assert vars(copy.copy(one)) == vars(one)
        for whole in (lm, lm.model, matrix):
            with pytest.raises(UnsupportedModel, match=r"packed model cannot be pickled.*retcon\.load"):
                pickle.dumps(whole)


def test_a_packed_model_that_an_lm_left_edited_is_no_base(checkpoints: dict[int, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints[8], dtype=torch.float32).eval()
    lm = LM(model, tokenizer())
    lm.apply(some_delta(lm))
    del lm
    with pytest.raises(UnsupportedModel, match=r"left edited.*load the model again"):
        LM(model, tokenizer())


class Halves(TwoTensor):  # type: ignore[misc]
    """A matrix kept as two tensors, as torchao keeps codes and scales."""

    def dequantize(self) -> torch.Tensor:
        return self.a + self.b


Halves.__module__ = "torchao.of.this.test"


def test_a_model_packed_by_torchao_is_edited_and_other_subclasses_of_tensors_are_refused() -> None:
    plain, model = LM(tiny_model("llama", torch.float32), tokenizer()), tiny_model("llama", torch.float32)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.detach()
        layer.mlp.down_proj.weight = nn.Parameter(Halves(weight / 2, weight / 2), requires_grad=False)
    packed = LM(model, tokenizer())
    before = packed_bytes(packed)
    assert packed.notes == ("torchao Halves weights, packed",)
    assert packed.fingerprint() == plain.fingerprint()
    assert torch.equal(logits(packed), logits(plain))
    moments = random_moments(plain)
    wanted, found = (
        made("memit", lm).propose(lm, ENDING, contexts=CONTEXTS, moments=moments) for lm in (plain, packed)
    )
    assert found.id == wanted.id
    with packed.edited(found), plain.edited(wanted):
        assert torch.equal(logits(packed), logits(plain))
    assert same_bytes(packed_bytes(packed), before)
    with packed.edited(found):
        edited = logits(packed)
        with pytest.raises(UnsupportedModel, match="has an LM already"):
            LM(model, tokenizer())
        assert torch.equal(logits(packed), edited)
    assert same_bytes(packed_bytes(packed), before)
    del packed
    packed = LM(model, tokenizer())
    assert same_bytes(packed_bytes(packed), before)
    packed.release()
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(Halves(embedding.weight.detach(), embedding.weight.detach()), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"embed_tokens.weight is a Halves of torchao.* no plain tensor"):
        LM(model, tokenizer())


def test_what_cannot_stay_packed_is_refused_by_name_before_weights_are_read(
    checkpoints: dict[int, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=r"packed: its weights are not quantised .*leave packed=True out"):
        load(str(checkpoints[32]), device="cpu", packed=True)
    folder = tmp_path / "fp8"
    shutil.copytree(checkpoints[32], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(
        UnsupportedModel, match=r"fp8 weights cannot stay packed \(bitsandbytes, torchao ones can\); to have them deq"
    ):
        load(str(folder), device="cpu", packed=True)


def test_a_model_whose_scales_bitsandbytes_has_rounded_is_refused(checkpoints: dict[int, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints[4], dtype=torch.float32).eval()
    model.model.layers[1].mlp.down_proj.weight.quant_state.packing_format_for_cpu = True  # as a pass sets it on AVX-512
    with pytest.raises(UnsupportedModel, match=r"layers.1.mlp.down_proj has run on this CPU.*load the model again"):
        LM(model, tokenizer())
