"""The fast value search against the plain one: same vectors, same steps, on every architecture."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from retcon.edits import Edit
from retcon.lm.layouts import LAYOUTS
from retcon.lm.model import LM
from retcon.lm.trace import Point
from retcon.memory.contexts import Contexts
from retcon.memory.objective import Values, ValueSearch, ValueSite
from retcon.memory.plain_values import search_values_plainly
from retcon.memory.values import search_values

CONTEXTS = Contexts(("The train stood still. ", "I read. "))
LOW = ValueSite(Point(1, "mlp"), "subject_last", clamp=1.5, weight_decay=0.02)
HIGH = ValueSite(Point(2, "mlp"), "prediction", clamp=0.7, weight_decay=0.02)
ATTN = replace(LOW, point=Point(1, "attn"))
SITES: dict[str, tuple[ValueSite, ...]] = {
    "low and high": (LOW, HIGH),
    "block": (replace(LOW, point=Point(2, "block")),),
    "last block": (replace(HIGH, point=Point(3, "block")),),
    "attention and MLP": (ATTN, LOW),
    "prediction only": (HIGH,),
    "first layer": (replace(LOW, point=Point(0, "attn")),),
}


@pytest.fixture
def mixed(edits: list[Edit]) -> list[Edit]:
    """Subjects at the start, in the middle and at the end, of one and of many tokens; short and long answers."""
    return [
        *edits,
        Edit("{}", "Zürich", "a town", id="whole"),
        Edit("Therefore it was late, and the mother tongue of {} is", "Ελλάδα", "French", id="long"),
    ]


def both(
    lm: LM, edits: Sequence[Edit], sites: Sequence[ValueSite], contexts: Contexts = CONTEXTS, *, width: int = 3,
    chunk: int = 4, **settings: Any,
) -> tuple[Values, Values]:  # fmt: skip
    search = ValueSearch(**{"steps": 6, "learning_rate": 0.2, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no falling back
        fast = search_values(lm, edits, sites, contexts, search, width=width, chunk=chunk)
    return fast, search_values_plainly(lm, edits, sites, contexts, search)


def agree(fast: Values, plain: Values, tolerance: float) -> None:
    for name in ("init", "delta", "live"):
        for a, b in zip(getattr(fast, name), getattr(plain, name), strict=True):
            assert float((a - b).norm(dim=1).max()) <= tolerance * float(b.norm(dim=1).max()), name
    for a, b in zip(fast.report, plain.report, strict=True):
        assert (a.id, a.steps, a.stopped) == (b.id, b.steps, b.stopped)
        assert a.probability == pytest.approx(b.probability, rel=100 * tolerance)
        assert a.detail == pytest.approx(b.detail, rel=100 * tolerance, abs=100 * tolerance)


def exactness(family: str) -> float:
    """Attention of GPT-J and gemma 2 computes in float32 whatever the weights are."""
    return 1e-5 if family in ("gptj", "gemma2") else 1e-10


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("sites", SITES)
def test_fast_and_plain_agree(family: str, sites: str, tiny: Callable[..., LM], mixed: list[Edit]) -> None:
    fast, plain = both(tiny(family), mixed, SITES[sites])
    agree(fast, plain, exactness(family))


@pytest.mark.parametrize("family", LAYOUTS)
def test_fast_and_plain_agree_in_float32(family: str, tiny: Callable[..., LM], mixed: list[Edit]) -> None:
    fast, plain = both(tiny(family, torch.float32), mixed, (LOW, HIGH))
    agree(fast, plain, 1e-5)
