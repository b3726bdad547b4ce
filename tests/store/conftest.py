"""The model that the stores of these tests are of."""

from collections.abc import Callable

import pytest
import torch

from retcon.lm.model import LM


@pytest.fixture
def lm(tiny: Callable[..., LM]) -> LM:
    return tiny("gptj", torch.float32)
