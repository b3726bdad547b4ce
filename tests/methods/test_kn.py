"""KN: the rewriting rule, erasure, refinement (T40 to T43), and facts of an embedded model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import retcon
from retcon import world
from retcon.errors import InvalidSetting
from retcon.lm.forward import Point, activations
from retcon.lm.prompts import pad
from retcon.locate.neurons import attribute_neurons
from retcon.memory.contexts import Contexts
from retcon.methods.kn import Kn, coarse, refine
from retcon.training.objective import answer_rows
from retcon.workflow import search_line


def kn(**settings: Any) -> Kn:
    return Kn(**{**dict(n_points=3, n_prefixes=0), **settings})


def columns(lm: Any, delta: Any, layer: int) -> dict[int, torch.Tensor]:
    """What is added to each value vector of a layer."""
    site = lm.site(layer, "down_proj")
    found = {}
    for change in delta.changes.get(site.name, ()):
        values = change.rows if site.transposed else change.columns.T
        found |= dict(zip(change.index.tolist(), values, strict=True))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lengths_follow_the_value_vector_s(family, tiny, edit):
    """T40, each term alone."""
    lm = tiny(family)
    for subtract, add in ((1.0, 0.0), (0.0, 8.0)):
        delta = kn(subtract=subtract, add=add).propose(lm, [edit])
        n = 0
        for layer in range(lm.n_layers):
            for j, change in columns(lm, delta, layer).items():
                v = lm.site(layer, "down_proj").weight[:, j]
                assert_close(change.norm(), (subtract + add) * v.norm())
                n += 1
        assert 1 <= n <= 20


@pytest.mark.parametrize("family", ["qwen2_moe", "dots1", "deepseek_v2", "gemma4_text"])
def test_blocks_of_two_widths_and_blocks_without_a_replay_are_edited(family, tiny, edit):
    lm = tiny(family)
    wide, narrow = (lm.site(layer, "down_proj").shape[1] for layer in (0, 1))
    delta = kn(threshold=0.0, max_units=10_000).propose(lm, [edit])
    units = [set(columns(lm, delta, layer)) for layer in range(lm.n_layers)]
    assert all(units)
    assert max(units[0]) >= narrow or wide == narrow
    assert max(units[1]) < narrow


def test_erasing_is_switching_the_units_off(tiny, edit):
    """T41."""
    lm = tiny("gptj")
    delta = kn(erase=True).propose(lm, [edit])
    layer = next(i for i in range(lm.n_layers) if columns(lm, delta, i))
    units = torch.tensor(sorted(columns(lm, delta, layer)))
    row = lm.encode(edit.text)
    batch, at = pad([row], lm.device), torch.tensor([row.prediction])
    with lm.frozen_eval():
        before = activations(lm, batch, {Point(layer, "key"): at, Point(layer, "mlp"): at})
        with lm.edited(delta):
            after = activations(lm, batch, {Point(layer, "key"): at, Point(layer, "mlp"): at})
    key = after[Point(layer, "key")].clone()
    key[:, units] = 0.0
    w = lm.site(layer, "down_proj").weight
    wanted = key @ w.T + (lm.site(layer, "down_proj").bias if lm.site(layer, "down_proj").bias is not None else 0)
    assert_close(after[Point(layer, "mlp")], wanted)
    assert not torch.allclose(before[Point(layer, "mlp")], after[Point(layer, "mlp")])


def test_thresholds_are_relative_and_refining_wants_agreement(randn):
    """T42."""
    scores = randn(4, 30)
    assert torch.equal(coarse(scores, 0.2), coarse(100 * scores, 0.2))
    assert refine(scores, 0.2, 0.7) == refine(7 * scores, 0.2, 0.7)
    agreed = torch.full((4, 10), 0.01)
    agreed[:, [2, 5]] = torch.tensor([1.0, 0.9])
    agreed[0, 7] = 5.0  # one prompt's own: its coarse set is this alone
    assert refine(agreed, 0.2, 0.7) == [2, 5]
    assert refine(torch.zeros(3, 5), 0.2, 0.7) == [0]  # something is always changed
    assert refine(torch.tensor([[0.1, 1.0, 0.5]]), 0.2, 0.7) == [1, 2]  # of one prompt, its coarse set


@pytest.mark.parametrize("prompts", [[5, 5, 5, 4, 4, 4, 4, 4], [5, 3, 3, 2]])
def test_the_share_is_moved_until_two_to_five_units_are_left(prompts):
    """Eight units are in four of five prompts' coarse sets, or one is: too many, and too few."""
    scores = torch.zeros(5, 10)
    for unit, n in enumerate(prompts):
        scores[:n, unit] = 1.0
    assert refine(scores, 0.2, 0.7) == [0, 1, 2]


def test_tied_embeddings_are_the_same_either_way(tiny, edit):
    """T43."""
    lm = tiny("gpt2")
    assert kn(embedding="input").propose(lm, [edit]).id == kn(embedding="output").propose(lm, [edit]).id
    lm = tiny("gptj")
    assert kn(embedding="input").propose(lm, [edit]).id != kn(embedding="output").propose(lm, [edit]).id


