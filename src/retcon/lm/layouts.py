"""What we know of each architecture: one row per `config.model_type`, chosen by that alone, never by name or shape.

Blocks of a model may differ (experts in some layers, a recurrent mixer in others): a row then names further kinds of
block, and each block is of the first kind whose modules it has. Module paths are relative to the block; `stored` says
how the family stores its matrices ("out,in" is torch's Linear, "in,out" is the Conv1D of GPT-2), and is checked against
the modules' types when a model is loaded.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from retcon.arguments import check_choice
from retcon.errors import UnknownLayout, UnsupportedModel

FusedPart = Literal["q", "k", "v", "gate", "up"]
Cut = Literal["blocks", "groups"]
Stored = Literal["out,in", "in,out"]
Earlier = Literal["attention", "state", "other"]


@dataclass(frozen=True)
class Fused:
    """One projection inside a fused matrix: some of its output rows."""

    module: str
    """Path of the fused module inside the block."""
    part: FusedPart
    cut: Cut = "blocks"
    """`blocks`: the parts come one after the other; `groups`: for each key head, its query heads, itself and its value
    head (GPT-NeoX, where every query head has its own; Falcon; GPTBigCode without multi-query attention)."""

    def __post_init__(self) -> None:
        check_choice(self.part, FusedPart, "part of a fused matrix")
        check_choice(self.cut, Cut, "cut of a fused matrix")

    def rows(self, config: Any) -> Int[Tensor, " rows"]:
        """Return the output rows of the fused matrix that belong to this part."""
        heads, shared = config.num_attention_heads, _key_heads(config)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        n_groups = shared if self.cut == "groups" else 1
        if self.part in ("gate", "up"):
            width = getattr(config, "shared_intermediate_size", None) or config.intermediate_size
            sizes = {"gate": width, "up": width}
        else:
            sizes = {"q": heads * size, "k": shared * size, "v": shared * size}
        sizes = {part: rows // n_groups for part, rows in sizes.items()}
        start = sum(list(sizes.values())[: list(sizes).index(self.part)])
        group = torch.arange(n_groups) * sum(sizes.values())
        return (group[:, None] + torch.arange(start, start + sizes[self.part])).reshape(-1)


def _key_heads(config: Any) -> int:
    """Return the number of key and value heads; the query heads' where they are not shared."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if found := getattr(config, name, None):
            return int(found)
    return int(config.num_attention_heads)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where an architecture keeps what the library reads and writes."""

    block: str
    """Path of a transformer block, with `{}` for its number."""
    down_proj: str | None
    """Second MLP matrix (m -> d): the associative memory that locate-then-edit methods write to. In a mixture of
    experts the shared expert's; None where every expert is routed."""
    up_proj: str | Fused | None
    """First MLP matrix (d -> m)."""
    gate_proj: str | Fused | None = None
    """Gate matrix of a gated MLP."""
    experts: str | None = None
    """Module that holds all routed experts, their down-projections in one tensor (experts, d, m) or (experts, m, d)."""
    q_proj: str | Fused | None
    k_proj: str | Fused | None
    v_proj: str | Fused | None
    o_proj: str
    """Out-projection of the attention, or of the recurrent mixer in its place."""
    embedding: str
    final_norm: str
    head: str = "lm_head"
    stored: Stored = "out,in"
    """Orientation in which the family stores the matrices above."""
    parallel: bool = False
    """Attention and MLP read the same input and are added together (GPT-J); otherwise one after the other."""
    mlp_post_norm: str | None = None
    """Norm between the MLP's output and the residual stream (gemma2, gemma3, olmo2)."""
    residual_multiplier: bool = False
    """What a block adds to the residual stream is multiplied by a constant first (granite)."""
    gated_shared: bool = False
    """The shared expert's output is multiplied by a gate of the token (Qwen)."""
    earlier: Earlier = "attention"
    """How earlier tokens reach a block: through attention keys and values alone; also through a recurrent state, so
    that a replay runs every token; or in a way that no replay knows."""
    others: tuple["Layout", ...] = ()
    """Further kinds of block that the family has."""

    def __post_init__(self) -> None:
        check_choice(self.stored, Stored, "orientation of stored matrices")
        check_choice(self.earlier, Earlier, "way of earlier tokens")

    @property
    def adds_mlp_output(self) -> bool:
        """Whether a change of the down-projection's output is the same change of the residual stream."""
        return self.mlp_post_norm is None and not (self.residual_multiplier or self.gated_shared)

    @property
    def kinds(self) -> tuple["Layout", ...]:
        """All kinds of block, this one first."""
        return (self, *self.others)

    def within(self, decoder: str) -> "Layout":
        """Return the row of a text model that another model holds as its module `decoder` (a wrapper's)."""
        if decoder == "model":
            return self

        def moved(path: str) -> str:
            return decoder + path.removeprefix("model") if path.startswith("model.") else path

        return replace(
            self,
            block=moved(self.block),
            embedding=moved(self.embedding),
            final_norm=moved(self.final_norm),
            head=decoder.removesuffix("model") + self.head if decoder.endswith(".model") else self.head,
            others=tuple(other.within(decoder) for other in self.others),
        )


