"""`LM`: applying and reverting on whole models, what is refused and why, freezing, generating."""

import copy
import pickle
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import retcon
from retcon.attachment import Beside, Hook
from retcon.delta import Delta, Dense, Entries, LowRank, Rows
from retcon.edits import Edit
from retcon.errors import (
    DeltaMismatch,
    DeltaNotApplied,
    InvalidEdit,
    ModelBusy,
    NonFinite,
    NotEditable,
    RetconWarning,
    UnsupportedModel,
    WrongBase,
)
from retcon.lm import scopes
from retcon.lm.fingerprint import fingerprint
from retcon.lm.forward import Point, adding, logits_at, run
from retcon.lm.generate import Writing, generate
from retcon.lm.ledger import Ledger
from retcon.lm.model import LM
from retcon.lm.prompts import encode, pad
from retcon.methods.common.sequence import in_steps
from tests.conftest import FAMILIES, FLOAT32_INSIDE, tiny_model, tokenizer
from tests.lm.deltas import KINDS, by_hand, random_change, same_bytes

Make = Callable[..., LM]


def weights(lm: LM) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in lm.model.named_parameters()}


def is_restored(lm: LM, before: dict[str, torch.Tensor]) -> bool:
    return all(same_bytes(p, before[n]) for n, p in lm.model.named_parameters())


def down(layer: int) -> str:
    return f"transformer.h.{layer}.mlp.fc_out.weight"


def make_delta(lm: LM, name: str, seed: int = 0, kind: str = "low_rank", **options: Any) -> Delta:
    return lm.delta({name: [random_change(kind, tuple(lm.parameter(name).shape), seed, **options)]})


# --- applying and reverting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_apply_and_revert_bit_for_bit(kind: str, dtype: torch.dtype, tiny: Make, untouched: Any) -> None:
    lm = tiny("gptj", dtype)
    before, look = weights(lm), untouched(lm)
    delta = lm.delta({down(layer): [random_change(kind, (32, 128), layer)] for layer in (1, 2)})
    lm.apply(delta)
    assert lm.applied == (delta,)
    for name in delta.changes:
        assert torch.equal(lm.parameter(name), by_hand(before[name], name, [delta]))
        assert same_bytes(lm.base_weight(name), before[name])
    assert {n for n, p in lm.model.named_parameters() if not torch.equal(p, before[n])} == set(delta.changes)
    assert lm.undo_bytes() > 0
    lm.revert(delta)
    assert lm.undo_bytes() == 0
    assert is_restored(lm, before)
    assert untouched(lm) == look


def test_removing_one_from_the_middle_leaves_the_others_alone(tiny: Make) -> None:
    lm, other = tiny("gptj", torch.bfloat16), tiny("gptj", torch.bfloat16)
    deltas: list[Delta] = []
    for seed, kind in enumerate(KINDS):
        deltas.append(make_delta(lm, down(seed % 2), seed, kind))
        lm.apply(deltas[-1])
    lm.revert(deltas[1].id)
    kept = [deltas[0], *deltas[2:]]
    assert lm.applied == tuple(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetconWarning)  # their parents are others now
        for delta in kept:
            other.apply(delta)
    assert fingerprint(lm.model) == fingerprint(other.model)
    lm.revert_all()
    assert lm.applied == ()
    assert fingerprint(lm.model) == lm.fingerprint()


def test_scopes_nest_and_restore_on_exceptions(tiny: Make) -> None:
    lm = tiny("gptj", torch.bfloat16)
    before = weights(lm)
    a = make_delta(lm, down(0), 1)
    with pytest.raises(KeyError), lm.edited(a) as inside:
        assert inside is lm
        b = make_delta(lm, down(0), 2, "rows")
        assert b.parents == (a.id,)
        with lm.edited(b):
            assert lm.applied == (a, b)
            assert torch.equal(lm.parameter(down(0)), by_hand(before[down(0)], down(0), [a, b]))
        assert lm.applied == (a,)
        assert torch.equal(lm.parameter(down(0)), by_hand(before[down(0)], down(0), [a]))
        raise KeyError("inside")
    assert is_restored(lm, before)


def test_scopes_nest_in_the_order_in_which_they_are_entered(tiny: Make) -> None:
    lm = tiny("gptj", torch.bfloat16)
    before = weights(lm)
    a, b = make_delta(lm, down(0), 1), make_delta(lm, down(1), 2)
    first, second = lm.edited(a), lm.edited(b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetconWarning)  # their parents are others
        with second:
            with first:
                assert lm.applied == (b, a)
            assert lm.applied == (b,)
            assert torch.equal(lm.parameter(down(1)), by_hand(before[down(1)], down(1), [b]))
        assert is_restored(lm, before)
        frozen, shown = lm.frozen_eval(), lm.without_deltas()
        lm.model.train()
        with shown, frozen:
            with lm.scope():
                pass
            assert not lm.model.training
        assert lm.model.training
        with first:  # a scope that has ended can be entered again
            assert lm.applied == (a,)
    assert is_restored(lm, before)


