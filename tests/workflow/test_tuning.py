"""`retcon.workflow.tuning`: settings searched on one half of the cases, reported on the other."""

import random
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import pytest

import retcon
from retcon import world
from retcon.errors import InvalidSetting, MalformedFile, NonFinite
from retcon.lm.model import LM
from retcon.methods.common import choosing
from retcon.methods.common.contract import ModelShape
from retcon.methods.common.presets import presets as list_presets
from retcon.methods.common.presets import signature, write_preset
from retcon.methods.common.registry import method_class
from retcon.methods.ft_l import FtL
from retcon.methods.memit import Memit
from retcon.workflow import tuning
from retcon.workflow.tuning import (
    Trial,
    _halving,
    _Search,
    candidates,
    changed_settings,
    objective,
    rounds,
    save_preset,
    tune,
)

CASES = world.cases(24, seed=0)
WEAK: dict[str, Any] = {"layers": (1, 2, 3)}


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETCON_PRESETS", str(tmp_path / "presets"))
    return tmp_path / "presets"


@pytest.mark.filterwarnings("ignore:no memit preset:retcon.errors.RetconWarning")
@pytest.mark.long
def test_finds_settings_at_least_as_good_as_the_rules_and_keeps_them(
    presets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "FACTORS", {"clamp": (2.0, 4.0)})
    lm = retcon.load("demo:gptj")
    before = lm.fingerprint()
    heard: list[Trial] = []
    start = {"clamp": 1.5, "moment_weight": 3000.0}
    monkeypatch.setattr("retcon.methods.memit.Memit.fallback_settings", classmethod(lambda cls, shape: WEAK | start))
    monkeypatch.setattr("retcon.methods.common.presets.OWN_FOLDER", tmp_path)  # a model that no preset knows
    monkeypatch.setattr("retcon.methods.common.starting_point.MAX_FACTOR", 1.0)
    found = tune(lm, "memit", CASES, max_trials=12, given={"steps": 12, "layers": (1, 2, 3)}, on_trial=heard.append)
    assert heard == list(found.trials)
    assert len(heard) <= 12
    assert (found.n_searched, found.n_reported) == (12, 12)
    last = [trial for trial in found.trials if trial.n_cases == 12]
    rule = next(trial.score for trial in last if not trial.changes)
    chosen = next(trial.score for trial in last if trial.changes == found.changes)
    assert chosen == max(trial.score for trial in last)
    assert chosen > rule
    assert found.changes["moment_weight"] == 600
    assert set(found.changes) <= {"clamp", "moment_weight", "stop"}
    assert lm.fingerprint() == before
    assert not lm.applied

    path = save_preset(lm, found, "tuned by retcon tune", "world")
    assert path == presets / "memit.toml"
    assert retcon.method("memit", for_model=lm) == found.method
    again = save_preset(lm, found, "tuned by retcon tune again", "world")
    assert again.read_text().count("[[preset]]") == 1


@pytest.mark.long
def test_trials_that_differ_in_the_write_alone_share_their_values(
    presets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "FACTORS", {})
    searched: list[int] = []
    real = retcon.memory.values.search.Chunk

    def counting(lm: Any, rows: Any, *rest: Any) -> Any:
        searched.append(len(rows))
        return real(lm, rows, *rest)

    monkeypatch.setattr("retcon.memory.values.search.Chunk", counting)
    lm = retcon.load("demo:gptj")
    preset: Any = retcon.method("memit", for_model=lm, layers=(1, 2))
    preset.propose(lm, CASES[0].edits)  # replays are tried
    searched.clear()
    keep = {"steps": 4, "stop": "loss", "layers": (1, 2), "clamp": 5.0}
    found = tune(lm, "memit", CASES[:8], max_trials=3, given=keep)
    lighter, heavier = ({"moment_weight": pytest.approx(factor * preset.moment_weight)} for factor in (0.2, 5.0))
    assert [trial.changes for trial in found.trials] == [{}, lighter, heavier]
    assert searched[0] == 4
    n_reported = 4 * (1 + bool(found.changes))  # by the best and, if that is another, by the first candidate
    assert sum(searched) == 4 + n_reported  # once for all trials


@pytest.mark.parametrize("name", ["jeep", "rome", "emmet", "kne", "ctp", "full_c", "ft_l"])
def test_candidates_differ_are_valid_and_keep_what_is_given(name: str, tiny: Callable[..., LM]) -> None:
    lm = tiny("llama")
    cls = method_class(name)
    start = cls(**cls.fallback_settings(ModelShape.of(lm)))
    found = candidates(lm, start, frozenset({"learning_rate"}), 10, random.Random(0))
    assert len(found) >= 8
    assert start not in found
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert {method.learning_rate for method in found} == {start.learning_rate}  # type: ignore[attr-defined]


