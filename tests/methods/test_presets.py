"""Presets of all methods: every published row loads, says its source, and is found for its model."""

import tomllib
from dataclasses import is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import pytest

from retcon.errors import InvalidSetting, MalformedFile, RetconWarning, UnsupportedModel
from retcon.lm.layouts import LAYOUTS
from retcon.methods.common import presets as presets_module
from retcon.methods.common.choosing import method
from retcon.methods.common.contract import ModelShape
from retcon.methods.common.presets import preset_for, presets
from retcon.methods.common.registry import METHODS, method_class
from retcon.methods.common.settings import Constraint, types_of


def _models():
    return presets_module._toml(Path(str(files("retcon") / "presets" / "models.toml")))


FAMILY = ("rome", "r_rome", "memit", "pmet", "jeep", "emmet", "alphaedit", "rect", "prune")
ALL = [(name, preset) for name in METHODS for preset in presets(name)]


@pytest.mark.parametrize(("name", "preset"), ALL, ids=[preset.name for _, preset in ALL])
def test_every_preset_loads_and_names_its_source(name, preset):
    assert preset.source
    assert preset.match["model_type"] in LAYOUTS
    settings = dict(preset.settings)
    if "base_method" in settings:  # what a filter wraps comes from the base's preset
        twin = next(
            p for p in presets(settings["base_method"]) if (p.model, p.dataset) == (preset.model, preset.dataset)
        )
        settings["base_settings"] = twin.settings
    chosen = method(name, **settings)
    layers = [x for field in ("layer", "layers", "low", "high") for x in _as_tuple(getattr(chosen, field, ()))]
    assert all(0 <= layer < preset.match["n_layers"] for layer in layers if layer is not None)  # None: all of them


def _as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("model", ["gpt-j-6b", "llama-2-7b", "llama-3-8b"])
@pytest.mark.parametrize("name", FAMILY)
def test_the_models_that_users_meet_first_resolve(name, model, tiny, monkeypatch):
    """Where a method has published settings for the model; else it starts from its relative depth, and says so."""
    lm = tiny("llama")
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(_models()[model]))
    published = [p for p in presets(name) if p.model == model]
    if len(published) == 1:
        chosen = method(name, for_model=lm)
        for field, value in published[0].settings.items():
            assert getattr(chosen, field) == (tuple(value) if isinstance(value, list) else value)
    elif published:
        with pytest.warns(RetconWarning, match=f"taking {name}/{model}/counterfact"):
            method(name, for_model=lm)
    elif name != "prune":  # whose base has a preset even there
        with pytest.warns(RetconWarning, match=f"no {name} preset"):
            method(name, for_model=lm)


def test_models_are_told_apart():
    looks = [tuple(sorted(match.items())) for match in _models().values()]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize(
    ("name", "preset", "wanted"),
    [
        ("rome", "gpt2-xl", dict(layer=17, clamp=4.0, weight_decay=0.5, steps=20, use_moment=True)),
        ("rome", "llama-3-8b", dict(layer=5, steps=25, weight_decay=0.001, use_moment=False)),
        ("r_rome", "gpt-j-6b", dict(layer=5, key_mode="avg", residual="value")),
        ("memit", "gpt-j-6b", dict(layers=(3, 4, 5, 6, 7, 8), moment_weight=15000.0, clamp=0.75, spread="even")),
        ("memit", "llama-3-8b", dict(layers=(4, 5, 6, 7, 8), learning_rate=0.1, weight_decay=0.5)),
        ("pmet", "gpt-j-6b", dict(learning_rate=0.2, kl_factor=1.0, moment_weight=6000.0, settled_factor=0.1)),
        ("emmet", "gpt2-xl", dict(layers=(17,), moment_weight=1000.0, stabiliser=None)),
        ("alphaedit", "llama-3-8b", dict(null_threshold=0.02, threshold_mode="absolute", ridge=10.0)),
    ],
)
def test_published_figures(name, preset, wanted):
    chosen = method(name, preset=f"{name}/{preset}/counterfact")
    assert {field: getattr(chosen, field) for field in wanted} == wanted


