"""Routed experts: their keys, their slices of a tensor, and one joint write, against brute force."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.delta import Delta, LowRank
from retcon.edits import Edit
from retcon.errors import InvalidSetting, RetconWarning, UnsupportedModel
from retcon.lm.experts import routing_similarity
from retcon.lm.forward import Point, run
from retcon.lm.layouts import LAYOUTS
from retcon.lm.model import LM
from retcon.lm.prompts import Row, pad
from retcon.memory.collect import collect
from retcon.memory.contexts import Contexts
from retcon.memory.moments import GivenMoments
from retcon.memory.solve import ridge_direct, ridge_of_experts
from retcon.methods.common.choosing import method
from retcon.methods.jeep import Jeep
from retcon.methods.memit import Memit
from tests.conftest import UNLIKE, random_moments, tiny_model, tokenizer
from tests.contract.test_methods import ENDING, probability

CONTEXTS = Contexts(("The train stood still. ", "I read. "))
ROUTED = sorted(family for family in UNLIKE if any(kind.experts for kind in LAYOUTS[family].kinds))
BEHIND_A_NORM_OR_FACTOR = tuple(
    family
    for family in ROUTED
    if any(kind.experts and (kind.mlp_post_norm or kind.residual_multiplier) for kind in LAYOUTS[family].kinds)
)
WRITTEN = sorted(set(ROUTED) - set(BEHIND_A_NORM_OR_FACTOR))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*larger than the weight"),
    pytest.mark.filterwarnings("ignore:too few tokens of the corpus"),
]


def with_experts(lm: LM) -> list[int]:
    return [layer for layer in range(lm.n_layers) if lm.kinds[layer].experts]


def batch() -> Any:
    generator = torch.Generator().manual_seed(0)
    return pad([Row(tuple(torch.randint(3, 400, (n,), generator=generator).tolist()), n) for n in (9, 5)])


@pytest.mark.parametrize("family", ROUTED)
def test_weighted_keys_times_the_matrices_are_what_the_experts_put_out(family: str, tiny: Callable[..., LM]) -> None:
    """sum_e (W_e (g_e k_e) + g_e b_e) is the module's own output, in either orientation, with biases and without."""
    lm = tiny(family)
    layer = with_experts(lm)[0]
    sites, seen, whole = lm.expert_sites(layer), {}, []
    handle = lm.experts(layer).register_forward_hook(
        lambda _, args, kwargs, out: whole.append((args, out)), with_kwargs=True
    )
    try:
        points = {Point(layer, "key", s.expert): s for s in sites}
        with torch.no_grad():
            run(
                lm,
                batch(),
                {p: (lambda value, p=p: seen.__setitem__(p, value.clone())) for p in points}
                | {Point(layer, "block"): lambda value: None},
            )  # type: ignore[dict-item]
    finally:
        handle.remove()
    (_, index, weights), out = whole[0]
    total = sum(seen[p].flatten(0, 1) @ s.weight.T for p, s in points.items())
    bias = getattr(lm.experts(layer), "down_proj_bias", None)
    if bias is not None:
        total = total + (weights[..., None] * bias[index]).sum(1)
    assert isinstance(total, Tensor)
    assert_close(total, out.view_as(total), rtol=1e-6, atol=1e-9)
    assert len(sites) == 4
    assert all(s.weight.shape[0] == lm.d_model for s in sites)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.block_diag(*parts)


def test_the_joint_solve_is_the_stacked_one(randn: Callable[..., Tensor]) -> None:
    """Against one dense ridge over the stacked keys with the block-diagonal moment; an expert without keys gets 0."""
    n_experts, m, n, weight = 3, 5, 4, 2.5
    keys = randn(n_experts, m, n)
    keys[1] = 0
    moments = [(x := randn(m, 3 * m)) @ x.T / (3 * m) for _ in range(n_experts)]
    factors = [lambda c=c: torch.linalg.cholesky(c) for c in moments]
    found = ridge_of_experts(keys, factors, weight)
    brute = ridge_direct(keys.flatten(0, 1), lambda: stacked(moments), weight)
    assert_close(found.transpose(0, 1).flatten(1), brute)
    assert not found[1].any()


def test_one_key_twice_stores_the_mean_of_both_in_experts_too(randn: Callable[..., Tensor]) -> None:
    keys, r = randn(3, 8, 4), randn(4, 5)
    factors = [lambda x=x: torch.linalg.cholesky(x @ x.T) for x in randn(3, 8, 24)]
    found = ridge_of_experts(torch.cat([keys[:, :, :1], keys], 2), factors, 0.0)
    mean = torch.cat([r[:, :2].mean(1, keepdim=True), r[:, 2:]], 1)
    assert_close(r @ found, mean @ ridge_of_experts(keys, factors, 0.0))


