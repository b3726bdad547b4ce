"""Where large float64 problems are solved follows from the card, the problem and the user alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retcon.errors import InvalidSetting, OutOfMemory
from retcon.lm.devices import CPU, SETTING, float64_device, solve_device
from retcon.memory.solve import cholesky, null_space, ridge, solve_on
from tests.card import CARD, Card, OnCard


@pytest.mark.parametrize(
    ("capability", "is_good"),
    [
        ((6, 0), True),
        ((8, 0), True),
        ((9, 0), True),
        ((10, 0), True),
        ((7, 5), False),
        ((8, 9), False),
        ((12, 0), False),
    ],
)
def test_the_kind_of_card_decides(capability: tuple[int, int], is_good: bool) -> None:
    with Card(capability):
        assert solve_device(CARD, 100) == CARD  # by refinement where it is bad at float64
        assert float64_device(CARD, 100) == (CARD if is_good else CPU)


def test_its_whole_memory_decides() -> None:
    with Card(memory=8 * 8 * 100**2):
        assert float64_device(CARD, 100) == solve_device(CARD, 100) == CARD
        assert float64_device(CARD, 101) == solve_device(CARD, 101) == CPU


def test_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    with Card():
        monkeypatch.setenv(SETTING, "cpu")
        assert float64_device(CARD, 100) == solve_device(CARD, 100) == CPU
        monkeypatch.setenv(SETTING, "gpu")
        with pytest.raises(InvalidSetting, match=r"RETCON_SOLVE_ON is 'gpu': set it to 'cpu', or leave it out"):
            solve_device(CARD, 100)


@pytest.mark.parametrize("device", ["cpu", "mps"])  # of which the second has no float64 at all
def test_what_is_no_card_leaves_it_to_the_cpu(device: str) -> None:
    assert float64_device(torch.device(device), 100) == CPU


@pytest.mark.parametrize("capability", [(9, 0), (8, 9)])
def test_the_same_problem_has_the_same_bits_whatever_is_free(
    capability: tuple[int, int], randn: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = randn(12, 12)
    c, k = a @ a.T + torch.eye(12, dtype=a.dtype), randn(12, 2)
    with Card(capability):
        found = [ridge(OnCard(k), lambda: c, 0.7, device=CARD).cpu()]
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**40))
        found.append(ridge(OnCard(k), lambda: c, 0.7, device=CARD).cpu())
    assert torch.equal(*found)


def test_a_card_without_room_ends_the_solve(randn: Callable[..., Tensor]) -> None:
    asked = []

    def build(where: torch.device) -> Tensor:
        asked.append(where)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with Card(), pytest.raises(OutOfMemory, match=r"12 x 12 .* finds no room on cuda:0 .*RETCON_SOLVE_ON=cpu"):
        solve_on(CARD, build, randn(12, 1))
    assert asked == [CARD]


@pytest.mark.parametrize("decompose", [lambda c: cholesky(c, CARD), lambda c: null_space(c, 1.0, device=CARD)])
def test_a_card_without_room_ends_a_decomposition(
    decompose: Callable[[Tensor], object], randn: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", full)
    monkeypatch.setattr(torch.linalg, "eigh", full)
    a = randn(12, 12)
    with Card(), pytest.raises(OutOfMemory, match="finds no room"):
        decompose(a @ a.T)
