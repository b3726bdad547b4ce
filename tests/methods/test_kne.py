"""KNE: what is chosen, what changes, and by how much (T11, T12, T16, T17, and the settings)."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from retcon.edits import Edit, write_edits
from retcon.errors import DeltaMismatch, InvalidEdit, InvalidSetting, NotEditable
from retcon.locate.attribution import Attribution, attribute
from retcon.methods.common.choosing import method
from retcon.methods.common.presets import presets
from retcon.methods.kne import Kne
from retcon.methods.rect import Rect

FAST: dict[str, Any] = dict(budget=0.05, n_points=3, epochs=3, learning_rate=1e-2)


def kne(**settings: Any) -> Kne:
    return Kne(**{**FAST, **settings})


def ensemble_of(delta) -> dict[str, list[int]]:
    """The delta's ensemble, without what its state says of how it was made."""
    return {name: units.tolist() for name, units in delta.state.items() if name not in ("base", "granularity")}


@pytest.mark.parametrize("family", ["gptj", "llama"])  # Linear, stored (out, in)
@pytest.mark.parametrize("granularity", ["row", "column", "entry"])
def test_only_the_ensemble_changes(family, granularity, tiny, edits):
    """T11, and T17: a layer without units is not in the delta."""
    lm = tiny(family, torch.float32)
    settings = kne(granularity=granularity, budget=None, p=0.004 if granularity == "entry" else 0.03)
    delta = settings.propose(lm, edits)
    ensemble = settings.locate(lm, edits)
    assert ensemble_of(delta) == {k: v.tolist() for k, v in ensemble.items()}
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    lm.apply(delta)
    for layer in range(lm.n_layers):
        site = lm.site(layer, "down_proj")
        units = ensemble.get(f"{layer}.down_proj", torch.empty(0, dtype=torch.long))
        assert (site.name in delta.changes) == bool(len(units))
        moved = before.pop(site.name) != lm.parameter(site.name)
        inside = torch.zeros_like(moved)
        if granularity == "row":
            inside[units] = True
        elif granularity == "column":
            inside[:, units] = True
        else:
            inside.view(-1)[units] = True
        assert not bool((moved & ~inside).any())
        assert not len(units) or bool((moved & inside).any())
    assert len(ensemble) < lm.n_layers or granularity == "entry"  # one threshold over all layers leaves some out
    assert all(torch.equal(lm.parameter(n), p) for n, p in before.items())


@pytest.mark.parametrize("granularity", ["row", "column", "entry"])
def test_the_ensemble_is_the_top_of_all_layers_together(granularity, tiny, edits):
    """T12: exact count, one threshold."""
    lm = tiny("gpt2")
    settings = kne(granularity=granularity, budget=None, p=0.07, modules=("down_proj", "q_proj"))
    sites = settings.sites(lm)
    scores = attribute(lm, edits, sites, Attribution(n_points=3), granularity)
    ensemble = settings.locate(lm, edits)
    total = sum(len(s) for s in scores)
    assert sum(map(len, ensemble.values())) == round(0.07 * total)
    inside, outside = [], []
    for site, score in zip(sites, scores, strict=True):
        chosen = torch.zeros(len(score), dtype=torch.bool)
        chosen[ensemble.get(f"{site.layer}.{site.kind}", torch.empty(0, dtype=torch.long))] = True
        inside.append(score[chosen].float())
        outside.append(score[~chosen].float())
    assert torch.cat(inside).min() >= torch.cat(outside).max()


def test_p_follows_from_the_budget(tiny):
    lm = tiny("llama")
    settings = kne(budget=0.01)
    n_parameters = sum(p.numel() for p in lm.model.parameters())
    p = 0.01 * n_parameters / (4 * 32 * 64)
    assert settings.n_chosen(lm, settings.sites(lm)) == round(p * 4 * 32)
    assert kne(budget=None, p=1e-9).n_chosen(lm, settings.sites(lm)) == 1
    whole = kne(budget=1.0)
    assert whole.n_chosen(lm, whole.sites(lm)) == 4 * 32  # never more than there is


@pytest.mark.parametrize(
    ("family", "share", "rows"), [("gpt-j", 0.0322, 3693), ("llama-2", 0.0467, 6121), ("llama-3", 0.0427, 5601)]
)
def test_the_published_budgets_by_arithmetic(family, share, rows):
    """One per cent of all parameters, in rows of the value matrix."""
    sizes = {"gpt-j": (28, 4096, 16384, 6.051e9), "llama-2": (32, 4096, 11008, 6.738e9)}
    n_layers, d_model, d_ff, n_parameters = sizes.get(family, (32, 4096, 14336, 8.030e9))
    p = 0.01 * n_parameters / (n_layers * d_model * d_ff)
    assert abs(p - share) < 1e-4
    assert abs(p * n_layers * d_model - rows) < 5


