"""Second moments: one pass for all layers against one pass per layer, and the rate against counted arithmetic.

    python -m benchmarks.moments --model demo:gptj demo:llama
    python -m benchmarks.moments --model PATH --corpus text.txt
    python -m benchmarks.moments --shape gptj-1024 --tokens 32768
    python -m benchmarks.moments --shape gpt-j-6b llama-7b --tokens 1000000 --device cuda

A shape is a model with random weights (bfloat16 on a GPU, float32 on a CPU) that reads random tokens in rows of 64 to
512; the time does not depend on the values. Layers are those of the model's JEEP settings. Counted are, for real tokens
only, the model's matrices and attention scores up to the input of the highest edited matrix, and half of each k k^T,
it being symmetric. The machine's rate is the best of three matrix products in the model's dtype: 2048 x 2048 x 2048,
the model's first MLP matrix and its key products over a batch.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, LlamaConfig

import retcon
from benchmarks.common import command_line, dtype_on, flops_per_token, jeep_of, machine, moments_of, print_row, timed
from retcon import world
from retcon.lm.forward import Point, run
from retcon.lm.model import LM
from retcon.lm.prompts import Row, pad
from retcon.lm.site import Site
from retcon.memory.collect import collect
from retcon.memory.moments import document_rows

SHAPES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "gpt-j-6b": (GPTJConfig(), (3, 4, 5, 6, 7, 8, 15, 16)),
    "llama-7b": (LlamaConfig(), (5, 6, 7, 8, 9, 10, 22, 23)),
    "llama-3-8b": (
        LlamaConfig(
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            vocab_size=128256,
            max_position_embeddings=8192,
        ),
        (4, 5, 6, 7, 8, 22, 23),
    ),
    "gptj-128": (
        GPTJConfig(
            n_embd=128,
            n_layer=5,
            n_head=4,
            rotary_dim=16,
            n_positions=512,
            vocab_size=4096,
            bos_token_id=0,
            eos_token_id=0,
        ),
        (1, 2, 3),
    ),
    "gptj-1024": (
        GPTJConfig(n_embd=1024, n_layer=6, n_head=8, n_positions=1024, vocab_size=4096, bos_token_id=0, eos_token_id=0),
        (1, 2, 3, 4),
    ),
    "llama-256": (
        LlamaConfig(
            hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=688, vocab_size=4096
        ),
        (1, 2, 3, 4),
    ),
}
"""Configuration and edited layers."""


def random_lm(name: str, device: str, dtype: torch.dtype) -> LM:
    """Return a model of a shape with random weights, and the embedded world's tokenizer."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[name][0], dtype=dtype).eval()
    return LM(model, AutoTokenizer.from_pretrained(world.model_path("gptj")), name=name)


def random_rows(n_tokens: int, vocabulary: int, seed: int) -> list[Row]:
    """Return rows of 64 to 512 random tokens."""
    draw = random.Random(seed)
    rows: list[Row] = []
    while n_tokens > 0:
        length = min(draw.randint(64, 512), n_tokens)
        rows.append(Row(tuple(draw.choices(range(vocabulary), k=length)), length))
        n_tokens -= length
    return rows


def counted(lm: LM, sites: Sequence[Site], rows: Sequence[Row]) -> tuple[float, float]:
    """Return (forward, products of keys) in FLOPs for the real tokens of `rows`."""
    highest = max(s.layer for s in sites)
    linear = sum(flops_per_token(lm.block(layer)) for layer in range(highest + 1))
    linear -= 2 * lm.site(highest, "down_proj").weight.numel()  # the pass ends at its input
    width = lm.site(0, "o_proj").weight.shape[1]
    n_tokens = sum(len(r.ids) for r in rows)
    scores = 4 * width * (highest + 1) * sum(len(r.ids) ** 2 for r in rows)
    products = sum(s.weight.shape[1] * (s.weight.shape[1] + 1) for s in sites) * n_tokens
    return linear * n_tokens + scores, products