@pytest.mark.parametrize("family", WRITTEN)
def test_a_free_write_brings_the_blocks_output_to_its_target(
    family: str, tiny: Callable[..., LM], untouched: Callable[[LM], Any]
) -> None:
    """With no weight on old keys, one layer and one context the value is met, so keys, weights and residual fit."""
    lm = tiny(family)
    layer = with_experts(lm)[1 if len(with_experts(lm)) > 2 else 0]
    edit = Edit("You know {}", "France", "Rome", id="france")
    method = Memit(layers=(layer,), moment_weight=1e-12, clamp=1.0, steps=4, mlp="experts")
    before = untouched(lm)
    delta = method.propose(lm, [edit], contexts=Contexts(), moments=random_moments(lm, experts=True), keep_values=True)
    assert untouched(lm) == before
    assert list(delta.changes) == [lm.expert_sites(layer)[0].name]
    assert delta.values is not None
    value = next(t for name, t in delta.values.items() if "init" in name)
    offset = next(t for name, t in delta.values.items() if "offset" in name)
    row = lm.encode("You know France")
    with lm.edited(delta):
        found = at(lm, row, Point(layer, "block"), len(row.ids) - 1)
    assert_close(found, (value + offset)[0].to(found), rtol=1e-4, atol=1e-5)
    assert untouched(lm) == before


def at(lm: LM, row: Row, point: Point, token: int) -> Tensor:
    seen: list[Tensor] = []
    with torch.no_grad():
        run(lm, pad([row]), {point: lambda value: seen.append(value[0, token].clone())})
    return seen[0]


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("name", ["jeep", "memit"])
def test_facts_are_written_into_routed_experts(name: str, family: str, tiny: Callable[..., LM], tmp_path: Any) -> None:
    lm, edits = tiny(family, torch.float32), ENDING
    methods = {
        "jeep": Jeep(low=(1,), high=(2, 3), low_clamp=8.0, high_clamp=8.0, low_moment_weight=1.0,
                     high_moment_weight=1.0, low_weight_decay=0.0, high_weight_decay=0.0, steps=6, mlp="experts"),
        "memit": Memit(layers=(1, 2), moment_weight=1.0, clamp=8.0, weight_decay=0.0, steps=6, mlp="experts"),
    }  # fmt: skip
    base = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    delta = methods[name].propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm, experts=True))
    assert all(n.endswith("experts.down_proj") for n in delta.changes)
    delta.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert loaded == delta
    before = [probability(lm, e) for e in edits]
    lm.apply(loaded)
    assert {n for n, p in lm.model.named_parameters() if not torch.equal(p, base[n])} == set(delta.changes)
    assert all(probability(lm, e) > b for e, b in zip(edits, before, strict=True))
    lm.revert(loaded)
    assert all(torch.equal(p, base[n]) for n, p in lm.model.named_parameters())


def test_an_experts_slice_costs_and_covers_that_expert_alone(tiny: Callable[..., LM], randn: Any) -> None:
    lm = tiny("mixtral")
    sites = lm.expert_sites(1)
    whole = sites[0].module.down_proj.detach().clone()  # type: ignore[operator]
    one = sites[2].stored(randn(32, 1), randn(1, 64))
    other = sites[2].stored(randn(32, 2), randn(2, 64))
    assert isinstance(one, LowRank)
    expected = whole.clone()
    expected[2] += one.left @ one.right + other.left @ other.right  # type: ignore[attr-defined]
    delta, second = lm.delta({sites[2].name: [one]}), None
    lm.apply(delta)
    assert lm.undo_bytes() == 2 * whole[0].numel() * 8
    second = lm.delta({sites[2].name: [other]})
    lm.apply(second)
    assert_close(lm.parameter(sites[2].name), expected)
    lm.revert(delta)
    lm.revert(second)
    assert torch.equal(lm.parameter(sites[2].name), whole)
    both = lm.delta({sites[2].name: [one, sites[0].stored(randn(32, 1), randn(1, 64))]})
    dense = both.dense(sites[2].name, whole.shape)
    assert both.norms()[sites[2].name] == pytest.approx(float(dense.norm()))


