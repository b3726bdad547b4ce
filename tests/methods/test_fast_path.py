"""Whole proposals by the fast path against the plain one: the same delta."""

from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from retcon.edits import Edit
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.lm.prompts import Where
from retcon.memory.contexts import Contexts
from retcon.memory.keys import KeyAverage, KeyReader, mean_keys
from retcon.memory.values.reference import search_values_reference
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


class PlainReader(KeyReader):
    """Keys by full passes."""

    def __init__(self, lm: LM, edits: Sequence[Edit], contexts: Contexts, *, average: KeyAverage, last: Where) -> None:
        self.given, self.average = (lm, edits, contexts), average

    def read(self, point: Point, where: Where, value: Point) -> tuple[Tensor, Tensor]:
        keys, now = mean_keys(*self.given, point, where, value=value, average=self.average)
        assert now is not None
        return keys, now


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
    with (
        patch("retcon.methods.common.proposal.search_values", search_values_reference),
        patch("retcon.methods.common.proposal.KeyReader", PlainReader),
    ):
        plain = METHODS[name].propose(lm, edits, contexts=CONTEXTS, moments=moments)
    assert fast.provenance["values"] != plain.provenance["values"]  # the plain path has no plan
    assert [(r.steps, r.stopped) for r in fast.report] == [(r.steps, r.stopped) for r in plain.report]
    close = 1e-5 if dtype == torch.float32 or family in FLOAT32_INSIDE else 1e-10
    assert set(fast.changes) == set(plain.changes)
    for changed in plain.changes:
        shape = lm.parameter(changed).shape
        a, b = fast.dense(changed, shape), plain.dense(changed, shape)
        assert float((a - b).norm()) <= close * float(b.norm()), changed