def test_a_filters_host_gets_its_own_preset_and_what_is_given_over_it(tiny, monkeypatch):
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(_models()["gpt-j-6b"]))
    chosen = method("rect", for_model=tiny("llama"), base_settings=dict(moment_weight=7.0))
    assert (chosen.base_method, chosen.keep_percent) == ("memit", None)
    assert chosen.base_settings["layers"] == (3, 4, 5, 6, 7, 8)
    assert chosen.base_settings["moment_weight"] == 7.0
    other = method("rect", for_model=tiny("llama"), base_method="rome")
    assert other.base_settings["layer"] == 5
    assert not other.supports_batches
    assert other.keep_percent is None  # k follows from the base method, which need not be the preset's


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 6, 12, 28, 32, 48, 80])
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("rect", "prune")])
def test_starting_points_fit_any_depth(name, n_layers):
    for parallel in (False, True):
        guess = method_class(name).fallback_settings(ModelShape(n_layers, 64, 256, parallel))
        method(name, **guess)
        layers = [value for field, value in guess.items() if field in ("layer", "layers", "low", "high")]
        assert all(0 <= x < n_layers for value in layers for x in _as_tuple(value))


@pytest.mark.parametrize("name", [n for n in METHODS if "modules" in types_of(method_class(n))])
@pytest.mark.parametrize("modules", [(), ("down_proj", "down_proj")])
def test_matrices_are_named_each_once(name, modules):
    with pytest.raises(InvalidSetting, match=f"^{name}: modules must name one or more, each once, found"):
        method(name, modules=modules)


def required(hint: Any) -> set[str]:
    """Return what a setting of this type must do, in words."""
    own = {c.words for c in getattr(hint, "__metadata__", ()) if isinstance(c, Constraint)}
    return own.union(*map(required, get_args(hint)))


@pytest.mark.parametrize("name", METHODS)
def test_a_setting_with_another_default_is_checked_as_before(name):
    """FT-L and Full-C gave `box` a default and took a negative one, which put every weight at the bound."""
    own = types_of(method_class(name))
    for above in filter(is_dataclass, method_class(name).__mro__):
        for setting, hint in types_of(above).items():
            assert required(own[setting]) >= required(hint), setting


@pytest.mark.parametrize("name", ["memit", "rect"])
def test_a_preset_can_be_left_aside(name, tiny, monkeypatch):
    lm = tiny("gptj")
    with pytest.warns(RetconWarning, match="no [a-z]+ preset"):
        by_rule = method(name, for_model=lm)
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(_models()["gpt-j-6b"]))
    preset = method(name, for_model=lm)
    with pytest.warns(RetconWarning, match="no [a-z]+ preset"):
        assert method(name, for_model=lm, preset="none") == by_rule != preset


def test_a_preset_for_a_part_of_what_another_is_for_is_taken_where_it_is_asked_for(tiny, monkeypatch):
    """`world-single` beside `world`: no question is raised where neither is named."""
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(_models()["demo-llama"]))
    lm = tiny("llama")
    assert method("ft", for_model=lm) == method("ft", preset="ft/demo-llama/world")
    assert method("ft", for_model=lm, dataset="world-single") == method("ft", preset="ft/demo-llama/world-single")


@pytest.mark.parametrize(
    ("users", "taken"),
    [
        ([("world-mine", "tuned by retcon tune on a.jsonl")], "world-mine"),
        ([("mine-2", "tuned by retcon tune later"), ("mine", "tuned by retcon tune")], "mine-2"),
        ([("mine", "tried on six facts")], "mine"),
        ([("mine", "tried on six facts"), ("mine-2", "tried on two of them")], "mine"),
        ([("mine", "tried on six facts"), ("first", "tuned by retcon tune")], "first"),
    ],
)
def test_a_users_preset_is_taken_before_the_packages(users, taken, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RETCON_PRESETS", str(tmp_path))
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(_models()["demo-llama"]))
    tables = [
        f"[[preset]]\nmodel = 'demo-llama'\ndataset = '{dataset}'\nsource = '{source}'\nsettings = {{layers = [1]}}\n"
        for dataset, source in users
    ]
    (tmp_path / "memit.toml").write_text("".join(tables))
    assert preset_for("memit", tiny("llama")).dataset == taken


