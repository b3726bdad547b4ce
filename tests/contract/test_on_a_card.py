"""Methods and evaluation on one card that is not there, or two: nothing lies on the wrong device, and results are the
CPU's."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import retcon
from retcon import world
from retcon.delta import Delta
from retcon.edits import Edit
from retcon.evaluation import evaluate
from retcon.lm import capacity
from retcon.lm.model import LM
from retcon.memory import keys
from retcon.memory.contexts import Contexts
from retcon.memory.values import plan, schedule, search
from retcon.methods.common import tuning
from tests.card import Card, both, on_two
from tests.conftest import everyday, random_moments, tiny_model, tokenizer

EDITS = [
    Edit("The capital of {} is", "France", "Rome", "Paris", id="a"),
    Edit("The mother tongue of {} is", "Danielle Darrieux", "Italian", "French", id="b"),
]
MEMIT: dict[str, Any] = dict(layers=(1, 2), steps=3)
METHODS: dict[str, dict[str, Any]] = {
    "jeep": dict(low=(1, 2), high=(3,), steps=4),
    "memit": MEMIT,
    "emmet": MEMIT,
    "pmet": MEMIT,
    "alphaedit": MEMIT,
    "rome": dict(layer=1, steps=3),
    "prune": dict(base_method="memit", base_settings=MEMIT),
    "rect": dict(base_method="memit", base_settings=MEMIT),
    "kn": {},
    "kne": dict(epochs=3, n_points=2, budget=0.05),
    "ctp": dict(epochs=3, n_positive=3),
    "ft": dict(layers=(1,), epochs=3),
    "lora": dict(epochs=3),
    "adalora": dict(epochs=3),
}
EVERYDAY = ("jeep", "ctp")
EVERYDAY_ON_TWO = ("memit", "adalora")
TRAINED = dict(layers=(1, 2), modules=("down_proj",), steps=2, rank=4, batch_size=2, validate_every=1)
AT_MOST = {"kne": (1, 5), "ctp": (2, 10), "ft": (1, 5), "lora": (1, 5), "adalora": (1, 5)}
"""Of a step more: numbers that come to the host or that it waits for, and tensors that go to the card."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    monkeypatch.setattr(schedule, "CAPTURED", {})
    for module in (capacity, search, tuning):
        monkeypatch.setattr(module, "free_bytes", lambda device: 2**33)
    for module in (capacity, keys, plan):
        monkeypatch.setattr(module, "planned_bytes", lambda lm: 2**33)
    with Card() as card:
        yield card


def proposed(lm: LM, name: str, **more: Any) -> Any:
    method = retcon.method(name, **METHODS[name] | more)
    edits = EDITS if method.supports_batches else EDITS[:1]
    return method.propose(lm, edits, contexts=Contexts(("It rained. ",)), moments=random_moments(lm_of_moments()))


def lm_of_moments() -> LM:
    return LM(tiny_model("gptj", torch.float32), tokenizer("gpt"), name="tiny")


def same(here: LM, found: Delta, wanted: Delta) -> None:
    assert found.changes.keys() == wanted.changes.keys()
    for parameter in wanted.changes:
        shape = here.parameter(parameter).shape
        one, other = wanted.dense(parameter, shape), found.dense(parameter, shape)
        assert float((one - other).norm()) <= 1e-4 * float(one.norm())
    for changes in found.changes.values():
        assert all(type(x) is torch.Tensor for change in changes for x in change.tensors().values())


@pytest.mark.parametrize("name", everyday(*EVERYDAY, of=METHODS))
def test_a_method_s_delta_is_the_cpu_s(name: str, card: Card) -> None:
    here, there = both()
    same(here, proposed(there, name), proposed(here, name))


@pytest.mark.parametrize("name", everyday(*EVERYDAY_ON_TWO, of=METHODS))
def test_a_method_s_delta_is_the_cpu_s_on_two_cards(name: str, card: Card) -> None:
    here, there = on_two("gptj")
    delta = proposed(there, name)
    same(here, delta, proposed(here, name))
    with there.edited(delta):
        assert len(there.complete("The capital of France is", max_new_tokens=2)) > 0


@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_a_trained_editor_is_the_cpu_s_on_two_cards(name: str, card: Card, tmp_path: Path) -> None:
    """Its matrices are of one shape and on different cards."""
    deltas = []
    for lm in (models := on_two("gptj")):
        method = retcon.method(name, **TRAINED)
        editor = method.fit(lm, world.cases(6), tmp_path / f"editor-{len(deltas)}")
        deltas.append(replace(method, editor=str(editor)).propose(lm, EDITS))
    same(models[0], deltas[1], deltas[0])


@pytest.mark.parametrize("name", everyday("ctp", of=AT_MOST))
def test_a_step_asks_little_of_the_host(name: str, card: Card) -> None:
    asked = []
    for epochs in (3, 4):
        _, there = both()
        before = Counter(Card.ran), card.to_host, card.to_card
        proposed(there, name, epochs=epochs)
        ran = Card.ran - before[0]
        asked.append((ran["_local_scalar_dense"] + ran["nonzero"] + card.to_host - before[1], card.to_card - before[2]))
    (waits, uploads), (waits_more, uploads_more) = asked
    assert waits_more - waits <= AT_MOST[name][0], asked
    assert uploads_more - uploads <= AT_MOST[name][1], asked


@pytest.mark.parametrize("models", [both, partial(on_two, "gptj")], ids=["one card", "two cards"])
def test_an_evaluation_is_the_cpu_s(models: Callable[[], tuple[LM, LM]], card: Card) -> None:
    here, there = models()
    wanted, found = (evaluate(lm, world.cases(3), max_new_tokens=4) for lm in (here, there))
    assert found.texts == wanted.texts
    assert found.records == wanted.records
