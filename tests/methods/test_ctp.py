"""CTP: which nodes change, what the contrast does, and what the released optimiser leaks (T25 to T29)."""

import math
from typing import Any

import pytest
import torch
from benchmarks.released_ctp import ReleasedCtp
from torch.testing import assert_close

from retcon.errors import InvalidEdit, InvalidSetting, NotEditable, RetconWarning
from retcon.locate.paths import Paths, Transmission, paths, slots_of
from retcon.methods.common.choosing import method
from retcon.methods.common.path_nodes import PathNodes
from retcon.methods.common.presets import presets
from retcon.methods.ctp import Ctp
from retcon.training.objective import AnswerLoss, answer_rows, own_answer_tokens
from retcon.training.parts import attached, changes
from tests.conftest import everyday

FAST: dict[str, Any] = dict(n_positive=4, epochs=4, learning_rate=1e-2)
RELEASE: dict[str, Any] = dict(reassess=0)


def ctp(kind: type[Ctp] = Ctp, **settings: Any) -> Ctp:
    return kind(**{**FAST, **settings})


def moved(lm, delta) -> dict[str, torch.Tensor]:
    """The change of every parameter, in full."""
    return {name: delta.dense(name, lm.parameter(name).shape) for name in delta.changes}


def same(lm, a, b, **tolerance) -> None:
    x, y = moved(lm, a), moved(lm, b)
    assert set(x) == set(y)
    for name in x:
        assert_close(x[name], y[name], **tolerance)


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_only_nodes_on_paths_change(family, tiny, edits):
    """T25: rows of W1 with their bias entries, columns of W2; no bias of W2."""
    lm = tiny(family)
    found = paths(lm, edits, n_positive=4, n_negative=1)
    delta = ctp().propose(lm, edits)
    full = moved(lm, delta)
    for t, slot in enumerate(found.slots):
        nodes = sorted([*found.positive.in_slot(t), *found.negative.in_slot(t)])
        change = full[slot.site.name]
        touched = (slot.by_node(change) != 0).any(0).nonzero()[:, 0].tolist()
        assert touched == nodes
        if slot.site.bias is not None:
            has_bias = slot.site.bias_name in full
            assert has_bias != slot.is_value
            if has_bias:
                assert full[slot.site.bias_name].nonzero()[:, 0].tolist() == nodes
    assert ("transformer.h.0.mlp.fc_in.bias" in full) == (family == "gptj")


def test_without_a_weight_there_is_no_contrast(tiny, edits):
    """T26: the negative node is untouched; `n_negative` 0 is the same again."""
    lm = tiny("llama")
    none = ctp(contrast="none").propose(lm, edits)
    for settings in (dict(contrast_weight=0.0), dict(contrast="mirror", contrast_weight=0.0), dict(n_negative=0)):
        assert ctp(**settings).propose(lm, edits).changes.keys() == none.changes.keys()
        same(lm, ctp(**settings).propose(lm, edits), none, rtol=0, atol=0)
    negative = paths(lm, edits, n_positive=4).negative
    for t, slot in enumerate(slots_of(lm)):
        assert not bool(slot.by_node(moved(lm, none)[slot.site.name])[:, negative.in_slot(t)].any())


def test_lambda_is_inert_in_the_released_optimiser_and_a_rate_in_ours(tiny, edits):
    """T27: Adam divides by the gradient's own scale, so that any weight above 0 gives the same trajectory."""
    lm = tiny("llama")
    release = [ctp(ReleasedCtp, **RELEASE, contrast_weight=w).propose(lm, edits) for w in (0.1, 1.0)]
    same(lm, *release, rtol=1e-2, atol=1e-5)
    ours = [ctp(contrast_weight=w).propose(lm, edits) for w in (0.1, 1.0)]
    with pytest.raises(AssertionError):
        same(lm, *ours, rtol=1e-2, atol=1e-4)


