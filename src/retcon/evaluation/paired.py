"""Comparing two methods on the same cases: the difference, with a bootstrap that draws subjects for both at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.evaluation.intervals import N_RESAMPLES, Interval, ci_boot
from retcon.evaluation.records import Record
from retcon.evaluation.summary import case_values, family_of, main_variant


@dataclass(frozen=True)
class Difference:
    """First minus second, over common cases."""

    metric: str
    value: float
    interval: Interval | None
    n: int
    """Common cases: those in which both have a value."""

    @property
    def clear(self) -> bool:
        """The interval leaves out 0."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)


def differences(
    first: Sequence[Record],
    second: Sequence[Record],
    *,
    of_what_there_is: bool = False,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> list[Difference]:
    """Return ES, GS, LS in the family's own variants and the harmonic Score, of two methods at one moment each.

    A case counts for a metric where both methods have a value, and for the Score where no metric is known of one of
    them only. What has no such case is not among the results.

    Args:
        of_what_there_is: where two of the metrics were measured, give their harmonic mean in place of the Score.
    """
    family = family_of([*first, *second])
    subjects = {r.case_id: r.subject for r in [*first, *second] if r.case_id is not None}
    pairs: dict[str, _Pair] = {}
    one_sided: set[str] = set()
    for name in _METRICS:
        one, two = (case_values(own, name, main_variant(family, name)) for own in (first, second))
        if common := one.keys() & two.keys():
            pairs[name] = ({case: one[case] for case in common}, {case: two[case] for case in common})
            one_sided |= one.keys() ^ two.keys()

    def compare(cases: Sequence[str], statistic: _Statistic) -> tuple[list[float], list[Interval | None]]:
        rows = [[pair[i].get(case, math.nan) for i in (0, 1) for pair in pairs.values()] for case in cases]
        values = torch.tensor(rows, dtype=torch.float64)
        of_subjects = [subjects[case] for case in cases]
        intervals = ci_boot(values, of_subjects, statistic, seed=seed, n_resamples=n_resamples)
        return statistic(values.nanmean(0, keepdim=True))[0].tolist(), intervals

    cases = [case for case in subjects if any(case in pair[0] for pair in pairs.values())]
    if not cases:
        return []
    found = [
        Difference(name, value, interval, len(pairs[name][0]))
        for name, value, interval in zip(pairs, *compare(cases, _apart), strict=True)
    ]
    even = [case for case in cases if case not in one_sided]
    n_needed = 2 if of_what_there_is else len(_METRICS)
    if len(pairs) >= n_needed and all(any(case in pair[0] for case in even) for pair in pairs.values()):
        ((value,), (interval,)) = compare(even, _scores_apart)
        metric = "Score" if len(pairs) == len(_METRICS) else f"mean of {' and '.join(pairs)}"
        found.append(Difference(metric, value, interval, len(even)))
    return found


_METRICS = ("ES", "GS", "LS")
_Pair = tuple[Mapping[str, float], Mapping[str, float]]
"""One metric of both methods by case, over the same cases."""
_Statistic = Callable[[Float[Tensor, "resamples metrics"]], Float[Tensor, "resamples scores"]]


def _apart(means: Float[Tensor, "resamples metrics"]) -> Float[Tensor, "resamples scores"]:
    """Return the first method's means, which come first, minus the second's."""
    one, two = means.chunk(2, dim=1)
    return one - two


def _scores_apart(means: Float[Tensor, "resamples metrics"]) -> Float[Tensor, "resamples 1"]:
    """Return the difference of the two harmonic means."""
    one, two = means.chunk(2, dim=1)
    k = one.shape[1]
    return k / one.reciprocal().sum(1, keepdim=True) - k / two.reciprocal().sum(1, keepdim=True)
