"""Batches: everything once, in order, within bounds, and smaller where memory runs out."""

import random
from itertools import pairwise

import pytest
import torch

from retcon.lm.batches import buckets, in_batches


@pytest.mark.parametrize("seed", range(20))
def test_buckets_hold_everything_once_within_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    lengths, bound = [rng.randrange(1, 60) for _ in range(rng.randrange(80))], rng.randrange(20, 300)
    groups = buckets(lengths, bound)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= bound
    flat = [lengths[i] for g in groups for i in g]
    assert flat == sorted(flat)
    for one, two in pairwise(groups):  # no group could have taken the next row as well
        assert (len(one) + 1) * lengths[two[0]] > bound


def test_buckets_worth_a_pass_hold_rows_of_about_one_length() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(5, 40) for _ in range(1000)]
    groups = buckets(lengths, 8192)
    assert sum(len(g) * lengths[g[-1]] for g in groups) < 1.1 * sum(lengths)
    assert len(groups) < 30


def test_results_come_back_in_order_and_the_longest_rows_run_first() -> None:
    lengths, ran, heard = [3, 9, 4, 4, 30, 1], [], []

    def work(group: list[int]) -> list[str]:
        ran.append([lengths[i] for i in group])
        return [f"{i}" for i in group]

    found = in_batches(lengths, work, max_tokens=20, on_progress=lambda done, of: heard.append((done, of)))
    assert found == ["0", "1", "2", "3", "4", "5"]
    assert ran == [[30], [9], [1, 3, 4, 4]]
    assert heard == [(1, 6), (2, 6), (6, 6)]
    assert in_batches([], work) == []


def test_rows_of_two_kinds_share_no_batch() -> None:
    groups: list[list[int]] = []
    in_batches([4] * 6, lambda group: [groups.append(group)] * len(group), kinds=["a", "b", "a", "b", "a", "b"])
    assert sorted(groups) == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("none"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_done_again_in_halves(error: BaseException) -> None:
    tried: list[int] = []

    def room_for(most: int, group: list[int]) -> list[int]:
        tried.append(len(group))
        if len(group) > most:
            raise error
        return group

    assert in_batches([5] * 10, lambda group: room_for(3, group), max_tokens=50) == list(range(10))
    assert tried == [10, 5, 2, 2, 2, 2, 2]
    with pytest.raises(type(error)):
        in_batches([5] * 10, lambda group: room_for(0, group))


def test_another_error_is_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        in_batches([5] * 10, lambda group: (_ for _ in ()).throw(RuntimeError("shapes differ")))
