"""Measuring what an edit changed and what it left alone.

`evaluate(lm, cases, delta=delta)` scores every query of the cases on the model without and with the delta and gives an
`Evaluation`: tidy records, and a summary with an interval per number. `read_cases` reads files of facts.
"""

from retcon.evaluation.datasets import LoadReport, contaminated, read_cases
from retcon.evaluation.intervals import Interval, ci_boot, ci_case, ci_seed, ci_wilson
from retcon.evaluation.measure import evaluate
from retcon.evaluation.plan import Measures
from retcon.evaluation.records import Record
from retcon.evaluation.results import Evaluation
from retcon.evaluation.score import Item, TokenScore, score
from retcon.evaluation.summary import Estimate, Line, Summary

__all__ = [
    "Estimate",
    "Evaluation",
    "Interval",
    "Item",
    "Line",
    "LoadReport",
    "Measures",
    "Record",
    "Summary",
    "TokenScore",
    "ci_boot",
    "ci_case",
    "ci_seed",
    "ci_wilson",
    "contaminated",
    "evaluate",
    "read_cases",
    "score",
]
