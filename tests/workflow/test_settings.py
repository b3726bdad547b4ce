"""`--set field=value`: what a value may look like."""

from typing import Any

import pytest

from retcon.errors import InvalidSetting
from retcon.workflow.settings import read_settings


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
    with pytest.raises(InvalidSetting, match="--set"):
        read(assignment)


def test_a_value_cannot_bring_in_another_field() -> None:
    with pytest.raises(InvalidSetting, match="whole number"):
        read("steps=1\nother=2")


def test_the_last_of_two_holds() -> None:
    assert read("steps=1", "steps=2") == {"steps": 2}
