"""How long the probes take: the contrast-based probe over many cases, and causal tracing against one pass per cell.

    python -m benchmarks.probe_speed --model demo:gptj
    python -m benchmarks.probe_speed --model PATH --data counterfact-edit.json --cases 1000 --corpus text.txt

Tracing is timed in three ways: as `retcon.locate` does it; by whole forward passes of our own, one per (token, layer)
cell, over the corrupted copies alone and with the head at the last position only ("lean"); and the way the first
public code does it, one pass per cell over the clean row and its copies, logits everywhere ("as released"). The ways
take turns, `--rounds` times; gains are medians over rounds. Times are of the processor, so that a busy machine matters
little. "Fewer tokens" says how many times fewer go through a block's MLP than in whole passes: about what is saved in
arithmetic.
"""

import itertools
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean, median
from typing import Any

import torch

import retcon
from benchmarks.common import cases_of, command_line, machine, timed
from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.lm.prompts import encode_edit, subject_tokens
from retcon.lm.site import SiteName
from retcon.locate import Tracing, causal_trace, contrast_probe, retrieve_word_sets
from retcon.locate.tracing import RestoredKind, default_window, embedding_deviation
from retcon.memory.moments import Corpus


def seconds(call: Callable[[], object]) -> float:
    return timed(call, clock=time.process_time)[1]


@torch.no_grad()
def as_released(lm: LM, edit: Edit, kind: RestoredKind, settings: Tracing) -> torch.Tensor:
    """Return scores (tokens, layers): a pass per cell over S + 1 rows, the first of them clean."""
    row, subject = encode_edit(lm.tokenizer, edit), subject_tokens(lm.tokenizer, edit)
    ids = torch.tensor([row.ids] * (settings.samples + 1))
    embedding = lm.model.get_submodule(lm.layout.embedding)
    deviation = embedding_deviation(lm, [edit.subject or ""])
    shape = (settings.samples, len(subject), embedding.weight.shape[1])
    noise = settings.noise * deviation * torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
    answer = int(lm.model(ids[:1]).logits[0, -1].argmax())
    scores = torch.zeros(len(row.ids), lm.n_layers)

    def corrupt(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[1:, list(subject)] += noise
        return out

    def modules(layer: int) -> list[torch.nn.Module]:
        if kind == "block":
            return [lm.block(layer)]
        low, high = layer - settings.window // 2, layer + math.ceil(settings.window / 2)
        site: SiteName = "down_proj" if kind == "mlp" else "o_proj"
        return [lm.site(i, site).module for i in range(max(0, low), min(lm.n_layers, high))]

    for layer in range(lm.n_layers):
        for token in range(len(row.ids)):

            def restore(_: object, __: object, out: Any, token: int = token) -> None:
                states = out[0] if isinstance(out, tuple) else out
                states[1:, token] = states[0, token]

            handles = [embedding.register_forward_hook(corrupt)]
            handles += [module.register_forward_hook(restore) for module in modules(layer)]
            logits = lm.model(ids, use_cache=False).logits
            for handle in handles:
                handle.remove()
            scores[token, layer] = logits[1:, -1].softmax(-1)[:, answer].mean()
    return scores


def all_as_released(lm: LM, edits: Sequence[Edit], settings: Tracing) -> None:
    """Trace edits one after the other, for every kind of the settings."""
    for edit, kind in itertools.product(edits, settings.kinds):
        as_released(lm, edit, kind, settings)


def mlp_tokens(lm: LM, call: Callable[[], object]) -> int:
    """Return how many tokens go through MLPs, all blocks together."""
    count = 0

    def add(_: object, __: object, out: torch.Tensor) -> None:
        nonlocal count
        count += out.numel() // out.shape[-1]

    handles = [lm.site(i, "down_proj").module.register_forward_hook(add) for i in range(lm.n_layers)]
    call()
    for handle in handles:
        handle.remove()
    return count


def main() -> None:
    parser = command_line(__doc__, cases=True)
    parser.add_argument("--corpus", help="also probe with word sets found in this text")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=10, help="prompts to trace")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    lm = retcon.load(args.model)
    edits = [case.edits[0] for case in cases_of(args.data, args.start, args.cases, args.seed)]
    print(f"{args.model}, seed {args.seed}; {machine()}\n")
    contrast_probe(lm, edits[:8])
    probing = seconds(lambda: contrast_probe(lm, edits))
    print(f"contrast-based probe, {len(edits):,} cases, both readings: {probing:.1f} s")
    if args.corpus:
        words = retrieve_word_sets(edits, Corpus.from_file(args.corpus).documents)
        probing = seconds(lambda: contrast_probe(lm, edits, word_sets=words))
        print(f"the same with word sets: {probing:.1f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB\n")

    settings = Tracing(window=default_window(lm.n_layers))
    causal_trace(lm, edits[:1], settings)
    print("| restored | subject | prompts | tokens | ours, s | lean, s | gain | fewer tokens | as released, s | gain |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for where in ("at the start", "further in"):
        first = where == "at the start"
        chosen = [e for e in edits if (subject_tokens(lm.tokenizer, e).start <= 1) == first]
        chosen = [t for t in chosen[: 3 * args.prompts] if lm.complete(t.text).strip().startswith(t.target_true or "")]
        chosen = chosen[: args.prompts]
        if not chosen:
            continue
        n_tokens = mean(len(encode_edit(lm.tokenizer, e).ids) for e in chosen)
        for kinds in (*((kind,) for kind in settings.kinds), settings.kinds):
            asked = replace(settings, kinds=kinds)
            ways: dict[str, Callable[[], object]] = {
                "ours": partial(causal_trace, lm, chosen, asked),
                "lean": partial(causal_trace, lm, chosen, replace(asked, replayed=False, max_batch_tokens=1)),
                "released": partial(all_as_released, lm, chosen, asked),
            }
            rounds = [{name: seconds(call) / len(chosen) for name, call in ways.items()} for _ in range(args.rounds)]
            took = {name: min(r[name] for r in rounds) for name in ways}
            gain = {name: median(r[name] / r["ours"] for r in rounds) for name in ways}
            fewer = mlp_tokens(lm, ways["lean"]) / mlp_tokens(lm, ways["ours"])
            cells = f"{n_tokens:.1f} | {took['ours']:.2f} | {took['lean']:.2f} | {gain['lean']:.1f} | {fewer:.1f}"
            released = f"{took['released']:.2f} | {gain['released']:.1f}"
            print(f"| {', '.join(kinds)} | {where} | {len(chosen)} | {cells} | {released} |", flush=True)


if __name__ == "__main__":
    main()