def test_one_layer_is_looked_for_in_the_whole_model_and_a_group_nearby(tiny: Callable[..., LM]) -> None:
    lm = tiny("llama", n_layers=12)
    one = candidates(lm, method_class("ft")(layers=(8,)), frozenset(), 60, random.Random(0))
    assert len({method.settings["layers"] for method in one}) > 8
    group = candidates(lm, Memit(layers=(4, 5, 6)), frozenset(), 60, random.Random(0))
    assert {layer for method in group for layer in method.settings["layers"]} == set(range(3, 9))


@pytest.mark.parametrize("given", [(), ("threshold",)])
@pytest.mark.parametrize(("stop", "threshold"), [("probability", 0.9), ("loss", 0.9), ("probability", None)])
def test_candidates_have_a_threshold_of_what_they_stop_at(
    stop: Any, threshold: float | None, given: tuple[str, ...], tiny: Callable[..., LM]
) -> None:
    start = Memit(layers=(1,), stop=stop, threshold=threshold)
    found = candidates(tiny("llama"), start, frozenset(given), 60, random.Random(0))
    tried = {(method.stop, method.threshold) for method in found if isinstance(method, Memit)}
    other = "loss" if stop == "probability" else "probability"
    wanted: set[Any] = {(stop, threshold)}
    if threshold is None or not given:
        wanted.add((other, None))
    if threshold is not None and not given:
        wanted |= {(stop, 0.45), (stop, 0.95 if stop == "probability" else 1.35)}
    assert tried == wanted


def test_rounds_grow_to_all_cases() -> None:
    assert rounds(50) == [6, 17, 50]
    assert rounds(10) == [10]
    assert rounds(200) == [7, 22, 67, 200]


class Scripted(_Search):
    """Few cases speak for other rates than the rule's, all of them for the rule's; time is over after `last` trials."""

    last = 1000

    @property
    def over(self) -> bool:
        return len(self.trials) >= min(self.max_trials, self.last)

    def new_results(self, *_: Any) -> Iterator[Any]:
        return repeat((None, 0.0))

    def trial(self, method: Any, n: int, *_: Any) -> Trial:
        away = abs(method.learning_rate - self.start.learning_rate)  # type: ignore[attr-defined]
        return Trial(changed_settings(method, self.start), n, 1 - away if n == len(self.cases) else away, 0.0)


@pytest.fixture
def scripted(tiny: Callable[..., LM]) -> Callable[[int], Scripted]:
    lm, cls = tiny("llama"), method_class("ft_l")
    start = cls(**cls.fallback_settings(ModelShape.of(lm)))

    def make(max_trials: int) -> Scripted:
        return Scripted(
            lm=lm,
            moments=None,
            cases=CASES[:24] * 2,
            pre=None,  # type: ignore[arg-type]
            seed=0,
            until=0.0,
            max_trials=max_trials,
            on_trial=lambda trial: None,
            folder="",
            start=start,
        )

    return make


@pytest.mark.parametrize("max_trials", [12, 40, 50])
def test_the_round_on_all_cases_ends_within_the_trials_there_are(max_trials: int, scripted: Any) -> None:
    """The rule is tried again in every round; where that was not counted, a third of the cases decided."""
    search = scripted(max_trials)
    found = _halving(search, frozenset(), random.Random(0))
    assert max_trials - 3 <= len(search.trials) <= max_trials
    assert search.trials[-1].n_cases == len(search.cases)
    assert found.learning_rate == search.start.learning_rate


@pytest.mark.parametrize("n_more", [-3, 0, 1, 2])
def test_what_leads_on_a_few_cases_when_time_is_over_must_lead_on_all(n_more: int, scripted: Any) -> None:
    """However far the rounds came: it and the rule are then tried on all cases."""
    whole = scripted(50)
    _halving(whole, frozenset(), random.Random(0))
    search = scripted(50)
    search.last = sum(trial.n_cases < len(whole.cases) for trial in whole.trials) + n_more
    found = _halving(search, frozenset(), random.Random(0))
    assert found.learning_rate == search.start.learning_rate
    assert search.trials[-1].n_cases == len(search.cases)


