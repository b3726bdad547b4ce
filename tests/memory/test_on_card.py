"""Solves and decompositions run where the matrices are: on a card that is good at float64, with the CPU's results."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon import audit
from retcon.delta import Dense, LowRank
from retcon.lm.prompts import Row
from retcon.memory import collect, solve
from retcon.methods.prune import singular_values
from retcon.methods.rect import Rect
from tests.card import CARD, Card, both

M = 40


@pytest.fixture
def card() -> Iterator[Card]:
    with Card() as card:
        yield card


def test_the_card_that_is_not_there_minds_where_tensors_are(card: Card) -> None:
    here = torch.ones(3)
    there = here.to(CARD)
    assert there.device == CARD
    assert (there + there).device == CARD
    assert (there + there).cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="on the card and on the CPU"):
        there + here
    assert (card.to_card, card.to_host) == (1, 1)


@pytest.fixture
def c(randn: Callable[..., Tensor]) -> Tensor:
    x = randn(M, 2 * M)
    return x @ x.T / (2 * M)


SOLVES: dict[str, Callable[[Tensor, Tensor, torch.device], Tensor]] = {
    "ridge, few keys": lambda k, c, device: solve.ridge(k[:, :6], lambda: c, 3.0, device=device),
    "ridge, many keys": lambda k, c, device: solve.ridge(k, lambda: c, 3.0, device=device),
    "whitened": lambda k, c, device: solve.whitened(k, lambda: c, device=device),
    "equality": lambda k, c, device: solve.equality(k[:, :6], lambda: c, device=device),
    "equality, identity": lambda k, c, device: solve.equality(k, lambda: c, identity_weight=2.0, device=device),
    "equality, dependent": lambda k, c, device: solve.equality(k[:, [0, 1, 0]], lambda: c, device=device),
    "experts": lambda k, c, device: solve.ridge_of_experts(
        torch.stack([k, 0 * k, 2 * k]), [lambda: torch.linalg.cholesky(c)] * 3, 3.0, device
    ),
    "null space": lambda k, c, device: solve.null_space_ridge(
        k, solve.null_space(c, 0.3, "rank", device), 2.0, device=device
    ),
    "factor": lambda k, c, device: solve.cholesky(c, device)[0].tril(),
}


@pytest.mark.parametrize("name", SOLVES)
def test_a_solve_runs_on_the_card(name: str, card: Card, c: Tensor, randn: Callable[..., Tensor]) -> None:
    k = randn(M, 15)
    wanted = SOLVES[name](k, c, solve.CPU)
    assert not card.ran
    found = SOLVES[name](k, c, CARD)
    assert found.device.type == "cpu"
    assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert {"linalg_cholesky_ex", "_linalg_eigh", "cholesky_solve"} & card.ran.keys(), card.ran
    assert card.to_host == 1 + (name == "null space")  # the result alone, and the basis, which is kept


@pytest.mark.parametrize("name", ["whitened", "ridge, many keys", "equality, identity", "null space", "factor"])
def test_a_moment_is_sent_as_it_is_kept_and_widened_on_the_card(
    name: str, card: Card, c: Tensor, randn: Callable[..., Tensor]
) -> None:
    k = randn(M, 15)
    SOLVES[name](k, c.to(torch.float32), CARD)
    basis = 8 * M * round(0.3 * M) if name == "null space" else 0  # which is kept on the CPU, and sent again
    assert card.sent <= 4 * M * M + 2 * k.nbytes + basis


def test_singular_values_of_a_change_are_found_on_the_card(card: Card, randn: Callable[..., Tensor]) -> None:
    for change in (LowRank(left=randn(12, 3), right=randn(3, 9)), Dense(full=randn(12, 9))):
        wanted = singular_values([change], torch.Size((12, 9)))
        assert not card.ran
        found = singular_values([change], torch.Size((12, 9)), CARD)
        for one, other in zip(found, wanted, strict=True):
            assert one.device == CARD
            assert_close(one.cpu(), other)
        assert "_linalg_svd" in card.ran
        card.ran.clear()


def test_rect_ranks_on_the_card(card: Card, randn: Callable[..., Tensor]) -> None:
    update, weight = randn(12, 9), randn(12, 9)
    weight[0] = weight[1]
    update[0] = update[1]  # equals
    wanted = Rect().filtered(update, weight, 33.0)
    assert not card.ran
    found = Rect().filtered(update, weight.to(CARD), 33.0)
    assert torch.equal(found, wanted)
    assert "kthvalue" in card.ran
    assert (card.to_card, card.to_host) == (2, 1)  # weight and update there; what is chosen back


def test_an_audit_counts_ranks_on_the_card(card: Card, randn: Callable[..., Tensor]) -> None:
    difference, stored = randn(30, 2) @ randn(2, 20), torch.ones(30, 20)
    assert audit._rank(difference, stored, CARD) == audit._rank(difference, stored, solve.CPU) == 2
    assert "_linalg_svd" in card.ran


def test_second_moments_are_finished_on_the_card(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(collect.CHUNK_TOKENS, device, 20)
    monkeypatch.setattr(collect, "free_bytes", lambda device: 2**40)
    rows = [Row(tuple(range(3, 3 + n)), n) for n in (5, 9, 12, 7, 17)]
    wanted, found = (
        [one for _, one in collect.collect(lm, [lm.site(1, "down_proj"), lm.site(2, "o_proj")], rows)] for lm in both()
    )
    assert card.to_host == len(found)  # the moments themselves
    for one, other in zip(found, wanted, strict=True):
        assert type(one.moment) is Tensor
        assert_close(one.moment, other.moment, rtol=1e-6, atol=1e-9)
        assert one.convergence == pytest.approx(other.convergence, rel=1e-5)