def test_the_negative_step_is_lambda_times_as_long(tiny, edit):
    """Adam's first step moves every entry by its rate: lr on T+, lambda x lr on T-."""
    lm = tiny("llama")
    delta = ctp(epochs=1, contrast_weight=0.25).propose(lm, [edit])
    found = paths(lm, [edit], n_positive=4)
    for t, slot in enumerate(found.slots):
        change = slot.by_node(moved(lm, delta)[slot.site.name])
        for of, rate in ((found.positive, 1e-2), (found.negative, 0.25e-2)):
            step = change[:, of.in_slot(t)].abs().median()
            assert_close(step, torch.tensor(rate, dtype=step.dtype), rtol=1e-2, atol=0)


def scripted(kind: type[Ctp], script: list[tuple[list[int], list[int]]], **settings: Any) -> Ctp:
    """The method, whose n-th assessment finds these positive and negative nodes, in every slot."""
    calls = iter(script)

    class Scripted(kind):
        def trainer(self, nodes, target, original):
            trainer = super().trainer(nodes, target, original)
            set_paths = trainer.set_paths

            def set_scripted(found: Transmission) -> None:
                of = [Paths(tuple((i,) * len(found.slots) for i in one), (0.0,) * len(one)) for one in next(calls)]
                set_paths(Transmission(found.slots, found.scores, *of))

            trainer.set_paths = set_scripted
            return trainer

    return ctp(Scripted, **settings)


@pytest.mark.parametrize("by", ["equal", "middle", "score"])
def test_steps_are_larger_where_layers_weigh_more(by, tiny, edit):
    """Adam's first step moves every entry by the learning rate, whatever its gradient."""
    lm = tiny("llama")
    change = moved(lm, ctp(epochs=1, contrast="none", score="l2", layer_steps=by).propose(lm, [edit]))
    largest = [float(change[slot.site.name].abs().max()) for slot in slots_of(lm)]
    assert sum(largest) == pytest.approx(len(largest) * FAST["learning_rate"], rel=1e-2)
    assert (max(largest) > 1.2 * min(largest)) == (by != "equal")


def test_more_paths_cover_more_of_the_score(tiny, edit):
    lm = tiny("llama")
    n_moved = []
    for share in (0.05, 0.5, 1.0):
        delta = ctp(epochs=1, contrast="none", score="l2", coverage=share, n_positive=1).propose(lm, [edit])
        slot = slots_of(lm)[-1]
        n_moved.append(int(slot.by_node(moved(lm, delta)[slot.site.name]).any(0).sum()))
    assert n_moved[0] < n_moved[1] < n_moved[2] < slot.n_nodes


def test_a_dropped_node_keeps_its_change_and_moves_no_more(tiny, edits):
    """T28; with the released optimiser it drifts on, by momentum."""
    lm = tiny("llama")
    found = {}
    for kind in (Ctp, ReleasedCtp):
        for epochs in (2, 4):
            settings = dict(
                reassess=2, epochs=epochs, stop_loss=0.0, batch_size=None, reduction="per_edit", train_out_bias=False
            )
            delta = scripted(kind, [([1, 2], [9]), ([2, 3], [9])], **settings).propose(lm, edits)
            found[kind, epochs] = [slot.by_node(moved(lm, delta)[slot.site.name]) for slot in slots_of(lm)]
    for kind, drifts in ((Ctp, False), (ReleasedCtp, True)):
        for before, after in zip(found[kind, 2], found[kind, 4], strict=True):
            assert bool(before[:, 1].any())
            assert torch.equal(before[:, 1], after[:, 1]) != drifts
            assert not bool(before[:, 3].any())
            assert bool(after[:, 3].any())
            assert not torch.equal(before[:, 2], after[:, 2])


def test_kept_nodes_go_on_as_if_nothing_had_happened(tiny, edits):
    """A re-assessment that finds the same paths changes nothing: momentum and step counts are kept."""
    lm = tiny("llama")
    found = paths(lm, edits, n_positive=4)
    script = [([int(n[0]) for n in found.positive.nodes], [int(found.negative.nodes[0][0])])] * 3
    once = scripted(Ctp, script, epochs=6, stop_loss=0.0).propose(lm, edits)
    thrice = scripted(Ctp, script, epochs=6, stop_loss=0.0, reassess=2).propose(lm, edits)
    same(lm, once, thrice, rtol=1e-9, atol=1e-12)