def test_a_scope_belongs_to_the_thread_that_enters_it(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "BUSY_SECONDS", 0.05)
    lm = tiny("gptj")
    delta = make_delta(lm, down(0), 1)
    made, heard = lm.edited(delta), []

    def work() -> None:
        with made:
            heard.append(lm.applied)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [(delta,)]
    assert lm.applied == ()


@pytest.mark.parametrize("kind", ["edited", "scope", "without_deltas", "frozen_eval"])
def test_a_scope_that_is_active_is_not_entered_again(kind: str, tiny: Make) -> None:
    lm = tiny("gptj")
    before = weights(lm)
    scope = lm.edited(make_delta(lm, down(0), 1)) if kind == "edited" else getattr(lm, kind)()
    with scope:
        inside = lm.applied
        with pytest.raises(ModelBusy, match=rf"this scope of LM\(.*\) is active.*lm\.{kind}\(\.\.\.\)"), scope:
            pass
        assert lm.applied == inside
    with scope:
        assert lm.applied == inside
    assert is_restored(lm, before)


def test_a_scope_that_another_thread_keeps_from_beginning_leaves_nothing(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scopes, "BUSY_SECONDS", 0.05)
    lm = tiny("gptj")
    delta, other = make_delta(lm, down(0), 1), make_delta(lm, down(1), 2)
    waiting, heard = lm.edited(other), []

    def work() -> None:
        with pytest.raises(ModelBusy, match="another thread"), waiting:
            heard.append("inside")

    with lm.edited(delta):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert lm.applied == (delta,)
    with waiting:
        assert lm.applied == (other,)
    assert heard == []
    assert lm.applied == ()


def test_a_delta_applied_inside_a_scope_outlives_it(tiny: Make) -> None:
    lm = tiny("gptj", torch.bfloat16)
    before = weights(lm)
    a = make_delta(lm, down(0), 1)
    with lm.edited(a):
        b = make_delta(lm, down(0), 2)
        lm.apply(b)
    assert lm.applied == (b,)
    assert torch.equal(lm.parameter(down(0)), by_hand(before[down(0)], down(0), [b]))
    lm.revert(b)
    assert is_restored(lm, before)


@pytest.mark.filterwarnings("ignore:delta .* was proposed on top of:retcon.errors.RetconWarning")
@pytest.mark.parametrize("how", ["that one", "all"])
def test_a_scope_whose_delta_was_reverted_inside_ends_quietly(how: str, tiny: Make) -> None:
    lm = tiny("gptj")
    before = weights(lm)
    outer, a = make_delta(lm, down(0), 1), make_delta(lm, down(0), 2)
    lm.apply(outer)
    with lm.edited(a):
        if how == "all":
            lm.revert_all()
        else:
            lm.revert(a)
    assert lm.applied == (() if how == "all" else (outer,))
    lm.revert_all()
    assert is_restored(lm, before)


def test_several_deltas_in_one_scope_go_on_in_order_or_not_at_all(tiny: Make) -> None:
    lm = tiny("gptj", torch.bfloat16)
    before = weights(lm)
    a = make_delta(lm, down(0), 1)
    with lm.edited(a):
        b = make_delta(lm, down(0), 2)
    with lm.edited(a, b):
        assert lm.applied == (a, b)
    bad = lm.delta({down(1): [Dense(full=torch.ones(2, 2))]})
    with pytest.raises(DeltaMismatch), lm.edited(a, bad):
        raise AssertionError("the scope must not be entered")
    assert lm.applied == ()
    assert is_restored(lm, before)


def test_a_change_that_does_not_fit_leaves_the_others_out_too(tiny: Make) -> None:
    lm = tiny("gptj")
    before = weights(lm)
    good = random_change("low_rank", (32, 128))
    bad = lm.delta({down(0): [good], down(1): [LowRank(left=torch.ones(32, 1), right=torch.ones(1, 127))]})
    message = r"h\.1\.mlp\.fc_out\.weight: low-rank factors \(32, 1\) x \(1, 127\) do not give \(32, 128\)"
    with pytest.raises(DeltaMismatch, match=message):
        lm.apply(bad)
    nan = lm.delta({down(0): [good], down(1): [Rows(index=torch.tensor([1]), rows=torch.full((1, 128), torch.nan))]})
    with pytest.raises(NonFinite, match=r"h\.1\.mlp\.fc_out\.weight: rows change: rows holds NaN or infinity"):
        lm.apply(nan)
    stray = lm.delta({down(0): [good], "transformer.h.7.mlp.fc_out.weight": [good]})
    with pytest.raises(DeltaMismatch, match=r"'tiny-gptj' has no parameter 'transformer\.h\.7\.mlp"):
        lm.apply(stray)
    assert lm.applied == ()
    assert is_restored(lm, before)


