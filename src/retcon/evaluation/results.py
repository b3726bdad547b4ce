"""What an evaluation returns: tidy records, and a summary computed from nothing but them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from retcon.errors import MissingPackage
from retcon.evaluation.intervals import N_RESAMPLES
from retcon.evaluation.records import Record, read_records, write_records
from retcon.evaluation.score import TokenScore
from retcon.evaluation.summary import Summary, edits_of, summarise
from retcon.plural import plural

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Evaluation:
    """Records of one evaluation, in the order of cases and queries, before then after."""

    records: list[Record]
    context: Mapping[str, Any] = field(default_factory=dict)
    """What holds for every record: model, method, dataset, protocol, n_edits, edit_batch, seed, run_id."""
    texts: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    """Generated answers by (when, case id, query id). Kept in memory only."""
    predictions: Mapping[tuple[str, str, str], tuple[int, ...]] = field(default_factory=dict)
    """The model's own tokens at the answer's places, by (when, case id, query id), on locality axes. In memory only."""
    scores: Mapping[tuple[str, str, str], tuple[TokenScore, ...]] = field(default_factory=dict)
    """Token by token, of the answer and of its rival, by (when, case id, query id). In memory only."""

    def __repr__(self) -> str:
        cases = len({record.case_id for record in self.records if record.case_id is not None})
        size = f"{plural(len(self.records), 'record')} of {plural(cases, 'case')}"
        return f"Evaluation({size}; print(evaluation.summary()) for the figures)"

    def summary(self, *, n_resamples: int = N_RESAMPLES) -> Summary:
        """Return macro means with intervals, of the `pre` and the `final` records; see `retcon.evaluation.summary`."""
        before = [record for record in self.records if record.when == "pre"]
        after = [record for record in self.records if record.when == "final"]
        seed = int(self.context.get("seed", 0))
        return summarise(before, after, edits=edits_of(self.records), seed=seed, n_resamples=n_resamples)

    def _repr_html_(self) -> str:
        """Return the summary's table for a notebook."""
        return self.summary()._repr_html_()

    def frame(self) -> "pandas.DataFrame":
        """Return the records as a pandas table, a row each, with the context's columns first.

        Raises:
            MissingPackage: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise MissingPackage(
                "evaluation.frame() needs pandas, which is not installed (pip install pandas); without it, "
                "evaluation.records holds the same rows and evaluation.write(PATH) writes them as JSON lines"
            ) from None
        columns = dict.fromkeys([*self.context, *Record._fields])
        rows = [{**self.context, **record._asdict()} for record in self.records]
        return pandas.DataFrame(rows, columns=list(columns))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object per record and line, the context repeated in each."""
        write_records(path, self.records, self.context)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Read records as `write` wrote them; texts and predictions are not among them.

        Raises:
            MalformedFile: a column is missing, or the records are of another schema.
        """
        records, context = read_records(path)
        return cls(records, context)
