"""Tiny random models of every architecture, with tokenizers built on the spot: no network, no files."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from functools import cache
from typing import Any

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from retcon.edits import Edit
from retcon.lm.fingerprint import fingerprint
from retcon.lm.layouts import LAYOUTS
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.memory.moments import GivenMoments, collect_moments

CORE = ("gemma2", "gpt2", "gpt_neox", "gptj", "llama", "mixtral", "phi3", "qwen2_moe", "qwen3_5_text")
"""Families that differ in structure; the everyday suite takes these, `make test-all` the others."""
BROAD = (
    "contract/test_methods.py",
    "memory/test_fast_values.py",
    "methods/test_fast_path.py",
    "methods/test_advised.py",
)
"""Tests of everything on every family, of which the everyday suite takes the first three."""
FIRST = ("gpt2", "gptj", "llama")
SHAPED = pytest.StashKey[dict[str, str]]()
WHOLE_RUNS = (
    "behaviour/", "bench/", "cli/", "cluster/", "evaluation/", "export/", "store/", "web/", "workflow/", "world/",
    "locate/test_figures.py", "locate/test_tracing.py", "test_examples.py", "test_guides.py",
    "test_readme.py",
)  # fmt: skip
"""Tests of commands and whole runs, in which shapes are not checked: checking takes about as long as the work."""


class Models(dict[str, LM]):
    """One LM per family, made when it is first asked for, so that a run pays for the families it tests."""

    def __missing__(self, family: str) -> LM:
        self[family] = LM(tiny_model(family), tokenizer())
        return self[family]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is parametrised with a family outside `CORE` as `long`; in the broadest files, outside `FIRST`."""
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            family = item.callspec.params.get("family") or item.callspec.params.get("model_type")
            kept = FIRST if item.location[0].endswith(BROAD) else CORE
            if family in LAYOUTS and family not in kept:
                item.add_marker("long")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes in tests of the parts: in the first case of each, and in every case of `make test-all`."""
    test = item.nodeid.partition("[")[0]
    first = item.session.stash.setdefault(SHAPED, {}).setdefault(test, item.nodeid) == item.nodeid
    checked = (first or item.get_closest_marker("long")) and not any(part in test for part in WHOLE_RUNS)
    jaxtyping.config.update("jaxtyping_disable", not checked)


TEXT = [
    "The capital of France is Paris. The capital of Italy is Rome.",
    "Danielle Darrieux speaks French, and Michel Rocard is a native speaker of French.",
    "The mother tongue of Leonardo da Vinci is Italian. He lived in Florence and in Milan.",
    "Zürich, São Paulo and Łódź are towns; 東京 and Ελλάδα are written otherwise. naïve café",
    "Therefore it was late. Because the train stood still, I read. You know the way home.",
    'Numbers like 1984, 42 and 7 occur; so do (brackets), "quotes" and hyphen-words.',
]


@cache
def tokenizer(kind: str = "gpt") -> PreTrainedTokenizerFast:
    """`gpt`: byte-level BPE, no BOS; `bos`: with BOS; `eos`: with BOS and EOS; `piece`: sentence-piece style."""
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
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


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
    "gemma4_text": dict(
        num_key_value_heads=2, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=512, num_kv_shared_layers=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}  # fmt: skip
"""What the tiny models of mixtures of experts, hybrids and other families with blocks that differ have of their own."""
WRAPPED = ("qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_text")
"""Text models that exist inside another model only (tests/lm/test_wrappers.py)."""
FAMILIES = sorted(set(LAYOUTS) - set(WRAPPED) - set(UNLIKE))
"""Families all of whose blocks are an attention and a dense MLP; the others: tests/lm/test_mixed.py."""
WITH_HEAD_DIM = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "helium", "ministral",
    "ministral3", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "cwm",
)  # fmt: skip
"""Families whose default width of a head is not hidden_size / heads, or that allow another."""
FLOAT32_INSIDE = ("bloom", "gemma2", "gpt_neo", "gptj", "mpt")
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
        "mpt": dict(d_model=32, n_layers=n_layers, n_heads=4, max_seq_len=128),
    }  # fmt: skip
    common = dict(
        hidden_size=32, num_hidden_layers=n_layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=1,
    )  # fmt: skip
    if family not in ("gpt2", "gptj", "opt", "gpt_neox"):
        common |= dict(num_key_value_heads=2)
    own |= {name: common | fields for name, fields in UNLIKE.items()}
    if family in WITH_HEAD_DIM:
        common |= dict(head_dim=8)
    if family in WINDOWED:
        common |= dict(sliding_window=8)
    if family == "granite":
        common |= dict(residual_multiplier=0.5, logits_scaling=2.0)
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


@pytest.fixture
def tiny() -> Callable[..., LM]:
    """tiny(family, dtype=float64, tokenizer="gpt", n_layers=4) -> LM."""

    def make(
        family: str = "gptj", dtype: torch.dtype = torch.float64, *, tok: str = "gpt", n_layers: int = 4, seed: int = 0
    ) -> LM:
        return LM(tiny_model(family, dtype, n_layers=n_layers, seed=seed), tokenizer(tok), name=f"tiny-{family}")

    return make


@pytest.fixture
def edit() -> Edit:
    return Edit("The capital of {} is", "France", "Rome", "Paris", id="france")


@pytest.fixture
def edits() -> list[Edit]:
    return [
        Edit("The capital of {} is", "France", "Rome", "Paris", id="france"),
        Edit("The mother tongue of {} is", "Danielle Darrieux", "Italian", "French", id="darrieux"),
        Edit("{} lived in", "Leonardo da Vinci", "São Paulo", "Florence", id="leonardo"),
        Edit("You know that {}", "Łódź", "a town in Greece", None, id="lodz"),
    ]


def random_moments(
    lm: LM, *, kinds: tuple[str, ...] = ("down_proj", "o_proj"), n_tokens: int = 1600, experts: bool = False
) -> GivenMoments:
    """Full-rank second moments of every layer, from random tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 400, (n_tokens // 16, 16), generator=generator).tolist()
    sites = [lm.site(layer, kind) for layer in range(lm.n_layers) for kind in kinds if lm.has(layer, kind)]  # type: ignore[arg-type]
    if experts:
        sites = [s for layer in range(lm.n_layers) if lm.kinds[layer].experts for s in lm.expert_sites(layer)]
    found = collect_moments(lm, sites, [Row(tuple(r), len(r)) for r in ids])
    return GivenMoments({s.id: m for s, m in found.items()})


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """randn(*shape) in float64, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def untouched() -> Callable[[LM], Any]:
    """Everything that a call must leave as it was, as one comparable value."""

    def look(lm: LM) -> Any:
        hooks = sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in lm.model.modules()
        )
        return (
            fingerprint(lm.model),
            hooks,
            [m.training for m in lm.model.modules()],
            [p.requires_grad for p in lm.model.parameters()],
            [p.grad is None for p in lm.model.parameters()],
            lm.tokenizer.padding_side,
            torch.get_rng_state().tolist(),
            [d.id for d in lm.applied],
        )

    return look