def test_running_out_of_memory_half_way_leaves_the_weights_as_they_were(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny("gptj", torch.bfloat16)
    before = weights(lm)
    delta = lm.delta({down(layer): [random_change("dense", (32, 128), layer)] for layer in range(3)})
    write = Ledger._write

    def failing(self: Ledger, name: str, touched: Any) -> None:
        if name == down(1):
            raise MemoryError("no room")
        write(self, name, touched)

    monkeypatch.setattr(Ledger, "_write", failing)
    with pytest.raises(MemoryError):
        lm.apply(delta)
    assert lm.applied == ()
    assert is_restored(lm, before)
    with pytest.raises(MemoryError), lm.edited(delta):
        raise AssertionError("the scope must not be entered")
    assert is_restored(lm, before)


def test_twice_or_never_is_refused(tiny: Make) -> None:
    lm = tiny("gptj")
    delta = make_delta(lm, down(0))
    with pytest.raises(DeltaNotApplied, match=f"delta {delta.id} is not applied; applied: none"):
        lm.revert(delta)
    with pytest.raises(DeltaNotApplied, match="delta c0ffee is not applied; applied: none"):
        lm.revert("c0ffee")
    lm.apply(delta)
    with pytest.raises(DeltaNotApplied, match="is applied already; revert it first"):
        lm.apply(delta)
    assert lm.applied == (delta,)


def test_another_base_is_refused_unless_said(tiny: Make) -> None:
    lm, other = tiny("gptj"), tiny("gptj", seed=1)
    delta = make_delta(other, down(0))
    before = weights(lm)
    with pytest.raises(WrongBase, match=rf"made for another model \(fingerprint {other.fingerprint()[:12]}\)") as error:
        lm.apply(delta)
    assert f"this is 'tiny-gptj' in float64 (fingerprint {lm.fingerprint()[:12]})" in str(error.value)
    assert "other_base=True" in str(error.value)
    assert is_restored(lm, before)
    lm.apply(delta, other_base=True)
    assert lm.applied == (delta,)
    lm.revert(delta)
    with lm.edited(delta, other_base=True):
        assert lm.applied == (delta,)
    assert is_restored(lm, before)


def test_the_dtype_is_part_of_the_base(tiny: Make) -> None:
    delta = make_delta(tiny("gptj", torch.float32), down(0))
    with pytest.raises(WrongBase, match="one that was wrapped, in the same dtype"):
        tiny("gptj", torch.bfloat16).apply(delta)


def test_other_parents_give_a_warning(tiny: Make) -> None:
    lm = tiny("gptj")
    a = make_delta(lm, down(0), 1)
    with lm.edited(a):
        b = make_delta(lm, down(0), 2)
    with pytest.warns(RetconWarning, match=rf"proposed on top of \[{a.id}\] and is applied on top of \[the base\]"):
        lm.apply(b)
    message = rf"proposed on top of \[the base\] and is applied on top of \[{b.id}\]"
    with pytest.warns(RetconWarning, match=message), lm.edited(a):
        assert lm.applied == (b, a)


def test_superseding_deltas_on_a_model(tiny: Make) -> None:
    lm = tiny("gptj", torch.bfloat16)
    before = weights(lm)
    a = make_delta(lm, down(0), 1)
    lm.apply(a)
    b = lm.delta({down(1): [random_change("dense", (32, 128), 3)]}, supersedes=(a.id,))
    with lm.edited(b):
        assert lm.applied == (b,)
        assert same_bytes(lm.parameter(down(0)), before[down(0)])
        with pytest.raises(DeltaNotApplied, match="is superseded by"):
            lm.revert(a.id)
    assert lm.applied == (a,)
    assert torch.equal(lm.parameter(down(0)), by_hand(before[down(0)], down(0), [a]))
    assert same_bytes(lm.parameter(down(1)), before[down(1)])


def test_a_proposal_records_base_and_parents(tiny: Make) -> None:
    lm = tiny("gptj")
    a = make_delta(lm, down(0), 1)
    lm.apply(a)
    b = lm.delta({down(0): [random_change("rows", (32, 128))]}, provenance={"method": "by hand"})
    assert (a.base, a.parents) == (lm.fingerprint(), ())
    assert (b.base, b.parents) == (a.base, (a.id,))  # the fingerprint is the base's, whatever is applied
    assert b.provenance == {"method": "by hand"}


def test_the_fingerprint_is_of_the_base_even_when_first_asked_for_under_a_delta(tiny: Make) -> None:
    lm, delta = tiny("gptj"), make_delta(tiny("gptj"), down(0))
    lm.remember_fingerprint(delta.base)
    lm.apply(delta)
    lm._fingerprint = None
    assert lm.fingerprint() == delta.base
    assert lm.applied == (delta,)


def test_without_deltas_shows_the_base_and_the_edits_come_back(tiny: Make) -> None:
    lm = tiny("gptj", torch.bfloat16)
    before = weights(lm)
    a = make_delta(lm, down(0), 1)
    lm.apply(a)
    edited = weights(lm)
    with pytest.raises(KeyError), lm.without_deltas() as base:
        assert base is lm
        assert is_restored(lm, before)
        with pytest.raises(DeltaNotApplied, match=r"off for the moment \(lm\.without_deltas\(\)\)"):
            lm.revert(a)
        with pytest.raises(DeltaNotApplied), pytest.warns(RetconWarning):
            lm.apply(make_delta(tiny("gptj", torch.bfloat16), down(0), 5))
        raise KeyError("inside")
    assert is_restored(lm, edited)
    lm.revert(a)
    assert is_restored(lm, before)


def test_base_weight_of_an_unknown_parameter(tiny: Make) -> None:
    with pytest.raises(DeltaMismatch, match="has no parameter 'nothing'"):
        tiny("gptj").base_weight("nothing")


# --- what cannot be edited, and what is refused --------------------------------------------------------------------


def test_tied_embeddings_are_not_editable_by_either_name(tiny: Make) -> None:
    lm = tiny("gpt2")
    for name, other in (("lm_head.weight", "transformer.wte.weight"), ("transformer.wte.weight", "lm_head.weight")):
        with pytest.raises(NotEditable, match=f"{name} cannot be edited: it is shared with {other}"):
            lm.check_editable(name)
        delta = lm.delta({name: [random_change("rows", (512, 32))]})
        with pytest.raises(NotEditable, match="shared with"):
            lm.apply(delta)
    lm.check_editable("transformer.h.0.mlp.c_proj.weight")
    assert set(lm.not_editable) == {"lm_head.weight", "transformer.wte.weight"}


def test_integer_and_float8_weights_are_not_editable_but_the_rest_is(tiny: Make) -> None:
    model = tiny_model("llama", torch.float32)
    for layer, dtype in ((1, torch.int8), (2, torch.float8_e4m3fn)):
        module = model.model.layers[layer].mlp.down_proj
        module.weight = torch.nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    lm = LM(model, tokenizer())
    assert set(lm.not_editable) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    with pytest.raises(NotEditable, match=r"quantised or not floating \(torch\.int8\); load the model unquantised"):
        lm.apply(make_delta(lm, "model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(NotEditable, match=r"torch\.float8_e4m3fn"):
        lm.apply(make_delta(lm, "model.layers.2.mlp.down_proj.weight"))
    lm.apply(make_delta(lm, "model.layers.0.mlp.down_proj.weight"))


def test_quantised_weights_by_their_mark() -> None:
    model = tiny_model("llama", torch.float32)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.quant_state = object()  # as bitsandbytes leaves it
    lm = LM(model, tokenizer())
    assert "quantised" in lm.not_editable["model.layers.1.mlp.down_proj.weight"]
    logits_at(lm, pad([lm.encode("The capital")]), (torch.tensor([0]), torch.tensor([0])))  # probing still works


def test_meta_weights_are_not_editable() -> None:
    model = tiny_model("llama", torch.float32)
    model.model.layers[3].mlp.down_proj.to("meta")
    lm = LM(model, tokenizer())
    name = "model.layers.3.mlp.down_proj.weight"
    with pytest.raises(NotEditable, match=r"no data on this machine \(meta device or offloaded\)"):
        lm.check_editable(name)
    change = random_change("rows", (32, 64))
    with pytest.raises(NotEditable, match="meta"):
        lm.apply(Delta({name: (change,)}, base="x"))
    with pytest.raises(UnsupportedModel, match="no fingerprint and cannot be edited"):
        lm.apply(Delta({"model.layers.0.mlp.down_proj.weight": (change,)}, base="x"))


class Wrapper(torch.nn.Module):
    """A stand-in with one telling attribute."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.config = tiny_model("llama").config
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"peft_config": {"default": 1}}, r"carries PEFT adapters.*merge_and_unload"),
        ({"_hf_peft_config_loaded": True}, r"carries PEFT adapters.*unload\(\)"),
        ({"_orig_mod": 1}, r"compiled \(torch\.compile\).*LM\(model\._orig_mod"),
        ({"_compiled_call_impl": 1}, r"compiled in place.*load it again"),
        ({"config": None}, r"Wrapper is no transformers model \(it has no config\.model_type\)"),
    ],
    ids=["peft", "adapter", "compiled", "compiled in place", "no config"],
)
def test_wrapped_models_are_refused_with_the_way_out(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        LM(Wrapper(**attributes), tokenizer())


def test_torch_compile_itself_is_noticed() -> None:
    with pytest.raises(UnsupportedModel, match=r"LM\(model\._orig_mod"):
        LM(torch.compile(tiny_model("llama")), tokenizer())
    model = tiny_model("llama")
    model.compile()
    with pytest.raises(UnsupportedModel, match="compiled in place"):
        LM(model, tokenizer())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # between PEFT and transformers
def test_peft_itself_is_noticed_and_its_unwrapped_model_is_fine() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=1, target_modules=["down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model("llama", torch.float32), config)
    with pytest.raises(UnsupportedModel, match="PEFT"):
        LM(wrapped, tokenizer())
    with pytest.raises(UnsupportedModel, match="PEFT"):
        LM(wrapped.base_model.model, tokenizer())
    lm = LM(wrapped.merge_and_unload(), tokenizer())
    lm.apply(make_delta(lm, "model.layers.0.mlp.down_proj.weight"))


def test_encoder_decoders_are_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModel, match="'t5' is an encoder-decoder model; retcon edits decoder-only ones"):
        LM(T5ForConditionalGeneration(config), tokenizer())


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedModel, match=r"Slow is a slow tokenizer.*use_fast=True"):
        LM(tiny_model("gptj"), Slow())
    for given, kind in ((None, "NoneType"), ("gpt2", "str")):
        with pytest.raises(UnsupportedModel, match=rf"{kind} given where a tokenizer is wanted"):
            LM(tiny_model("gptj"), given)


def test_a_layer_that_is_not_there(tiny: Make) -> None:
    lm = tiny("gptj")
    for layer in (-1, 4):
        with pytest.raises(UnsupportedModel, match=f"layer {layer} asked for; 'tiny-gptj' has layers 0 to 3"):
            lm.site(layer, "down_proj")
        with pytest.raises(UnsupportedModel, match=f"layer {layer} asked for"):
            lm.block(layer)


def test_what_it_says_about_itself(tiny: Make) -> None:
    lm = tiny("gptj", torch.bfloat16)
    assert repr(lm) == "LM(tiny-gptj: gptj, 4 layers, torch.bfloat16)"
    with lm.edited(make_delta(lm, down(0))):
        assert repr(lm) == "LM(tiny-gptj: gptj, 4 layers, torch.bfloat16, 1 applied delta)"
    assert LM(tiny_model("gptj"), tokenizer()).name == "gptj"
    assert lm.device == torch.device("cpu")


# --- freezing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "raises"])
def test_borrowed_gives_every_flag_back(fails: bool, tiny: Make) -> None:
    lm = tiny("gpt2")
    generator = torch.Generator().manual_seed(0)
    for module in lm.model.modules():
        module.training = bool(torch.randint(2, (), generator=generator))
    for parameter in lm.model.parameters():
        parameter.requires_grad_(bool(torch.randint(2, (), generator=generator)))

    def flags() -> Any:
        return [m.training for m in lm.model.modules()], [p.requires_grad for p in lm.model.parameters()]

    before = flags()
    assert {True, False} == set(before[0]) == set(before[1])

    def body() -> None:
        with lm.frozen_eval():
            assert not any(flags()[0])
            assert not any(flags()[1])
            with lm.frozen_eval():
                pass
            assert not any(flags()[0] + flags()[1])
            lm.model.train()  # whatever the body does to the flags is undone as well
            lm.model.requires_grad_(True)
            if fails:
                raise KeyError("inside")

    if fails:
        with pytest.raises(KeyError):
            body()
    else:
        body()
    assert flags() == before


# --- running -------------------------------------------------------------------------------------------------------

PROMPTS = [
    "The capital of France",
    "Danielle Darrieux speaks",
    "The",
    "You know that Leonardo da Vinci lived in Florence and in Milan. Therefore it was",
    "Zürich",
]


def step_by_step(lm: LM, prompt: str, n: int) -> list[int]:
    """Greedy tokens from plain forward passes over one unpadded row."""
    ids = list(encode(lm.tokenizer, prompt).ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == lm.tokenizer.eos_token_id:
                break
    return ids[start:]


@pytest.mark.parametrize(("family", "tok"), [*((f, "gpt") for f in FAMILIES), ("gpt2", "bos"), ("llama", "piece")])
def test_generating_equals_one_step_at_a_time(family: str, tok: str, tiny: Make, untouched: Any) -> None:
    # Where attention is cast to float32 before its softmax, a float64 mask becomes -inf there, and padding NaN.
    lm = tiny(family, torch.float32 if family in FLOAT32_INSIDE else torch.float64, tok=tok)
    look, shipped = untouched(lm), lm.model.generation_config
    got = generate(lm, PROMPTS, Writing(max_new_tokens=6, stops=()), max_batch_tokens=64)
    for prompt, text in zip(PROMPTS, [one.text for one in got], strict=True):
        want = lm.tokenizer.decode(step_by_step(lm, prompt, 6), skip_special_tokens=True)
        assert text == want
    assert lm.model.generation_config is shipped
    assert untouched(lm) == look


def test_generating_ignores_the_shipped_settings_and_leaves_them(tiny: Make) -> None:
    lm = tiny("llama")
    plain = lm.generate(PROMPTS, max_new_tokens=5)
    shipped = lm.model.generation_config
    for name, value in {
        "do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1,
        "num_beams": 3, "min_new_tokens": 20, "max_length": 3, "suppress_tokens": list(range(3, 300)),
    }.items():  # fmt: skip
        setattr(shipped, name, value)
    before = shipped.to_dict()
    lm.tokenizer.padding_side = "right"
    assert lm.generate(PROMPTS, max_new_tokens=5) == plain
    assert lm.model.generation_config is shipped
    assert shipped.to_dict() == before
    assert lm.tokenizer.padding_side == "right"


def test_padding_side_does_not_matter(tiny: Make) -> None:
    lm = tiny("gpt2")
    side = lm.tokenizer.padding_side
    try:
        texts = []
        for lm.tokenizer.padding_side in ("left", "right"):
            texts.append(lm.generate(PROMPTS, max_new_tokens=5))
        assert texts[0] == texts[1]
    finally:
        lm.tokenizer.padding_side = side


def test_generation_config_comes_back_after_an_error(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("lfm2")  # which keeps more than attention's keys and values: written by transformers' own generate
    shipped = lm.model.generation_config

    def fail(*_: Any, **__: Any) -> None:
        assert lm.model.generation_config is not shipped
        raise ZeroDivisionError

    monkeypatch.setattr(lm.model, "generate", fail)
    with pytest.raises(ZeroDivisionError):
        lm.generate(PROMPTS)
    assert lm.model.generation_config is shipped


def test_an_empty_list_is_fine(tiny: Make) -> None:
    assert tiny("llama").generate([]) == []


@pytest.fixture
def scripted(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], LM]]:
    """scripted(text) -> a model that says just that text after any prompt, whatever its weights hold."""

    def make(text: str) -> LM:
        lm = tiny("llama")
        said = [*lm.tokenizer(text, add_special_tokens=False)["input_ids"], lm.tokenizer.eos_token_id]
        forward = lm.model.forward
        state = {"step": 0}

        def talk(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out.logits = torch.zeros_like(out.logits)
            out.logits[..., said[min(state["step"], len(said) - 1)]] = 1
            state["step"] += 1
            return out

        monkeypatch.setattr(lm.model, "forward", talk)
        return lm

    return make


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        (" Paris.\nThe town", ("\n",), " Paris."),
        (" Paris. The town", ("\n",), " Paris. The town"),
        (" Paris. The town", (".", "\n"), " Paris"),
        (" Paris. The town", ("town", "ris"), " Pa"),
        (" Paris. The town", (), " Paris. The town"),
        (" 東京 is", ("\n",), " 東京 is"),
    ],
)
def test_completion_is_cut_at_the_earliest_stop(
    text: str, stops: tuple[str, ...], want: str, scripted: Callable[[str], LM]
) -> None:
    lm = scripted(text)
    assert lm.complete("The capital of France is", stops=stops) == want


def test_max_new_tokens_bounds_the_answer(tiny: Make) -> None:
    lm = tiny("llama")
    text = lm.complete("The", max_new_tokens=2, stops=())
    assert text == lm.tokenizer.decode(step_by_step(lm, "The", 2), skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_weight_acts_like_its_change_added_to_the_output(family: str, tiny: Make, randn: Any) -> None:
    """logits under W + ΔW = logits with ΔW k added at the MLP's output, wherever the family keeps W."""
    lm = tiny(family)
    row = lm.encode("The capital of France is")
    at = torch.tensor([0]), torch.tensor([row.prediction])
    site = lm.site(3, "down_proj")
    left, right = randn(32, 2), randn(2, site.weight.shape[1])
    everywhere = torch.zeros(len(row.ids), dtype=torch.long), torch.arange(len(row.ids))
    batch, found = pad([row]), []
    with torch.no_grad():
        before = logits_at(lm, batch, at)
        run(lm, batch, {Point(3, "key"): lambda k: found.append(k[0])})
        added = logits_at(lm, batch, at, {Point(3, "mlp"): adding(*everywhere, found[0] @ (left @ right).T)})
        with lm.edited(lm.delta({site.name: [site.stored(left, right)]})):
            after = logits_at(lm, batch, at)
        again = logits_at(lm, batch, at)
    assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)
    assert_close(after, added, rtol=1e-5, atol=1e-6)
    assert torch.equal(before, again)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["down_proj", "up_proj", "q_proj", "v_proj"])
def test_rows_columns_and_entries_of_a_site_land_where_they_belong(
    family: str, kind: Any, tiny: Make, randn: Any
) -> None:
    """A change in math orientation, stored and applied, moves exactly those places of `site.weight`, fused or not."""
    lm = tiny(family)
    if not lm.has(1, kind):
        pytest.skip(f"{family} has no {kind} of its own")
    site = lm.site(1, kind)
    before, others = site.weight.clone(), {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    out, into = before.shape
    rows, columns, entries = torch.tensor([7, 0, 3]), torch.tensor([1, 9]), torch.tensor([2, into + 1, 5 * into + 4])
    r, c, e, full = randn(3, into), randn(out, 2), randn(3), randn(out, into)
    for change, index, values in (
        (site.stored_rows(rows, r), (rows, slice(None)), r),
        (site.stored_columns(columns, c), (slice(None), columns), c),
        (site.stored_entries(entries, e), (entries // into, entries % into), e),
        (site.stored_dense(full), (slice(None), slice(None)), full),
    ):
        wanted = torch.zeros_like(before)
        wanted[index] = values
        with lm.edited(lm.delta({site.name: [change]})):
            moved = site.weight - before
            elsewhere = [n for n, p in lm.model.named_parameters() if not torch.equal(p, others[n])]
            n_moved = int((lm.parameter(site.name) != others[site.name]).sum())
        assert_close(moved, wanted, rtol=1e-6, atol=1e-9)
        assert elsewhere == [site.name]
        assert n_moved == int((wanted != 0).sum())  # nothing of the other projections in a fused matrix


def test_a_sites_bias_is_that_of_its_own_outputs(tiny: Make) -> None:
    lm = tiny("gpt2")
    with torch.no_grad():
        lm.parameter("transformer.h.0.attn.c_attn.bias").copy_(torch.arange(96.0))
    site = lm.site(0, "k_proj")
    assert site.bias is not None
    assert site.bias.tolist() == list(range(32, 64))
    assert lm.parameter(site.bias_name).shape == (96,)
    assert tiny("llama").site(0, "k_proj").bias is None


# --- one LM, one thread, no surprises ------------------------------------------------------------------------------


def test_a_second_lm_over_a_model_is_refused_while_the_first_is_alive(tiny: Make) -> None:
    lm = tiny("llama")
    with pytest.raises(UnsupportedModel, match=r"has an LM already.*release\(\)"):
        LM(lm.model, lm.tokenizer)
    delta = make_delta(lm, lm.site(0, "down_proj").name)
    lm.apply(delta)
    with pytest.raises(DeltaNotApplied, match="1 delta is applied"):
        lm.release()
    lm.revert(delta)
    lm.release()
    second = LM(lm.model, lm.tokenizer)
    model = second.model
    del lm, second
    LM(model, tokenizer())  # gone is as good as released


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
def test_a_copy_of_an_lm_has_its_model_and_undoes_what_is_on_it(copied: Any, tiny: Make, untouched: Any) -> None:
    lm = tiny("llama")
    before, look = weights(lm), untouched(lm)
    delta = make_delta(lm, lm.site(0, "down_proj").name)
    with pytest.raises(UnsupportedModel, match="has an LM already"):
        LM((unedited := copied(lm)).model, tokenizer())
    assert unedited.fingerprint() == lm.fingerprint()
    lm.apply(delta)
    other = copied(lm)
    assert other.applied == (delta,)
    with pytest.raises(UnsupportedModel, match="has an LM already"):
        LM(other.model, tokenizer())
    other.revert_all()
    assert is_restored(other, before)
    assert not is_restored(lm, before)
    lm.revert(delta)
    assert untouched(lm) == look


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("scope", ["edited", "without_deltas", "frozen_eval", "scope"])
def test_an_lm_is_not_copied_inside_a_scope(scope: str, copied: Any, tiny: Make, untouched: Any) -> None:
    lm = tiny("llama")
    before = untouched(lm)
    with getattr(lm, scope)(), pytest.raises(ModelBusy, match=r"cannot be copied or pickled inside a scope.*lm\.apply"):
        copied(lm)
    assert untouched(lm) == before
    assert copied(lm)


class Doubling(Beside):
    """Doubles what an MLP returns."""

    kind = "doubling"

    def hooks(self) -> list[Hook]:
        return [Hook("transformer.h.1.mlp", _doubled)]


def _doubled(inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


@pytest.mark.parametrize("in_a_circle", [False, True])
def test_weights_that_an_lm_left_edited_are_no_base(in_a_circle: bool) -> None:
    model = tiny_model("gptj", torch.float32)
    lm = LM(model, tokenizer())
    edited = make_delta(lm, down(1))
    lm.apply(edited)
    if in_a_circle:
        lm.myself = lm  # type: ignore[attr-defined]
    del lm
    for _ in range(2):
        with pytest.raises(
            UnsupportedModel,
            match=rf"left edited.*1 parameter \({re.escape(down(1))}\).*load the model again.*deepcopy",
        ):
            LM(model, tokenizer())
    copied = LM(copy.deepcopy(model), tokenizer())
    assert copied.fingerprint() != edited.base


@pytest.mark.parametrize("kind", ["low_rank", "rows", "entries"])
def test_a_model_whose_weights_were_put_back_since_is_free(kind: str) -> None:
    model = tiny_model("gptj", torch.float32)
    base = copy.deepcopy(model.state_dict())
    lm = LM(model, tokenizer())
    fingerprint, shape = lm.fingerprint(), lm.parameter(down(1)).shape
    change: Any = {
        "low_rank": lambda: LowRank(left=torch.ones(shape[0], 1), right=torch.ones(1, shape[1])),
        "rows": lambda: Rows(index=torch.tensor([3]), rows=torch.ones(1, shape[1])),
        "entries": lambda: Entries(index=torch.tensor([5]), entries=torch.ones(1)),
    }[kind]()
    lm.apply(lm.delta({down(1): [change]}))
    edited = copy.deepcopy(model.state_dict())
    del lm
    model.double()
    with pytest.raises(UnsupportedModel, match="left edited"):  # in another dtype, but there
        LM(model, tokenizer())
    model.float().load_state_dict(base)
    lm = LM(model, tokenizer())
    assert lm.fingerprint() == fingerprint
    lm.release()
    del lm
    model.load_state_dict(edited)
    with pytest.raises(UnsupportedModel, match="left edited"):
        LM(model, tokenizer())


def test_an_lm_that_took_its_edits_back_leaves_the_model_free() -> None:
    model = tiny_model("gptj", torch.float32)
    lm = LM(model, tokenizer())
    base, delta = lm.fingerprint(), make_delta(lm, down(1))
    with lm.edited(delta):
        pass
    lm.apply(delta)
    with lm.without_deltas():
        pass
    lm.revert_all()
    del lm
    assert LM(model, tokenizer()).fingerprint() == base


def test_hooks_of_attachments_that_are_left_on_a_model_are_named() -> None:
    model, module = tiny_model("gptj", torch.float32), "transformer.h.1.mlp"
    lm = LM(model, tokenizer())
    found = Doubling(base=lm.fingerprint())
    with lm.edited(found):
        copied = copy.deepcopy(model)
    message = rf"{re.escape(module)} carries a hook of attachment {found.id}.*revert_all\(\)"
    with pytest.raises(UnsupportedModel, match=message):
        LM(copied, tokenizer())
    LM(copy.deepcopy(model), tokenizer())
    lm.apply(found)
    del lm
    with pytest.raises(UnsupportedModel, match=message):
        LM(model, tokenizer())


def test_parameters_in_the_same_memory_are_not_editable() -> None:
    model = tiny_model("llama", torch.float32)
    one, two = (model.model.layers[i].mlp.down_proj for i in (0, 1))
    two.weight = torch.nn.Parameter(one.weight.data.view(-1)[: one.weight.numel()].view_as(one.weight))
    lm = LM(model, tokenizer())
    with pytest.raises(NotEditable, match=r"same memory as model\.layers\.0\.mlp\.down_proj\.weight"):
        lm.check_editable("model.layers.1.mlp.down_proj.weight")
    lm.check_editable("model.layers.2.mlp.down_proj.weight")


def test_another_thread_waits_and_then_is_told(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "BUSY_SECONDS", 0.05)
    lm = tiny("gptj")
    delta, other = make_delta(lm, down(0), 1), make_delta(lm, down(1), 2)
    heard: list[BaseException | None] = []

    def work() -> None:
        try:
            lm.apply(other)
            heard.append(None)
        except ModelBusy as error:
            heard.append(error)

    with lm.edited(delta):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        lm.fingerprint()  # the thread that has the scope goes on as it likes
    assert "another thread is changing it" in str(heard[0])
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard[1] is None
    assert lm.applied == (other,)


def test_a_copy_waits_for_a_scope_of_another_thread(tiny: Make) -> None:
    lm = tiny("gptj")
    before, inside = weights(lm), threading.Event()

    def work() -> None:
        with lm.edited(make_delta(lm, down(0))):
            inside.set()
            time.sleep(0.2)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    copied = copy.deepcopy(lm)
    thread.join()
    assert is_restored(copied, before)
    assert copied.applied == ()


def test_the_fingerprint_follows_weights_that_something_else_changes(tiny: Make) -> None:
    lm = tiny("gptj", torch.float32)
    first = lm.fingerprint()
    lm.parameter(down(0)).data += 1
    second = lm.fingerprint()
    assert second != first
    lm.model.half()
    assert lm.fingerprint() not in (first, second)


def test_flags_and_hooks_that_an_interrupt_left_are_put_back_by_the_next_call(tiny: Make) -> None:
    lm = tiny("gptj")
    lm.model.train()
    scope = lm.frozen_eval()
    scope.__enter__()
    assert not lm.model.training
    del scope  # as after an interrupt that kept __exit__ from running
    assert not lm.consistent
    assert "interrupted" in repr(lm)
    lm.applied  # noqa: B018
    assert lm.consistent
    assert lm.model.training
    assert all(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize("family", ["gptj", "mpt"])  # n_positions, max_seq_len
def test_a_prompt_longer_than_the_context_is_refused_with_its_ends(family: str, tiny: Callable[..., LM]) -> None:
    lm = tiny(family)
    text = "The first words of it, " + "very " * 150 + "and the last ones."
    with pytest.raises(
        InvalidEdit, match=r"'The first words .* \.\.\. .*the last ones\.' has \d+ tokens; .* 128 tokens"
    ):
        lm.complete(text)
    with pytest.raises(InvalidEdit, match=r"has 10,000,000 characters"):  # no tokens are counted
        lm.complete("x" * 10_000_000)


def test_the_context_of_longrope_ends_where_other_factors_begin() -> None:
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[3.0, 5.0, 9.0, 20.0])
    length = dict(original_max_position_embeddings=20)
    lm = LM(tiny_model("phi3", **length, rope_parameters=rope | length), tokenizer())
    assert lm.context_length == 20
    assert len(lm.encode("You know Paris").ids) < 20
    with pytest.raises(InvalidEdit, match="reads 20 tokens at once"):
        lm.complete("The capital of France is a large town on a river, and you know the way home")


def test_an_edit_longer_than_the_context_is_refused_before_any_pass(tiny: Callable[..., LM]) -> None:
    edit = Edit("very " * 150 + "{} is", "France", "Rome", id="long")
    lm = tiny("llama")
    lm.model.forward = None  # a pass would fail
    for name in ("memit", "ft"):
        with pytest.raises(InvalidEdit, match=r"edit 'long': .* tokens"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            in_steps(retcon.method(name, for_model=lm), lm, [edit])


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    model = tiny_model("gptj")
    model.resize_token_embeddings(100)
    with pytest.raises(UnsupportedModel, match=r"the tokenizer has \d+ tokens, the embedding 100 rows"):
        LM(model, tokenizer())
