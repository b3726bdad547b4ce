"""LoRA and AdaLoRA: start, rank, continuing an adapter (T36), and AdaLoRA's allotment against peft's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from retcon.errors import DeltaMismatch, InvalidSetting
from retcon.lm.site import Site
from retcon.methods.adalora import AdaLora, Allotment, add_penalty
from retcon.methods.common import tuning as tuning_module
from retcon.methods.lora import Lora
from retcon.training.objective import answer_log_probs, answer_rows
from retcon.training.parts import TrainedTriplets, attached, changes, fresh


def lora(**settings: Any) -> Lora:
    return Lora(**{**dict(rank=3, alpha=6.0, learning_rate=1e-2, epochs=4), **settings})


def adalora(**settings: Any) -> AdaLora:
    return AdaLora(**{**dict(rank=4, target_rank=2, learning_rate=1e-2, epochs=20, stop_loss=0.0), **settings})


@pytest.mark.parametrize("family", ["gpt2", "gptj", "phi3"])
def test_the_change_has_at_most_the_rank(family, tiny, edits):
    lm = tiny(family, torch.float32)
    delta = lora().propose(lm, edits)
    for name, changed in delta.changes.items():
        full = delta.dense(name, lm.parameter(name).shape)
        n_sites = 2 if "c_attn" in name or "qkv" in name else 1
        assert 0 < int(torch.linalg.matrix_rank(full.float())) <= 3 * n_sites
        assert len(changed) == n_sites
    assert len(delta.changes) == lm.n_layers * (1 if family != "gptj" else 2)


def test_adapters_leave_as_factors(tiny, edits):
    delta = lora().propose(tiny("llama", torch.float32), edits)
    assert {change.kind for changes in delta.changes.values() for change in changes} == {"low_rank"}


@pytest.mark.parametrize("method", [lora(), adalora(), adalora(allocate=False)])
def test_what_is_trained_is_stated_beforehand(method, tiny, edits, monkeypatch):
    lm, stated = tiny("llama", torch.float32), []
    monkeypatch.setattr(tuning_module, "check_memory", lambda name, lm, n, each: stated.append((n, each)))
    method.propose(lm, edits)
    assert stated == [(method.n_trained(lm), method.bytes_per_value)]


def test_a_fused_matrix_is_adapted_whole_by_its_path(tiny, edits):
    lm = tiny("gpt2", torch.float32)
    delta = lora(modules=("attn.c_attn",)).propose(lm, edits)
    assert set(delta.changes) == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(4)}
    assert all(rank == 3 for rank in delta.ranks().values())
    with pytest.raises(InvalidSetting, match=r"has no attn\.qkv in its blocks"):
        lora(modules=("attn.qkv",)).propose(lm, edits)


@pytest.mark.parametrize("adapting", [lora, adalora])
def test_layers_without_a_matrix_are_passed_over_unless_they_are_named(adapting, tiny, edits):
    lm = tiny("qwen3_5_text")
    delta = adapting().propose(lm, edits[:1])
    assert set(delta.changes) == {lm.site(i, kind).name for i in (1, 3) for kind in ("q_proj", "v_proj")}
    with pytest.raises(InvalidSetting, match=r"has no q_proj in layer 0; name one of down_proj, up_proj"):
        adapting(layers=(0, 1)).propose(lm, edits[:1])
    with pytest.raises(InvalidSetting, match=r"has no q_proj in its blocks; name one of .*o_proj, or a matrix's path"):
        adapting().propose(tiny("deepseek_v2"), edits[:1])


def test_the_hooked_model_is_the_merged_one(tiny, edits, randn):
    """T36, in triplets; one singular value is 0, and its factors do not count."""
    lm = tiny("gpt2")
    site, rows = lm.site(1, "q_proj"), answer_rows(lm, edits)
    out, into = site.weight.shape
    part = TrainedTriplets(site, randn(out, 3), torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64), randn(3, into), 0.1)
    with attached([part]):
        hooked = answer_log_probs(lm, rows)
    (change,) = changes([part])[site.name]
    assert change.region is not None
    with lm.edited(lm.delta(changes([part]))):
        assert_close(answer_log_probs(lm, rows), hooked, rtol=1e-9, atol=1e-9)


def test_seeds_draw_the_start(tiny, edit):
    lm = tiny("llama")
    first, second, other = (lora().propose(lm, [edit], seed=seed) for seed in (1, 1, 2))
    assert first.id == second.id != other.id


def test_an_adapter_may_be_trained_on(tiny, edits):
    """Both deltas together are one adapter of the rank; without `continue_adapter`, they are two."""
    lm = tiny("llama")
    on = lora(continue_adapter=True)
    first = on.propose(lm, edits[:2])
    lm.apply(first)
    second = on.propose(lm, edits[2:], state=first.state)
    apart = lora().propose(lm, edits[2:])
    name = lm.site(1, "q_proj").name
    shape = lm.parameter(name).shape
    together = first.dense(name, shape) + second.dense(name, shape)
    assert int(torch.linalg.matrix_rank(together, rtol=1e-9)) <= 3
    assert int(torch.linalg.matrix_rank(first.dense(name, shape) + apart.dense(name, shape), rtol=1e-9)) == 6
    b, a = second.state["1.q_proj.B"], second.state["1.q_proj.A"]
    assert_close(together, 2.0 * b @ a, rtol=1e-9, atol=1e-12)
    with pytest.raises(DeltaMismatch, match="no adapter of rank 2"):
        lora(rank=2, alpha=4.0, continue_adapter=True).propose(lm, edits, state=first.state)
    fewer = lora(continue_adapter=True, modules=("q_proj",))
    with pytest.raises(DeltaMismatch, match=r"has an adapter for \d\.v_proj too, .*; name the same layers and modules"):
        fewer.propose(lm, edits, state=first.state)
    with pytest.raises(DeltaMismatch, match=r"is of scale 2.0, wanted is scale 4.0; begin anew"):
        lora(alpha=12.0, continue_adapter=True).propose(lm, edits, state=first.state)
    with pytest.raises(DeltaMismatch, match="is of base"):
        on.propose(tiny("llama", seed=1), edits, state=first.state)
    unnamed = {name: t for name, t in first.state.items() if name not in ("base", "scale")}  # of an earlier version
    assert on.propose(lm, edits[2:], state=unnamed).id == second.id


def test_the_allotment_ends_at_the_target_rank_on_average(tiny, edits):
    """T36."""
    lm = tiny("llama")
    delta = adalora().propose(lm, edits)
    ranks = {n: int(torch.linalg.matrix_rank(delta.dense(n, lm.parameter(n).shape), rtol=1e-9)) for n in delta.changes}
    assert sum(ranks.values()) == 2 * lm.n_layers * 2
    assert len(set(ranks.values())) > 1  # allotted where it pays
    kept = adalora(allocate=False).propose(lm, edits)
    assert set(kept.ranks().values()) == {4}


@pytest.mark.parametrize("epochs", [2, 3, 5])
@pytest.mark.parametrize("shares", [{}, dict(cooldown=0.0), dict(warmup=0.9, cooldown=0.0)])
def test_few_steps_reach_the_target_rank_too(epochs, shares, tiny, edits):
    lm = tiny("llama")
    delta = adalora(epochs=epochs, **shares).propose(lm, edits)
    ranks = [torch.linalg.matrix_rank(delta.dense(n, lm.parameter(n).shape), rtol=1e-9) for n in delta.changes]
    assert sum(map(int, ranks)) == 2 * lm.n_layers * 2
    once = adalora(epochs=1, **shares).propose(lm, edits)
    assert set(once.ranks().values()) == {4}, "one step says nothing of importance before it is taken"


def test_the_allotment_is_peft_s(randn):
    """The same factors and gradients, step after step: the same singular values are left."""
    layer = pytest.importorskip("peft.tuners.adalora.layer")
    n_steps, rank, target = 12, 4, 2
    settings = adalora(rank=rank, target_rank=target, warmup=0.2, cooldown=0.3)
    site = Site(0, "down_proj", "weight", nn.Linear(5, 6, dtype=torch.float64), transposed=False)
    parts = [TrainedTriplets(site, randn(6, rank), randn(rank), randn(rank, 5)) for _ in range(3)]

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, part in enumerate(parts):
                named = dict(lora_A=part.right, lora_B=part.left, lora_E=part.singular[:, None])
                for name, tensor in named.items():
                    holder = nn.ParameterDict({"default": nn.Parameter(tensor.detach().clone())})
                    self.add_module(f"m{i}_{name}", holder)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            for name, parameter in super().named_parameters(*args, **kwargs):
                yield name.replace("_lora", ".lora"), parameter

    model = Theirs()
    config = SimpleNamespace(
        beta1=0.85, beta2=0.85, target_r=target, tinit=2, tfinal=3, total_step=n_steps, deltaT=1, init_r=rank
    )
    theirs, ours = layer.RankAllocator(model, config, "default"), Allotment(settings, parts, n_steps)
    pattern = None
    for step in range(n_steps):
        for i, part in enumerate(parts):
            for name, tensor in (("lora_A", part.right), ("lora_B", part.left), ("lora_E", part.singular)):
                tensor.grad = randn(*tensor.shape)
                own = getattr(model, f"m{i}_{name}")["default"]
                own.grad = tensor.grad.view(own.shape).clone()
                tensor.data += 0.1 * tensor.grad
                own.data += 0.1 * own.grad
        if step < n_steps - 3:
            theirs.update_and_allocate(model, step)
        elif step == n_steps - 3:
            _, pattern = theirs.update_and_allocate(model, step, force_mask=True)
        else:
            theirs.mask_using_rank_pattern(model, pattern)
        ours.update()
        for i, part in enumerate(parts):
            assert torch.equal(part.singular, getattr(model, f"m{i}_lora_E")["default"][:, 0].detach())
    assert sum(int((part.singular != 0).sum()) for part in parts) == target * 3


def test_the_penalty_is_the_mean_distance_from_orthogonality(tiny, randn):
    site = tiny("llama").site(0, "q_proj")
    tensors = [randn(*t.shape).requires_grad_() for t in (fresh(site, 32, 2), fresh(site, 2), fresh(site, 2, 32))]
    part = TrainedTriplets(site, *tensors)
    add_penalty([part], 0.5)
    p, q = part.left.detach().requires_grad_(), part.right.detach().requires_grad_()
    (0.25 * ((p.T @ p - torch.eye(2)).norm() + (q @ q.T - torch.eye(2)).norm())).backward()
    assert_close(part.left.grad, p.grad)
    assert_close(part.right.grad, q.grad)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(rank=0), "rank must be at least 1"),
        (dict(target_rank=9), "target_rank must be from 1"),
        (dict(warmup=0.6, cooldown=0.5), "leave no step"),
        (dict(smoothing=1.0), "smoothing must be between"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        adalora(**settings)
    with pytest.raises(InvalidSetting, match="rank must be at least 1"):
        lora(rank=0)