def check_count(lm: LM, sites: Sequence[Site], row: Row) -> None:
    """Compare the forward's count with torch's own counter, which may not know a fused attention, for one row."""
    highest = max(s.layer for s in sites)
    with FlopCounterMode(display=False) as counter, lm.frozen_eval(), torch.no_grad():
        run(lm, pad([row], lm.device), {Point(highest, "key"): lambda _: None})
    found, said = counted(lm, sites, [row])[0], counter.get_total_flops()
    scores = 4 * lm.site(0, "o_proj").weight.shape[1] * (highest + 1) * len(row.ids) ** 2
    assert 0.99 * (found - scores) <= said <= 1.01 * found, f"the formula counts {found:.4g} FLOPs, torch {said:.4g}"


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the shortest of some runs."""
    return min(timed(call, device=device)[1] for _ in range(repeats))


def product_rates(lm: LM) -> dict[str, float]:
    """Return FLOP/s of matrix products in the model's dtype, where the model is."""
    d_model, d_ff = lm.site(0, "down_proj").weight.shape
    n = 4096 if lm.device.type == "cpu" else 32768
    shapes = {"2048³": (2048, 2048, 2048), "MLP": (n, d_model, d_ff), "keys": (d_ff, n, d_ff)}
    rates = {}
    for name, (i, j, k) in shapes.items():
        a = torch.randn(i, j, device=lm.device, dtype=lm.dtype)
        b = torch.randn(j, k, device=lm.device, dtype=lm.dtype)
        a @ b
        rates[name] = 2 * i * j * k / seconds_of(partial(torch.matmul, a, b), lm.device, 5)
    return rates


def measure(name: str, lm: LM, layers: Sequence[int], rows: Sequence[Row], per_layer: bool, repeats: int) -> None:
    """Print one row of the table."""
    sites = [lm.site(layer, "down_proj") for layer in layers]
    check_count(lm, sites, rows[0])

    def passes(*groups: Sequence[Site]) -> None:
        for group in groups:
            for _ in collect(lm, group, rows):
                pass

    run(lm, pad(rows[:1], lm.device), {Point(max(layers), "key"): lambda _: None})
    before = product_rates(lm)
    once = seconds_of(lambda: passes(sites), lm.device, repeats)
    after = product_rates(lm)
    each = seconds_of(lambda: passes(*([s] for s in sites)), lm.device, 1) if per_layer else None
    rates = {shape: max(before[shape], after[shape]) for shape in before}
    forward, products = counted(lm, sites, rows)
    n_tokens, rate, best = sum(len(r.ids) for r in rows), (forward + products) / once, max(rates.values())
    cells = [
        name, len(layers), f"{n_tokens:,}", f"{once:.2f}", f"{each:.2f} ({each / once:.1f}x)" if each else "",
        f"{n_tokens / once:,.0f}", f"{forward / n_tokens / 1e6:,.1f} + {products / n_tokens / 1e6:,.1f}",
        f"{rate / 1e9:,.0f}", " / ".join(f"{r / 1e9:,.0f}" for r in rates.values()), f"{100 * rate / best:.0f} %",
    ]  # fmt: skip
    if lm.device.type == "cuda":
        cells.append(f"{torch.cuda.max_memory_allocated(lm.device) / 2**30:.1f}")
    print_row(*cells)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", nargs="*", default=[])
    parser.add_argument("--corpus", help="text; the model's default if left out")
    parser.add_argument("--shape", nargs="*", default=[], choices=SHAPES)
    parser.add_argument("--tokens", type=int, help="20 per key dimension if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="bfloat16 on a GPU and float32 on a CPU if left out")
    parser.add_argument("--layers", type=int, nargs="+", help="edited layers, if not the JEEP settings'")
    parser.add_argument("--no-per-layer", action="store_true", help="leave out the passes per layer")
    parser.add_argument("--repeats", type=int, default=2, help="of the pass for all layers; the shortest counts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    dtype = args.dtype or dtype_on(args.device)
    print(f"{machine()}, {dtype} on {args.device}, seed {args.seed}\n")
    memory = " peak GiB |" if args.device != "cpu" else ""
    print(
        "| model | layers | tokens | one pass, s | one per layer, s | tokens/s | MFLOP a token: forward + products |"
        f" GFLOP/s | products alone: 2048³ / MLP / keys | share of the best |{memory}"
    )
    print("|" + "---|" * (11 if memory else 10), flush=True)
    for name in args.model:
        lm = retcon.load(name, device=args.device, dtype=dtype)
        jeep = jeep_of(lm)
        layers = args.layers or [*jeep.low, *jeep.high]
        source = moments_of(lm, args.corpus)
        n_tokens = args.tokens or source.key(lm, lm.site(layers[0], "down_proj")).n_tokens
        rows = document_rows(lm, source.corpus.documents, n_tokens, source.max_length)
        measure(name, lm, layers, rows, not args.no_per_layer, args.repeats)
    for name in args.shape:
        lm = random_lm(name, args.device, getattr(torch, dtype))
        n_tokens = args.tokens or 20 * lm.site(0, "down_proj").weight.shape[1]
        rows = random_rows(n_tokens, lm.model.config.vocab_size, args.seed)
        measure(name, lm, args.layers or SHAPES[name][1], rows, not args.no_per_layer, args.repeats)


if __name__ == "__main__":
    main()
