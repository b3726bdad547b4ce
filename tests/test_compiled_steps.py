"""Steps that are compiled: the values of those that are not."""

from collections.abc import Callable

import pytest
import torch
from benchmarks.compiled_steps import CompiledSteps
from torch.testing import assert_close

from retcon.lm.model import LM
from retcon.memory.values.schedule import Pace
from tests.memory.test_captured import searched
from tests.memory.test_value_pace import FACTS


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_find_the_same(tiny: Callable[..., LM]) -> None:
    lm, steps = tiny("llama", torch.float32), CompiledSteps("cpu", "aot_eager")  # another backend takes a compiler
    (wanted,) = searched(lm, Pace(2, 4), facts=FACTS[:1]).values()
    (found,) = searched(lm, Pace(2, 4, steps), facts=FACTS[:1]).values()
    assert len(steps.seconds) == 1
    assert found.report.steps == wanted.report.steps
    of_found, of_wanted = ((*v.offset, *v.init, *v.activation) for v in (found, wanted))
    for a, b in zip(of_found, of_wanted, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
