"""What we know of each architecture: one row per `config.model_type`, chosen by that alone, never by name or shape.

Module paths are relative to the block; `stored` says how the family stores its matrices ("out,in" is torch's Linear,
"in,out" is the Conv1D of GPT-2), and is checked against the modules' types when a model is loaded.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from retcon.errors import UnknownLayout, UnsupportedModel


@dataclass(frozen=True)
class Fused:
    """One projection inside a fused matrix: some of its output rows."""

    module: str
    """Path of the fused module inside the block."""
    part: Literal["q", "k", "v", "gate", "up"]
    cut: Literal["blocks", "groups"] = "blocks"
    """`blocks`: the parts come one after the other; `groups`: for each key head, its query heads, itself and its value
    head (GPT-NeoX, where every query head has its own; Falcon)."""

    def rows(self, config: Any) -> Int[Tensor, " rows"]:
        """Output rows of the fused matrix that belong to this part."""
        heads, shared = config.num_attention_heads, _key_heads(config)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        n_groups = shared if self.cut == "groups" else 1
        if self.part in ("gate", "up"):
            sizes = {"gate": config.intermediate_size, "up": config.intermediate_size}
        else:
            sizes = {"q": heads * size, "k": shared * size, "v": shared * size}
        sizes = {part: rows // n_groups for part, rows in sizes.items()}
        start = sum(list(sizes.values())[: list(sizes).index(self.part)])
        group = torch.arange(n_groups) * sum(sizes.values())
        return (group[:, None] + torch.arange(start, start + sizes[self.part])).reshape(-1)


def _key_heads(config: Any) -> int:
    """Number of key and value heads; the query heads' where they are not shared."""
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
    down_proj: str
    """Second MLP matrix (m -> d): the associative memory that locate-then-edit methods write to."""
    up_proj: str | Fused
    """First MLP matrix (d -> m)."""
    gate_proj: str | Fused | None = None
    """Gate matrix of a gated MLP."""
    q_proj: str | Fused
    k_proj: str | Fused
    v_proj: str | Fused
    o_proj: str
    """Attention out-projection."""
    embedding: str
    final_norm: str
    head: str = "lm_head"
    stored: Literal["out,in", "in,out"] = "out,in"
    """Orientation in which the family stores the matrices above."""
    parallel: bool = False
    """Attention and MLP read the same input and are added together (GPT-J); otherwise one after the other."""
    mlp_post_norm: str | None = None
    """Norm between the MLP's output and the residual stream (gemma2, gemma3, olmo2)."""
    residual_multiplier: bool = False
    """What a block adds to the residual stream is multiplied by a constant first (granite)."""

    @property
    def adds_mlp_output(self) -> bool:
        """Whether a change of the MLP's output is the same change of the residual stream."""
        return self.mlp_post_norm is None and not self.residual_multiplier


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
_POST_NORM = replace(_LLAMA, mlp_post_norm="post_feedforward_layernorm")
_GATELESS = replace(_LLAMA, gate_proj=None)
_GLM = replace(
    _LLAMA, up_proj=Fused("mlp.gate_up_proj", "up"), gate_proj=Fused("mlp.gate_up_proj", "gate")
)  # gate and up in one matrix, q, k and v each in its own
_BLOOM = Layout(
    block="transformer.h.{}",
    down_proj="mlp.dense_4h_to_h",
    up_proj="mlp.dense_h_to_4h",
    q_proj=Fused("self_attention.query_key_value", "q", cut="groups"),
    k_proj=Fused("self_attention.query_key_value", "k", cut="groups"),
    v_proj=Fused("self_attention.query_key_value", "v", cut="groups"),
    o_proj="self_attention.dense",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
)

LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(
        block="transformer.h.{}",
        down_proj="mlp.c_proj",
        up_proj="mlp.c_fc",
        q_proj=Fused("attn.c_attn", "q"),
        k_proj=Fused("attn.c_attn", "k"),
        v_proj=Fused("attn.c_attn", "v"),
        o_proj="attn.c_proj",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        stored="in,out",
    ),
    "gptj": Layout(
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
    ),
    "gpt_neox": Layout(
        block="gpt_neox.layers.{}",
        down_proj="mlp.dense_4h_to_h",
        up_proj="mlp.dense_h_to_4h",
        q_proj=Fused("attention.query_key_value", "q", cut="groups"),
        k_proj=Fused("attention.query_key_value", "k", cut="groups"),
        v_proj=Fused("attention.query_key_value", "v", cut="groups"),
        o_proj="attention.dense",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        parallel=True,
    ),
    "gpt_neo": Layout(
        block="transformer.h.{}",
        down_proj="mlp.c_proj",
        up_proj="mlp.c_fc",
        q_proj="attn.attention.q_proj",
        k_proj="attn.attention.k_proj",
        v_proj="attn.attention.v_proj",
        o_proj="attn.attention.out_proj",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
    ),
    "bloom": _BLOOM,
    "falcon": replace(_BLOOM, parallel=True),
    "mpt": Layout(
        block="transformer.blocks.{}",
        down_proj="ffn.down_proj",
        up_proj="ffn.up_proj",
        q_proj=Fused("attn.Wqkv", "q"),
        k_proj=Fused("attn.Wqkv", "k"),
        v_proj=Fused("attn.Wqkv", "v"),
        o_proj="attn.out_proj",
        embedding="transformer.wte",
        final_norm="transformer.norm_f",
    ),
    "llama": _LLAMA,
    "cwm": _LLAMA,
    "ernie4_5": _LLAMA,
    "gemma": _LLAMA,
    "helium": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "cohere": replace(_LLAMA, parallel=True),
    "cohere2": replace(_LLAMA, parallel=True),
    "granite": replace(_LLAMA, residual_multiplier=True),
    "apertus": _GATELESS,
    "arcee": _GATELESS,
    "jais2": _GATELESS,
    "nemotron": _GATELESS,
    "starcoder2": replace(_GATELESS, up_proj="mlp.c_fc", down_proj="mlp.c_proj"),
    "phi": replace(
        _GATELESS,
        up_proj="mlp.fc1",
        down_proj="mlp.fc2",
        o_proj="self_attn.dense",
        final_norm="model.final_layernorm",
        parallel=True,
    ),
    "exaone4": _POST_NORM,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "glm": _GLM,
    "glm4": replace(_GLM, mlp_post_norm="post_mlp_layernorm"),
    "phi3": replace(
        _GLM,
        q_proj=Fused("self_attn.qkv_proj", "q"),
        k_proj=Fused("self_attn.qkv_proj", "k"),
        v_proj=Fused("self_attn.qkv_proj", "v"),
    ),
    "opt": Layout(  # the block holds the MLP's matrices itself, and fc2 sees (batch x seq, m)
        block="model.decoder.layers.{}",
        down_proj="fc2",
        up_proj="fc1",
        q_proj="self_attn.q_proj",
        k_proj="self_attn.k_proj",
        v_proj="self_attn.v_proj",
        o_proj="self_attn.out_proj",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
    ),
}

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WRAPPED = ("text_config", "language_config", "llm_config")


def layout_for(config: Any) -> Layout:
    """The row for a transformers config.

    Raises:
        UnsupportedModel: mixture of experts, a multimodal wrapper, or an odd variant of a known family.
        UnknownLayout: no row for this `model_type`; the message says how to add one.
    """
    kind = config.model_type
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        raise UnsupportedModel(
            f"model_type {kind!r} routes tokens through experts: a key reaches only some of them, so no single matrix "
            "holds a fact. Use a dense model of the family."
        )
    if kind not in LAYOUTS:
        inner = next((n for n in _WRAPPED if getattr(config, n, None) is not None), None)
        if inner:
            raise UnsupportedModel(
                f"model_type {kind!r} wraps a language model in another one (config.{inner}); load the text model by "
                f"itself (AutoModelForCausalLM on a text-only checkpoint) and pass LM(model, tokenizer)."
            )
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
    row = LAYOUTS[kind]
    if kind in ("gpt_neox", "stablelm"):
        row = replace(row, parallel=config.use_parallel_residual)
    elif kind == "falcon":
        row = replace(row, parallel=config.new_decoder_architecture or config.parallel_attn)
    elif kind == "granite":
        row = replace(row, residual_multiplier=config.residual_multiplier != 1)
    return row
