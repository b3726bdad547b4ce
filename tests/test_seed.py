"""Seeds are whole numbers that torch takes, wherever they go."""

from typing import Any

import pytest

import retcon
from retcon.errors import InvalidSetting
from retcon.seed import LARGEST, SMALLEST, check_seed, generator_of


@pytest.mark.parametrize("seed", [SMALLEST, -1, 0, LARGEST])
def test_a_seed_begins_a_generator(seed: int) -> None:
    assert check_seed(seed) == seed
    assert generator_of(seed).initial_seed() % 2**64 == seed % 2**64


@pytest.mark.parametrize("seed", [LARGEST + 1, SMALLEST - 1, 0.5, "a", True, None])
def test_what_is_no_seed_is_named(seed: Any) -> None:
    with pytest.raises(InvalidSetting, match="seed: expected a whole number of at most 64 bits, found"):
        generator_of(seed)


@pytest.mark.parametrize("name", ["lora", "adalora", "kne", "ctp", "ft", "memit"])
def test_methods_refuse_what_is_no_seed(name: str) -> None:
    lm = retcon.load("demo:gptj")
    edit = retcon.Edit("The capital of {} is", "France", "Rome")
    with pytest.raises(InvalidSetting, match="seed: expected"):
        retcon.method(name, for_model=lm).propose(lm, [edit], seed=2**70)
