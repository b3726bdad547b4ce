"""Measuring what an edit changed and what it left alone.

`evaluate(lm, cases, delta=delta)` scores every query of the cases on the model without and with the delta and gives an
`Evaluation`: tidy records, and a summary with an interval per number. `read_cases` reads files of facts.

Names are loaded when first used: reading a file of facts needs no torch.
"""

from typing import TYPE_CHECKING

from retcon.lazily import lazily

if TYPE_CHECKING:
    from retcon.evaluation.datasets import LoadReport as LoadReport
    from retcon.evaluation.datasets import contaminated as contaminated
    from retcon.evaluation.datasets import read_cases as read_cases
    from retcon.evaluation.intervals import Interval as Interval
    from retcon.evaluation.intervals import ci_boot as ci_boot
    from retcon.evaluation.intervals import ci_case as ci_case
    from retcon.evaluation.intervals import ci_seed as ci_seed
    from retcon.evaluation.intervals import ci_wilson as ci_wilson
    from retcon.evaluation.measure import evaluate as evaluate
    from retcon.evaluation.plan import Measures as Measures
    from retcon.evaluation.records import Record as Record
    from retcon.evaluation.results import Evaluation as Evaluation
    from retcon.evaluation.summary import CaseMean as CaseMean
    from retcon.evaluation.summary import Line as Line
    from retcon.evaluation.summary import Summary as Summary

__all__, __getattr__ = lazily(
    __name__,
    {
        "retcon.evaluation.datasets": ("LoadReport", "contaminated", "read_cases"),
        "retcon.evaluation.intervals": ("Interval", "ci_boot", "ci_case", "ci_seed", "ci_wilson"),
        "retcon.evaluation.measure": ("evaluate",),
        "retcon.evaluation.plan": ("Measures",),
        "retcon.evaluation.records": ("Record",),
        "retcon.evaluation.results": ("Evaluation",),
        "retcon.evaluation.summary": ("CaseMean", "Line", "Summary"),
    },
)
