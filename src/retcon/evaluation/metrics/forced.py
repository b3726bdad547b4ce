"""Teacher forcing: the CounterFact, zsRE and EasyEdit families, from `TokenScore`s."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retcon.evaluation.metrics.names import Measured, metric_names

if TYPE_CHECKING:
    from retcon.evaluation.score import TokenScore

NOT_FINITE = "NaN or infinite log-probability"


def compare(axis: str, target: "TokenScore", contrast: "TokenScore") -> list[Measured]:
    """Return the CounterFact family's metrics of one query: the target must be more probable than its rival.

    On neighbours the target is the true answer, so the same comparison serves ES, GS and LS. Ties fail.
    """
    success, magnitude, accuracy = metric_names(axis)
    n = len(target.target)
    if not (target.finite and contrast.finite):
        pairs = [(success, "cf.prob_mean"), (success, "cf.prob_sum"), (magnitude, "cf.magnitude")]
        pairs += [(accuracy, "cf.all_correct"), (success, "zsre.tok")]
        return [Measured(metric, variant, None, n, NOT_FINITE) for metric, variant in pairs]
    mean, rival_mean = target.nll_mean, contrast.nll_mean
    total, rival_total = target.nll_sum, contrast.nll_sum
    return [
        Measured(success, "cf.prob_mean", float(mean < rival_mean), n, "tie" if mean == rival_mean else None),
        Measured(success, "cf.prob_sum", float(total < rival_total), n, "tie" if total == rival_total else None),
        Measured(magnitude, "cf.magnitude", math.exp(-mean) - math.exp(-rival_mean), n),
        Measured(accuracy, "cf.all_correct", float(target.all_correct), n),
        Measured(success, "zsre.tok", target.tok_acc, n),
    ]


def accuracy(axis: str, target: "TokenScore") -> list[Measured]:
    """Return the zsRE family's metrics of one query: how much of the target is the model's own choice."""
    success, n = metric_names(axis)[0], len(target.target)
    if not target.finite:
        return [Measured(success, variant, None, n, NOT_FINITE) for variant in ("zsre.tok", "zsre.seq", "zsre.first")]
    return [
        Measured(success, "zsre.tok", target.tok_acc, n),
        Measured(success, "zsre.seq", float(target.all_correct), n),
        Measured(success, "zsre.first", float(target.first_correct), n),
    ]


def easyedit(axis: str, target: "TokenScore") -> list[Measured]:
    """Return EasyEdit's `rewrite_acc`, `rephrase_acc`, `portability.<key>_acc`: token accuracy, as `zsre.tok`."""
    success, n = metric_names(axis)[0], len(target.target)
    return [Measured(success, "ee.tok", target.tok_acc, n) if target.finite else _broken(success, "ee.tok", n)]


def unchanged(target: "TokenScore", before: Sequence[int] | None) -> Measured:
    """Return EasyEdit's `locality.<key>_acc` for one query: agreement with the unedited model at the answer's places.

    Args:
        before: what the unedited model chose there, after the same gold answer; None where that is not known.
    """
    variant, n = "ee.loc.argmax", len(target.pred)
    if before is None or len(before) != n:
        return Measured("LS", variant, None, 0, "no predictions of the unedited model for these tokens")
    if not target.finite:  # a broken model agrees with itself
        return _broken("LS", variant, n)
    return Measured("LS", variant, agreement(before, target.pred), n)


def agreement(pre: Sequence[int], post: Sequence[int]) -> float:
    """Return the share of positions where two models choose the same token; 1 for a model and itself."""
    return sum(a == b for a, b in zip(pre, post, strict=True)) / len(pre)


def _broken(metric: str, variant: str, n: int) -> Measured:
    return Measured(metric, variant, None, n, NOT_FINITE)
