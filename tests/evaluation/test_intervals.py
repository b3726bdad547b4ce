"""Intervals: the published formulas, and a bootstrap that draws subjects."""

import math

import numpy as np
import pytest
import torch

from retcon.errors import InvalidSetting
from retcon.evaluation import ci_boot, ci_case, ci_seed, ci_wilson
from retcon.evaluation.intervals import Interval, _t_975


@pytest.mark.parametrize(("p", "n", "points"), [(0.152, 10_000, 0.704), (0.998, 10_000, 0.088)])
def test_over_cases_as_published(p: float, n: int, points: float) -> None:
    hits = round(p * n)
    found = ci_case([1.0] * hits + [0.0] * (n - hits))
    assert found is not None
    assert found.kind == "ci.case"
    assert 100 * found.half_width == pytest.approx(points, abs=5e-4)
    assert found.half_width == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))
    assert (found.low + found.high) / 2 == pytest.approx(p)


def test_over_three_seeds() -> None:
    found = ci_seed([84.0, 85.0, 86.0])
    assert found is not None
    assert found.kind == "ci.seed"
    assert found.half_width == pytest.approx(2.48, abs=5e-3)
    assert (found.low + found.high) / 2 == pytest.approx(85)


def test_students_t() -> None:
    table = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 10: 2.228, 12: 2.179, 20: 2.086, 30: 2.042, 120: 1.980}
    for dof, quantile in table.items():
        assert _t_975(dof) == pytest.approx(quantile, abs=6e-4)


def test_too_little_gives_none() -> None:
    assert ci_case([]) is None
    assert ci_seed([85.0]) is None
    assert ci_boot(torch.zeros(0, 2), []) == [None, None]
    assert ci_boot(torch.full((3, 1), math.nan), "abc") == [None]


def test_duplicating_cases_fools_the_plain_interval_but_not_the_clustered_one() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 1.0, 0.25]
    once, twice = ci_case(values), ci_case(values * 2)
    assert once is not None
    assert twice is not None
    assert twice.half_width == pytest.approx(once.half_width / math.sqrt(2))
    column = torch.tensor(values)[:, None]
    subjects = list("abcdefgh")
    assert ci_boot(column, subjects) == ci_boot(torch.cat([column, column]), subjects * 2)


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_cases() -> None:
    values = [float(i % 4 == 0) for i in range(400)]
    plain = ci_case(values)
    boot = ci_boot(torch.tensor(values)[:, None], range(400))[0]
    assert plain is not None
    assert boot is not None
    assert boot.kind == "ci.boot"
    assert boot.low == pytest.approx(plain.low, abs=0.006)
    assert boot.high == pytest.approx(plain.high, abs=0.006)


def test_drawing_subjects_is_drawing_their_means_where_they_have_equally_many_cases() -> None:
    values = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    by_subject = ci_boot(values[:, None], ["a", "a", "b", "b", "c", "c"])
    assert by_subject == ci_boot(torch.tensor([[0.5], [1.0], [0.0]]), ["a", "b", "c"])


def test_a_statistic_of_several_means_from_the_same_draw() -> None:
    values = torch.tensor([[float(i % 2), float(i % 2 == 0)] for i in range(30)])
    difference = ci_boot(values, range(30), lambda means: means.sum(1, keepdim=True))
    assert difference == [Interval("ci.boot", pytest.approx(1.0), pytest.approx(1.0))]


def test_cases_without_a_metric_do_not_change_it() -> None:
    have = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    found = ci_boot(torch.cat([have, torch.full((4, 1), math.nan)]), ["a", "b", "c", "d"] * 2)
    assert found == ci_boot(have, ["a", "b", "c", "d"])


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    values = torch.linspace(0, 1, 20)[:, None]
    state = torch.get_rng_state()
    one, two = ci_boot(values, range(20), seed=1), ci_boot(values, range(20), seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert one == ci_boot(values, range(20), seed=1) != two


def test_many_subjects_are_drawn_in_parts_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(5000, 1, generator=torch.Generator().manual_seed(0))
    found = ci_boot(values, range(5000), n_resamples=900)[0]
    plain = ci_case(values[:, 0].tolist())
    assert found is not None
    assert plain is not None
    assert found.half_width == pytest.approx(plain.half_width, rel=0.15)


def test_wilsons_interval_against_its_equation_and_known_values() -> None:
    found = ci_wilson(1.0, 1)
    assert found is not None
    assert (found.kind, round(found.low, 4), found.high) == ("ci.wilson", 0.2065, 1.0)
    for n, share in ((10, 0.1), (50, 0.98), (7, 0.0), (200, 0.5)):
        found = ci_wilson(share, n)
        assert found is not None
        assert 0 <= found.low <= share <= found.high <= 1
        for bound in (found.low, found.high):  # where (p - bound)^2 = z^2 bound (1 - bound) / n
            assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, abs=1e-12)
    assert ci_wilson(0.5, 0) is None


def test_arrays_are_values_too() -> None:
    values = np.array([[0.1], [0.4], [0.7]])
    assert ci_case(values[:, 0]) == ci_case([0.1, 0.4, 0.7])  # type: ignore[arg-type]
    assert ci_case(np.array([])) is None  # type: ignore[arg-type]
    assert ci_boot(values, "aab") == ci_boot(torch.tensor(values), "aab")  # type: ignore[arg-type]


def test_what_is_no_share_or_has_no_cluster_is_refused() -> None:
    for share in (50, -0.1, math.nan):
        with pytest.raises(InvalidSetting, match=f"a share lies between 0 and 1, found {share}"):
            ci_wilson(share, 100)
    with pytest.raises(InvalidSetting, match="3 values and 2 clusters given"):
        ci_boot(torch.zeros(3, 1), "ab")
