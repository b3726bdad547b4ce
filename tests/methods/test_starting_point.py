"""Settings for models without a preset: what follows from the shape, and clamps fitted to the edits."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from retcon.edits import Edit
from retcon.errors import RetconWarning
from retcon.methods.common import starting_point
from retcon.methods.common.choosing import choose, method
from retcon.methods.common.contract import ModelShape, Trainable
from retcon.methods.common.registry import method_class
from retcon.methods.common.starting_point import ENOUGH, fit_clamps, fit_learning_rate
from retcon.training.descent import Schedule
from tests.conftest import everyday

FAMILY = ("rome", "r_rome", "memit", "pmet", "jeep", "emmet", "alphaedit")


@pytest.mark.parametrize("n_layers", [6, 7, 8, 12, 30, 80])
def test_shallow_models_get_three_low_and_two_high_layers(n_layers):
    for parallel in (False, True):
        shape = ModelShape(n_layers, 64, 256, parallel)
        assert len(method_class("memit").fallback_settings(shape)["layers"]) >= 3
        jeep = method_class("jeep").fallback_settings(shape)
        assert len(jeep["low"]) >= 3
        assert len(jeep["high"]) >= 2
        assert jeep["low"][-1] < jeep["high"][0]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("n_layers", [2, 3, 4])
def test_no_value_at_the_subject_is_searched_in_the_topmost_layer(n_layers, name):
    guess = method_class(name).fallback_settings(ModelShape(n_layers, 64, 256, False))
    layers = [guess["layer"]] if "layer" in guess else guess["low" if name == "jeep" else "layers"]
    assert 0 <= min(layers) <= max(layers) < n_layers - 1


@pytest.mark.parametrize(
    ("name", "field", "published", "d_ff"),
    [
        ("memit", "moment_weight", 6_000, 24_576),
        ("jeep", "low_moment_weight", 2_500, 11_008),
        ("jeep", "high_moment_weight", 1_000, 11_008),
    ],
)
def test_weights_follow_the_key_width_from_the_published_ones(name, field, published, d_ff):
    def weight(m):
        return method_class(name).fallback_settings(ModelShape(32, 4096, m, False))[field]

    assert weight(d_ff) == pytest.approx(published, rel=0.25)
    assert weight(704) == pytest.approx(weight(d_ff) * 704 / d_ff, rel=0.01)


@pytest.mark.parametrize("name", everyday("memit", "pmet", of=FAMILY))
def test_clamps_are_doubled_by_one_factor_until_half_of_the_edits_reach(name, tiny, edits):
    lm = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetconWarning)
        narrow = method(name, for_model=lm)
    names = starting_point.clamp_settings(type(narrow))
    narrow = replace(narrow, steps=8, stop="probability", weight_decay=0.0) if name != "jeep" else narrow
    narrow = replace(narrow, **dict.fromkeys(names, 0.01))
    fitted = fit_clamps(lm, narrow, edits, names)
    assert fitted.n_tried == len(edits)
    assert set(fitted.clamps.values()) == {0.01 * fitted.factor}

    def reached(factor):
        here = replace(narrow.searching_what_is_written(), **dict.fromkeys(names, 0.01 * factor))
        contexts = here.sampled_contexts(lm, 0)
        report = starting_point.search_values(lm, edits, here.value_sites(lm), contexts, here.value_search()).report
        return sum(r.stopped == "reached" or r.search_probability >= starting_point.REACHED for r in report)

    assert reached(fitted.factor) == fitted.n_reached
    if fitted.factor > 1:
        assert reached(fitted.factor / 2) < ENOUGH * len(edits)


def test_clamps_stay_where_steps_are_what_is_missing(tiny, edits):
    lm = tiny("llama")
    slow = method_class("memit")(layers=(0, 1), learning_rate=1e-6, steps=2)
    fitted = fit_clamps(lm, slow, edits, ["clamp"])
    assert (fitted.factor, fitted.clamps) == (1.0, {"clamp": 0.75})


@pytest.mark.parametrize(("name", "rate"), [("kne", 0.005), pytest.param("ctp", 0.0002, marks=pytest.mark.long)])
def test_learning_rates_are_doubled_until_half_of_the_edits_reach_their_loss(name, rate, tiny, edits):
    lm = tiny("llama")
    before = lm.fingerprint()
    slow = replace(method_class(name)(), learning_rate=rate, epochs=15, stop_loss=5.6)
    fitted = fit_learning_rate(lm, slow, edits)
    assert fitted.n_tried == len(edits)
    assert fitted.learning_rate in [rate * 2**i for i in range(8)]

    def reached(faster):
        return sum(r.stopped == "reached" for r in replace(slow, learning_rate=faster).propose(lm, edits).report)

    assert reached(fitted.learning_rate) == fitted.n_reached >= ENOUGH * len(edits)
    assert fitted.learning_rate > rate
    assert reached(fitted.learning_rate / 2) < ENOUGH * len(edits)
    assert lm.fingerprint() == before


@pytest.mark.parametrize(
    ("n_edits", "at_once", "sizes"),
    [
        (5, None, [5]),
        (50, None, [50]),
        (1000, None, [64]),
        (50, 1, [1] * 8),
        (3, 1, [1] * 3),
        (50, 3, [3] * 3),
        (0, 1, []),
    ],
)
def test_learning_rates_are_tried_on_batches_of_the_size_that_will_be_written(n_edits, at_once, sizes):
    edits = [object() for _ in range(n_edits)]
    batches = starting_point.tried_batches(edits, at_once)
    assert [len(batch) for batch in batches] == sizes
    tried = [edit for batch in batches for edit in batch]
    assert len({id(edit) for edit in tried}) == len(tried)  # none twice, in the order given
    assert [edits.index(edit) for edit in tried] == sorted(edits.index(edit) for edit in tried)


@dataclass(frozen=True)
class Training:
    """A method whose edits reach their loss once the rate is large enough for as many as are written together."""

    learning_rate: float
    needed: Callable[[int], float]
    """The rate that so many edits need; the earlier half of a batch needs half of that."""
    tried: list[tuple[int, float]] = field(default_factory=list)
    mini_batch: int | None = None

    def propose(self, lm, edits, *, state, seed):
        self.tried.append((len(edits), self.learning_rate))
        needs = [self.needed(len(edits)) / (2 if 2 * i < len(edits) else 1) for i in range(len(edits))]
        stopped = ["reached" if self.learning_rate >= need else "steps" for need in needs]
        return SimpleNamespace(report=[SimpleNamespace(stopped=each) for each in stopped], state={})

    def for_next_try(self):
        return self

    def schedule(self, n_edits):
        return Schedule(epochs=1, batch_size=self.mini_batch)


@pytest.mark.parametrize(
    ("n_edits", "at_once", "rate", "tried"),
    [
        (50, None, 4.0, [(8, 1.0), (50, 1.0), (50, 2.0), (50, 4.0)]),  # eight are content with less than fifty
        (50, 1, 1.0, [(1, 1.0)] * 8),
        (6, None, 1.0, [(6, 1.0)]),
        (1000, None, 4.0, [(8, 1.0), (64, 1.0), (64, 2.0), (64, 4.0)]),
        (0, None, 1.0, []),
    ],
)
def test_many_edits_begin_with_the_rate_that_a_few_need(n_edits, at_once, rate, tried):
    method = Training(1.0, lambda n: n / 8)
    fitted = fit_learning_rate(None, method, [object() for _ in range(n_edits)], at_once=at_once)
    assert fitted.learning_rate == rate
    assert method.tried == tried


def test_in_mini_batches_a_few_edits_are_tried():
    method = Training(1.0, lambda n: 4.0, mini_batch=2)
    assert fit_learning_rate(None, method, [object()] * 50).learning_rate == 2.0
    assert method.tried == [(8, 1.0), (8, 2.0)]


def test_a_rate_that_helps_nobody_is_not_raised_for_ever():
    method = Training(1.0, lambda n: 1e9)
    assert fit_learning_rate(None, method, [object()] * 4).learning_rate == 1.0
    assert [rate for _, rate in method.tried] == [2.0**i for i in range(7)]


@pytest.mark.long
def test_a_batch_gets_a_larger_learning_rate_than_facts_one_at_a_time(tiny, edits):
    lm = tiny("llama")
    slow = replace(method_class("kne")(), learning_rate=0.001, epochs=15, stop_loss=5.6)
    together, alone = (fit_learning_rate(lm, slow, edits, at_once=at_once) for at_once in (None, 1))
    assert together.n_tried == alone.n_tried == len(edits)
    assert together.learning_rate >= alone.learning_rate

    def reached(rate):
        each = [replace(slow, learning_rate=rate).propose(lm, [edit]).report for edit in edits]
        return sum(r.stopped == "reached" for report in each for r in report)

    assert reached(alone.learning_rate) == alone.n_reached >= ENOUGH * len(edits)


def test_what_was_chosen_is_said_and_given_settings_stand(tiny, edits):
    lm = tiny("llama")
    with pytest.warns(RetconWarning, match="no memit preset for this model"):
        found = choose("memit", for_model=lm, cases=edits)
    m = lm.site(0, "down_proj").weight.shape[1]
    assert found.preset is None
    assert any(f"m = {m:,}" in note for note in found.notes)
    assert any("times the default, with which" in note for note in found.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetconWarning)
        own = choose("memit", for_model=lm, cases=edits, clamp=0.3, moment_weight=7.0)
    assert (own.method.clamp, own.method.moment_weight) == (0.3, 7.0)
    assert not any("clamp" in note or "moment_weight" in note for note in own.notes)


def test_fine_tuning_gets_a_rate_by_which_half_of_a_few_edits_reach_their_loss(tiny, edits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetconWarning)
        found, without_stop = (
            choose("ft", for_model=tiny("llama"), cases=edits, epochs=15, stop_loss=stop) for stop in (5.0, 0.0)
        )
    assert any("learning_rate" in note and "doubled" in note for note in found.notes)
    assert found.method.learning_rate > without_stop.method.learning_rate == 5e-4
    assert not any("doubled" in note for note in without_stop.notes)


def test_fine_tuning_gets_the_layer_at_which_a_step_stays_with_its_fact(tiny, edits):
    def chosen(of=edits, **given):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RetconWarning)
            return choose("ft", for_model=lm, cases=of, learning_rate=1e-3, **given)

    lm = tiny("llama")
    best = starting_point.fit_layer(lm, method_class("ft")(layers=(2,)), edits)
    assert 0 not in best.of.layers
    alone = starting_point.fit_layer(lm, method_class("ft")(layers=(2,)), edits, at_once=1)
    assert alone.of.layers == (0, 1, 2, 3)
    found = chosen()
    assert found.method.layers == (best.layer,) == (best.of.best(),)
    assert str(best) in found.notes
    assert not any("by relative depth" in note for note in found.notes)
    (note,) = (note for note in chosen(edits[:1]).notes if "layers" in note)  # no other fact says anything
    assert note == "layers = 2: by relative depth, 4 layers"
    assert chosen(layers=(3,)).method.layers == (3,)
    assert chosen(None).method.layers == (2,)
    assert starting_point.fit_layer(lm, method_class("ft")(layers=(2,), modules=("block",)), edits).layer == best.layer


def test_facts_that_cannot_be_asked_say_nothing_of_a_layer(tiny, edits):
    lm, ft = tiny("gpt2"), method_class("ft")(layers=(2,))
    wanted = starting_point.fit_layer(lm, ft, edits)
    lost = Edit("The capital of France is", "Norway", "Oslo", id="lost")
    long = Edit("word " * 3000 + "{} is", "Norway", "Oslo", id="long")
    found = starting_point.fit_layer(lm, ft, [lost, long, *edits])
    assert str(found) == str(wanted)
    assert starting_point.fit_layer(lm, ft, [lost, long]) is None


@dataclass(frozen=True, kw_only=True)
class OwnTrained(Trainable):
    """Reads no settings from its editor."""

    name = "own"
    editor: str | None = None
    layers: tuple[int, ...] = ()

    @classmethod
    def fallback_settings(cls, shape):
        return {"layers": (2, 3)}

    def n_fitted(self, lm):
        return 1

    def fit(self, lm, cases, out, **given):
        raise NotImplementedError

    def propose(self, lm, edits, **given):
        raise NotImplementedError


def test_a_method_that_reads_no_settings_from_its_editor_keeps_those_of_the_model(tiny):
    with pytest.warns(RetconWarning, match="its settings follow from its shape: layers = 2-3"):
        made = method(f"{__name__}:OwnTrained", for_model=tiny("llama"), editor="x")
    assert made == OwnTrained(editor="x", layers=(2, 3))


def test_settings_of_an_editor_are_no_presets(tiny):
    lm, preset = tiny("llama"), "mend/demo-llama/world"
    assert choose("mend", for_model=lm, preset=preset).preset.name == preset
    chosen = choose("mend", for_model=lm, preset=preset, editor="x")
    assert chosen.preset is None
    assert chosen.method == method("mend", editor="x")


def test_layers_are_written_in_short():
    shape = ModelShape(8, 64, 256, False)
    low_and_high = {"low": (0, 1, 2), "high": (5, 6), "layer": 3}
    (note,) = starting_point.shape_notes(method_class("jeep"), shape, low_and_high)
    assert note == "low = 0-2, high = 5-6, layer = 3: by relative depth, 8 layers"
    (note,) = starting_point.shape_notes(method_class("jeep"), shape, {"low": (0,), "high": ()})
    assert note == "low = 0, high = none: by relative depth, 8 layers"


def test_filters_get_what_their_base_method_would(tiny, edits):
    lm = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetconWarning)
        base = choose("memit", for_model=lm, cases=edits)
        rect = choose("rect", for_model=lm, cases=edits, base_method="memit")
    assert rect.method.base_settings["clamp"] == base.method.clamp
    assert rect.method.base_settings["moment_weight"] == base.method.moment_weight
    assert rect.notes == base.notes


def test_the_probe_chooses_layers_and_the_rule_the_rest(tiny, edits):
    lm = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetconWarning)
        rule = method("memit", for_model=lm, cases=edits)
        probed = method("memit", for_model=lm, cases=edits, layers="probe")
        emmet = method("emmet", for_model=lm, cases=edits, layers="probe")
    assert probed.moment_weight == rule.moment_weight != method_class("memit").moment_weight
    assert len(emmet.layers) == 1


def test_jeep_without_a_preset_fits_its_clamps_on_the_low_value_alone(tiny, edits):
    guess = method_class("jeep").fallback_settings(ModelShape.of(tiny("llama")))
    jeep = method("jeep", **guess)
    assert (jeep.sites, jeep.joint_optimisation) == ("block", False)
    assert jeep.searching_what_is_written() == replace(jeep, high=())
    together = replace(jeep, joint_optimisation=True)
    assert together.searching_what_is_written() == together
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetconWarning)
        notes = choose("jeep", for_model=tiny("llama"), cases=edits, steps=2).notes
    assert sum("low_clamp" in note for note in notes) == 1
    assert any(note.startswith("sites = block, joint_optimisation = False: ") for note in notes)
