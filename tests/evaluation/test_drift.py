"""Perplexity against brute force; divergence by hand."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from retcon.errors import InvalidSetting
from retcon.evaluation import drift
from retcon.evaluation.drift import divergence, next_token_divergence, perplexity, routing_overlap, windows
from retcon.lm import forward
from retcon.lm.forward import next_log_probs
from retcon.lm.model import LM
from tests.evaluation.test_measure import bump
from tests.lookup import InContext

Make = Callable[..., LM]
TEXT = "The capital of France is Paris. He lived in Florence and in Milan, and the train stood still."


def test_windows_of_the_worked_example() -> None:
    found = windows(1300, 1024, 512)
    assert found == [(0, 1024, 1), (512, 1300, 1024)]
    assert [end - first for _, end, first in found] == [1023, 276]
    assert windows(2) == [(0, 2, 1)]
    for n, window, stride in ((100, 7, 3), (9, 8, 7), (64, 16, 8)):
        scored = [t for _, end, first in windows(n, window, stride) for t in range(first, end)]
        assert scored == list(range(1, n))
        assert all(start < first and end - start <= window for start, end, first in windows(n, window, stride))
    with pytest.raises(InvalidSetting, match="stride 8 and window 8"):
        windows(10, 8, 8)


def test_perplexity_is_that_of_each_token_in_its_window(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    ids = list(lm.encode(TEXT).ids)
    found = perplexity(lm, TEXT, window=16, stride=8)
    total = 0.0
    for start, end, first in windows(len(ids), 16, 8):
        with torch.no_grad():
            logp = lm.model(torch.tensor([ids[start:end]])).logits[0].double().log_softmax(-1)
        total -= sum(float(logp[t - start - 1, ids[t]]) for t in range(first, end))
    assert found.n_tokens == len(ids) - 1
    assert found.nll == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert found.ppl == pytest.approx(math.exp(found.nll))
    whole = perplexity(lm, TEXT)
    with torch.no_grad():
        loss = lm.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert whole.nll == pytest.approx(float(loss), abs=1e-5)
    assert lm.context_length == 128
    long = TEXT * 10  # of a text that is too long for the model, half a window is read anew
    assert perplexity(lm, long) == perplexity(lm, long, window=128, stride=64) != perplexity(lm, long, stride=32)
    assert perplexity(lm, long, stride=100) != perplexity(lm, long)
    with pytest.raises(InvalidSetting, match="stride 128 and window 128"):
        perplexity(lm, long, stride=128)
    assert perplexity(lm, TEXT, max_tokens=5).n_tokens == 4
    with pytest.raises(InvalidSetting, match="has no perplexity"):
        perplexity(lm, TEXT, max_tokens=1)


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    assert drift.Perplexity(709, 3).ppl == math.exp(709)
    assert drift.Perplexity(710, 3).ppl == math.inf
    assert math.isnan(drift.Perplexity(math.nan, 3).ppl)


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    wanted = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert float(divergence(p.log(), q.log())) == pytest.approx(wanted, abs=1e-6)
    assert float(divergence(p.log(), p.log())) == 0
    none = torch.tensor([[1.0, 0.0, 0.0]])
    assert float(divergence(none.log(), p.log())) == pytest.approx(math.log(2))
    assert float(divergence(p.log(), none.log())) == math.inf


def test_the_same_model_does_not_diverge_and_an_edited_one_does(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    prompts = ["The capital of Italy is", "He lived in", "Łódź"]
    assert next_token_divergence(lm, prompts, nullcontext, nullcontext) == [0, 0, 0]
    delta = bump(lm)
    found = next_token_divergence(lm, prompts, nullcontext, lambda: lm.edited(delta), max_batch_tokens=16)
    assert all(value > 0 for value in found)
    lm.apply(delta)
    again = next_token_divergence(lm, prompts, lm.without_deltas, nullcontext)
    assert again == pytest.approx(found, abs=1e-5)


def test_prompts_are_read_as_what_is_attached_makes_them(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    shown = InContext(base=lm.fingerprint(), settings={"before": "You know the way home."})
    prompts = ["The capital of Italy is", "He lived in"]
    found = next_token_divergence(lm, prompts, nullcontext, lambda: lm.edited(shown))
    by_hand = next_token_divergence(lm, [shown.prompt(p) for p in prompts], nullcontext, nullcontext)
    assert by_hand == [0, 0]
    logp = [
        [next_log_probs(lm, [lm.encode(text)]).detach()[0] for text in (prompt, shown.prompt(prompt))]
        for prompt in prompts
    ]
    assert found == pytest.approx([float(divergence(old[None], new[None])) for old, new in logp], abs=1e-6)
    assert all(value > 0 for value in found)
    lm.apply(shown)
    assert next_token_divergence(lm, prompts, lm.without_deltas, nullcontext) == pytest.approx(found, abs=1e-6)


def test_where_memory_runs_out_fewer_prompts_are_compared_at_a_time(tiny: Make, monkeypatch: Any) -> None:
    lm, sizes = tiny("mixtral"), []
    delta = lm.delta({(site := lm.site(1, "o_proj")).name: [site.stored_dense(3 * torch.eye(lm.d_model).double())]})
    prompts = ["The capital of Italy is", "He lived in", "I read. The train stood still and"]
    edited = lambda: lm.edited(delta)  # noqa: E731
    wanted = next_token_divergence(lm, prompts, nullcontext, edited), routing_overlap(lm, prompts, nullcontext, edited)
    own = drift.pad, forward.pad

    def short_of_memory(rows: Any, *args: Any, **more: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("as if")
        return own[0](rows, *args, **more)

    monkeypatch.setattr(drift, "pad", short_of_memory)
    monkeypatch.setattr(forward, "pad", short_of_memory)
    found = next_token_divergence(lm, prompts, nullcontext, edited), routing_overlap(lm, prompts, nullcontext, edited)
    assert max(sizes) > 1
    assert found[0] == pytest.approx(wanted[0], abs=1e-6)
    assert found[1] == pytest.approx(wanted[1])
    assert not lm.applied


def test_routing_overlap_is_that_of_each_token_routed_by_hand(tiny: Make) -> None:
    lm = tiny("mixtral")
    prompts = ["The capital of France is", "I read. The train stood still and", "You know"]
    same = routing_overlap(lm, prompts, nullcontext, nullcontext)
    assert same == dict.fromkeys(range(lm.n_layers), 1.0)
    site = lm.site(1, "o_proj")
    delta = lm.delta({site.name: [site.stored_dense(3 * torch.eye(lm.d_model, dtype=torch.float64))]})
    found = routing_overlap(lm, prompts, nullcontext, lambda: lm.edited(delta), max_batch_tokens=16)
    assert found[0] == 1.0
    assert min(found.values()) < 1.0

    def experts(layer: int, text: str) -> list[set[int]]:
        seen: list[torch.Tensor] = []
        handle = lm.experts(layer).register_forward_hook(lambda _, args, out: seen.append(args[1]))
        with torch.no_grad():
            lm.model(torch.tensor([lm.encode(text).ids]))
        handle.remove()
        return [set(row.tolist()) for row in seen[0]]

    for layer in range(lm.n_layers):
        old = [s for text in prompts for s in experts(layer, text)]
        with lm.edited(delta):
            new = [s for text in prompts for s in experts(layer, text)]
        shares = [len(a & b) / len(a | b) for a, b in zip(old, new, strict=True)]
        assert found[layer] == pytest.approx(sum(shares) / len(shares))
    assert routing_overlap(tiny("llama"), prompts, nullcontext, nullcontext) == {}
