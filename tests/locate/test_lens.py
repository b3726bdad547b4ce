"""Reading states as next tokens, against the model's own logits and against definitions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from recipes import tiny
from torch import Tensor
from torch.testing import assert_close

from retcon.errors import UnsupportedModel
from retcon.lm.forward import Point, activations
from retcon.lm.layouts import LAYOUTS
from retcon.lm.model import LM
from retcon.lm.prompts import Row, pad
from retcon.locate import lens
from tests.conftest import FAMILIES, UNLIKE, tiny_model, tokenizer

Still = Callable[[str], LM]
ROWS = [Row((5, 60, 200, 31), 4), Row((17, 300), 2)]


def last_states(lm: LM) -> Tensor:
    at = torch.tensor([r.prediction for r in ROWS])
    point = Point(lm.n_layers - 1, "block")
    return activations(lm, pad(ROWS), {point: at})[point]


@pytest.mark.parametrize("family", [*FAMILIES, *UNLIKE])
def test_with_the_final_norm_the_last_block_gives_the_models_own_softmax(family: str, still: Still) -> None:
    lm = still(family)  # spec, invariant 63
    with torch.no_grad():
        own = torch.stack([lm.model(torch.tensor([r.ids])).logits[0, -1] for r in ROWS]).softmax(-1)
        read = lens.logits_of(lm, last_states(lm), final_norm=True).softmax(-1)
        bare = lens.logits_of(lm, last_states(lm), final_norm=False).softmax(-1)
    assert_close(read, own, rtol=1e-7, atol=1e-9)  # MPT norms in float32
    assert float((bare - own).abs().max()) > 1e-4
    lens.check_reads(lm)


def test_a_soft_cap_is_in_force_somewhere(still: Still) -> None:
    assert still("gemma2").model.config.final_logit_softcapping  # or the test above would not see it


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_final_norm_it_is_the_head_and_nothing_else(family: str, still: Still) -> None:
    lm = still(family)
    states = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = states @ lm.head.weight.detach().T  # type: ignore[union-attr, operator]
    if lm.head.bias is not None:
        wanted = wanted + lm.head.bias.detach()  # type: ignore[operator]
    with torch.no_grad():
        assert_close(lens.logits_of(lm, states, final_norm=False), wanted)


@pytest.mark.parametrize(
    ("wrapper", "text_type", "own"),
    [
        ("llava", "cohere2", dict(logit_scale=0.5)),  # its forward passes over the factor, or the cap
        ("llava", "gemma2", dict(final_logit_softcapping=5.0)),
        ("gemma4", "gemma4_text", UNLIKE["gemma4_text"] | dict(final_logit_softcapping=5.0)),  # its forward caps
    ],
)
def test_a_wrapper_is_read_as_its_own_forward_reads(
    wrapper: str, text_type: str, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.WRAPPERS, wrapper, (text_type, own))
    lm = LM(tiny.tiny_wrapper(wrapper), tokenizer())
    lens.check_reads(lm)
    assert not lm.head._forward_hooks


def test_a_wrong_layout_is_noticed() -> None:
    layout = replace(LAYOUTS["llama"], final_norm="model.layers.0.input_layernorm")
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.1, 2, 32))
    with pytest.raises(UnsupportedModel, match="off the model's own logits, so states cannot be read"):
        lens.check_reads(LM(model, tokenizer(), layout=layout))


def test_chunks_are_the_whole(still: Still) -> None:
    lm = still("gptj")
    states = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = lens.logits_of(lm, states, final_norm=True)
        for max_logits in (1, 3 * 512, 10**9):
            found = torch.full_like(whole, torch.nan)
            for part, logits in lens.in_chunks(lm, states, final_norm=True, max_logits=max_logits):
                found[part] = logits
                assert logits.numel() <= max(max_logits, 512)
            assert_close(found, whole)


def test_ranks_count_what_is_more_likely() -> None:
    logits = torch.randint(0, 6, (4, 12), generator=torch.Generator().manual_seed(0)).double()  # full of ties
    wanted = torch.tensor([[sum(other > own for other in row) for own in row] for row in logits.tolist()])
    assert torch.equal(lens.ranks(logits), wanted)
    tokens = torch.tensor([[0, 5], [1, 1], [11, 3], [2, 7]])
    assert torch.equal(lens.rank_of(logits, tokens), wanted.gather(1, tokens))
    assert torch.equal(wanted.min(1).values, torch.zeros(4, dtype=torch.long))
    assert torch.equal((wanted == 0), logits == logits.max(1, keepdim=True).values)  # rank 0 <=> arg-max (invariant 64)
