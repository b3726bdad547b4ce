"""Comparing two methods on the same cases: the difference, with a bootstrap that draws subjects for both at once."""

from collections.abc import Sequence
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
    """Common cases."""

    @property
    def clear(self) -> bool:
        """The interval leaves out 0."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)


def differences(
    first: Sequence[Record], second: Sequence[Record], *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> list[Difference]:
    """ES, GS, LS in the family's own variants and the harmonic Score, of two methods measured at one moment each.

    Cases that only one of them has are left out; what neither measured is not among the results.
    """
    family = family_of([*first, *second])
    names = ["ES", "GS", "LS"]
    subjects = {r.case_id: r.subject for r in [*first, *second] if r.case_id is not None}
    columns = [[case_values(own, name, main_variant(family, name)) for name in names] for own in (first, second)]
    known = [i for i in range(3) if columns[0][i] and columns[1][i]]
    common = [case for case in subjects if all(case in own[i] for own in columns for i in known[:1])]
    if not known or not common:
        return []
    nan = float("nan")
    rows = [[own[i].get(str(case), nan) for own in columns for i in known] for case in common]
    values = torch.tensor(rows, dtype=torch.float64)
    k = len(known)

    def statistic(means: Float[Tensor, "resamples metrics"]) -> Float[Tensor, "resamples scores"]:
        one, two = means[:, :k], means[:, k:]
        parts = [one - two]
        if k == 3:
            parts.append(k / one.reciprocal().sum(1, keepdim=True) - k / two.reciprocal().sum(1, keepdim=True))
        return torch.cat(parts, dim=1)

    intervals = ci_boot(values, [subjects[case] for case in common], statistic, seed=seed, n_resamples=n_resamples)
    found = statistic(values.nanmean(0, keepdim=True))[0].tolist()
    labels = [names[i] for i in known] + (["Score"] if k == 3 else [])
    return [Difference(*each, len(common)) for each in zip(labels, found, intervals, strict=True)]
