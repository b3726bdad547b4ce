"""The contrast-based probe against hidden states and full softmaxes, record by record."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite
from retcon.lm.forward import Point, run
from retcon.lm.model import LM
from retcon.lm.prompts import encode_edit, pad
from retcon.locate import Contrast, WordSets, contrast_probe
from retcon.locate.wordsets import SETS, TokenSets
from tests.conftest import FAMILIES, everyday

Still = Callable[[str], LM]
RTOL = 1e-6
"""gemma 2 and GPT-J take their attention weights in float32."""
EDITS = [
    Edit("The capital of {} is", "France", "Rome", "Paris", id="france"),
    Edit("The mother tongue of {} is", "Danielle Darrieux", "Italian", "French", id="darrieux"),
    Edit("{} lived in", "Leonardo da Vinci", "São Paulo", "Florence", id="leonardo"),
    Edit("You know that {}", "Łódź", "a town in Greece", "Milan", id="lodz"),
]


def by_hand(lm: LM, edit: Edit, position: int, point: Point, final_norm: bool) -> Tensor:
    """The distribution that a state gives, from one unpadded row."""
    row = encode_edit(lm.tokenizer, edit)
    found: list[Tensor] = []
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        if point.layer < 0:
            handle = lm.block(0).register_forward_pre_hook(lambda _, args: found.append(args[0]))
            lm.model(ids)
            handle.remove()
        else:
            run(lm, pad([row]), {point: lambda value: found.append(value)})
        state = found[0][0, position]
        if final_norm:
            state = lm.model.get_submodule(lm.layout.final_norm)(state)
        logits = lm.head(state)
        if final_norm:  # Cohere; Granite, HyperCLOVA X
            scaling = getattr(lm.config, "logits_scaling", None) or 1.0
            logits = logits * (getattr(lm.config, "logit_scale", None) or 1.0)
            logits = logits * (scaling if lm.config.model_type == "hyperclovax" else 1 / scaling)
        cap = getattr(lm.model.config, "final_logit_softcapping", None)
        if final_norm and cap:
            logits = cap * torch.tanh(logits / cap)
    return logits.softmax(-1)


@pytest.mark.parametrize("family", everyday("gemma2", "gpt2", "gptj", of=FAMILIES))
def test_every_state_is_read_as_by_hand(family: str, still: Still, untouched: Callable[[LM], Any]) -> None:
    lm = still(family)
    before = untouched(lm)
    found = contrast_probe(lm, EDITS, tensors=("mlp", "block", "attn"))
    assert untouched(lm) == before
    assert found.ids == tuple(e.id for e in EDITS)
    assert found.points[:4] == (Point(-1, "block"), Point(0, "attn"), Point(0, "mlp"), Point(0, "block"))
    assert found.n_layers == 4
    for i, edit in enumerate(EDITS[1:3], 1):
        row = encode_edit(lm.tokenizer, edit)
        tokens = [lm.encode(edit.text, answer).target_ids[0] for answer in (edit.target_true, edit.target_new)]
        for w, position in enumerate((row.subject_last, row.prediction)):
            assert position is not None
            for p, point in enumerate(found.points):
                for n, final_norm in enumerate(found.norms):
                    prob = by_hand(lm, edit, position, point, final_norm)
                    ranks = [float((prob > prob[t]).sum()) for t in tokens]
                    assert_close(found.sum_prob[i, w, p, n], prob[tokens], rtol=RTOL, atol=1e-12)
                    assert found.mean_rank[i, w, p, n].tolist() == ranks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_with_the_norm_is_the_model_itself(family: str, still: Still) -> None:
    lm = still(family)
    found = contrast_probe(lm, EDITS, positions=("prediction",), norms=(True,))
    for i, edit in enumerate(EDITS):
        with torch.no_grad():
            own = lm.model(torch.tensor([encode_edit(lm.tokenizer, edit).ids])).logits[0, -1].softmax(-1)
        first = lm.encode(edit.text, edit.target_true).target_ids[0]
        assert_close(found.sum_prob[i, 0, -1, 0, 0], own[first], rtol=RTOL, atol=1e-14)
        assert bool(found.known[i]) == (int(own.argmax()) == first) == (float(found.mean_rank[i, 0, -1, 0, 0]) == 0)


def test_edits_may_come_from_a_generator_and_in_inference_mode(still: Still) -> None:
    lm = still("llama")
    wanted = contrast_probe(lm, EDITS)
    with torch.inference_mode():
        found = contrast_probe(lm, (edit for edit in EDITS))
    assert (found.ids, found.points) == (wanted.ids, wanted.points)
    assert torch.equal(found.mean_rank, wanted.mean_rank)


def test_batches_and_chunks_do_not_matter(still: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = still("llama")
    whole = contrast_probe(lm, EDITS)
    heard: list[tuple[int, int]] = []
    one_by_one = contrast_probe(lm, EDITS, max_batch_tokens=1, progress=lambda *a: heard.append(a))
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    monkeypatch.setattr("retcon.locate.lens.in_chunks.__kwdefaults__", {"max_logits": 512})
    for other in (one_by_one, contrast_probe(lm, EDITS)):
        assert_close(other.sum_prob, whole.sum_prob, rtol=1e-9, atol=0)
        assert torch.equal(other.mean_rank, whole.mean_rank)


def test_what_cannot_be_contrasted_is_left_out_and_said(still: Still) -> None:
    lm = still("gpt2")
    row = encode_edit(lm.tokenizer, EDITS[0])
    with torch.no_grad():
        said = lm.tokenizer.decode(int(lm.model(torch.tensor([row.ids])).logits[0, -1].argmax()))
    edits = [
        EDITS[0],
        Edit("The capital of {} is", "Italy", "Milan", "Milano", id="same"),
        Edit("The capital is", "Spain", "Rome", "Madrid", id="absent"),
        Edit("The capital of {} is", "France", "Rome", id="unsaid"),
    ]
    found = contrast_probe(lm, edits)
    assert found.ids == ("france", "unsaid")
    assert found.assumed.tolist() == [False, True]
    assert found.known.tolist() == [False, True]  # what the model says is what it says
    assert float(found.mean_rank[1, 1, -1, 1, 0]) == 0, said
    assert found.skipped == {
        "absent": "the subject does not occur in the prompt",
        "same": "both answers begin with the same token",
    }
    with pytest.raises(InvalidSetting, match=r"nothing to probe: 1 left out, both answers begin with the same token"):
        contrast_probe(lm, edits[1:2])
    with pytest.raises(InvalidSetting, match="nothing to probe: no edits were given"):
        contrast_probe(lm, [])
    untyped = inspect.unwrap(contrast_probe)  # without the tests' check of types
    with pytest.raises(InvalidSetting, match="unknown position 'subject'; known: subject_last, prediction"):
        untyped(lm, edits, positions=["subject"])
    with pytest.raises(InvalidSetting, match="positions must be a list of texts, found 'prediction'"):
        untyped(lm, edits, positions="prediction")
    with pytest.raises(InvalidSetting, match="cannot read key as next tokens; known: block, attn, mlp"):
        contrast_probe(lm, EDITS, tensors=("key",))


@pytest.mark.parametrize("what", ["positions", "tensors", "norms"])
def test_a_probe_looks_somewhere(what: str, still: Still) -> None:
    with pytest.raises(InvalidSetting, match=f"no {what} were given; at least one is wanted"):
        contrast_probe(still("gptj"), EDITS, **{what: ()})
    untyped = inspect.unwrap(contrast_probe)
    given = {"positions": ["prediction"], "tensors": ["block"], "norms": [False]}
    once = untyped(still("gptj"), EDITS, **{**given, what: iter(given[what])})
    assert torch.equal(once.mean_rank, untyped(still("gptj"), EDITS, **given).mean_rank)


def test_a_broken_state_is_refused(tiny: Callable[..., LM]) -> None:
    lm = tiny("gptj")
    with torch.no_grad():
        lm.site(1, "down_proj").module.weight[0, 0] = math.inf  # type: ignore[index]
    with pytest.raises(NonFinite, match="load the model in a wider dtype"):
        contrast_probe(lm, EDITS, norms=(False,))


def test_half_precision(tiny: Callable[..., LM]) -> None:
    found = contrast_probe(tiny("llama", torch.bfloat16), EDITS)
    assert torch.isfinite(found.sum_prob).all()
    assert (found.sum_prob <= 1).all()


# --- tables ------------------------------------------------------------------------------------------------------


def test_the_tidy_table_holds_everything_once(still: Still) -> None:
    found = contrast_probe(still("gptj"), EDITS)
    rows = list(found.records())
    assert len(rows) == 4 * 2 * 5 * 2 * 2
    keys = {(r["record_id"], r["position"], r["layer"], r["site"], r["final_norm"], r["set"]) for r in rows}
    assert len(keys) == len(rows)
    row = next(
        r for r in rows
        if (r["record_id"], r["position"], r["layer"], r["final_norm"], r["set"])
        == ("leonardo", "prediction", 2, True, "target")
    )  # fmt: skip
    assert row["mean_rank"] == float(found.mean_rank[2, 1, 3, 1, 1])
    assert row["sum_prob"] == row["mean_prob"] == float(found.sum_prob[2, 1, 3, 1, 1])
    assert row["size"] == 1


def test_a_curve_is_mean_and_interval_over_records(still: Still) -> None:
    found = contrast_probe(still("gptj"), EDITS)
    curve = found.curve("mean_rank", "original", "subject_last", final_norm=False)
    layers, values = found.values("mean_rank", "original", "subject_last", final_norm=False)
    assert curve.layers == layers == (-1, 0, 1, 2, 3)
    ranks = values[:, 2].tolist()
    mean = sum(ranks) / 4
    sem = math.sqrt(sum((r - mean) ** 2 for r in ranks) / 3 / 4)
    assert float(curve.mean[2]) == pytest.approx(mean)
    assert float(curve.half_width[2]) == pytest.approx(1.96 * sem)
    assert curve.n == 4
    means = found.means()
    assert len(means) == 2 * 1 * 2 * 2 * 3 * 5
    one = next(m for m in means if m["layer"] == 1 and m["quantity"] == "mean_rank")
    assert (one["mean"], one["half_width"]) == (pytest.approx(mean), pytest.approx(1.96 * sem))
    with pytest.raises(InvalidSetting, match="the probe holds no set related; it holds original, target"):
        found.curve("mean_rank", "related", "prediction", final_norm=False)
    with pytest.raises(InvalidSetting, match="no tensor mlp"):
        found.values("mean_rank", "original", "prediction", final_norm=False, tensor="mlp")


def test_one_record_has_a_mean_and_no_interval(still: Still) -> None:
    curve = contrast_probe(still("gptj"), EDITS[:1]).curve("sum_prob", "target", "prediction", final_norm=True)
    assert torch.isfinite(curve.mean).all()
    assert curve.half_width.isnan().all()


# --- word sets ---------------------------------------------------------------------------------------------------


def probe_with_sets(lm: LM) -> tuple[Contrast, WordSets]:
    words = WordSets(
        related={"france": frozenset({"train", "Rome", "the", "French"}), "leonardo": frozenset({"Milan"})},
        factual={"france": frozenset({"French"})},
        stopwords=frozenset({"the", "of", ","}),
    )
    return contrast_probe(lm, EDITS, word_sets=words), words


def test_word_sets_are_followed_as_by_hand(still: Still) -> None:
    lm = still("gpt2")
    found, words = probe_with_sets(lm)
    assert found.sets == ("original", "target", *SETS)
    tokens = TokenSets(words, lm.tokenizer, 512)
    for i in (0, 2):
        edit = EDITS[i]
        original = lm.encode(edit.text, edit.target_true).target_ids[0]
        row = encode_edit(lm.tokenizer, edit)
        prob = by_hand(lm, edit, row.prediction, Point(1, "block"), True)
        rank = (prob[None] > prob[:, None]).sum(1).double()
        for k, of in enumerate(tokens.of(edit, original), 2):
            assert int(found.size[i, k]) == len(of)
            if len(of):
                assert float(found.sum_prob[i, 1, 2, 1, k]) == pytest.approx(float(prob[of].sum()), rel=1e-7)
                assert float(found.mean_rank[i, 1, 2, 1, k]) == pytest.approx(float(rank[of].mean()))
    assert_close(
        found.mean_prob[..., 2:], found.sum_prob[..., 2:] / found.size[:, None, None, None, 2:], equal_nan=True
    )


def test_an_empty_set_is_no_number_and_no_record(still: Still) -> None:
    found, _ = probe_with_sets(still("gpt2"))
    related = found.sets.index("related")
    assert found.size[:, related].tolist() == [4, 0, 1, 0]
    assert found.mean_rank[[1, 3]][..., related].isnan().all()
    assert found.curve("mean_prob", "related", "prediction", final_norm=True).n == 2
    assert {r["record_id"] for r in found.records() if r["set"] == "related"} == {"france", "leonardo"}


def test_left_and_the_rest_make_a_whole(still: Still) -> None:
    lm = still("llama")
    found = contrast_probe(lm, EDITS, word_sets=WordSets({}, {}, frozenset()))
    left, original = found.sets.index("left"), found.sets.index("original")
    assert (found.size[:, left] == 511).all()
    assert_close(found.sum_prob[..., left] + found.sum_prob[..., original], torch.ones(4, 2, 5, 2, dtype=torch.float64))