def _fused_qkv(module: str, cut: Literal["blocks", "groups"] = "blocks") -> dict[str, Any]:
    """Return the three projections inside one fused matrix."""
    return {"q_proj": Fused(module, "q", cut), "k_proj": Fused(module, "k", cut), "v_proj": Fused(module, "v", cut)}


_LLAMA = Layout(
    block="model.layers.{}",
    down_proj="mlp.down_proj",
    up_proj="mlp.up_proj",
    gate_proj="mlp.gate_proj",
    q_proj="self_attn.q_proj",
    k_proj="self_attn.k_proj",
    v_proj="self_attn.v_proj",
    o_proj="self_attn.o_proj",
    embedding="model.embed_tokens",
    final_norm="model.norm",
)
_GRANITE = replace(_LLAMA, residual_multiplier=True)
_POST_NORM = replace(_LLAMA, mlp_post_norm="post_feedforward_layernorm")
_GATELESS = replace(_LLAMA, gate_proj=None)
_GLM = replace(
    _LLAMA, up_proj=Fused("mlp.gate_up_proj", "up"), gate_proj=Fused("mlp.gate_up_proj", "gate")
)  # gate and up in one matrix, q, k and v each in its own


def _routed(row: Layout, experts: str) -> Layout:
    """Return a row whose MLP is routed experts alone."""
    return replace(row, down_proj=None, up_proj=None, gate_proj=None, experts=experts)


def _shared(row: Layout, path: str, experts: str = "mlp.experts") -> Layout:
    """Return a row whose MLP is a mixture of experts with a shared one at `path`."""
    return replace(
        row, down_proj=f"{path}.down_proj", up_proj=f"{path}.up_proj", gate_proj=f"{path}.gate_proj", experts=experts
    )


def _recurrent(row: Layout, o_proj: str) -> Layout:
    """Return a row whose block has a recurrent mixer instead of the attention."""
    return replace(row, q_proj=None, k_proj=None, v_proj=None, o_proj=o_proj)


def _with(row: Layout, *others: Layout) -> Layout:
    return replace(row, others=others)


_ROUTED = _routed(_LLAMA, "mlp.experts")
_LATENT = replace(_LLAMA, q_proj=None, k_proj=None, v_proj=None)  # multi-head latent attention: no plain q, k, v
_GATED_SHARED = replace(_shared(_LLAMA, "mlp.shared_expert"), gated_shared=True)
_QWEN_HYBRID = replace(_LLAMA, earlier="state")
_QWEN_HYBRID_MOE = replace(_GATED_SHARED, earlier="state")
_LFM2 = replace(
    _LLAMA,
    down_proj="feed_forward.w2",
    up_proj="feed_forward.w3",
    gate_proj="feed_forward.w1",
    o_proj="self_attn.out_proj",
    final_norm="model.embedding_norm",
    earlier="state",
)
_LFM2_ROUTED = _routed(_LFM2, "feed_forward.experts")
_FEED_FORWARD = replace(
    _LLAMA,
    down_proj="feed_forward.down_proj",
    up_proj="feed_forward.up_proj",
    gate_proj="feed_forward.gate_proj",
)
_JAMBA = replace(_FEED_FORWARD, final_norm="model.final_layernorm", earlier="state")
_JAMBA_ROUTED = _routed(_JAMBA, "feed_forward.experts")
_FALCON_H1 = replace(_JAMBA, residual_multiplier=True)  # attention and mixer side by side; factors after the MLP
_GRANITE_HYBRID = replace(
    _LLAMA,
    down_proj="shared_mlp.output_linear",
    up_proj=Fused("shared_mlp.input_linear", "up"),
    gate_proj=Fused("shared_mlp.input_linear", "gate"),
    residual_multiplier=True,
    earlier="state",
)
_GRANITE_HYBRID_MOE = replace(_GRANITE_HYBRID, experts="block_sparse_moe.experts")
_GRANITE_MOE = _routed(_GRANITE, "block_sparse_moe.experts")
_BLOOM = Layout(
    block="transformer.h.{}",
    down_proj="mlp.dense_4h_to_h",
    up_proj="mlp.dense_h_to_4h",
    **_fused_qkv("self_attention.query_key_value", "groups"),
    o_proj="self_attention.dense",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
)

