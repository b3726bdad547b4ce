"""What the method tests share: contexts, exact settings on tiny models, comparing deltas."""

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.delta import Delta
from retcon.edits import Edit
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.keys import KeyAverage, mean_keys

EASY = Edit("You know {}", "France", "French", id="easy", relation_id="a")
EASY_TOO = Edit("You know {}", "France", "the", id="easy too", relation_id="b")
"""Subjects at the prompt's end with answers of one token, which a random GPT-2 or OPT can be brought to say."""
CONTEXTS, BARE = Contexts(("The train stood still. ", "I read. ")), Contexts()
SEARCH: dict[str, Any] = dict(clamp=2.0, weight_decay=0.02, steps=5, learning_rate=0.2)
"""A value search that moves and ends in a moment."""


def update(lm: LM, delta: Delta, layer: int) -> Tensor:
    """A layer's change in math orientation."""
    site = lm.site(layer, "down_proj")
    dense = delta.dense(site.name, lm.parameter(site.name).shape)
    return dense.T if site.transposed else dense


def same(lm: LM, a: Delta, b: Delta, **tolerance: Any) -> None:
    assert set(a.changes) == set(b.changes)
    for name in a.changes:
        shape = lm.parameter(name).shape
        assert_close(a.dense(name, shape), b.dense(name, shape), **tolerance)


def keys_of(lm: LM, edits: Any, layer: int, contexts: Contexts = CONTEXTS, average: KeyAverage = "two_level") -> Tensor:
    return mean_keys(lm, edits, contexts, Point(layer, "key"), "subject_last", average=average)[0]


def value_of(lm: LM, edits: Any, point: Point) -> Tensor:
    """The bare prompts' activation at the subject."""
    found = mean_keys(lm, edits, BARE, Point(0, "key"), "subject_last", value=point)[1]
    assert found is not None
    return found


def weights(lm: LM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
