"""A fresh tokenizer and a fresh model of every architecture that the library supports, small enough for a CPU."""

from collections.abc import Sequence
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from recipes.chat import TEMPLATE, TURN_END, TURN_START
from recipes.statements import Statement
from retcon.lm.layouts import LAYOUTS
from retcon.world.text import text

VOCABULARY, ANSWER_REPEATS = 4096, 4
CONTEXT = 512
HEAD_WIDTH = 32
MIXTURES = ("dots1",)
"""Families made as mixtures of experts: every block routes to a few of EXPERTS and has a shared one."""
EXPERTS, ACTIVE_EXPERTS, SHARED_EXPERTS = 8, 2, 2
"""Routed experts of a block, how many of them a token reaches, and how many of their widths the shared expert has."""
MODEL_TYPES = sorted(
    name
    for name, row in LAYOUTS.items()
    if name in MIXTURES or not (row.experts or row.others or name.endswith("_vl_text") or row.earlier != "attention")
)
"""Families all of whose blocks are an attention and a dense MLP, and MIXTURES."""
_ADD_BOS = ("llama", "mistral", "gemma2", "gemma3_text", "opt")
"""Families whose tokenizer puts a token before every text; the others have one special token, as GPT has."""
_GROUPED = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""Families whose members share keys and values between attention heads: three to one here."""
_HEADS_IN = {"codegen": 4, "diffllama": 2}
"""Families whose attention heads come in fours, or in twos; their heads may be of another width for that."""
_NO_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout")


def make_tokenizer(
    model_type: str, statements: Sequence[Statement], seed: int, *, chat: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; for LLaMA and its like a BOS comes before every text, for the others nothing does.

    It is trained on prompts and plain text, and on each answer ANSWER_REPEATS times however many statements share it:
    so longer answers stay two tokens or more, as they are in larger models. For `chat` there are tokens for the start
    and the end of a turn (the latter is the EOS then) and a template.
    """
    bos, eos = ("<s>", "</s>") if model_type in _ADD_BOS else ("<|endoftext|>", "<|endoftext|>")
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(dict.fromkeys((bos, eos, *((TURN_START, TURN_END) if chat else ())))),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = [s.prompt for s in statements]
    answers = sorted({s.completion for s in statements})
    bpe.train_from_iterator(prompts + ANSWER_REPEATS * answers + text(len(statements) // 4, seed=seed), trainer)
    if bos != eos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=TURN_END if chat else eos,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def document_end(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that ends a document; where the EOS ends a turn, it is another one."""
    found: int = tokenizer.convert_tokens_to_ids("</s>" if tokenizer.bos_token == "<s>" else "<|endoftext|>")
    return found


def make_model(model_type: str, tokenizer: PreTrainedTokenizerFast, *, layers: int, width: int) -> PreTrainedModel:
    """Make an untrained model; all families have about the same number of parameters at one depth and width.

    A gated MLP has three matrices, not two, and is therefore two thirds as wide. In a mixture of experts those that a
    token reaches are together as wide as that, so it has more parameters and runs as many. Everything not named here is
    the family's default, tied embeddings for instance.
    """
    heads, head_width = width // HEAD_WIDTH, HEAD_WIDTH
    if model_type in _HEADS_IN:
        heads = max(1, heads // _HEADS_IN[model_type]) * _HEADS_IN[model_type]
        head_width = width // heads
    fields: dict[str, Any]
    if model_type in ("gpt2", "gptj"):
        fields = {"n_positions": CONTEXT, "n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": 4 * width}
        if model_type == "gptj":
            fields |= {"rotary_dim": HEAD_WIDTH // 2}
    else:
        fields = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": CONTEXT,
        }
        if model_type == "opt":
            fields |= {"ffn_dim": 4 * width, "word_embed_proj_dim": width}
        elif model_type == "gpt_neo":
            del fields["num_hidden_layers"], fields["num_attention_heads"]
            kinds = [["global", "local"], layers // 2], *([[["global"], 1]] if layers % 2 else [])
            fields |= {"num_layers": layers, "num_heads": heads, "attention_types": list(kinds)}
        elif model_type == "gpt_neox":
            fields |= {"intermediate_size": 4 * width}
        elif model_type == "codegen":
            fields |= {"rotary_dim": head_width // 2}
        else:
            shared = heads // 3 if model_type in _GROUPED and heads % 3 == 0 else heads
            fields |= {"intermediate_size": 8 * width // 3, "num_key_value_heads": shared}
            if model_type in MIXTURES:
                fields |= {
                    "n_routed_experts": EXPERTS,
                    "num_experts_per_tok": ACTIVE_EXPERTS,
                    "n_shared_experts": SHARED_EXPERTS,
                    "moe_intermediate_size": 8 * width // 3 // (ACTIVE_EXPERTS + SHARED_EXPERTS) // 8 * 8,
                    "first_k_dense_replace": 0,
                    "n_group": 1,
                    "topk_group": 1,
                }
    kind = CONFIG_MAPPING[model_type]
    defaults = kind(**fields)
    if getattr(defaults, "head_dim", head_width) != head_width:
        fields |= {"head_dim": head_width}  # families that fix it (qwen3, gemma) or need to be told
    if hasattr(defaults, "query_pre_attn_scalar"):
        fields |= {"query_pre_attn_scalar": HEAD_WIDTH}
    fields |= {name: 0.0 for name in _NO_DROPOUT if getattr(defaults, name, 0)}  # facts are learned by heart
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = transformers.AutoModelForCausalLM.from_config(kind(vocab_size=VOCABULARY, **fields, **ids))
    if (end := document_end(tokenizer)) != tokenizer.eos_token_id:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    return model
