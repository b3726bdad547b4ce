"""95 % intervals of a mean over cases, each saying which kind it is.

Published tables mix kinds, so an interval never travels without its name: `ci.case` (normal, over cases; ROME, MEMIT),
`ci.boot` (bootstrap of subjects; right where cases share a subject, and for scores made of several means), `ci.seed`
(Student's t over runs), `ci.wilson` (of a share near 0 or 1, where the first two are too narrow and may leave [0, 1]).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.errors import InvalidSetting
from retcon.seed import generator_of

N_RESAMPLES = 2000
"""Bootstrap resamples of a `ci.boot`."""

_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)  # degrees of freedom 1 to 9


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, in the unit of the values it was made from."""

    kind: str
    """`ci.case`, `ci.boot`, `ci.seed` or `ci.wilson`."""
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def ci_case(values: Sequence[float]) -> Interval | None:
    """Return mean ± 1.96 s / sqrt(N) over cases, s the population standard deviation, N the cases used (ROME, MEMIT).

    None without values. Not clipped to the range of the values.
    """
    if not len(values):
        return None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
    half = 1.96 * math.sqrt(variance / len(values))
    return Interval("ci.case", mean - half, mean + half)


FEW = 5
"""Successes or failures below which a share counts as near its bound."""


def near_a_bound(share: float, n: int) -> bool:
    """Return whether a share of `n` subjects rests on so few successes, or failures, that others mislead."""
    return n * min(share, 1 - share) < FEW


def ci_wilson(share: float, n: int) -> Interval | None:
    """Return Wilson's score interval of a share: (p + z^2/2n ± z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96.

    It lies within [0, 1], and has a width where all succeed: 1 of 1 is [0.21, 1]. A mean of shares counts as a share,
    which is cautious. Wilson 1927; Brown, Cai and DasGupta 2001, equation 4.

    Args:
        share: in [0, 1].
        n: independent subjects; None is returned for 0.

    Raises:
        InvalidSetting: the share is outside of [0, 1].
    """
    if not 0 <= share <= 1:
        raise InvalidSetting(f"a share lies between 0 and 1, found {share}; divide a number of successes, or percent")
    if n < 1:
        return None
    z2 = 1.959964**2
    centre = share + z2 / (2 * n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    scale = 1 + z2 / n
    return Interval("ci.wilson", max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def ci_seed(values: Sequence[float]) -> Interval | None:
    """Return mean ± t s / sqrt(k) over the values of k runs, t with k - 1 degrees of freedom; None for one run."""
    k = len(values)
    if k < 2:
        return None
    mean = math.fsum(values) / k
    s = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (k - 1))
    half = _t_975(k - 1) * s / math.sqrt(k)
    return Interval("ci.seed", mean - half, mean + half)


def ci_boot(
    values: Float[Tensor, "cases metrics"],
    clusters: Sequence[Hashable],
    statistic: Callable[[Float[Tensor, "resamples metrics"]], Float[Tensor, "resamples scores"]] = lambda means: means,
    *,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> list[Interval | None]:
    """Return percentile bootstrap intervals: whole clusters (subjects) drawn with replacement, one draw for all.

    Args:
        values: value of each metric in each case, NaN where the case does not have it.
        clusters: what cases are drawn by, one per case.
        statistic: from the metrics' means to what the intervals are for; the means themselves by default.
        seed: of a generator of its own; the global one is left alone.

    Returns:
        One interval per column of the statistic; None where no resample gave a number.

    Raises:
        InvalidSetting: there are more values than clusters, or fewer.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) != len(clusters):
        raise InvalidSetting(f"{len(values)} values and {len(clusters)} clusters given; each value needs its own")
    if not len(values):
        width = statistic(torch.zeros(1, values.shape[1], dtype=torch.float64)).shape[1]
        return [None] * width
    numbers: dict[Hashable, int] = {}
    of_case = torch.tensor([numbers.setdefault(c, len(numbers)) for c in clusters])
    known = ~values.isnan()
    shape = (len(numbers), values.shape[1])
    sums = torch.zeros(shape, dtype=torch.float64).index_add_(0, of_case, values.nan_to_num(0.0))
    counts = torch.zeros(shape, dtype=torch.float64).index_add_(0, of_case, known.double())

    generator = generator_of(seed)
    means = []
    chunk = max(1, 4_000_000 // len(numbers))  # resamples at a time: bounds the weights at 32 MB
    for done in range(0, n_resamples, chunk):
        size = (min(chunk, n_resamples - done), len(numbers))
        drawn = torch.randint(len(numbers), size, generator=generator)
        weights = torch.zeros(size, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(size))
        means.append((weights @ sums) / (weights @ counts))
    results = statistic(torch.cat(means))
    quantiles = torch.nanquantile(results, torch.tensor([0.025, 0.975], dtype=results.dtype), dim=0)
    return [None if math.isnan(low) else Interval("ci.boot", low, high) for low, high in quantiles.T.tolist()]


def _t_975(dof: int) -> float:
    """Return the 97.5 % quantile of Student's t; from 10 degrees of freedom on by its expansion about the normal's.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5; good to four digits there.
    """
    if dof <= len(_T_975):
        return _T_975[dof - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / dof + second / dof**2 + third / dof**3
