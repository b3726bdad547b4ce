"""Mixtures of experts, hybrids and other models whose blocks differ: what holds for dense ones holds for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.fast_path import plain_path
from torch import Tensor

from retcon.edits import Edit
from retcon.errors import UnsupportedModel
from retcon.lm.forward import Point, run
from retcon.lm.layouts import LAYOUTS
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.lm.replay import capture_states, replaying, suffix_starts
from retcon.memory.contexts import Contexts
from retcon.memory.values.search import REPLAYS
from retcon.methods.memit import Memit
from tests.conftest import UNLIKE, random_moments, tiny_model, tokenizer

CONTEXTS = Contexts(("The train stood still. ", "I read. "))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*larger than the weight"),
    pytest.mark.filterwarnings("ignore:.*stands between"),
]
REPLAYED = sorted(set(UNLIKE) - {"gemma4_text"})
ROUTED_ONLY = tuple(f for f in UNLIKE if all(kind.down_proj is None for kind in LAYOUTS[f].kinds))
ENDS = ("down_proj.weight", "w2.weight", "output_linear.weight")
NOT_LINEAR = ("llama4_text",)
"""Families whose experts are not linear in what leaves them; only their shared expert is in the layout."""
WITH_MLP = sorted(set(UNLIKE) - set(ROUTED_ONLY))


def with_mlp(lm: LM) -> list[int]:
    return [layer for layer in range(lm.n_layers) if lm.has(layer, "down_proj")]


@pytest.mark.parametrize("family", UNLIKE)
def test_each_block_is_of_the_kind_whose_modules_it_has(family: str, tiny: Callable[..., LM]) -> None:
    lm = tiny(family)
    for layer in range(lm.n_layers):
        down = [n for n, _ in lm.block(layer).named_parameters() if n.endswith(ENDS)]
        assert lm.has(layer, "down_proj") == bool(down), (layer, down)
        experts = [n for n, _ in lm.block(layer).named_parameters() if n.endswith("experts.down_proj")]
        assert (lm.kinds[layer].experts is not None) == bool(experts and family not in NOT_LINEAR)
        assert lm.site(layer, "o_proj").weight.shape[0] == lm.d_model == 32


@pytest.mark.parametrize(
    ("model_type", "own", "dense", "routed"),
    [
        ("ernie4_5_moe", dict(moe_num_shared_experts=0), [0], [1, 2, 3]),
        ("granitemoe_swa", dict(shared_intermediate_size=0), [], [0, 1, 2, 3]),
        ("qwen3_next", dict(mlp_only_layers=[0, 1]), [0, 1], []),
        ("cohere2_moe", dict(num_shared_experts=0), [0], [1, 2, 3]),
    ],
)
def test_blocks_that_a_config_makes_otherwise_are_known(
    model_type: str, own: dict[str, Any], dense: list[int], routed: list[int]
) -> None:
    lm = LM(tiny_model(model_type, **UNLIKE[model_type] | own), tokenizer())
    assert [i for i, kind in enumerate(lm.kinds) if kind.experts is None] == dense
    assert [i for i, kind in enumerate(lm.kinds) if kind.down_proj is None] == routed


@pytest.mark.parametrize("family", REPLAYED)
@pytest.mark.parametrize("first", [1, 2])
def test_replayed_blocks_give_what_a_plain_pass_gives(first: int, family: str, tiny: Callable[..., LM]) -> None:
    lm = tiny(family)
    generator = torch.Generator().manual_seed(0)
    rows = [Row(tuple(torch.randint(3, 400, (n,), generator=generator).tolist()), n) for n in (19, 7, 23, 1)]
    starts = suffix_starts(lm, [11, 0, 17, 0])
    state, _ = capture_states(lm, rows, starts, first)
    found: list[Tensor] = []
    with lm.frozen_eval(), torch.no_grad(), replaying(lm, state) as inputs:
        run(lm, inputs, {Point(lm.n_layers - 1, "block"): lambda value: found.append(value)})
    for i, row in enumerate(rows):
        plain = last_block_output(lm, row)[starts[i] :]
        replayed = found[0][i, : len(plain)]
        close = 1e-6 * float(plain.abs().max())  # some routers compute in float32
        assert float((replayed - plain).abs().max()) <= close


def last_block_output(lm: LM, row: Row) -> Tensor:
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = lm.block(lm.n_layers - 1).register_forward_hook(keep)
    try:
        with torch.no_grad():
            lm.model(torch.tensor([row.ids]), use_cache=False)
    finally:
        handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("family", WITH_MLP)
def test_dense_and_shared_matrices_are_edited_fast_as_plain_and_undone_to_the_bit(
    family: str, tiny: Callable[..., LM], edits: list[Edit], untouched: Callable[[LM], Any]
) -> None:
    lm = tiny(family)
    before = untouched(lm)
    method = Memit(layers=tuple(with_mlp(lm)[-3:-1] or with_mlp(lm)), clamp=1.0, moment_weight=10.0, steps=5)
    moments = random_moments(lm)
    fast = method.propose(lm, edits, contexts=CONTEXTS, moments=moments)
    assert lm.layout.earlier == "other" or all(REPLAYS[lm].values())
    with plain_path():
        plain = method.propose(lm, edits, contexts=CONTEXTS, moments=moments)
    assert set(fast.changes) == set(plain.changes) == {lm.site(i, "down_proj").name for i in method.layers}
    for name in plain.changes:
        shape = lm.parameter(name).shape
        a, b = fast.dense(name, shape), plain.dense(name, shape)
        assert float((a - b).norm()) <= 2e-5 * float(b.norm()), name
    lm.apply(fast)
    assert untouched(lm) != before
    lm.revert(fast)
    assert untouched(lm) == before


def test_a_block_without_a_matrix_says_where_there_is_one(tiny: Callable[..., LM]) -> None:
    with pytest.raises(UnsupportedModel, match="has no q_proj in layer 0; it has one in layers 1, 3"):
        tiny("qwen3_5_text").site(0, "q_proj")
    with pytest.raises(UnsupportedModel, match="no down_proj in layer 1: every expert of that block is routed"):
        tiny("mixtral").site(1, "down_proj")
