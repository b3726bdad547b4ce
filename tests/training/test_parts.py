"""The hooks of masked tuning against weights changed in place (T1 to T5 of the engine's invariants)."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from retcon.errors import NonFinite
from retcon.lm.forward import answer_log_probs
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.lm.site import Site
from retcon.training.objective import AnswerLoss, answer_rows
from retcon.training.parts import (
    Part,
    TrainedBias,
    TrainedColumns,
    TrainedDense,
    TrainedEntries,
    TrainedLowRank,
    TrainedRows,
    attached,
    changes,
    fresh,
    whole_parameter,
)

KINDS = ("rows", "columns", "entries", "low_rank", "dense", "bias")
SITES = [
    ("gpt2", "down_proj"),  # Conv1D
    ("gpt2", "v_proj"),  # a region of a fused Conv1D
    ("gptj", "up_proj"),
    ("gpt_neox", "v_proj"),  # heads alternate in the fused matrix
    ("phi3", "gate_proj"),  # a region of a fused Linear
    ("opt", "down_proj"),  # sees (batch x seq, width)
]


def part(kind: str, site: Site, randn, scale: float = 0.5, size: float = 0.3) -> Part:
    """A part with random values and places."""
    out, into = site.weight.shape

    def values(*shape: int) -> torch.Tensor:
        return (size * randn(*shape)).requires_grad_()

    if kind == "rows":
        return TrainedRows(site, torch.tensor([5, 0, 7]), values(3, into), scale)
    if kind == "columns":
        return TrainedColumns(site, torch.tensor([2, 9]), values(2, out), scale)
    if kind == "entries":
        return TrainedEntries(site, torch.tensor([0, 3, into + 1, 5 * into]), values(4), scale)
    if kind == "low_rank":
        return TrainedLowRank(site, values(out, 2), values(2, into), scale)
    if kind == "dense":
        return TrainedDense(site, values(out, into))
    return TrainedBias(site, torch.tensor([1, 4]), values(2), scale)


def whole_gradient(lm: LM, name: str, rows: list[Row]) -> torch.Tensor:
    """Gradient of the summed edit loss with respect to a parameter, by autograd on the model's own."""
    parameter = lm.parameter(name)
    with lm.frozen_eval():
        parameter.requires_grad_(True)
        AnswerLoss(lm, rows)(range(len(rows))).sum().backward()
        found = parameter.grad.clone()
        parameter.grad = None
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "site_kind"), SITES)
def test_hooked_equals_merged_and_gradients_are_slices(kind, family, site_kind, tiny, edits, randn):
    """T2 and T3, on rows of different lengths; the fused and flattened cases included."""
    lm = tiny(family)
    site = lm.site(2, site_kind)
    if kind == "bias" and site.bias is None:
        pytest.skip(f"{family} has no bias there")
    one, rows = part(kind, site, randn), answer_rows(lm, edits)
    with attached([one]):
        hooked = answer_log_probs(lm, rows)
    with lm.edited(lm.delta(changes([one]))):
        merged = answer_log_probs(lm, rows)
        (name,) = changes([one])
        slope = whole_gradient(lm, name, rows)
    tolerance = dict(rtol=1e-5, atol=1e-5) if family == "gptj" else dict(rtol=1e-9, atol=1e-9)  # float32 attention
    if family == "opt" or family == "phi3":
        tolerance = dict(rtol=1e-5, atol=1e-5)  # norms and softmax in float32
    assert_close(hooked, merged, **tolerance)
    assert not torch.allclose(hooked, answer_log_probs(lm, rows))

    with lm.frozen_eval(), attached([one]):
        AnswerLoss(lm, rows)(range(len(rows))).sum().backward()
    for tensor in one.trained():  # d/d values through dW(values), against the whole gradient
        step = 1e-6 * randn(*tensor.shape)
        before = changes([one])[name][0].dense(slope.shape)
        with torch.no_grad():
            tensor += step
        moved = changes([one])[name][0].dense(slope.shape) - before
        with torch.no_grad():
            tensor -= step
        loose = dict(rtol=1e-3, atol=1e-10) if tolerance["rtol"] > 1e-6 else dict(rtol=1e-6, atol=1e-13)
        assert_close((tensor.grad * step).sum(), (slope * moved).sum(), **loose)


