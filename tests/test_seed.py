"""Seeds are whole numbers that torch takes, wherever they go."""

from typing import Any

import numpy as np
import pytest
import torch

import retcon
from retcon.bench.spec import Protocol
from retcon.errors import InvalidSetting
from retcon.seed import LARGEST, SMALLEST, check_seed, generator_of


@pytest.mark.parametrize("seed", [SMALLEST, -1, 0, LARGEST])
def test_a_seed_begins_a_generator(seed: int) -> None:
    assert check_seed(seed) == seed
    assert generator_of(seed).initial_seed() % 2**64 == seed % 2**64


def test_numbers_of_numpy_are_numbers() -> None:
    lm = retcon.load("demo:gptj")
    edit = retcon.Edit("The capital of {} is", "France", "Rome")
    own: Any = dict(layers=np.array([1, 2]), steps=np.int64(2), learning_rate=np.float32(0.5))
    method = retcon.method("memit", for_model=lm, **own)
    assert repr(method) == repr(retcon.method("memit", for_model=lm, layers=(1, 2), steps=2, learning_rate=0.5))
    seed: Any = np.int64(1)
    size: Any = np.int64(2)
    wanted = retcon.in_steps(method, lm, [edit], batch_size=2, seed=1)
    found = retcon.in_steps(method, lm, [edit], batch_size=size, seed=seed)
    assert (found, found.provenance) == (wanted, wanted.provenance)
    assert retcon.evaluate(lm, [], seed=seed).context == retcon.evaluate(lm, [], seed=1).context
    assert repr(Protocol(n=size, kind="batch")) == repr(Protocol(n=2, kind="batch"))
    with pytest.raises(InvalidSetting, match=r"protocol: n must be a whole number, found 2\.5"):
        Protocol(n=2.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match=r"memit: batch_size must be a whole number, found 1\.5"):
        retcon.in_steps(method, lm, [edit], batch_size=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [torch.tensor([1, 2]), {1, 2}, range(1, 3), iter([1, 2])])
def test_a_list_may_be_a_tensor_a_set_a_range_or_an_iterator(given: Any) -> None:
    assert repr(retcon.method("memit", layers=given)) == repr(retcon.method("memit", layers=(1, 2)))


@pytest.mark.parametrize("given", [np.array(3), torch.tensor(3), b"\x01\x02", "12", {1: 2}])
def test_what_is_no_list_is_refused(given: Any) -> None:
    with pytest.raises(InvalidSetting, match=r"memit: layers must be a list \(\[1, 2, 3\], say\), found"):
        retcon.method("memit", layers=given)


def test_a_choice_is_one_of_its_words_or_numbers_and_no_array() -> None:
    given: Any = np.array(["even", "even"])
    with pytest.raises(InvalidSetting, match=r"memit: spread is array\(.*\); known: even"):
        retcon.method("memit", layers=(1, 2), spread=given)
    sign: Any = np.int64(1)
    assert repr(retcon.method("mend", sign=sign)) == repr(retcon.method("mend", sign=1))


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
