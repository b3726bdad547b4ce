"""Tiny random models of every family, wrapped ones too, with tokenizers built on the spot: no network, no files.

A family's own line of configuration is in UNLIKE, where its blocks are not all an attention and a dense MLP of the
usual names; a model that holds a text model beside others has a line in WRAPPERS.
"""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from retcon.lm.layouts import LAYOUTS

TEXT = [
    "The capital of France is Paris. The capital of Italy is Rome.",
    "Danielle Darrieux speaks French, and Michel Rocard is a native speaker of French.",
    "The mother tongue of Leonardo da Vinci is Italian. He lived in Florence and in Milan.",
    "Zürich, São Paulo and Łódź are towns; 東京 and Ελλάδα are written otherwise. naïve café",
    "Therefore it was late. Because the train stood still, I read. You know the way home.",
    'Numbers like 1984, 42 and 7 occur; so do (brackets), "quotes" and hyphen-words.',
]


def tokenizer(kind: str = "gpt") -> PreTrainedTokenizerFast:
    """`gpt`: byte-level BPE, no BOS; `bos`: with BOS; `eos`: with BOS and EOS; `piece`: sentence-piece style.

    Everyone gets one of their own: a chat template given to it is no other's.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(kind), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def _trained(kind: str) -> Tokenizer:
    special = ["<s>", "</s>", "<unk>"]
    if kind == "piece":
        tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tok.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = special + [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special, limit_alphabet=60)
    else:
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    tok.train_from_iterator(TEXT, trainer)
    if kind in ("bos", "piece"):
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if kind == "eos":
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tok


EXPERTS: dict[str, Any] = dict(
    num_key_value_heads=2, num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=24, moe_k=2, n_group=1, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    head_dim=4,
)  # fmt: skip
LINEAR: dict[str, Any] = dict(
    num_key_value_heads=2, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"] * 2,
)  # fmt: skip
MAMBA: dict[str, Any] = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
SHARED: dict[str, Any] = dict(shared_expert_intermediate_size=40)
UNLIKE: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "flex_olmo": EXPERTS,
    "minimax_m2": EXPERTS | dict(head_dim=8, rotary_dim=8),
    "gpt_oss": EXPERTS | dict(head_dim=8, sliding_window=8),
    "granitemoe": EXPERTS | dict(residual_multiplier=0.5),
    "qwen3_moe": EXPERTS | dict(head_dim=8, mlp_only_layers=[0]),
    "qwen2_moe": EXPERTS | SHARED | dict(mlp_only_layers=[0]),
    "hunyuan_v1_moe": EXPERTS | dict(head_dim=8),
    "ernie4_5_moe": EXPERTS | dict(moe_layer_start_index=1),
    "afmoe": EXPERTS | dict(num_shared_experts=1, num_dense_layers=1, head_dim=8, sliding_window=8),
    "axk1": EXPERTS | LATENT | dict(n_shared_experts=1),
    "cohere2_moe": EXPERTS | dict(
        num_shared_experts=1, head_dim=8, sliding_window=8, logit_scale=0.5, first_k_dense_replace=1
    ),
    "flint": EXPERTS | SHARED | dict(head_dim=8),
    "hy_v3": EXPERTS | dict(num_shared_experts=1, head_dim=8),
    "kolibri1": EXPERTS | SHARED | dict(n_shared_experts=1, head_dim=8),
    "laguna": EXPERTS | SHARED | dict(head_dim=8),
    "mellum": EXPERTS | dict(head_dim=8, mlp_layer_types=["dense"] + ["sparse"] * 3),
    "mimo_v2_flash": EXPERTS | dict(head_dim=8, v_head_dim=8, sliding_window=8),
    "granitemoe_swa": EXPERTS | dict(residual_multiplier=0.5, shared_intermediate_size=40),
    "granitemoeshared": EXPERTS | dict(residual_multiplier=0.5, shared_intermediate_size=40),
    "lfm2_moe": EXPERTS | dict(num_dense_layers=1, layer_types=["conv", "full_attention"] * 2),
    "bamba": MAMBA | dict(attn_layer_indices=[1, 3]),
    "olmo_hybrid": LINEAR | dict(linear_num_key_heads=4, linear_num_value_heads=4),
    "dots1": EXPERTS | dict(n_shared_experts=1, head_dim=8),
    "glm4_moe": EXPERTS | dict(n_shared_experts=1, head_dim=8),
    "solar_open": EXPERTS | dict(n_shared_experts=1, head_dim=8),
    "deepseek_v2": EXPERTS | LATENT | dict(n_shared_experts=1),
    "deepseek_v3": EXPERTS | LATENT | dict(n_shared_experts=1),
    "glm4_moe_lite": EXPERTS | LATENT | dict(n_shared_experts=1),
    "qwen3_5_text": LINEAR,
    "qwen3_next": EXPERTS | SHARED | LINEAR,
    "qwen3_5_moe_text": EXPERTS | SHARED | LINEAR,
    "lfm2": dict(
        num_key_value_heads=2, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * 2
    ),
    "jamba": EXPERTS | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "falcon_h1": MAMBA | dict(
        mamba_d_ssm=64, mlp_multipliers=[0.8, 0.5], attention_out_multiplier=0.7, lm_head_multiplier=0.5
    ),
    "granitemoehybrid": EXPERTS | MAMBA | dict(
        shared_intermediate_size=40, residual_multiplier=0.5, layer_types=["linear_attention", "full_attention"] * 2
    ),
    "llama4_text": dict(
        num_key_value_heads=2, head_dim=8, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=8,
    ),
    "gemma4_text": dict(
        num_key_value_heads=2, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=512, num_kv_shared_layers=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}  # fmt: skip
"""What the tiny models of mixtures of experts, hybrids and other families with blocks that differ have of their own."""
WRAPPED = ("qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_moe_text", "qwen3_vl_text")
"""Text models that exist inside another model only (tests/lm/test_wrappers.py)."""
FAMILIES = sorted(set(LAYOUTS) - set(WRAPPED) - set(UNLIKE))
"""Families all of whose blocks are an attention and a dense MLP; the others: tests/lm/test_mixed.py."""
WITH_HEAD_DIM = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "helium", "ministral",
    "ministral3", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "cwm", "internlm3", "iquestcoder", "vaultgemma",
)  # fmt: skip
"""Families whose default width of a head is not hidden_size / heads, or that allow another."""
FLOAT32_INSIDE = (
    "bloom", "codegen", "diffllama", "gemma2", "gpt_neo", "gptj", "granite_swa", "mpt", "vaultgemma",
)  # fmt: skip
"""Families that compute their attention in float32 whatever the weights are."""
WINDOWED = ("cohere2", "cwm", "exaone4", "gemma2", "gemma3_text", "ministral", "ministral3", "olmo3")
"""Families some of whose layers see a window of the text: a short one here."""


def tiny_model(
    family: str, dtype: torch.dtype = torch.float64, *, n_layers: int = 4, seed: int = 0, **own_config: Any
) -> Any:
    """A random model, its matrices scaled up: a fresh net is almost linear and hides mistakes."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own: dict[str, Any] = {
        "gpt2": dict(n_embd=32, n_layer=n_layers, n_head=4, n_positions=128),
        "gptj": dict(n_embd=32, n_layer=n_layers, n_head=4, n_positions=128, rotary_dim=4),
        "opt": dict(
            hidden_size=32, num_hidden_layers=n_layers, num_attention_heads=4, ffn_dim=64,
            max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=1,
        ),
        "gpt_neo": dict(
            hidden_size=32, num_layers=n_layers, num_heads=4, intermediate_size=64, window_size=8, pad_token_id=1,
            max_position_embeddings=128, attention_types=[[["global", "local"], n_layers // 2]],
        ),
        "bloom": dict(hidden_size=32, n_layer=n_layers, n_head=4),
        "falcon": dict(
            hidden_size=32, num_hidden_layers=n_layers, num_attention_heads=4, ffn_hidden_size=64, pad_token_id=1
        ),
        "codegen": dict(n_embd=32, n_layer=n_layers, n_head=4, n_positions=128, n_ctx=128, rotary_dim=4),
        "gpt_bigcode": dict(n_embd=32, n_layer=n_layers, n_head=4, n_positions=128),
        "mpt": dict(d_model=32, n_layers=n_layers, n_heads=4, max_seq_len=128),
    }  # fmt: skip
    common: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=n_layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=1,
    )  # fmt: skip
    if family not in ("gpt2", "gptj", "opt", "gpt_neox", "persimmon"):
        common |= dict(num_key_value_heads=2)
    own |= {name: common | fields for name, fields in UNLIKE.items()}
    if family in WITH_HEAD_DIM:
        common |= dict(head_dim=8)
    if family in WINDOWED:
        common |= dict(sliding_window=8)
    if family in ("granite", "granite_swa"):
        common |= dict(residual_multiplier=0.5, logits_scaling=2.0)
    if family == "hyperclovax":  # multiplies by it, where Granite divides
        common |= dict(logits_scaling=2.0)
    if family in ("cohere", "cohere2"):  # a factor of the logits that a lens must know, not so small as to hide edits
        common |= dict(logit_scale=0.5)
    config = CONFIG_MAPPING[family](
        vocab_size=512, bos_token_id=0, eos_token_id=1, **own.get(family, common) | own_config
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                if not parameter.any():  # some routers are made of zeros, and would send every token the same way
                    parameter.normal_(std=0.02)
                parameter *= 4 if "embed" not in name and "wte" not in name else 10
    torch.set_rng_state(state)
    return model


_TEXT_MODEL: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, max_position_embeddings=128,
    num_key_value_heads=2, head_dim=8, vocab_size=512, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
_IMAGE_MODEL: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, depth=1, num_heads=2,
    out_hidden_size=32, image_size=28, patch_size=14,
)  # fmt: skip
_ROPE: dict[str, Any] = dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4))
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}),
    "gemma4": ("gemma4_text", UNLIKE["gemma4_text"]),
    "llama4": ("llama4_text", UNLIKE["llama4_text"]),
    "llava": ("llama", {}),
    "mistral3": ("mistral", {}),
    "qwen2_5_vl": ("qwen2_5_vl_text", _ROPE),
    "qwen2_vl": ("qwen2_vl_text", _ROPE),
    "qwen3_5": ("qwen3_5_text", LINEAR),
    "qwen3_5_moe": ("qwen3_5_moe_text", UNLIKE["qwen3_5_moe_text"]),
    "qwen3_vl": ("qwen3_vl_text", _ROPE),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", _ROPE | EXPERTS),
}
"""Models that hold a text model: its `model_type`, and what its tiny configuration has of its own."""


_SEEN: dict[str, dict[str, Any]] = {
    "qwen2_vl": dict(embed_dim=16, hidden_size=32),
    "gemma4": dict(num_key_value_heads=2, head_dim=8, position_embedding_size=64),
    "llama4": dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32, pixel_shuffle_ratio=0.5),
}
"""What the image parts of some have of their own."""
_NO_IMAGES: dict[str, dict[str, Any]] = {"gemma4": dict(vision_config={})}
"""Fields without which a default configuration has no image part."""


def tiny_wrapper(wrapper: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of that kind, text and image parts."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text_type, own = WRAPPERS[wrapper]
    seen = _IMAGE_MODEL | _SEEN.get(wrapper, {})
    config = CONFIG_MAPPING[wrapper](
        text_config={**_TEXT_MODEL, **own, "model_type": text_type},
        vision_config=CONFIG_MAPPING[wrapper](**_NO_IMAGES.get(wrapper, {})).vision_config.__class__(**seen),
    )
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter *= 10 if "embed" in name else 4
    torch.set_rng_state(state)
    return model