@pytest.mark.parametrize("kind", ["rows", "columns", "entries", "bias"])
def test_gradient_is_the_scale_times_the_slice(kind, tiny, edits, randn):
    """T2 to the letter, at B = 0."""
    lm = tiny("gpt2")
    site, rows = lm.site(1, "up_proj"), answer_rows(lm, edits)
    one = part(kind, site, randn, scale=0.25, size=0.0)
    with lm.frozen_eval(), attached([one]):
        AnswerLoss(lm, rows)(range(len(rows))).sum().backward()
    g = whole_gradient(lm, site.bias_name if kind == "bias" else site.name, rows)
    full = g if kind == "bias" else g.T  # stored (in, out)
    wanted = {
        "rows": lambda: full[one.index],
        "columns": lambda: full[:, one.index].T,
        "entries": lambda: full.reshape(-1)[one.index],
        "bias": lambda: full[one.index],
    }[kind]()
    assert_close(one.trained()[0].grad, 0.25 * wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["rows", "columns", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_parts_change_no_bit(kind, dtype, tiny, edits, randn):
    """T1."""
    lm = tiny("llama", dtype)
    site = lm.site(1, "down_proj")
    out, into = site.weight.shape
    index = torch.arange(4)
    one = {
        "rows": lambda: TrainedRows(site, index, fresh(site, 4, into)),
        "columns": lambda: TrainedColumns(site, index, fresh(site, 4, out)),
        "low_rank": lambda: TrainedLowRank(site, fresh(site, out, 2), randn(2, into).to(fresh(site).dtype)),
    }[kind]()
    rows = answer_rows(lm, edits)
    clean = answer_log_probs(lm, rows)
    with attached([one]):
        assert torch.equal(answer_log_probs(lm, rows), clean)
    assert not changes([one])


def test_left_and_right_padding_give_the_same_gradient(randn):
    """T2 with padding on either side, on a model called directly with its mask."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=2, n_head=2, n_positions=32)).double().eval()
    from tests.conftest import tokenizer

    lm = LM(model, tokenizer())
    ids = [[3, 4, 5, 6], [7, 8]]
    found = []
    for left in (False, True):
        pad = [[0] * (4 - len(r)) for r in ids]
        batch = torch.tensor([p + r if left else r + p for r, p in zip(ids, pad, strict=True)])
        mask = torch.tensor(
            [
                [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p)
                for r, p in zip(ids, pad, strict=True)
            ]
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        one = TrainedRows(lm.site(0, "down_proj"), torch.tensor([1, 3]), fresh(lm.site(0, "down_proj"), 2, 64))
        with lm.frozen_eval(), attached([one]):
            logits = model(batch, attention_mask=mask, position_ids=positions).logits
            last = [-1, -1] if left else [3, 1]
            sum(logits[i, p].log_softmax(-1)[9] for i, p in enumerate(last)).backward()
        found.append(one.values.grad)
    assert_close(*found, rtol=1e-9, atol=1e-12)


def test_parts_of_one_module_add_up(tiny, edits, randn):
    lm = tiny("phi3")
    both = [part("rows", lm.site(1, "gate_proj"), randn), part("columns", lm.site(1, "up_proj"), randn)]
    rows = answer_rows(lm, edits)
    with attached(both):
        hooked = answer_log_probs(lm, rows)
    assert len(changes(both)) == 1  # the fused parameter
    with lm.edited(lm.delta(changes(both))):
        assert_close(answer_log_probs(lm, rows), hooked, rtol=1e-5, atol=1e-5)


def test_half_precision_models_are_tuned_in_float32(tiny, edits):
    lm = tiny("llama", torch.bfloat16)
    site = lm.site(1, "down_proj")
    one = TrainedRows(site, torch.tensor([0]), fresh(site, 1, site.weight.shape[1]))
    with lm.frozen_eval(), attached([one]):
        loss = AnswerLoss(lm, answer_rows(lm, edits))(range(len(edits)))
        loss.sum().backward()
    assert loss.dtype == one.values.grad.dtype == torch.float32
    with torch.no_grad():
        one.values.sub_(1e-5)  # far below what bfloat16 can tell apart near 1
    assert bool((changes([one])[site.name][0].values() == -1e-5).all())


def test_no_weight_gets_a_gradient_and_all_is_as_before(tiny, edits, untouched, randn):
    """T5, also when something goes wrong inside."""
    lm = tiny("gptj")
    lm.model.train()
    before = untouched(lm)
    one = part("rows", lm.site(2, "down_proj"), randn)
    with pytest.raises(NonFinite), lm.frozen_eval(), attached([one]):
        AnswerLoss(lm, answer_rows(lm, edits))(range(len(edits))).sum().backward()
        raise NonFinite("midway")
    assert untouched(lm) == before
    assert one.values.grad is not None


def test_nothing_below_the_lowest_part_is_recorded(tiny, edits):
    """Autograd starts at the lowest hooked module, so freezing the rest costs nothing."""
    lm = tiny("llama")
    site = lm.site(3, "down_proj")
    one = TrainedRows(site, torch.tensor([0]), fresh(site, 1, site.weight.shape[1]))
    seen = {}
    handles = [
        lm.block(layer).register_forward_hook(lambda _, __, out, layer=layer: seen.update({layer: out.requires_grad}))
        for layer in range(4)
    ]
    try:
        with lm.frozen_eval(), attached([one]):
            AnswerLoss(lm, answer_rows(lm, edits))(range(len(edits)))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {0: False, 1: False, 2: False, 3: True}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.1.ln_1.weight"),
        ("gpt2", "transformer.ln_f.bias"),
        ("gpt2", "transformer.wpe.weight"),
        ("gpt2", "transformer.h.1.mlp.c_fc.bias"),
        ("gptj", "transformer.wte.weight"),
        ("gptj", "lm_head.weight"),
        ("gptj", "lm_head.bias"),
        ("llama", "model.layers.1.post_attention_layernorm.weight"),
        ("gemma2", "model.layers.1.pre_feedforward_layernorm.weight"),  # multiplies by 1 + w
        ("gemma2", "model.embed_tokens.weight"),  # scaled
        ("opt", "model.decoder.layers.2.self_attn.q_proj.weight"),
    ],
)
def test_any_parameter_of_a_module_can_be_trained_whole(family, name, tiny, edits, randn):
    """T2 and T3 for embeddings, norms, biases and the head."""
    lm = tiny(family)
    for parameter in list(lm.not_editable):
        del lm.not_editable[parameter]
    one = whole_parameter(lm.model.get_submodule(name.rpartition(".")[0]), name)
    rows = answer_rows(lm, edits)
    if lm.parameter(name) is lm.head.weight and lm.head.weight is lm.parameter(lm.layout.embedding + ".weight"):
        pytest.skip(f"{family} ties its embedding to its head")
    with attached([one]):
        assert torch.equal(answer_log_probs(lm, rows), answer_log_probs(lm, rows))
    with torch.no_grad():
        one.values.add_(0.1 * randn(*one.values.shape))
    with lm.frozen_eval(), attached([one]):
        hooked = answer_log_probs(lm, rows).detach()
        AnswerLoss(lm, rows)(range(len(rows))).sum().backward()
    with lm.edited(lm.delta(changes([one]))):
        tolerance = dict(rtol=1e-9, atol=1e-9) if family == "gpt2" else dict(rtol=1e-4, atol=1e-4)  # float32 inside
        assert_close(answer_log_probs(lm, rows), hooked, **tolerance)
        assert_close(one.values.grad, whole_gradient(lm, name, rows), rtol=1e-3, atol=tolerance["atol"])
