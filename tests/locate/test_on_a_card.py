"""Probes on one card that is not there, or two: they find what they find on the CPU, and wait for it seldom."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.lm import capacity
from retcon.lm.model import LM
from retcon.lm.prompts import encode_edit
from retcon.locate import Tracing, WordSets, causal_trace, contrast_probe
from retcon.locate.attribution import Attribution, attribute
from retcon.locate.neurons import attribute_neurons
from retcon.locate.paths import assess, slots_of
from tests.card import Card, both, on_two
from tests.conftest import everyday

EDITS = [
    Edit("The capital of {} is", "France", "Rome", id="a"),
    Edit("The mother tongue of {} is", "Danielle Darrieux", "Italian", id="b"),
    Edit("{} lived in", "Leonardo da Vinci", "Milan", id="c"),
    Edit("The river of {} is", "France", "Po", id="d"),
]
WORDS = WordSets({"a": frozenset({"Paris", "wine"})}, {"b": frozenset({"red"})}, frozenset({"the", "of"}))


def contrast(lm: LM, edits: Sequence[Edit]) -> list[Tensor]:
    found = contrast_probe(lm, edits, word_sets=WORDS)
    return [found.mean_rank, found.sum_prob]


def trace(lm: LM, edits: Sequence[Edit]) -> list[Tensor]:
    return [table for t in causal_trace(lm, edits, Tracing(samples=2)).traces for table in t.scores.values()]


def attribution(lm: LM, edits: Sequence[Edit]) -> list[Tensor]:
    return attribute(lm, edits, [lm.site(layer, "down_proj") for layer in range(lm.n_layers)], Attribution())


def neurons(lm: LM, edits: Sequence[Edit]) -> list[Tensor]:
    rows = [encode_edit(lm.tokenizer, e, answer=e.target_new) for e in edits]
    return [of_layer for part in attribute_neurons(lm, rows) for of_layer in part]


def nodes(lm: LM, edits: Sequence[Edit]) -> list[Tensor]:
    return assess(lm, edits, slots_of(lm))


PROBES = {contrast: (4, 0), trace: (11, 3), attribution: (5, 0), neurons: (3, 0), nodes: (8, 0)}
"""How often the host waits at most: for two facts, and for each one more in the same batch."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    monkeypatch.setattr(capacity, "planned_bytes", lambda lm: 2**33)
    with Card() as card:
        yield card


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert type(one) is torch.Tensor
        assert_close(one, other, rtol=1e-4, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("probe", everyday(attribution, of=PROBES))
def test_a_probe_finds_the_same_on_two_cards(probe: Callable[..., list[Tensor]], card: Card) -> None:
    here, there = on_two("gptj")
    same(probe(there, EDITS[:2]), probe(here, EDITS[:2]))


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_finds_the_same_on_a_card_and_waits_seldom(probe: Callable[..., list[Tensor]], card: Card) -> None:
    waits: list[int] = []
    for n in (2, 4):
        here, there = both()
        wanted = probe(here, EDITS[:n])
        before: Any = Counter(Card.ran), card.to_host
        found = probe(there, EDITS[:n])
        ran = Card.ran - before[0]
        waits.append(ran["_local_scalar_dense"] + ran["nonzero"] + card.to_host - before[1])
        same(found, wanted)
    at_most, each_more = PROBES[probe]
    assert waits[0] <= at_most, waits
    assert waits[1] - waits[0] <= 2 * each_more, waits