def test_a_runaway_is_taken_back_though_paths_were_assessed_anew(tiny, edits):
    """Assessed anew, paths bring nodes that were not trained before."""
    lm = tiny("gpt2", torch.float32)
    with pytest.warns(RetconWarning, match="the last finite values are kept"):
        delta = ctp(score="random", reassess=1, learning_rate=1e15).propose(lm, edits)
    assert {report.stopped for report in delta.report} == {"non_finite"}
    assert all(math.isfinite(report.final_probability) for report in delta.report)
    assert not delta.changes  # the first step ran away


def test_mirror_puts_the_mean_change_on_the_negative_node(tiny, edits):
    """T29: the second term's gradient with respect to Delta+, by finite differences of the edited model's loss."""
    lm = tiny("gpt2")
    settings = ctp(contrast="mirror", contrast_weight=1.0)
    rows = answer_rows(lm, edits)
    slots = slots_of(lm)
    with lm.frozen_eval():
        old = AnswerLoss(lm, rows, own_answer_tokens(lm, rows))
        trainer = settings.trainer(PathNodes(slots, with_bias=False), AnswerLoss(lm, rows), old)
        trainer.set_paths(paths(lm, edits, n_positive=4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in trainer.paths.values():
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

        def second_term() -> torch.Tensor:
            with attached(trainer.paths.mirrored()):
                return old(range(len(rows))).mean()

        second_term().backward()
        for t in (0, 5):
            nodes = trainer.paths.nodes[t]
            for place in ((0, 3), (2, 7)):
                sides = []
                for sign in (1, -1):
                    with torch.no_grad():
                        nodes.tensors[0][place] += sign * 1e-5
                        sides.append(second_term().item())
                        nodes.tensors[0][place] -= sign * 1e-5
                assert_close((sides[0] - sides[1]) / 2e-5, float(nodes.tensors[0].grad[place]), rtol=1e-5, atol=1e-10)

        # and it is the loss of a model changed in T-'s nodes alone, by the mean
        mean = trainer.paths.nodes[1].tensors[0][trainer.paths.nodes[1].chosen(trainer.paths.positive[1])].mean(0)
        delta = lm.delta(changes(trainer.paths.mirrored()))
        full = slots[1].by_node(moved(lm, delta)[slots[1].site.name].T)
        assert_close(full[:, trainer.paths.negative[1][0]], mean.detach())
        assert int((full != 0).any(0).sum()) == 1
        hooked = second_term().detach()
        with lm.edited(delta):
            assert_close(old(range(len(rows))).mean().detach(), hooked)


def test_mirror_leaves_the_negative_path_as_it_is(tiny, edits):
    lm = tiny("llama")
    delta = ctp(contrast="mirror", contrast_weight=1.0).propose(lm, edits)
    negative = paths(lm, edits, n_positive=4).negative
    for t, slot in enumerate(slots_of(lm)):
        assert not bool(slot.by_node(moved(lm, delta)[slot.site.name])[:, negative.in_slot(t)].any())
    with pytest.raises(AssertionError):
        same(lm, delta, ctp(contrast="none").propose(lm, edits), rtol=1e-3, atol=1e-4)


def test_the_release_trains_the_whole_bias_of_the_value_matrix(tiny, edits):
    lm = tiny("gptj")
    delta = ctp(ReleasedCtp, **RELEASE).propose(lm, edits)
    for layer in range(4):
        site = lm.site(layer, "down_proj")
        assert bool(moved(lm, delta)[site.bias_name].all())


def test_the_original_answer_is_the_unedited_models(tiny, edits):
    lm, method = tiny("llama"), ctp()
    rows = answer_rows(lm, edits)
    own = method._original(lm, edits, rows).labels
    with lm.edited(ctp(epochs=20).propose(lm, edits)):
        assert own_answer_tokens(lm, rows) != own
        assert method._original(lm, edits, rows).labels == own


def test_the_original_answer_may_be_the_true_one(tiny, edits):
    lm = tiny("llama")
    own = ctp(contrast_weight=1.0).propose(lm, edits[:3])
    true = ctp(contrast_weight=1.0, original="target_true").propose(lm, edits[:3])
    with pytest.raises(AssertionError):
        same(lm, own, true, rtol=1e-3, atol=1e-4)
    with pytest.raises(InvalidEdit, match=r"'lodz'.*no target_true"):
        ctp(original="target_true").propose(lm, edits)


CHOICES = [(k, s) for k in ("gate", "both") for s in ("rank_aligned", "k_best")]


@pytest.mark.parametrize(
    ("key_matrix", "select"), everyday(("gate", "rank_aligned"), ("both", "k_best"), of=CHOICES, rows=True)
)
def test_other_key_matrices_and_selections(key_matrix, select, tiny, edits):
    lm = tiny("phi3")  # gate and up are one fused parameter
    delta = ctp(key_matrix=key_matrix, select=select, pool="per_edit").propose(lm, edits)
    found = paths(lm, edits, n_positive=4, select=select, pool="per_edit", key_matrix=key_matrix)
    for layer in range(4):
        rows = [
            int(slot.site.outputs(torch.tensor([node])))
            for t, slot in enumerate(found.slots)
            if slot.site.layer == layer and not slot.is_value
            for node in {*found.positive.in_slot(t), *found.negative.in_slot(t)}
        ]
        change = moved(lm, delta)[lm.site(layer, "gate_proj").name]
        assert (change != 0).any(1).nonzero()[:, 0].tolist() == sorted(rows)


def test_mini_batches_depend_on_the_seed(tiny, edits):
    lm = tiny("llama", n_layers=2)
    a, b, c = (ctp(batch_size=2, epochs=2).propose(lm, edits, seed=seed) for seed in (1, 1, 2))
    assert a.id == b.id != c.id


def test_random_nodes_are_drawn_by_the_seed_and_anew_in_every_epoch(tiny, edits):
    lm = tiny("llama", n_layers=2)

    def nodes(seed: int, epochs: int = 1) -> set[tuple[str, int]]:
        full = moved(lm, ctp(score="random", reassess=1, epochs=epochs).propose(lm, edits, seed=seed))
        return {
            (s.site.name, j) for s in slots_of(lm) for j in s.by_node(full[s.site.name]).any(0).nonzero()[:, 0].tolist()
        }

    assert nodes(1) == nodes(1) != nodes(2)
    assert nodes(1) < nodes(1, epochs=2)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(n_positive=0), "n_positive"),
        (dict(n_negative=-1), "n_negative"),
        (dict(contrast_weight=-0.1), "contrast_weight"),
        (dict(score="gradient"), "score is 'gradient'"),
        (dict(contrast="literal"), "contrast is 'literal'"),
        (dict(kind=ReleasedCtp, contrast="mirror"), "second step"),
        (dict(batch_size=0), "batch_size"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        ctp(**settings)


def test_what_a_model_does_not_have_or_must_not_change(tiny, edit, untouched):
    lm = tiny("gpt2")
    before = untouched(lm)
    with pytest.raises(InvalidSetting, match="no gated MLP"):
        ctp(key_matrix="gate").propose(lm, [edit])
    with pytest.raises(InvalidSetting, match="128 nodes"):
        ctp(n_positive=128).propose(lm, [edit])
    lm.not_editable[lm.site(2, "up_proj").bias_name] = "it is shared with another"
    with pytest.raises(NotEditable, match="shared with another"):
        ctp().propose(lm, [edit])
    assert untouched(lm) == before


def test_presets_fit_the_settings():
    found = presets("ctp")
    assert {"gpt-j-6b", "llama-2-7b", "llama-3-8b", "demo-gptj", "demo-llama", "cf-gptj"} <= {p.model for p in found}
    assert {"counterfact", "consecutive"} == {p.dataset for p in found if p.model == "llama-2-7b"}
    for preset in found:
        assert preset.source
        method("ctp", preset=preset.name)
