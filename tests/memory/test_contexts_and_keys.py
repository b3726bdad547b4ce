"""Context prefixes and averaged keys."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite
from retcon.lm.forward import Point, activations
from retcon.lm.model import LM
from retcon.lm.prompts import encode_edit, pad
from retcon.memory.contexts import N_TOKENS, STARTS, Contexts, sample_contexts
from retcon.memory.keys import KeyAverage, KeyReader, mean_keys, weights_of

CONTEXTS = Contexts(("The train stood still. ", "I read. "))


def test_prefixes_are_seeded_clean_and_short(tiny, untouched):
    lm = tiny("llama", torch.float32, tok="bos")
    before = untouched(lm)
    first, again, other = (sample_contexts(lm, seed=s) for s in (0, 0, 1))
    assert untouched(lm) == before  # no global random state is used or changed
    assert first == again != other
    assert len(first.prefixes) == len(STARTS)
    for start, prefix in zip(STARTS, first.prefixes, strict=True):
        assert prefix.startswith(start)
        assert prefix.endswith(". ")
        assert not set(prefix) & set("{}\n\r\t\ufffd")
        assert "<s>" not in prefix
        assert len(lm.encode(prefix).ids) <= 3 * N_TOKENS


@pytest.mark.parametrize(("style", "n"), [("memit", 5), ("rome", 20), ("rome_easyedit", 20)])
def test_styles_differ_in_number_start_and_length(style, n, tiny):
    lm = tiny("llama", torch.float32, tok="bos")
    contexts = sample_contexts(lm, style=style)
    assert len(contexts.prefixes) == n
    assert contexts == sample_contexts(lm, style=style)
    assert all(prefix.endswith(". ") and "<s>" not in prefix for prefix in contexts.prefixes)
    if style != "rome":
        assert all(prefix.startswith(STARTS) for prefix in contexts.prefixes)
    if style != "memit":  # half of them are short
        short, long = contexts.prefixes[:10], contexts.prefixes[10:]
        assert sum(map(len, short)) < sum(map(len, long))


def test_an_unknown_style_is_refused(tiny):
    untyped = inspect.unwrap(sample_contexts)  # without the tests' check of types
    with pytest.raises(InvalidSetting, match="unknown style of contexts 'mend'; known: memit, rome, rome_easyedit"):
        untyped(tiny("llama"), style="mend")


def test_romes_style_needs_a_mark_to_start_from(tiny):
    lm = tiny("llama")
    lm.tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    with pytest.raises(InvalidSetting, match="start from a BOS or EOS token"):
        sample_contexts(lm, style="rome")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_overflows_is_named(value: float, tiny: Callable[..., LM]) -> None:
    lm = tiny("gptj", torch.float32)
    with torch.no_grad():
        lm.head.bias[3] = value
    with pytest.raises(NonFinite, match=rf"'{lm.name}'.*NaN or infinite.*bfloat16 or float32"):
        sample_contexts(lm)


def test_prefixes_come_from_the_unedited_model(tiny):
    from retcon.delta import Dense

    lm = tiny("llama", torch.float32)
    wanted = sample_contexts(lm)
    site = lm.site(0, "down_proj")
    with lm.edited(lm.delta({site.name: [Dense(full=torch.ones_like(site.weight))]})):
        assert sample_contexts(lm) == wanted


@pytest.mark.parametrize("average", ["two_level", "uniform"])
def test_weights_sum_to_one(average):
    assert sum(weights_of(5, average)) == pytest.approx(1)
    assert weights_of(0, average) == [1.0]
    assert weights_of(5, "two_level")[:2] == [0.5, 0.1]


@pytest.mark.parametrize("where", ["subject_last", "prediction"])
@pytest.mark.parametrize("average", ["two_level", "uniform"])
def test_mean_key_equals_the_mean_over_rows_one_by_one(tiny, edits, where, average):
    lm = tiny("llama")
    keys, values = mean_keys(
        lm, edits, CONTEXTS, Point(1, "key"), where, value=Point(2, "block"), average=average, max_batch_tokens=40
    )
    for i, edit in enumerate(edits):
        found, weight = 0, weights_of(2, average)
        for j, prefix in enumerate(CONTEXTS.all):
            row = encode_edit(lm.tokenizer, edit, prefix)
            at = torch.tensor([row.position(where)])
            seen = activations(lm, pad([row]), {Point(1, "key"): at, Point(2, "block"): at})
            found = found + weight[j] * seen[Point(1, "key")][0]
            if j == 0:
                assert_close(values[i], seen[Point(2, "block")][0])
        assert_close(keys[i], found)


def test_targets_appended_change_neither_keys_nor_values(tiny, edits):
    lm = tiny("gpt2")
    for edit in edits:
        bare, full = encode_edit(lm.tokenizer, edit), encode_edit(lm.tokenizer, edit, answer=edit.target_new)
        assert full.ids[: full.n_prompt] == bare.ids
        for where in ("subject_last", "prediction"):
            assert bare.position(where) == full.position(where)
            at = {Point(2, "key"): torch.tensor([bare.position(where)])}
            assert_close(
                activations(lm, pad([bare]), at)[Point(2, "key")], activations(lm, pad([full]), at)[Point(2, "key")]
            )


def test_prediction_position_does_not_depend_on_the_target(tiny):
    lm = tiny("llama", tok="bos")
    rows = [
        encode_edit(lm.tokenizer, Edit("{} speaks", "Michel Rocard", target), answer=target)
        for target in ("French", "French and a little Ελλάδα")
    ]
    assert rows[0].prediction == rows[1].prediction
    ending = encode_edit(lm.tokenizer, Edit("You know {}", "Michel Rocard", "French"))
    assert ending.subject_last == ending.prediction


@pytest.mark.parametrize("average", ["two_level", "uniform"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_a_reader_gives_the_mean_keys_while_layers_are_written(
    family: str, average: KeyAverage, tiny: Callable[..., LM], edits: list[Edit], randn: Callable[..., torch.Tensor]
) -> None:
    lm = tiny(family)
    reader = KeyReader(lm, edits, CONTEXTS, average=average)
    readings = [(0, "subject_last", 1), (1, "subject_last", 1), (2, "prediction", 3), (3, "prediction", 3)]
    with ExitStack() as scope:
        for layer, where, above in readings:
            point, value = Point(layer, "key"), Point(above, "mlp")
            found = reader.read(point, where, value)
            wanted = mean_keys(lm, edits, CONTEXTS, point, where, value=value, average=average)
            for a, b in zip(found, wanted, strict=True):
                assert_close(a, b, rtol=1e-9, atol=1e-9)
            site = lm.site(layer, "down_proj")
            change = site.stored(randn(32, 2), 0.1 * randn(2, 64 if family != "gpt2" else 128))
            scope.enter_context(lm.edited(lm.delta({site.name: [change]})))


def test_a_reader_runs_no_token_after_the_last_that_is_read(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny("llama")
    reader = KeyReader(lm, edits, CONTEXTS, last="subject_last")
    assert all(len(row.ids) == row.subject_last + 1 for row in reader.rows if row.subject_last is not None)
    point, value = Point(1, "key"), Point(2, "mlp")
    found = reader.read(point, "subject_last", value)
    for a, b in zip(found, mean_keys(lm, edits, CONTEXTS, point, "subject_last", value=value), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_edits_that_share_a_key_have_one(family, tiny):
    """Equal rows differ in their last bits where they are in different batches."""
    lm = tiny(family, torch.float32)
    prompts = ["{} lies in", "{} is twinned with", "{} belongs to the continent of"]
    edits = [Edit(p, s, "X", id=s + p) for p in prompts for s in ("Geneva", "A place in the far north", "Rome")]
    point = Point(1, "key")
    small, _ = mean_keys(lm, edits, CONTEXTS, point, "subject_last", max_batch_tokens=64)
    reader = KeyReader(lm, edits, CONTEXTS)
    for found in (small, reader.read(point, "subject_last", Point(2, "block"))[0]):
        for j in range(3):
            assert torch.equal(found[j::3], found[j].expand(3, -1))
    apart = reader.read(point, "prediction", Point(2, "block"))[0]
    assert len(apart.unique(dim=0)) == len(edits)
