"""Every row of the layout table against the model it describes."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.delta import Change
from retcon.errors import NotEditable, UnknownLayout, UnsupportedModel
from retcon.lm.layouts import LAYOUTS, REFUSED, Fused, Layout, layout_for
from retcon.lm.model import LM
from retcon.lm.site import Site, SiteName
from tests.conftest import FAMILIES, Models, tiny_model, tokenizer

KINDS: tuple[SiteName, ...] = get_args(SiteName)


@pytest.fixture(scope="module")
def models() -> dict[str, LM]:
    return Models()


def sites(lm: LM, layer: int = 1) -> dict[str, Site]:
    return {kind: lm.site(layer, kind) for kind in KINDS if getattr(lm.layout, kind) is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_of_a_row_leads_somewhere(family: str, models: dict[str, LM]) -> None:
    lm = models[family]
    layout, config = lm.layout, lm.model.config
    assert layout == LAYOUTS[family]
    assert lm.n_layers == config.num_hidden_layers
    for path in (layout.embedding, layout.final_norm, layout.head, *(layout.block.format(i) for i in range(4))):
        lm.model.get_submodule(path)
    if layout.mlp_post_norm is not None:
        lm.block(0).get_submodule(layout.mlp_post_norm)
    assert lm.head is lm.model.get_output_embeddings()
    assert lm.model.get_submodule(layout.embedding) is lm.model.get_input_embeddings()
    for layer in range(4):
        for kind, site in sites(lm, layer).items():
            assert lm.parameter(site.name) is site.module.weight, kind
            assert (site.layer, site.kind) == (layer, kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_is_seen_as_out_by_in_whatever_is_stored(family: str, models: dict[str, LM]) -> None:
    """W x + b equals what the module itself computes, for each site; square matrices (d = m) included."""
    lm = models[family]
    for kind, site in sites(lm).items():
        is_conv1d = type(site.module).__name__ == "Conv1D"
        assert site.transposed == is_conv1d == (lm.layout.stored == "in,out")
        x = torch.randn(5, site.weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            out, zero = site.module(x), site.module(torch.zeros_like(x))
        rows = slice(None) if site.rows is None else site.rows
        assert_close(x @ site.weight.T, (out - zero)[:, rows], msg=kind)
    assert sites(lm)["o_proj"].weight.shape == (32, 32)
    assert sites(lm)["down_proj"].weight.shape[0] == 32


@pytest.mark.parametrize(
    ("family", "kind"),
    [(f, k) for f in FAMILIES for k in KINDS if isinstance(getattr(LAYOUTS[f], k), Fused)],
)
def test_fused_rows_are_those_the_attention_uses_as_that_part(
    family: str, kind: SiteName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The query, key and value states that reach the attention function, changed by changing one part's rows only."""
    lm = LM(tiny_model(family), tokenizer())
    site = lm.site(1, kind)
    assert site.rows is not None
    ids = torch.tensor([[5, 9, 33, 60, 7, 101]])

    def parts() -> dict[str, Tensor]:
        """The parts of layer 1 as the model's own code separates them."""
        if kind in ("gate_proj", "up_proj"):
            return mlp_parts(lm, ids)
        return attention_parts(lm, ids, monkeypatch)

    if kind not in ("gate_proj", "up_proj") and not uses_attention_function(lm):
        pytest.skip("its attention is no function of query, key and value states; see the next test")
    before = parts()
    change = torch.randn(*site.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with lm.edited(lm.delta({site.name: [site.stored(change, torch.eye(site.weight.shape[1], dtype=torch.float64))]})):
        after = parts()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {kind}


def uses_attention_function(lm: LM) -> bool:
    import importlib

    return hasattr(importlib.import_module(type(lm.model).__module__), "eager_attention_forward")


OWN_ATTENTION: dict[str, dict[str, Any]] = {
    "bloom": {},
    "mpt": {},
    "falcon": {},  # multi-query
    "falcon, a key head per query head": dict(multi_query=False),
    "falcon, grouped": dict(new_decoder_architecture=True, num_kv_heads=2),
    "gpt_bigcode": {},  # multi-query
    "gpt_bigcode, a key head per query head": dict(multi_query=False),
}


@pytest.mark.parametrize("variant", OWN_ATTENTION)
def test_fused_rows_are_those_the_cache_holds_as_that_part(variant: str) -> None:
    """Changing the rows of k (v) changes what the cache holds as keys (values) alone; of q, neither, but the output."""
    lm = LM(tiny_model(variant.split(",")[0], **OWN_ATTENTION[variant]), tokenizer())
    ids = torch.tensor([[5, 9, 33, 60, 7, 101]])
    rows = [lm.site(1, kind).rows for kind in ("q_proj", "k_proj", "v_proj")]
    assert torch.cat([r for r in rows if r is not None]).sort().values.tolist() == list(
        range(len(lm.site(1, "q_proj").module.weight))  # type: ignore[arg-type]
    )

    def parts() -> dict[str, Tensor]:
        from transformers import DynamicCache

        with torch.no_grad():
            found = lm.model(ids, use_cache=True, past_key_values=DynamicCache())
        layer = found.past_key_values.layers[1]
        return {"k_proj": layer.keys, "v_proj": layer.values, "logits": found.logits}

    before = parts()
    for kind in ("q_proj", "k_proj", "v_proj"):
        site = lm.site(1, kind)
        change = torch.randn(*site.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        identity = torch.eye(site.weight.shape[1], dtype=torch.float64)
        with lm.edited(lm.delta({site.name: [site.stored(change, identity)]})):
            after = parts()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {kind, "logits"} - {"q_proj"}


@pytest.mark.parametrize("multi_query", [True, False])
def test_gpt_bigcode_s_parts_are_those_of_its_own_code(multi_query: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(tiny_model("gpt_bigcode", multi_query=multi_query), tokenizer())
    fused = lm.block(1).attn.c_attn
    inputs: list[Tensor] = []
    handle = fused.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    parts = attention_parts(lm, torch.tensor([[5, 9, 33, 60, 7, 101]]), monkeypatch)
    handle.remove()
    for kind in ("q_proj", "k_proj", "v_proj"):
        site = lm.site(1, kind)
        computed = inputs[0] @ site.weight.T + fused.bias[site.rows]  # (batch, seq, heads x size)
        heads = computed.unflatten(-1, (-1, 8)).transpose(1, 2)
        assert_close(heads, parts[kind].reshape(heads.shape), msg=kind)


def attention_parts(lm: LM, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Query, key and value states of layer 1, caught on their way into the attention function."""
    import importlib

    module = importlib.import_module(type(lm.model).__module__)
    caught: list[tuple[Tensor, ...]] = []
    own = module.eager_attention_forward

    def spy(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        caught.append((query.clone(), key.clone(), value.clone()))
        return own(self, query, key, value, *args, **kwargs)

    lm.model.set_attn_implementation("eager")
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", spy)
        lm.model(ids, use_cache=False)
    assert len(caught) == 4
    return dict(zip(("q_proj", "k_proj", "v_proj"), caught[1], strict=True))


def mlp_parts(lm: LM, ids: Tensor) -> dict[str, Tensor]:
    """Gate and up of layer 1: act's input is the gate, and the key divided by act(gate) is the up part."""
    caught: dict[str, Tensor] = {}
    mlp = lm.block(1).mlp
    handles = [
        mlp.activation_fn.register_forward_hook(lambda _, args, out: caught.update(gate=args[0], act=out)),
        mlp.down_proj.register_forward_pre_hook(lambda _, args: caught.update(key=args[0])),
    ]
    try:
        with torch.no_grad():
            lm.model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {"gate_proj": caught["gate"], "up_proj": (caught["key"] / caught["act"]).round(decimals=9)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_in_math_orientation_arrives_whatever_is_stored(family: str, randn: Any) -> None:
    """site.stored(L, R), applied, gives weight + L R: fused regions, interleaved heads and Conv1D included."""
    lm = LM(tiny_model(family), tokenizer())
    for kind, site in sites(lm).items():
        out, into = site.weight.shape
        before, whole = site.weight.clone(), site.module.weight.detach().clone()
        for rank in (1, out + into):
            left, right = randn(out, rank), randn(rank, into)
            change: Change = site.stored(left, right)
            with lm.edited(lm.delta({site.name: [change]})):
                assert_close(site.weight, before + left @ right, msg=kind)
                changed = site.module.weight.detach() != whole
            if site.rows is not None:  # nothing but the part's own rows moved
                others = torch.ones(max(whole.shape[0 if not site.transposed else 1], 1), dtype=torch.bool)
                others[site.rows] = False
                assert not (changed.T if site.transposed else changed)[others].any(), kind
        assert torch.equal(site.module.weight, whole)


def test_linear_and_conv1d_twins_get_the_same_change(randn: Any) -> None:
    """Invariant 2: the same ΔW from a Linear and from a Conv1D, the square out-projection included."""
    lm = LM(tiny_model("gpt2"), tokenizer())
    twin = LM(tiny_model("gpt2"), tokenizer())
    for layer in range(4):
        for path in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc", "attn.c_attn"):
            parent = twin.block(layer).get_submodule(path.split(".")[0])
            conv = getattr(parent, path.split(".")[1])
            linear = torch.nn.Linear(*conv.weight.shape, dtype=torch.float64)
            linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
            setattr(parent, path.split(".")[1], linear)
    twin.release()
    twin = LM(twin.model, tokenizer(), layout=replace(LAYOUTS["gpt2"], stored="out,in"))
    ids = torch.tensor([[5, 9, 33, 60, 7, 101]])
    for kind in ("o_proj", "down_proj", "up_proj", "q_proj", "k_proj", "v_proj"):
        a, b = lm.site(2, kind), twin.site(2, kind)
        assert_close(a.weight, b.weight)
        left, right = randn(a.weight.shape[0], 2), randn(2, a.weight.shape[1])
        with torch.no_grad():
            plain = lm.model(ids).logits
            with lm.edited(lm.delta({a.name: [a.stored(left, right)]})):
                one = lm.model(ids).logits
            with twin.edited(twin.delta({b.name: [b.stored(left, right)]})):
                two = twin.model(ids).logits
        assert_close(one, two)
        assert not torch.allclose(one, plain)


def test_the_view_of_a_whole_matrix_follows_the_model(models: dict[str, LM]) -> None:
    for family in ("gpt2", "llama"):
        site = models[family].site(0, "down_proj")
        assert site.weight.data_ptr() == site.module.weight.data_ptr()
        assert not site.weight.requires_grad


def test_alternating_heads_of_a_transposed_matrix_are_refused() -> None:
    site = Site(0, "q_proj", "x.weight", torch.nn.Linear(4, 4), transposed=True, rows=torch.tensor([0, 2]))
    with pytest.raises(NotEditable, match="alternating columns of a transposed matrix"):
        site.stored(torch.ones(2, 1), torch.ones(1, 4))


def test_grouped_query_attention_has_fewer_key_rows(models: dict[str, LM]) -> None:
    lm = models["phi3"]  # 4 heads of 8, 2 shared key heads
    rows = {kind: lm.site(0, kind).rows for kind in ("q_proj", "k_proj", "v_proj")}
    assert [r.tolist() for r in rows.values() if r is not None] == [
        list(range(32)), list(range(32, 48)), list(range(48, 64)),
    ]  # fmt: skip
    assert len(lm.site(0, "q_proj").module.weight) == 64


# --- what is refused -----------------------------------------------------------------------------------------------


def config(model_type: str, **own: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**own)


@pytest.mark.parametrize("model_type", ["mamba", "nemotron_h"])
def test_families_that_cannot_be_edited_are_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{model_type}' cannot be edited: {REFUSED[model_type]}"):
        layout_for(config(model_type))
    assert not set(REFUSED) & set(LAYOUTS)


def test_a_gemma_4_with_experts_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"Gemma 4 with experts \(enable_moe_block=True\).*use a dense Gemma 4"):
        layout_for(config("gemma4_text", enable_moe_block=True))


@pytest.mark.parametrize(
    ("model_type", "own"),
    [
        ("paligemma", {}),
        ("gemma3_text", dict(use_bidirectional_attention=True)),
        ("gemma4_text", dict(use_bidirectional_attention="all")),
        ("llama", dict(is_causal=False)),
    ],
)
def test_text_models_that_look_ahead_are_refused(model_type: str, own: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"with bidirectional attention .*; use a causal checkpoint"):
        layout_for(config(model_type, **own))
    layout_for(config("gemma4_text", use_bidirectional_attention="vision"))


def test_a_model_that_cannot_be_run_on_text_alone_is_refused() -> None:
    """As BLIP-2's is."""

    class WithImages(type(tiny_model("llama"))):  # type: ignore[misc]
        def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Any = None, **more: Any) -> None: ...

    model = tiny_model("llama")
    model.__class__ = WithImages
    with pytest.raises(UnsupportedModel, match="WithImages cannot be run on text alone: its forward demands pixel_val"):
        LM(model, tokenizer())


@pytest.mark.parametrize("family", ["granite", "granite_swa", "granitemoe_swa", "granitemoeshared", "granitemoehybrid"])
def test_a_factor_of_1_is_none(family: str) -> None:
    for factor in (0.5, 1.0):
        kinds = layout_for(config(family, residual_multiplier=factor)).kinds
        assert [kind.residual_multiplier for kind in kinds] == [factor != 1] * len(LAYOUTS[family].kinds)


@pytest.mark.parametrize(
    ("model_type", "text_type"),
    [("llava", "llama"), ("gemma3", "gemma3_text"), ("qwen2_vl", "qwen2_vl_text"), ("mistral3", "mistral")],
)
def test_a_wrapper_has_its_text_models_row(model_type: str, text_type: str) -> None:
    assert layout_for(config(model_type)) is LAYOUTS[text_type]


@pytest.mark.parametrize("model_type", ["ctrl", "nanochat"])
def test_unknown_families_are_refused_with_both_ways_out(model_type: str) -> None:
    with pytest.raises(UnknownLayout) as error:
        layout_for(config(model_type))
    text = str(error.value)
    assert f"no layout for model_type '{model_type}'; known: afmoe, apertus, arcee" in text
    assert "layout=retcon.Layout(...)" in text
    assert "src/retcon/lm/layouts.py" in text


def test_opt_350m_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"do_layer_norm_before=False \(opt-350m\).*use another OPT size"):
        layout_for(config("opt", do_layer_norm_before=False))
    assert layout_for(config("opt")) is LAYOUTS["opt"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"down_proj": "mlp.w2"}, r"places down_proj at 'model\.layers\.0\.mlp\.w2', but the model has no such module"),
        ({"o_proj": "attn.out"}, r"places o_proj at 'model\.layers\.0\.attn\.out'"),
        ({"block": "model.h.{}"}, r"places the blocks at 'model\.h', but the model has no such list"),
        ({"block": "model.norm.{}"}, r"places the blocks at 'model\.norm', but the model has no such list"),
        ({"stored": "in,out"}, r"is a Linear, but the layout says its weight is stored as \(in,out\)"),
        ({"head": "output"}, r"places head at 'output', but the model has no such module"),
        ({"embedding": "model.wte"}, r"places embedding at 'model\.wte', but the model has no such module"),
        ({"final_norm": "model.ln_f"}, r"places final_norm at 'model\.ln_f', but the model has no such module"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_fails_at_once(wrong: dict[str, Any], message: str) -> None:
    layout: Layout = replace(LAYOUTS["llama"], **wrong)
    with pytest.raises(UnsupportedModel, match=message):
        LM(tiny_model("llama"), tokenizer(), layout=layout)


def test_a_users_layout_serves_an_unknown_family() -> None:
    model = tiny_model("llama")
    model.config.model_type = "mystery"
    with pytest.raises(UnknownLayout):
        LM(model, tokenizer())
    lm = LM(model, tokenizer(), layout=LAYOUTS["llama"])
    assert lm.site(3, "gate_proj").weight.shape == (64, 32)


def test_a_part_that_the_family_does_not_have(models: dict[str, LM]) -> None:
    with pytest.raises(UnsupportedModel, match="gptj has no gate_proj"):
        models["gptj"].site(0, "gate_proj")
