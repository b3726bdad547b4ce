"""`--set field=value`: what a value may look like, and how settings are written so."""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from retcon.errors import InvalidSetting
from retcon.lm.model import LM
from retcon.methods.common.presets import preset_named
from retcon.methods.common.registry import list_methods, method_class, setting_types
from retcon.methods.memit import Memit
from retcon.workflow.settings import as_toml, read_settings, resolve


def read(*assignments: str) -> dict[str, Any]:
    return read_settings("jeep", dataset=None, preset=None, assignments=assignments)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("low=[1, 2]", (1, 2)),
        ("low=[]", ()),
        ('sites="block"', "block"),
        ("sites=block", "block"),
        ("kl_factor=0.1", 0.1),
        ("kl_factor=1", 1.0),
        ("steps = 7", 7),
        ("write_low=false", False),
        ("high_target=none", None),
        ("high_target=joint", "joint"),
    ],
)
def test_values_are_toml_and_bare_words_are_text(assignment: str, value: Any) -> None:
    (found,) = read(assignment).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "assignment",
    [
        "low=1",
        "low=[0.5]",
        "low=ab",
        "steps=1.5",
        "steps=true",
        "write_low=1",
        "kl_factor=x",
        "sites=none",
        "steps=",
        "=1",
    ],
)
def test_values_of_another_type_are_refused(assignment: str) -> None:
    with pytest.raises(InvalidSetting, match="setting "):
        read(assignment)


def test_a_value_cannot_bring_in_another_field() -> None:
    with pytest.raises(InvalidSetting, match="whole number"):
        read("steps=1\nother=2")


def test_the_last_of_two_holds() -> None:
    assert read("steps=1", "steps=2") == {"steps": 2}


ODD = ["none", "None", "", " a ", "1", "-1e3", "true", "[1]", "{a = 1}", '"a"', "'a'", "a\nb", "a, b", "a = b # c"]
ODD += ["\x7f", "\u2028", "é😀", "C:\\new", "1979-05-27", 'it\'s "so"', "./a b.safetensors", "nan"]


def read_back(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Read settings as the page and a command do: one `field=value` a line."""
    lines = "\n".join(f"{setting}={as_toml(value)}" for setting, value in settings.items()).splitlines()
    return read_settings(name, dataset=None, preset=None, assignments=lines)


def choices(hint: Any) -> Iterator[Any]:
    """Yield the values that a setting may have, as far as its type names them."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) is tuple:
        yield from ((choice,) for choice in choices(get_args(hint)[0]))
    elif hint is NoneType:
        yield None
    else:
        for part in get_args(hint)[: 1 if get_origin(hint) is Annotated else None]:
            yield from choices(part)


@pytest.mark.parametrize("name", list_methods())
def test_every_methods_settings_are_read_back_as_they_were(name: str) -> None:
    made = method_class(name)
    hints = setting_types(name)
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(made)}
    assert read_back(name, known := {s: v for s, v in defaults.items() if v is not MISSING}) == known
    for setting, hint in hints.items():
        for value in choices(hint):
            assert read_back(name, {setting: value}) == {setting: value}


@pytest.mark.parametrize("text", ODD)
def test_odd_values_are_read_back_as_they_were(text: str) -> None:
    for name, settings in [
        ("malmen", {"editor": text}),
        ("lora", {"modules": (text, "q_proj")}),
        ("rect", {"base_method": "malmen", "base_settings": {"editor": text}}),
        ("rect", {"base_settings": {"layers": [1, 2], "stop": "loss", "clamp": 1e-5, "use_moment": False}}),
    ]:
        assert read_back(name, settings) == settings


def test_a_text_has_quotes_where_it_needs_them_alone() -> None:
    assert [as_toml(v) for v in ("probability", "mend.safetensors", "1", None)] == [
        "probability",
        "mend.safetensors",
        '"1"',
        "none",
    ]
    assert as_toml({"stop": "loss", "modules": ("q_proj",)}) == '{stop = "loss", modules = ["q_proj"]}'


def test_a_filter_says_where_its_base_methods_settings_are_from(
    tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = preset_named("memit", "memit/demo-llama/world")
    named = f"memit by preset {base.name} ({base.source})"
    monkeypatch.setattr("retcon.methods.common.presets.signature", lambda lm: dict(base.match))
    found = resolve(tiny("llama"), "rect")
    assert found.source.startswith("preset rect/demo-llama/world (")
    assert found.source.endswith(f"; {named}")
    assert replace(found, preset=None).source == f"no preset for this model; {named}"


@dataclass(frozen=True, kw_only=True)
class MyMemit(Memit):
    """A method of one's own."""


def test_what_the_notes_say_is_no_warning(tiny: Callable[..., LM]) -> None:
    assert resolve(tiny("llama"), f"{__name__}:MyMemit", preset="none").notes