PRESET = {"model": '"demo-llama"', "dataset": '"d"', "source": '"s"', "settings": "{layers = [1]}"}


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("settings", "3", "'int' object is not a mapping"),
        ("source", "3", "source = 3"),
        ("dataset", "3", "dataset = 3"),
        ("model", "{}", "model needs some of model_type, n_layers, .*, found none"),
        ("model", "{n_layer = 8}", "model needs some of model_type, n_layers, .*, found n_layer"),
        ("model", '"demo-lama"', "'demo-lama'"),
    ],
)
def test_a_malformed_preset_is_refused_by_file_and_field(field, value, problem, tmp_path, monkeypatch):
    monkeypatch.setenv("RETCON_PRESETS", str(tmp_path))
    table = "\n".join(f"{name} = {text}" for name, text in (PRESET | {field: value}).items())
    (tmp_path / "memit.toml").write_text(f"[[preset]]\n{table}\n")
    with pytest.raises(MalformedFile, match=rf"memit\.toml: .*missing or wrong: {problem}"):
        presets("memit")


@pytest.mark.parametrize(("name", "setting"), [("rect", "layer"), ("prune", "layers")])
def test_the_probe_advises_a_filter_for_the_base_method_of_its_preset(name, setting, tiny, tmp_path, monkeypatch):
    """RECT's default is MEMIT, PRUNE's ROME; these presets have it the other way round."""
    bases = {"rect": "rome", "prune": "memit"}
    monkeypatch.setenv("RETCON_PRESETS", str(tmp_path))
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(_models()["demo-llama"]))
    monkeypatch.setattr("retcon.methods.common.choosing.probe_layers", lambda lm, cases: None)
    advised = {"layer": 1} if setting == "layer" else {"layers": (1,)}
    monkeypatch.setattr("retcon.methods.common.choosing.settings_for", lambda advice, base: advised)
    table = {"model": "demo-llama", "dataset": "mine", "source": "s"}
    lines = [f"{field} = '{text}'\n" for field, text in table.items()]
    (tmp_path / f"{name}.toml").write_text(
        f"[[preset]]\n{''.join(lines)}settings = {{base_method = '{bases[name]}'}}\n"
    )
    made = method(name, for_model=tiny("llama"), layers="probe")
    assert (made.base_method, made.base_settings[setting]) == (bases[name], advised[setting])


@pytest.mark.parametrize("name", ["rect", "prune"])
def test_a_filters_preset_by_full_name_is_over_its_base_methods_of_that_name(name, tiny):
    lm = tiny("llama")  # which need not be the preset's model
    for dataset in ("world", "world-first"):
        made = method(name, for_model=lm, preset=f"{name}/demo-llama/{dataset}")
        assert made.wrapped == method("memit", preset=f"memit/demo-llama/{dataset}")


@pytest.mark.parametrize("preset", ["memit/demo-llama/world", "none"])
def test_a_dataset_beside_a_preset_is_refused(preset, tiny):
    with pytest.raises(InvalidSetting, match=f"preset {preset} .*; leave out dataset=.zsre."):
        method("memit", for_model=tiny("llama"), preset=preset, dataset="zsre")


def test_a_setting_that_cannot_be_is_named_with_its_preset(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RETCON_PRESETS", str(tmp_path))
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(_models()["demo-llama"]))
    table = "\n".join(f"{name} = {text}" for name, text in (PRESET | {"settings": "{layer = 1}"}).items())
    (tmp_path / "memit.toml").write_text(f"[[preset]]\n{table}\n")
    with pytest.raises(InvalidSetting, match="preset memit/demo-llama/d has no setting 'layer'"):
        method("memit", for_model=tiny("llama"))


RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.toml")), ids=lambda file: file.stem)
def test_presets_that_records_of_results_name_are_there(file):
    """A record's file can be run again: what it was made with has stayed, under the name that it gives."""
    asked = tomllib.loads(file.read_text("utf-8"))
    models = [m["name"].replace("demo:", "demo-") for m in asked["models"] if m["name"].startswith("demo:")]
    for row in asked["methods"]:
        known = {(p.model, p.dataset) for p in presets(row["name"])}
        for model in models if "dataset" in row else ():
            assert (model, row["dataset"]) in known


@pytest.mark.parametrize("model", ["demo-gptj", "demo-llama"])
def test_ft_m_of_the_embedded_models_is_ft_for_single_facts(model):
    """Its rows in the tables are those of that preset."""
    single = method("ft", preset=f"ft/{model}/world-single").settings
    assert method("ft_m", preset=f"ft_m/{model}/world").settings == single


@pytest.mark.parametrize("name", METHODS)
def test_a_name_in_place_of_a_model_says_to_load_it(name):
    with pytest.raises(
        UnsupportedModel, match=r"'demo:gptj' is a model's name; load it first: retcon.load\('demo:gptj'\)"
    ):
        method(name, for_model="demo:gptj")