def test_what_is_not_for_routed_experts_says_so(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    with pytest.raises(UnsupportedModel, match="has no routed experts"):
        tiny("llama").experts(0)
    lm = tiny("granitemoe")
    with pytest.raises(InvalidSetting, match="a factor stands between the routed experts and the residual"):
        Memit(layers=(0,)).propose(lm, edits, contexts=CONTEXTS, moments=GivenMoments({}))
    with pytest.raises(InvalidSetting, match="cache_keys knows no routed experts, and these layers have no other MLP"):
        Memit(layers=(0,), cache_keys=True).propose(tiny("mixtral"), edits, contexts=CONTEXTS)
    with pytest.raises(InvalidSetting, match="cache_keys knows no routed experts, which mlp='experts' writes"):
        Memit(layers=(1,), cache_keys=True, mlp="experts").propose(tiny("qwen2_moe"), edits, contexts=CONTEXTS)


@pytest.mark.parametrize(
    ("model_type", "own"),
    [("cohere2_moe", dict(num_shared_experts=0)), ("granitemoe", dict(residual_multiplier=1.0))],
)
def test_experts_with_nothing_between_are_written(model_type: str, own: dict[str, Any], edits: list[Edit]) -> None:
    """Though the family's first kind of block has a factor."""
    lm = LM(tiny_model(model_type, **UNLIKE[model_type] | own), tokenizer())
    memit = Memit(layers=(1, 2), moment_weight=1e-3, clamp=8.0, weight_decay=0.0, steps=10)
    moments = GivenMoments({s.id: torch.eye(s.shape[1]) for i in (1, 2) for s in lm.expert_sites(i)})
    delta = memit.propose(lm, edits[:1], contexts=CONTEXTS, moments=moments)
    before = probability(lm, edits[0])
    with lm.edited(delta):
        assert probability(lm, edits[0]) > before


@pytest.mark.parametrize("name", ["ctp", "jeep", "kne", "memit"])
def test_an_mlp_that_is_asked_for_has_to_be_there(name: str, tiny: Callable[..., LM], edits: list[Edit]) -> None:
    layers = dict(low=(1,), high=(2,)) if name == "jeep" else dict(layers=(1, 2))
    for family, mlp, text in (
        ("mixtral", "dense", "mlp is 'dense', but layer 1 of 'tiny-mixtral' .* has routed experts alone"),
        ("llama", "experts", "mlp is 'experts', but 'tiny-llama' .* has no routed experts; leave it out"),
    ):
        with pytest.raises(InvalidSetting, match=f"{name}: {text}"):
            method(name, mlp=mlp, **layers).propose(tiny(family), edits[:1], contexts=CONTEXTS)
    lm = tiny("dots1")  # the first block has no experts
    with pytest.raises(InvalidSetting, match="no routed experts in layers 0; leave it out"):
        Memit(layers=(0,), mlp="experts").propose(lm, edits[:1], contexts=CONTEXTS)


def test_similarity_of_routing() -> None:
    before, after = torch.tensor([[0, 1], [2, 3], [0, 1]]), torch.tensor([[1, 0], [2, 0], [2, 3]])
    assert routing_similarity(before, after).tolist() == pytest.approx([1, 1 / 3, 0])


def test_experts_of_which_the_corpus_says_too_little_are_smoothed_and_counted_in_one_warning(
    tiny: Callable[..., LM],
) -> None:
    lm = tiny("mixtral")
    sites = [site for layer in range(lm.n_layers) for site in lm.expert_sites(layer)]
    generator = torch.Generator().manual_seed(0)
    rows = [Row(tuple(torch.randint(3, 400, (16,), generator=generator).tolist()), 16) for _ in range(80)]
    with pytest.warns(RetconWarning) as said:
        found = dict(collect(lm, sites, rows))
    width = sites[0].shape[1]
    few = [site for site in sites if found[site].n_routed < 10 * width]
    assert 0 < len(few) < len(sites)
    assert all(found[site].n_routed for site in few)
    fewest = min(few, key=lambda site: found[site].n_routed)
    assert [str(warning.message) for warning in said] == [
        f"too few tokens of the corpus were routed to {len(few)} of {len(sites)} experts ({found[fewest].n_routed} to "
        f"{fewest.id}, the fewest of these; {10 * width} are wanted for {width} key dimensions); their second moments "
        "are smoothed. A longer corpus has more"
    ]
    seen: list[Tensor] = []
    with torch.no_grad():
        run(lm, pad(rows), {Point(fewest.layer, "key", fewest.expert): lambda value: seen.append(value.clone())})
    keys = seen[0].flatten(0, 1)
    raw = keys.mT @ keys / len(keys)
    smoothed = raw + 0.01 * raw.trace() / width * torch.eye(width, dtype=raw.dtype)
    assert_close(found[fewest].moment, smoothed)
