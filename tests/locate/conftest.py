"""One tiny random model per architecture for the probes' tests: nothing there changes weights."""

from collections.abc import Callable

import pytest

from retcon.lm.model import LM
from tests.conftest import tiny_model, tokenizer


@pytest.fixture(scope="session")
def still() -> Callable[[str], LM]:
    """still(family) -> LM in float64; the same object every time."""
    made: dict[str, LM] = {}

    def get(family: str) -> LM:
        if family not in made:
            made[family] = LM(tiny_model(family), tokenizer(), name=f"tiny-{family}")
        return made[family]

    return get
