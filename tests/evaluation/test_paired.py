"""Two methods on the same cases."""

import pytest

from retcon.evaluation.intervals import Interval
from retcon.evaluation.paired import differences
from retcon.evaluation.records import Record
from tests.evaluation.test_results import axis


def records(es: list[float], gs: list[float], ls: list[float]) -> list[Record]:
    cases = "abcdefgh"
    return [
        *axis("rewrite", "ES", {c: [v] for c, v in zip(cases, es, strict=False)}),
        *axis("paraphrase", "GS", {c: [v] for c, v in zip(cases, gs, strict=False)}),
        *axis("neighborhood", "LS", {c: [v] for c, v in zip(cases, ls, strict=False)}),
    ]


def test_differences_are_of_means_and_of_scores() -> None:
    one = records([1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1])
    two = records([1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1])
    found = {d.metric: d for d in differences(one, two)}
    assert {m: d.value for m, d in found.items()} == pytest.approx(
        {"ES": 0.25, "GS": 0.25, "LS": -0.25, "Score": 3 / (1 + 2 / 0.75) - 3 / (1 / 0.75 + 2 + 1)}
    )
    for d in found.values():
        assert d.interval is not None
        assert d.interval.low <= d.value <= d.interval.high
        assert d.n == 4
        assert not d.clear


def test_a_method_against_itself_is_no_different() -> None:
    one = records([1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1])
    for d in differences(one, one):
        assert (d.value, d.interval.low, d.interval.high) == (0, 0, 0)  # type: ignore[union-attr]
        assert not d.clear


def test_pairing_is_sharper_than_the_two_apart() -> None:
    """Every case falls by the same amount: no doubt is left, though the cases differ wildly."""
    base = [1.0, 0.2, 0.8, 0.4, 0.9, 0.3]
    one, two = records(base, base, base), records([v - 0.1 for v in base], base, base)
    es = next(d for d in differences(one, two) if d.metric == "ES")
    assert es.interval is not None
    assert es.clear
    assert es.interval.half_width == pytest.approx(0, abs=1e-12)


def es_interval(subjects: str, seed: int = 0) -> Interval:
    """Of eight cases with these subjects, half of which one method gets right and the other does not."""
    one = axis("rewrite", "ES", {case: [1 - i / 100 if i < 4 else 0] for i, case in enumerate("abcdefgh")})
    named = [r._replace(subject=subjects[i]) for i, r in enumerate(one)]
    (found,) = differences(named, [r._replace(value=0.0) for r in named], seed=seed, n_resamples=200)
    assert found.interval is not None
    return found.interval


def test_cases_that_share_a_subject_are_drawn_together() -> None:
    assert es_interval("AAAABBBB").half_width > 1.2 * es_interval("ABCDEFGH").half_width


def test_the_seed_is_the_bootstraps() -> None:
    assert es_interval("ABCDEFGH", seed=1) == es_interval("ABCDEFGH", seed=1) != es_interval("ABCDEFGH", seed=2)


def test_only_common_cases_and_metrics_count() -> None:
    one, two = records([1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]), records([1, 1], [1, 1], [])
    found = differences(one, two)
    assert [(d.metric, d.value, d.n) for d in found] == [("ES", 0, 2), ("GS", 0, 2)]
    more = differences(one, two, of_what_there_is=True)
    assert [(d.metric, d.value, d.n) for d in more] == [("ES", 0, 2), ("GS", 0, 2), ("mean of ES and GS", 0, 2)]
    assert differences(one, []) == []


def test_every_metric_is_paired_by_itself() -> None:
    """A case that one method has no LS of counts for ES and GS, and neither for LS nor for the Score."""
    one, two = records([1, 1, 0], [1, 1, 1], [1, 0, 1]), records([1, 0, 0], [1, 1, 0], [0, 0, 1])
    failed = [r._replace(value=None, status="error") if (r.case_id, r.metric) == ("a", "LS") else r for r in one]
    found = {d.metric: (d.value, d.n) for d in differences(failed, two)}
    assert found == {
        "ES": (pytest.approx(1 / 3), 3),
        "GS": (pytest.approx(1 / 3), 3),
        "LS": (0, 2),
        "Score": (pytest.approx(3 / (2 + 1 + 2) - 0), 2),
    }
    lost = [r._replace(value=None, status="error") if (r.case_id, r.metric) == ("a", "ES") else r for r in one]
    assert {d.metric: d.n for d in differences(lost, two)} == {"ES": 2, "GS": 3, "LS": 3, "Score": 2}


def test_a_case_that_lacks_a_metric_by_nature_counts_for_the_others() -> None:
    one, two = records([1, 1, 1], [1, 0], [1, 1, 1]), records([1, 0, 1], [1, 1], [1, 1, 1])
    found = {d.metric: (d.value, d.n) for d in differences(one, two)}
    score = 3 / (1 + 2 + 1) - 3 / (1.5 + 1 + 1)
    assert found["GS"] == (-0.5, 2)
    assert found["Score"] == (pytest.approx(score), 3)