_GPT2 = Layout(
    block="transformer.h.{}",
    down_proj="mlp.c_proj",
    up_proj="mlp.c_fc",
    **_fused_qkv("attn.c_attn"),
    o_proj="attn.c_proj",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
)
_GPTJ = Layout(
    block="transformer.h.{}",
    down_proj="mlp.fc_out",
    up_proj="mlp.fc_in",
    q_proj="attn.q_proj",
    k_proj="attn.k_proj",
    v_proj="attn.v_proj",
    o_proj="attn.out_proj",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    parallel=True,
)

_OPT = Layout(  # the block holds the MLP's matrices itself, and fc2 sees (batch x seq, m)
    block="model.decoder.layers.{}",
    down_proj="fc2",
    up_proj="fc1",
    q_proj="self_attn.q_proj",
    k_proj="self_attn.k_proj",
    v_proj="self_attn.v_proj",
    o_proj="self_attn.out_proj",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
)

LAYOUTS: dict[str, Layout] = {
    "gpt2": replace(_GPT2, stored="in,out"),
    "gptj": _GPTJ,
    "gpt_neox": Layout(
        block="gpt_neox.layers.{}",
        down_proj="mlp.dense_4h_to_h",
        up_proj="mlp.dense_h_to_4h",
        **_fused_qkv("attention.query_key_value", "groups"),
        o_proj="attention.dense",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        parallel=True,
    ),
    "gpt_neo": replace(
        _GPT2,
        q_proj="attn.attention.q_proj",
        k_proj="attn.attention.k_proj",
        v_proj="attn.attention.v_proj",
        o_proj="attn.attention.out_proj",
    ),
    "gpt_bigcode": _GPT2,
    "codegen": replace(
        _GPTJ, q_proj=None, k_proj=None, v_proj=None
    ),  # fused for four cores, which no part of a matrix names
    "persimmon": Layout(
        block="model.layers.{}",
        down_proj="mlp.dense_4h_to_h",
        up_proj="mlp.dense_h_to_4h",
        **_fused_qkv("self_attn.query_key_value", "groups"),
        o_proj="self_attn.dense",
        embedding="model.embed_tokens",
        final_norm="model.final_layernorm",
    ),
    "bloom": _BLOOM,
    "falcon": replace(_BLOOM, parallel=True),
    "mpt": Layout(
        block="transformer.blocks.{}",
        down_proj="ffn.down_proj",
        up_proj="ffn.up_proj",
        **_fused_qkv("attn.Wqkv"),
        o_proj="attn.out_proj",
        embedding="transformer.wte",
        final_norm="transformer.norm_f",
    ),
    **dict.fromkeys(
        (
            *("llama", "cwm", "diffllama", "ernie4_5", "gemma", "helium", "hunyuan_v1_dense", "internlm3"),
            *("iquestcoder", "ministral", "ministral3", "mistral", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3"),
            *("stablelm", "vaultgemma", "bitnet", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
        ),
        _LLAMA,
    ),
    "cohere": replace(_LLAMA, parallel=True),
    "cohere2": replace(_LLAMA, parallel=True),
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "hyperclovax": replace(_GRANITE, mlp_post_norm="post_norm2"),
    **dict.fromkeys(("apertus", "arcee", "jais2", "nemotron"), _GATELESS),
    "starcoder2": replace(_GATELESS, up_proj="mlp.c_fc", down_proj="mlp.c_proj"),
    "phi": replace(
        _GATELESS,
        up_proj="mlp.fc1",
        down_proj="mlp.fc2",
        o_proj="self_attn.dense",
        final_norm="model.final_layernorm",
        parallel=True,
    ),
    **dict.fromkeys(("exaone4", "gemma2", "gemma3_text", "olmo2", "olmo3"), _POST_NORM),
    "glm": _GLM,
    "glm4": replace(_GLM, mlp_post_norm="post_mlp_layernorm"),
    "phi3": replace(_GLM, **_fused_qkv("self_attn.qkv_proj")),
    "gemma4_text": replace(_POST_NORM, earlier="other", others=(replace(_POST_NORM, k_proj=None, v_proj=None),)),
    # mixtures of experts
    "flex_olmo": replace(_ROUTED, mlp_post_norm="post_feedforward_layernorm"),
    **dict.fromkeys(("gpt_oss", "minimax_m2", "mixtral", "olmoe", "phimoe"), _ROUTED),
    **dict.fromkeys(("mellum", "mimo_v2_flash", "qwen3_moe"), _with(_ROUTED, _LLAMA)),
    "granitemoe": _GRANITE_MOE,
    **dict.fromkeys(
        ("granitemoe_swa", "granitemoeshared"),
        _with(replace(_GRANITE_HYBRID_MOE, earlier="attention"), _GRANITE_MOE),
    ),
    "qwen2_moe": _with(_GATED_SHARED, replace(_LLAMA, gated_shared=True)),
    "hunyuan_v1_moe": _shared(_LLAMA, "mlp.shared_mlp"),
    "afmoe": _with(
        replace(_shared(_LLAMA, "mlp.shared_experts"), mlp_post_norm="post_mlp_layernorm"),
        replace(_LLAMA, mlp_post_norm="post_mlp_layernorm"),
    ),
    "axk1": _with(replace(_shared(_LATENT, "mlp.shared_experts"), mlp_post_norm="mlp.post_mlp_layernorm"), _LATENT),
    "cohere2_moe": _with(  # shared and routed experts are averaged, or summed, as the config says
        replace(_shared(_LLAMA, "mlp.shared_experts"), parallel=True, residual_multiplier=True),
        replace(_ROUTED, parallel=True),
        replace(_LLAMA, parallel=True),
    ),
    "flint": _with(_shared(_LLAMA, "mlp.shared_expert"), _LLAMA),
    "ernie4_5_moe": _with(_shared(_LLAMA, "mlp.shared_experts"), _ROUTED, _LLAMA),
    **dict.fromkeys(
        ("hy_v3", "laguna", "dots1", "glm4_moe", "solar_open"),
        _with(_shared(_LLAMA, "mlp.shared_experts"), _LLAMA),
    ),
    "kolibri1": replace(_shared(_LLAMA, "mlp.shared_experts"), mlp_post_norm="post_mlp_layernorm"),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _with(_shared(_LATENT, "mlp.shared_experts"), _LATENT)
    ),
    "qwen3_vl_moe_text": _with(_ROUTED, _LLAMA),
    # its router scales what enters an expert, not what leaves it, so that only the shared expert is linear in it
    "llama4_text": _with(replace(_shared(_LLAMA, "feed_forward.shared_expert"), experts=None), _FEED_FORWARD),
    # hybrids
    "qwen3_5_text": _with(_QWEN_HYBRID, _recurrent(_QWEN_HYBRID, "linear_attn.out_proj")),
    "qwen3_next": _with(
        _QWEN_HYBRID_MOE,
        _recurrent(_QWEN_HYBRID_MOE, "linear_attn.out_proj"),
        _QWEN_HYBRID,
        _recurrent(_QWEN_HYBRID, "linear_attn.out_proj"),
    ),
    "qwen3_5_moe_text": _with(_QWEN_HYBRID_MOE, _recurrent(_QWEN_HYBRID_MOE, "linear_attn.out_proj")),
    "lfm2": _with(_LFM2, _recurrent(_LFM2, "conv.out_proj")),
    "lfm2_moe": _with(
        _LFM2, _recurrent(_LFM2, "conv.out_proj"), _LFM2_ROUTED, _recurrent(_LFM2_ROUTED, "conv.out_proj")
    ),
    "bamba": _with(_JAMBA, _recurrent(_JAMBA, "mamba.out_proj")),
    "olmo_hybrid": _with(
        replace(_POST_NORM, earlier="state"), _recurrent(replace(_LLAMA, earlier="state"), "linear_attn.o_proj")
    ),
    "jamba": _with(
        _JAMBA,
        _recurrent(_JAMBA, "mamba.out_proj"),
        _JAMBA_ROUTED,
        _recurrent(_JAMBA_ROUTED, "mamba.out_proj"),
    ),
    "falcon_h1": _FALCON_H1,
    "granitemoehybrid": _with(
        _GRANITE_HYBRID_MOE,
        _recurrent(_GRANITE_HYBRID_MOE, "mamba.out_proj"),
        _GRANITE_HYBRID,
        _recurrent(_GRANITE_HYBRID, "mamba.out_proj"),
    ),
    "opt": _OPT,
    "biogpt": replace(
        _OPT,
        block="biogpt.layers.{}",
        embedding="biogpt.embed_tokens",
        final_norm="biogpt.layer_norm",
        head="output_projection",
    ),
}

REFUSED = {
    "falcon_mamba": "a block is a state-space mixer alone: it has no MLP that stores keys and values",
    "mamba": "a block is a state-space mixer alone: it has no MLP that stores keys and values",
    "mamba2": "a block is a state-space mixer alone: it has no MLP that stores keys and values",
    "nemotron_h": "a block is a mixer or an MLP, never both, and the methods speak of layers that have both",
    "rwkv": "its channel mixing reads the token before as well, so a key is not of one token",
}
"""Families that are known and cannot be edited, with the reason."""


def layout_for(config: Any) -> Layout:
    """Return the row for a transformers config; of a wrapper (a model that holds a text model), its text model's.

    Raises:
        UnsupportedModel: a family that cannot be edited, or an odd variant of a known one; with the reason.
        UnknownLayout: no row for this `model_type`; the message says how to add one.
    """
    config = config.get_text_config()
    kind = config.model_type
    if kind in REFUSED:
        raise UnsupportedModel(f"model_type {kind!r} cannot be edited: {REFUSED[kind]}")
    if kind not in LAYOUTS:
        raise UnknownLayout(
            f"no layout for model_type {kind!r}; known: {', '.join(sorted(LAYOUTS))}.\n"
            f"Pass layout=retcon.Layout(...) for a family of the same shape, or add a row to "
            f"src/retcon/lm/layouts.py (docs/models.md, 'A new family')."
        )
    if kind == "opt" and not getattr(config, "do_layer_norm_before", True):
        raise UnsupportedModel(
            "OPT with do_layer_norm_before=False (opt-350m) norms after each sum, so a block's output is no residual "
            "stream; use another OPT size."
        )
    if kind == "bloom" and config.apply_residual_connection_post_layernorm:
        raise UnsupportedModel(
            "BLOOM with apply_residual_connection_post_layernorm=True adds to a normed state, so a block's output is "
            "no residual stream; use another checkpoint."
        )
    if kind == "gemma4_text" and config.enable_moe_block:
        raise UnsupportedModel(
            "Gemma 4 with experts (enable_moe_block=True) norms the dense MLP and the experts apart before it adds "
            "them, which no layout describes yet; use a dense Gemma 4."
        )
    attends = getattr(config, "use_bidirectional_attention", None)
    if attends not in (None, False, "vision") or not getattr(config, "is_causal", True):  # "vision": in images alone
        raise UnsupportedModel(
            f"model_type {kind!r} with bidirectional attention (use_bidirectional_attention={attends!r}) lets a token "
            "see those after it, so that padding and answers change what comes before them; use a causal checkpoint."
        )
    row = LAYOUTS[kind]
    if kind in ("gpt_neox", "stablelm"):
        row = replace(row, parallel=config.use_parallel_residual)
    elif kind == "falcon":
        row = replace(row, parallel=config.new_decoder_architecture or config.parallel_attn)
    elif kind.startswith("granite") and config.residual_multiplier == 1:
        row = _with(*(replace(one, residual_multiplier=False) for one in row.kinds))
    elif kind == "gpt_bigcode" and not config.multi_query:
        row = replace(row, **_fused_qkv("attn.c_attn", "groups"))
    return row
