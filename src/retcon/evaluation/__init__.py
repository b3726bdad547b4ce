"""Measuring what an edit changed and what it left alone.

`evaluate(lm, cases, delta=delta)` scores every query of the cases on the model without and with the delta and gives an
`Evaluation`: tidy records, and a summary with an interval per number. `read_cases` reads files of facts.

Names are loaded when first used: reading a file of facts needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retcon.evaluation.datasets import LoadReport, contaminated, read_cases
    from retcon.evaluation.intervals import Interval, ci_boot, ci_case, ci_seed, ci_wilson
    from retcon.evaluation.measure import evaluate
    from retcon.evaluation.plan import Measures
    from retcon.evaluation.records import Record
    from retcon.evaluation.results import Evaluation
    from retcon.evaluation.summary import CaseMean, Line, Summary

_LAZY = {
    "CaseMean": "retcon.evaluation.summary",
    "Evaluation": "retcon.evaluation.results",
    "Interval": "retcon.evaluation.intervals",
    "Line": "retcon.evaluation.summary",
    "LoadReport": "retcon.evaluation.datasets",
    "Measures": "retcon.evaluation.plan",
    "Record": "retcon.evaluation.records",
    "Summary": "retcon.evaluation.summary",
    "ci_boot": "retcon.evaluation.intervals",
    "ci_case": "retcon.evaluation.intervals",
    "ci_seed": "retcon.evaluation.intervals",
    "ci_wilson": "retcon.evaluation.intervals",
    "contaminated": "retcon.evaluation.datasets",
    "evaluate": "retcon.evaluation.measure",
    "read_cases": "retcon.evaluation.datasets",
}

__all__ = [
    "CaseMean",
    "Evaluation",
    "Interval",
    "Line",
    "LoadReport",
    "Measures",
    "Record",
    "Summary",
    "ci_boot",
    "ci_case",
    "ci_seed",
    "ci_wilson",
    "contaminated",
    "evaluate",
    "read_cases",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'retcon.evaluation' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