def test_the_first_step_is_alpha_over_root_n_times_the_learning_rate(tiny, edit):
    """T16: Adam's first step moves every trained entry by its rate, the weight by alpha / sqrt(n_l) of that."""
    lm = tiny("gptj")
    for alpha in (1.0, 3.0):
        delta = kne(alpha=alpha, epochs=1).propose(lm, [edit])
        for name, units in ensemble_of(delta).items():
            site = lm.site(int(name.split(".")[0]), "down_proj")
            (change,) = delta.changes[site.name]
            wanted = alpha / math.sqrt(len(units)) * 1e-2
            assert_close(change.rows.abs().median(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-3, atol=0)


def test_under_plain_gradient_descent_the_first_step_scales_with_alpha_squared(tiny, edits):
    """T16: gradient and write-back both carry alpha."""
    from retcon.training.objective import AnswerLoss, answer_rows
    from retcon.training.parts import attached, changes

    lm = tiny("gpt2")
    rows, found = answer_rows(lm, edits), []
    for alpha in (1.0, 2.0):
        part = kne(alpha=alpha)._part(lm.site(1, "down_proj"), torch.tensor([3, 8]))
        with lm.frozen_eval(), attached([part]):
            AnswerLoss(lm, rows)(range(4)).mean().backward()
        torch.optim.SGD([part.values], lr=0.1).step()
        found.append(changes([part])[part.site.name][0].values())
    assert_close(4 * found[0], found[1], rtol=1e-9, atol=1e-15)


def test_a_given_ensemble_is_reused_and_checked(tiny, edits):
    lm = tiny("llama")
    first = kne().propose(lm, edits[:2])
    lm.apply(first)
    reusing = kne(reuse=True).propose(lm, edits[2:], state=first.state)
    assert ensemble_of(reusing) == ensemble_of(first)
    anew = kne().propose(lm, edits[2:], state=first.state)
    assert ensemble_of(anew) != ensemble_of(first)
    lm.revert_all()
    for bad in ({"9.down_proj": torch.tensor([0])}, {"0.down_proj": torch.tensor([64])}):
        with pytest.raises(DeltaMismatch, match="no row ensemble over down_proj"):
            kne(reuse=True).propose(lm, edits, state=bad)
    with pytest.raises(DeltaMismatch, match="is of granularity row, wanted is granularity column; locate anew"):
        kne(reuse=True, granularity="column").propose(lm, edits, state=first.state)
    with pytest.raises(DeltaMismatch, match="is of base"):
        kne(reuse=True).propose(tiny("llama", seed=1), edits, state=first.state)
    located = kne().locate(lm, edits[:2])  # names neither
    assert kne(reuse=True).propose(lm, edits[2:], state=located).changes


def test_facts_to_locate_on_may_come_from_a_file_and_are_sampled(tiny, edits, tmp_path):
    lm = tiny("llama")
    write_edits(tmp_path / "facts.jsonl", edits[2:])
    from_file = kne(locate_on=str(tmp_path / "facts.jsonl")).propose(lm, edits[:1])
    wanted = kne().locate(lm, edits[2:])
    filtered = Rect(base_method="kne", base_settings=kne(locate_on=str(tmp_path / "facts.jsonl")).settings)
    record = filtered.propose(lm, edits[:1]).provenance["settings"]
    assert record["base_settings"]["locate_on"] == from_file.provenance["settings"]["locate_on"] == "facts.jsonl"
    assert ensemble_of(from_file) == {k: v.tolist() for k, v in wanted.items()}
    few = [kne(locate_limit=1).locate(lm, edits, seed=seed) for seed in range(6)]
    alone = [kne().locate(lm, [e]) for e in edits]
    as_lists = [{k: v.tolist() for k, v in e.items()} for e in alone]
    assert all({k: v.tolist() for k, v in e.items()} in as_lists for e in few)
    assert len({str(e) for e in few}) > 1


def test_pooling_by_union_takes_every_facts_own(tiny, edits):
    lm = tiny("llama")
    union = kne(pool="union").locate(lm, edits)
    own = [kne().locate(lm, [e]) for e in edits]
    for name in union:
        wanted = sorted({int(i) for e in own for i in e.get(name, torch.empty(0))})
        assert union[name].tolist() == wanted


def test_signs_and_sums(tiny, edits):
    lm = tiny("gpt2")
    base = kne().scores(lm, edits)
    assert any(bool((s < 0).any()) for s in base)
    for a, b in zip(base, kne(sign="abs").scores(lm, edits), strict=True):
        assert torch.equal(a.abs(), b)
    entries = attribute(lm, edits, kne().sites(lm), Attribution(n_points=3), "entry")
    for e, site, rows, columns in zip(
        entries,
        kne().sites(lm),
        kne(unit_score="sum_abs").scores(lm, edits),
        kne(unit_score="sum_abs", granularity="column").scores(lm, edits),
        strict=True,
    ):
        assert_close(rows, e.view(site.weight.shape).abs().sum(1))
        assert_close(columns, e.view(site.weight.shape).abs().sum(0))


def test_random_ensembles_are_drawn_by_seed_and_as_large(tiny, edit):
    lm = tiny("llama")
    a, b, c = (kne(score="random").locate(lm, [edit], seed=s) for s in (1, 1, 2))
    assert {k: v.tolist() for k, v in a.items()} == {k: v.tolist() for k, v in b.items()}
    assert {k: v.tolist() for k, v in a.items()} != {k: v.tolist() for k, v in c.items()}
    assert sum(map(len, a.values())) == sum(map(len, kne().locate(lm, [edit]).values()))


def test_known_facts_are_left_alone(tiny, edit):
    """Nothing to learn: an empty delta, and the report says that it was reached without a step."""
    lm = tiny("llama")
    delta = kne(stop_loss=50.0).propose(lm, [edit])
    assert not delta.changes
    assert (delta.report[0].stopped, delta.report[0].steps) == ("reached", 0)


def test_what_is_reported_is_what_the_edited_model_says(tiny, edits):
    lm = tiny("gpt2")
    delta = kne(epochs=6, batch_size=2).propose(lm, edits)
    from retcon.training.objective import answer_nll, answer_rows

    with lm.edited(delta), lm.frozen_eval():
        now = answer_nll(lm, answer_rows(lm, edits)).tolist()
    for said in ([r.search_probability for r in delta.report], [r.final_probability for r in delta.report]):
        assert_close(said, [math.exp(-x) for x in now], rtol=1e-6, atol=1e-9)


def test_every_matrix_can_be_edited(tiny, edit):
    lm = tiny("phi3", torch.float32)
    everything = ("down_proj", "up_proj", "gate_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    delta = kne(modules=everything, budget=0.2, path="joint").propose(lm, [edit])
    kinds = {name.split(".")[1] for name in ensemble_of(delta)}
    assert kinds == set(everything)
    assert {n.split(".")[-2] for n in delta.changes} == {"down_proj", "gate_up_proj", "qkv_proj", "o_proj"}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(modules=("mlp",)), r"modules\[0\] is .mlp.; known: down_proj"),
        (dict(budget=None), "budget or p"),
        (dict(p=0.1), "budget or p"),
        (dict(budget=1.5), "shares above 0"),
        (dict(granularity="cell"), "known: row, column, entry"),
        (dict(granularity="entry", unit_score="sum_abs"), "nothing to sum"),
        (dict(n_points=0), "n_points"),
        (dict(path="all"), "path"),
        (dict(epochs=-1), "epochs"),
        (dict(locate_limit=0), "locate_limit"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        kne(**settings)


def test_what_a_model_does_not_have_or_must_not_change(tiny, edit, untouched):
    with pytest.raises(InvalidSetting, match=r"tiny-gpt2.*has no gate_proj"):
        kne(modules=("gate_proj",)).propose(tiny("gpt2"), [edit])
    lm = tiny("llama")
    lm.not_editable[lm.site(2, "down_proj").name] = "it is shared with another"
    with pytest.raises(NotEditable, match="shared with another"):
        kne().propose(lm, [edit])
    before = untouched(lm)
    del lm.not_editable[lm.site(2, "down_proj").name]
    with pytest.raises(InvalidEdit, match="no target_true"):
        kne(answer="target_true").propose(lm, [Edit("The capital of {} is", "France", "Rome", id="x")])
    assert untouched(lm) == before


def test_presets_fit_the_settings():
    found = presets("kne")
    assert {"gpt-j-6b", "llama-2-7b", "llama-3-8b", "demo-gptj", "demo-llama", "cf-gptj"} <= {p.model for p in found}
    for preset in found:
        assert preset.source
        method("kne", preset=preset.name)
