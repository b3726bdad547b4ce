"""Whole proposals by the fast path against the plain one: the same delta."""

from collections.abc import Callable

import pytest
import torch
from benchmarks.fast_path import plain_path

from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.methods.jeep import Jeep
from retcon.methods.memit import Memit
from tests.conftest import CORE, FAMILIES, FLOAT32_INSIDE, everyday, random_moments

CONTEXTS = Contexts(("The train stood still. ", "I read. "))
METHODS = {
    "jeep": Jeep(
        low=(0, 1), high=(2, 3), low_clamp=1.0, high_clamp=0.5, low_moment_weight=10.0, high_moment_weight=10.0, steps=5
    ),
    "memit": Memit(layers=(0, 1, 2), clamp=1.0, moment_weight=10.0, steps=5),
}

JEEP, MEMIT = ("jeep", torch.float64, "llama"), ("memit", torch.float32, "gpt2")
"""What is tried every day; the other families by `make test-all`."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*larger than the weight"),
    pytest.mark.filterwarnings("ignore:.*a norm stands between"),
]


@pytest.mark.parametrize(
    ("name", "dtype", "family"),
    [
        *everyday(JEEP, of=(("jeep", torch.float64, f) for f in FAMILIES), rows=True),
        *everyday(MEMIT, of=(("memit", torch.float32, f) for f in FAMILIES if f in CORE), rows=True),
    ],
)
def test_fast_and_plain_give_the_same_delta(
    name: str, dtype: torch.dtype, family: str, tiny: Callable[..., LM], edits: list[Edit]
) -> None:
    lm = tiny(family, dtype)
    moments = random_moments(lm)
    fast = METHODS[name].propose(lm, edits, contexts=CONTEXTS, moments=moments)
    with plain_path():
        plain = METHODS[name].propose(lm, edits, contexts=CONTEXTS, moments=moments)
    assert fast.provenance["values"] != plain.provenance["values"]  # the plain path has no plan
    assert [(r.steps, r.stopped) for r in fast.report] == [(r.steps, r.stopped) for r in plain.report]
    close = 1e-5 if dtype == torch.float32 or family in FLOAT32_INSIDE else 1e-10
    assert set(fast.changes) == set(plain.changes)
    for changed in plain.changes:
        shape = lm.parameter(changed).shape
        a, b = fast.dense(changed, shape), plain.dense(changed, shape)
        assert float((a - b).norm()) <= close * float(b.norm()), changed