@pytest.mark.filterwarnings("ignore:no ft_l preset:retcon.errors.RetconWarning")
def test_nothing_that_is_searched_sees_the_reported_half(
    presets: Path, tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_with: set[str] = set()
    tried: list[set[str]] = []
    real = choosing.choose, tuning.edit_and_measure

    def choose(name: str, *, cases: Any, **more: Any) -> Any:
        begun_with.update(case.id for case in cases)
        return real[0](name, cases=cases, **more)

    def edit_and_measure(lm: Any, method: Any, cases: Any, *rest: Any) -> Any:
        tried.append({case.id for case in cases})
        return real[1](lm, method, cases, *rest)

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(tuning, "edit_and_measure", edit_and_measure)
    tune(tiny(n_layers=2), "ft_l", CASES[:4], max_trials=1, given={"epochs": 1, "layers": (1,)})
    searched, reported = tried
    assert begun_with == searched
    assert reported == {case.id for case in CASES[:4]} - searched
    assert len(reported) == 2


@dataclass(frozen=True, kw_only=True)
class MyFtL(FtL):
    """A method of one's own, without a name of its own."""


@pytest.mark.filterwarnings("ignore:no .*FtL preset:retcon.errors.RetconWarning")
def test_a_preset_of_a_method_of_ones_own_is_found_under_the_name_that_was_asked_for(
    presets: Path, tiny: Callable[..., LM]
) -> None:
    lm, name = tiny(n_layers=2), f"{__name__}:MyFtL"
    given = {"epochs": 1, "layers": (1,)}
    save_preset(lm, tune(lm, name, CASES[:4], max_trials=1, given=given), "tuned by retcon tune", "mine")
    assert [(p.source, p.settings["epochs"]) for p in list_presets(name) if p.is_users] == [("tuned by retcon tune", 1)]
    assert not any(p.is_users for p in list_presets("ft_l"))


@pytest.mark.parametrize("leave_out", [{"neighborhood"}, {"neighborhood", "paraphrase"}])
def test_what_is_clearly_worse_is_so_without_neighbours_or_paraphrases(
    leave_out: set[str], presets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_halving", lambda search, given, draw: replace(search.start, epochs=0))
    few = [replace(case, queries=tuple(q for q in case.queries if q.axis not in leave_out)) for case in CASES[:8]]
    assert tune(retcon.load("demo:gptj"), "ft_m", few).worse


@dataclass(frozen=True, kw_only=True)
class Failing(FtL):
    """Cannot edit by some rates."""

    failing: tuple[float, ...]

    def propose(self, *args: Any, **more: Any) -> Any:
        if self.learning_rate in self.failing:
            raise NonFinite("not by that rate")
        return super().propose(*args, **more)


@pytest.mark.filterwarnings("ignore:no .*Failing preset:retcon.errors.RetconWarning")
@pytest.mark.parametrize(("failing", "kept"), [((1e-4,), 1e-3), ((1e-3,), 1e-4), ((1e-4, 1e-3), None)])
def test_what_was_found_is_not_lost_where_either_cannot_edit_the_other_half(
    failing: tuple[float, ...], kept: float | None, presets: Path, tiny: Callable[..., LM], monkeypatch: Any
) -> None:
    monkeypatch.setattr(tuning, "_halving", lambda search, given, draw: replace(search.start, learning_rate=1e-3))
    given = {"epochs": 1, "layers": (1,), "failing": failing, "learning_rate": 1e-4}

    def tuned() -> tuning.Tuned:
        return tune(tiny(n_layers=2), f"{__name__}:Failing", CASES[:4], given=given)

    if kept is None:
        with pytest.raises(NonFinite):
            tuned()
        return
    found = tuned()
    assert found.method.settings["learning_rate"] == kept
    assert (found.start_summary is None) == (kept == 1e-3)
    assert [trial.problem for trial in found.trials] == ["not by that rate"]
    assert not found.worse


@pytest.mark.filterwarnings("ignore:no ft_l preset:retcon.errors.RetconWarning")
def test_the_reported_half_is_the_same_by_any_seed(
    presets: Path, tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that begins at what another one found does not report on what that one searched on."""
    halves = []
    monkeypatch.setattr(tuning, "_halving", lambda search, given, draw: halves.append(search.cases) or search.start)
    for seed in (0, 1):
        tune(tiny(n_layers=2), "ft_l", CASES, given={"epochs": 1, "layers": (1,)}, seed=seed)
    assert halves[0] == halves[1]


def test_what_cannot_be_tuned_says_so() -> None:
    lm = retcon.load("demo:gptj")
    with pytest.raises(InvalidSetting, match="at least 4 cases"):
        tune(lm, "memit", CASES[:3])
    with pytest.raises(InvalidSetting, match=r"rect filters .* tune that method \(memit\)"):
        tune(lm, "rect", CASES[:4])
    with pytest.raises(InvalidSetting, match=r"mend edits by the settings that its editor was trained with"):
        tune(lm, "mend", CASES[:4], given={"editor": "mend.safetensors"})
    given = dict.fromkeys(("learning_rate", "epochs", "stop_loss", "box"), 1) | {"layers": (1,)}
    with pytest.raises(InvalidSetting, match=r"ft_l has nothing left to search: .* none that is not given"):
        tune(lm, "ft_l", CASES[:4], given=given)


def test_the_objective_is_the_score_or_the_mean_of_what_there_is() -> None:
    lm = retcon.load("demo:gptj")
    found = retcon.evaluate(lm, CASES[:4], generate=False)
    assert objective(found.summary()) == 0.0  # nothing was edited


def test_a_preset_of_a_filter_is_read_back(presets: Path) -> None:
    settings = {"base_method": "memit", "base_settings": {"stop": "probability", "mlp": None}, "keep_percent": 5.0}
    write_preset("rect", {"model_type": "llama", "n_layers": 4, "d_model": 8}, "a", "s", settings, presets)
    preset = next(p for p in list_presets("rect") if p.source == "s")
    assert preset.settings == settings | {"base_settings": {"stop": "probability", "mlp": "none"}}


@pytest.mark.parametrize(
    ("base", "settings"), [("pmet", {"settled_factor": None}), ("ft", {"steps_per_epoch": None}), ("kne", {})]
)
def test_none_of_a_base_method_is_read_back_over_its_preset(base: str, settings: Any, presets: Path) -> None:
    lm = retcon.load("demo:gptj")
    made = retcon.method("rect", for_model=lm, dataset="world", base_method=base, base_settings=settings)
    assert made.settings["base_settings"].items() >= settings.items()
    write_preset("rect", signature(lm), "a", "tuned by retcon x", made.settings)
    assert retcon.method("rect", for_model=lm, dataset="a") == made


def test_none_of_the_usual_base_method_is_written_without_its_name(presets: Path) -> None:
    match = {"model_type": "llama", "n_layers": 4, "d_model": 8}
    path = write_preset("rect", match, "a", "s", {"base_settings": {"threshold": None}}, presets)
    assert 'base_settings = {threshold = "none"}' in path.read_text()


@dataclass(frozen=True, kw_only=True)
class Worded(Memit):
    pace: Literal["slow", "none"] | None = "slow"
    place: str | None = "here"


@pytest.mark.parametrize("setting", ["pace", "place"])
def test_a_none_that_would_be_read_as_a_text_is_refused(setting: str, presets: Path) -> None:
    name = f"{__name__}:Worded"
    with pytest.raises(
        InvalidSetting, match=f'Worded: {setting} is None, which no preset can say, for "none" is a text'
    ):
        write_preset(name, {"model_type": "llama", "n_layers": 4, "d_model": 8}, "a", "s", {setting: None})
    assert not presets.exists()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kne", {"p": 0.5, "budget": None}),
        ("pmet", {"settled_factor": None}),
        ("ft_l", {"box": None}),
        ("full_c", {"box": None}),
        ("ctp", {"batch_size": None}),
    ],
)
def test_none_is_read_back_where_the_default_is_another(name: str, settings: Any, presets: Path) -> None:
    cls = method_class(name)
    made = cls(**cls.fallback_settings(ModelShape(4, 8, 32, False)) | settings)
    write_preset(name, {"model_type": "llama", "n_layers": 4, "d_model": 8}, "a", "s", made.settings)
    assert retcon.method(name, preset=f"{name}/llama-4x8/a") == made


def test_a_preset_is_put_before_the_others_and_a_broken_file_is_left_alone(tmp_path: Path) -> None:
    match = {"model_type": "llama", "n_layers": 4, "d_model": 8, "rope_theta": None}
    path = write_preset("memit", match, "a", "s", {"layers": (1, 2), "clamp": 1e-5, "threshold": None}, tmp_path)
    write_preset("memit", match, "b", 'with "quotes"', {"layers": (1,), "cache_keys": True}, tmp_path)
    text = path.read_text()
    assert text.index('dataset = "b"') < text.index('dataset = "a"')
    assert "clamp = 1e-05" in text
    assert "threshold" not in text
    assert "cache_keys = true" in text
    write_preset("memit", match, "b-x", "s", {"layers": (3,)}, tmp_path)
    write_preset("memit", match, "b", "again", {"layers": (2,)}, tmp_path)  # in place of its like, and of no other
    tables = tomllib.loads(path.read_text())["preset"]
    assert [(t["dataset"], t["source"]) for t in tables] == [("b", "again"), ("b-x", "s"), ("a", "s")]
    path.write_text(path.read_text().replace("# end\n", "").rstrip())
    write_preset("memit", match, "a", "s", {"layers": (1,)}, tmp_path)
    write_preset("memit", match, "b", "once more", {"layers": (2,)}, tmp_path)  # without the lines that end a preset
    tables = tomllib.loads(path.read_text())["preset"]
    assert [(t["dataset"], t["source"]) for t in tables] == [("b", "once more"), ("a", "s"), ("b-x", "s")]
    path.write_text("[[preset]]\nmodel = 3")
    with pytest.raises(MalformedFile, match=r"memit\.toml"):
        write_preset("memit", match, "c", "s", {}, tmp_path)
    assert path.read_text() == "[[preset]]\nmodel = 3"