def test_edits_are_independent_and_add_up(tiny, edits):
    lm = tiny("gpt2")
    both = kn().propose(lm, edits[:2])
    apart = [kn().propose(lm, [edit]) for edit in edits[:2]]
    for name in both.changes:
        shape = lm.parameter(name).shape
        wanted = sum(d.dense(name, shape) for d in apart if name in d.changes)
        assert_close(both.dense(name, shape), wanted)


@pytest.mark.parametrize("attributed", ["old", "target_new"])
def test_the_chosen_units_are_the_prompt_s_highest(attributed, tiny, edit):
    lm = tiny("llama")
    delta = kn(threshold=0.5, attributed=attributed).propose(lm, [edit])
    fact = replace(edit, target_new=edit.target_true) if attributed == "old" else edit
    scores, _ = attribute_neurons(lm, answer_rows(lm, [fact]), n_points=3)
    of_fact = torch.stack(scores, 1)[0]
    wanted = (of_fact >= 0.5 * of_fact.max()).nonzero().tolist()
    assert sorted([layer, j] for layer in range(lm.n_layers) for j in columns(lm, delta, layer)) == wanted


def test_the_change_is_turned_round_for_units_that_are_negative(tiny, edit):
    """On the mean of the prompts."""
    lm = tiny("llama")
    prefixes = ("I read. ", "The train stood still. ", "You know, ", "He lived in Milan, and so ")
    settings = dict(n_prefixes=4, threshold=0.0, share=0.05, max_units=1000)
    signed, published = (
        kn(signed=signed, **settings).propose(lm, [edit], contexts=Contexts(prefixes)) for signed in (True, False)
    )
    old = replace(edit, target_new=edit.target_true)
    rows = [answer_rows(lm, [old], prefix=prefix)[0] for prefix in ("", *prefixes)]
    activations = torch.stack(attribute_neurons(lm, rows, n_points=3)[1], 1)
    units = [(i, j) for i in range(lm.n_layers) for j in columns(lm, signed, i)]
    turned = [float((columns(lm, signed, i)[j] @ columns(lm, published, i)[j]).sign()) for i, j in units]
    assert turned == [float(activations.mean(0)[unit].sign()) for unit in units]
    assert set(turned) == {1.0, -1.0}
    assert any(float(activations[0][unit].sign()) != sign for unit, sign in zip(units, turned, strict=True))


def test_an_edit_that_fails_is_no_conflict_since_nothing_was_searched(tiny, edits):
    delta = kn(erase=True).propose(tiny("llama"), edits)
    assert {(r.stopped, r.greedy_match, r.outcome) for r in delta.report} == {("written", False, "missed")}
    assert search_line(delta.report) == ""
    took = replace(delta.report[0], greedy_match=True)  # by a later step, say
    assert took.outcome == "reached"


@pytest.mark.parametrize("name", ["kn", "ft"])
def test_no_more_prefixes_are_asked_for_than_are_sampled(name, tiny, edits):
    settings = dict(n_points=1) if name == "kn" else dict(layers=(1,), epochs=1)
    method, lm = retcon.method(name, n_prefixes=6, **settings), tiny("gpt2")
    with pytest.raises(InvalidSetting, match=f"^{name}: n_prefixes is 6, and 5 prefixes are sampled"):
        method.propose(lm, edits[:1])
    many = Contexts(tuple(f"I read {word}. " for word in ("the", "a", "an", "one", "two", "three", "four")))
    assert method.propose(lm, edits[:1], contexts=many).contexts == many.prefixes[:6]


def test_without_an_old_answer_the_model_s_own_is_taken(tiny, edits):
    lm, edit = tiny("llama"), edits[-1]
    assert edit.target_true is None
    own = lm.complete(edit.text, max_new_tokens=4, stops=("\n", ".", ","))
    none, same, other = (
        [columns(lm, kn().propose(lm, [replace(edit, target_true=answer)]), i) for i in range(lm.n_layers)]
        for answer in (None, own, edit.target_new)
    )
    assert_close(none, same)
    assert [set(c) for c in none] != [set(c) for c in other]


def test_facts_of_an_embedded_model_become_likelier():
    lm = retcon.load("demo:gptj")
    edits = [case.edits[0] for case in world.cases(3, seed=0)]
    from retcon.methods.common.proposal import answers

    before = [p for p, _ in answers(lm, edits)]
    delta = Kn(n_points=10, n_prefixes=0).propose(lm, edits)
    assert sum(r.final_probability > p for r, p in zip(delta.report, before, strict=True)) >= 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(n_points=0), "n_points must be at least 1"),
        (dict(share=0.0), "share must be above 0"),
        (dict(threshold=-0.1), "threshold must not be negative"),
        (dict(threshold=1.05), "threshold is a share of the highest score, at most 1; found 1.05"),
        (dict(grid="all"), "grid is 'all'"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        kn(**settings)
