"""Taps against brute force: plain hooks, hidden states, and full logits, on every architecture."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.lm.forward import Point, activations, adding, logits_at, run
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, Row, pad
from tests.conftest import FAMILIES, FLOAT32_INSIDE, Models, tiny_model, tokenizer

TENSORS = ("key", "mlp", "attn_key", "attn", "block")
LENGTHS = (13, 5, 1, 9)


class Warm(Models):
    """Models that have been run: transformers installs hooks of its own, for good, at the first hidden states."""

    def __missing__(self, family: str) -> LM:
        lm = super().__missing__(family)
        plain(lm, rows()[1])
        return lm


@pytest.fixture(scope="module")
def models() -> dict[str, LM]:
    """One model per architecture for this whole file: nothing here changes weights."""
    return Warm()


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(2)
    return [Row(tuple(torch.randint(3, 400, (n,), generator=generator).tolist()), n) for n in LENGTHS]


def batch() -> Batch:
    return pad(rows())


def n_hooks(lm: LM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def plain(lm: LM, row: Row) -> Any:
    """The model's own forward over one unpadded row, with hidden states."""
    with torch.no_grad():
        return lm.model(torch.tensor([row.ids]), output_hidden_states=True, use_cache=False)


def by_hook(lm: LM, row: Row, module: torch.nn.Module, side: str) -> Tensor:
    """Input or output of a module over one unpadded row, (seq, width)."""
    found = []

    def keep(value: Any) -> None:  # a copy: Falcon adds to its MLP's output in place
        found.append((value[0] if isinstance(value, tuple) else value).clone())

    handle = (
        module.register_forward_pre_hook(lambda _, args: keep(args[0]))
        if side == "in"
        else module.register_forward_hook(lambda _, __, out: keep(out))
    )
    plain(lm, row)
    handle.remove()
    return found[0].reshape(len(row.ids), -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_reads_what_a_plain_hook_reads_padded_or_not(family: str, models: dict[str, LM]) -> None:
    lm, seen = models[family], {}
    hooks = n_hooks(lm)
    points = [Point(layer, tensor) for layer in (0, 2) for tensor in TENSORS]  # type: ignore[arg-type]

    def reader(point: Point) -> Any:
        return lambda value: seen.__setitem__(point, value.clone())

    with torch.no_grad():
        run(lm, batch(), {p: reader(p) for p in points})
    layout, blocks = lm.layout, layout_blocks(lm)
    for layer in (0, 2):
        down = blocks[layer].get_submodule(layout.down_proj)
        out = blocks[layer].get_submodule(layout.o_proj)
        modules = {
            "key": (down, "in"), "mlp": (down, "out"), "attn_key": (out, "in"), "attn": (out, "out"),
            "block": (blocks[layer], "out"),
        }  # fmt: skip
        for tensor, (module, side) in modules.items():
            got = seen[Point(layer, tensor)]  # type: ignore[arg-type]
            assert got.shape[:2] == (len(LENGTHS), max(LENGTHS))
            for i, row in enumerate(rows()):
                assert_close(got[i, : len(row.ids)], by_hook(lm, row, module, side), rtol=1e-6, atol=1e-7)
        for i, row in enumerate(rows()):
            state = plain(lm, row).hidden_states[layer + 1][0]
            assert_close(seen[Point(layer, "block")][i, : len(row.ids)], state, rtol=1e-6, atol=1e-7)
    assert n_hooks(lm) == hooks


def layout_blocks(lm: LM) -> Any:
    return lm.model.get_submodule(lm.layout.block.removesuffix(".{}"))


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_picks_one_position_per_row(family: str, models: dict[str, LM]) -> None:
    lm = models[family]
    last = torch.tensor(LENGTHS) - 1
    found = activations(lm, batch(), {Point(1, "key"): last, Point(3, "block"): last // 2})
    for i, row in enumerate(rows()):
        key = by_hook(lm, row, lm.site(1, "down_proj").module, "in")[-1]
        assert_close(found[Point(1, "key")][i], key, rtol=1e-6, atol=1e-7)
        state = by_hook(lm, row, lm.block(3), "out")[(len(row.ids) - 1) // 2]
        assert_close(found[Point(3, "block")][i], state, rtol=1e-6, atol=1e-7)
    assert not any(v.requires_grad for v in found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_equal_the_full_logits_there(family: str, models: dict[str, LM]) -> None:
    lm = models[family]
    hooks = n_hooks(lm)
    where = [(i, t) for i, n in enumerate(LENGTHS) for t in {0, n // 2, n - 1}] + [(0, 3), (0, 3)]
    at = torch.tensor(where)
    with torch.no_grad():
        got = logits_at(lm, batch(), (at[:, 0], at[:, 1]))
    assert got.shape == (len(where), 512)
    full = [plain(lm, row).logits[0] for row in rows()]
    close = 1e-5 if family in FLOAT32_INSIDE else 1e-7
    assert_close(got, torch.stack([full[i][t] for i, t in where]), rtol=10 * close, atol=close)
    assert n_hooks(lm) == hooks


def test_softcapping_is_in_the_logits(models: dict[str, LM]) -> None:
    cap = models["gemma2"].model.config.final_logit_softcapping
    assert cap
    head = models["gemma2"].head
    big = head.weight.detach().clone()
    try:
        head.weight.data *= 50
        with torch.no_grad():
            got = logits_at(models["gemma2"], batch(), (torch.tensor([0]), torch.tensor([12])))
            assert_close(got[0], plain(models["gemma2"], rows()[0]).logits[0, -1])
        assert 0.9 * cap < got.abs().max() <= cap
    finally:
        head.weight.data.copy_(big)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_vector_is_added(family: str, models: dict[str, LM]) -> None:
    """Invariant 7: `mlp` and `block` of one layer are the same place, and `attn` too where the block is parallel."""
    lm = models[family]
    hit, position = torch.tensor([0, 1, 3]), torch.tensor([4, 4, 8])
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = torch.tensor([[i, n - 1] for i, n in enumerate(LENGTHS)])

    def logits(tensor: str | None) -> Tensor:
        hooks = {} if tensor is None else {Point(1, tensor): adding(hit, position, vectors)}  # type: ignore[arg-type]
        with torch.no_grad():
            return logits_at(lm, batch(), (ends[:, 0], ends[:, 1]), hooks)

    none, mlp, block, attn = logits(None), logits("mlp"), logits("block"), logits("attn")
    assert (block - none)[[0, 1, 3]].abs().max(-1).values.min() > 1e-3
    assert torch.equal(block[2], none[2])  # a row that is not hit
    assert close(mlp, block) == lm.layout.adds_mlp_output
    if lm.layout.adds_mlp_output:
        assert close(attn, mlp) == lm.layout.parallel


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_parallel_flag_of_gpt_neox_follows_the_config() -> None:
    model = tiny_model("gpt_neox")
    assert LM(model, tokenizer()).layout.parallel
    model.config.use_parallel_residual = False
    assert not LM(model, tokenizer()).layout.parallel


def test_adding_is_out_of_place_and_adds_up_where_a_position_is_named_twice() -> None:
    value = torch.zeros(2, 3, 4)
    new = adding(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 2]), torch.ones(3, 4, dtype=torch.float64))(value)
    assert new is not None
    assert new.dtype == torch.float32
    assert value.abs().sum() == 0
    assert new[0, 1].tolist() == [2.0] * 4
    assert new[1, 2].tolist() == [1.0] * 4
    assert new.sum() == 12


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])  # others norm in float32
def test_an_added_vector_gets_its_gradient(family: str, models: dict[str, LM]) -> None:
    lm = models[family]
    vector = torch.zeros(1, 32, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([0]), torch.tensor([12])
    with lm.frozen_eval():
        found = logits_at(lm, batch(), at, {Point(1, "mlp"): adding(torch.tensor([0]), torch.tensor([4]), vector)})
    (gradient,) = torch.autograd.grad(found.log_softmax(-1)[0, 7], vector)
    step = 1e-5 * gradient / gradient.norm()

    def value(shift: Tensor) -> Tensor:
        tap = adding(torch.tensor([0]), torch.tensor([4]), shift)
        with torch.no_grad():
            return logits_at(lm, batch(), at, {Point(1, "mlp"): tap}).log_softmax(-1)[0, 7]

    assert_close((value(step) - value(-step)) / 2e-5, gradient.norm(), rtol=1e-5, atol=1e-8)


def test_a_tap_may_replace_and_later_points_see_it(models: dict[str, LM]) -> None:
    lm, seen = models["opt"], []  # opt: fc2 sees (batch x seq, width), and a tap (batch, seq, width)
    zero = {
        Point(1, "key"): lambda v: torch.zeros_like(v),
        Point(1, "mlp"): lambda v: seen.append(v),
    }
    with torch.no_grad():
        run(lm, batch(), zero)
    bias = lm.site(1, "down_proj").module.bias
    assert_close(seen[0], bias.expand(seen[0].shape).detach())


def test_the_pass_ends_after_the_deepest_tap_when_no_logits_are_asked(models: dict[str, LM]) -> None:
    lm, ran = models["llama"], []
    handles = [
        lm.block(layer).register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
        for layer in range(lm.n_layers)
    ]
    try:
        with torch.no_grad():
            run(lm, batch(), {Point(0, "block"): lambda v: None, Point(1, "key"): lambda v: None})
            assert ran == [0, 1]
            ran.clear()
            at = torch.tensor([0]), torch.tensor([0])
            logits_at(lm, batch(), at, {Point(0, "block"): lambda v: None})
            assert ran == [0, 1, 2, 3]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("asked", [True, False], ids=["logits", "no logits"])
def test_hooks_are_gone_after_an_error_inside_a_tap(asked: bool, models: dict[str, LM]) -> None:
    lm = models["gpt2"]
    hooks = n_hooks(lm)

    def broken(_: Tensor) -> None:
        raise RuntimeError("tap")

    at = torch.tensor([0]), torch.tensor([0])
    for layer, message in ((1, "tap"), (9, "layer 9 asked for")):
        wanted = {Point(0, "key"): lambda v: None, Point(layer, "attn"): broken}
        with pytest.raises(Exception, match=message):
            logits_at(lm, batch(), at, wanted) if asked else run(lm, batch(), wanted)
        assert n_hooks(lm) == hooks
