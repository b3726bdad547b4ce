"""Means over cases, and the scores made of several means."""

import math
from collections.abc import Mapping, Sequence


def macro(values: Mapping[str, Sequence[float]]) -> float | None:
    """Return the mean over cases of the mean inside each case; cases without a value are left out, not counted as 0."""
    cases = [math.fsum(v) / len(v) for v in values.values() if len(v)]
    return math.fsum(cases) / len(cases) if cases else None


def micro(values: Mapping[str, Sequence[float]]) -> float | None:
    """Return the mean over all values, whichever case they are of (JEEP's script)."""
    flat = [v for own in values.values() for v in own]
    return math.fsum(flat) / len(flat) if flat else None


def score_hm(parts: Sequence[float | None]) -> float | None:
    """Return the harmonic mean of dataset-level values (ROME, MEMIT, JEEP): 0 if any is 0, None if any is missing."""
    known = [p for p in parts if p is not None]
    if not known or len(known) < len(parts):
        return None
    return 0.0 if min(known) <= 0 else len(known) / math.fsum(1 / p for p in known)


def score_am(es: float | None, gs: float | None, ls: float | None) -> float | None:
    """Return the arithmetic mean of the three; of the first two where locality was not measured."""
    if es is None or gs is None:
        return None
    return (es + gs) / 2 if ls is None else (es + gs + ls) / 3
