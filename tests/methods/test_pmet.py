"""PMET's identities (float64, tiny models)."""

import pytest
import torch

import retcon
from retcon import world
from retcon.errors import InvalidSetting
from retcon.lm.forward import Point, adding, logits_at
from retcon.lm.prompts import encode_edit, pad
from retcon.memory.values import ValueSearch, ValueSite, search_values
from retcon.methods.jeep import Jeep
from retcon.methods.memit import Memit
from retcon.methods.pmet import Pmet
from tests.conftest import random_moments
from tests.methods.common import BARE, CONTEXTS, EASY, SEARCH, same, update

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight")
LAYERS = dict(layers=(0, 1), moment_weight=2.0)


def propose(method, lm, edits):
    return method.propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_stripped_of_all_its_own_it_is_memit(family, tiny, edits):
    """Identity 27."""
    lm = tiny(family)
    own = dict(attention=False, settled_factor=None, site="block", spread="even", kl_factor=0.0625)
    same(lm, propose(Pmet(**LAYERS, **SEARCH, **own), lm, edits), propose(Memit(**LAYERS, **SEARCH), lm, edits))


@pytest.mark.parametrize("dropped", [{}, dict(attention=False), dict(settled_factor=None), dict(site="block")])
def test_each_of_its_own_choices_counts(dropped, tiny):
    lm = tiny("gpt2")
    search = SEARCH | dict(steps=12, clamp=20.0, weight_decay=0.0, learning_rate=0.5)
    whole = propose(Pmet(**LAYERS, **search), lm, [EASY])
    other = propose(Pmet(**LAYERS, **search, **(dropped or dict(spread="even"))), lm, [EASY])
    assert not all(
        (update(lm, whole, layer) - update(lm, other, layer)).norm() < 1e-6 * update(lm, whole, layer).norm()
        for layer in (0, 1)
    )


def test_spread_over_one_layer_is_no_spread(tiny, edits):
    """Identity 28."""
    lm = tiny("llama")
    one = dict(layers=(1,), moment_weight=2.0) | SEARCH
    same(lm, propose(Pmet(**one), lm, edits), propose(Pmet(**one, spread="even"), lm, edits))


def test_jeep_without_high_layers_writes_the_same_values_alike(tiny, edits):
    """Identity 31: the write behind MLP sites and root spread is one and the same."""
    lm = tiny("llama")
    search = SEARCH | dict(steps=1)  # a search of one pass: both values are the clean ones
    a = propose(Pmet(**LAYERS, **(search | dict(clamp=0.0))), lm, edits)
    jeep = Jeep(low=(0, 1), high=(), low_moment_weight=2.0, low_clamp=0.0, steps=1)
    same(lm, a, propose(jeep, lm, edits), atol=1e-12, rtol=0)
    moved = dict(attention=False, settled_factor=None, stop="probability", threshold=0.9, kl_factor=0.0625)
    b = propose(Pmet(**LAYERS, **SEARCH, **moved), lm, edits)
    low = dict(low_moment_weight=2.0, low_clamp=2.0, low_weight_decay=0.02, steps=5, learning_rate=0.2)
    same(lm, b, propose(Jeep(low=(0, 1), high=(), **low), lm, edits))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_nll_counts_less_from_the_step_after_all_targets_are_settled(family, tiny):
    """Identity 29: the searches with and without the schedule part exactly there."""
    lm = tiny(family)
    site = ValueSite(Point(2, "mlp"), "subject_last", 50.0, 0.0)

    def found(steps, factor):
        search = ValueSearch(
            steps=steps, learning_rate=0.5, kl_factor=0.5, stop="loss", threshold=-1.0,
            settled_factor=factor, settled_kl=0.0,
        )  # fmt: skip
        return search_values(lm, [EASY], [site], BARE, search)

    def settled(values):
        row = encode_edit(lm.tokenizer, EASY, answer=EASY.target_new)
        at = torch.tensor([0]), torch.tensor([row.position("subject_last")])
        where = torch.zeros(len(row.target_ids), dtype=torch.long), torch.arange(row.n_prompt - 1, len(row.ids) - 1)
        with torch.no_grad():
            logits = logits_at(lm, pad([row]), where, {site.point: adding(*at, values.offset[0])})
        return logits.argmax(-1).tolist() == list(row.target_ids)

    first = next(steps for steps in range(1, 40) if settled(found(steps, None)))
    for steps, parted in ((first, False), (first + 1, False), (first + 2, True)):  # n passes make n - 1 updates
        gap = (found(steps, 0.1).offset[0] - found(steps, None).offset[0]).norm()
        assert bool(gap > 1e-6) == parted


@pytest.mark.parametrize(
    ("settings", "text"),
    [(dict(site="attn"), "known: mlp, block"), (dict(settled_factor=-1.0), "settled_factor must not"),
     (dict(attn_weight_decay=-1.0), "attn_weight_decay must not"), (dict(steps=0), "steps must be at least 1")],
)  # fmt: skip
def test_settings_are_checked(settings, text, tiny, edits):
    with pytest.raises(InvalidSetting, match=text):
        propose(Pmet(**(LAYERS | settings)), tiny("llama"), edits)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::retcon.errors.RetconWarning")
def test_without_a_preset_the_mlps_value_carries_the_facts():
    """With the default share of the attention's value three of these thirty edits conflict, and the mean is 0.87."""
    lm = retcon.load("demo:llama")
    pmet = retcon.method("pmet", for_model=lm, preset="none", clamp=8.0)
    report = pmet.propose(lm, [case.edits[0] for case in world.cases(1030)[1000:]]).report
    assert sum(r.outcome == "conflict" for r in report) <= 1
    assert sum(r.final_probability for r in report) / len(report) > 0.9
