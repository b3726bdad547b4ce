"""How long a benchmark will take, from a few edits and cases of each cell."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from retcon.bench.directory import FINISHED, place_of
from retcon.bench.inputs import cells_of, chosen_cases, read_inputs
from retcon.bench.manifest import (
    manifest_of,
)
from retcon.bench.protocol import editable
from retcon.bench.run import CellRunner
from retcon.bench.spec import BenchSpec, Cell
from retcon.edits import Case, Edit, resolve_conflicts
from retcon.errors import InvalidSetting
from retcon.evaluation.datasets import Loaded
from retcon.evaluation.measure import measure
from retcon.evaluation.plan import plan_queries
from retcon.methods.common.sequence import in_steps

N_PROBED = 8
"""Cases edited and measured for an estimate."""


@dataclass(frozen=True)
class RunEstimate:
    """What one run will take, from a few edits and cases."""

    cell: Cell
    n_cases: int
    seconds_call: float
    """Of a call for one edit."""
    seconds_more: float
    """Per further edit in a call, as much as in a call for a few; larger batches share more."""
    seconds_measure: float
    """Per case."""
    finished_before: bool = False
    """The directory has its records already."""

    @property
    def seconds_edit(self) -> float:
        """Per edit."""
        _, size = self.cell.protocol.sizes(self.n_cases)
        return (self.seconds_call + (size - 1) * self.seconds_more) / size

    @property
    def seconds(self) -> float:
        """Of the run: each case is edited once, measured before and after, in a sequence after its own step too."""
        looks = 2 if self.cell.protocol.restores else 3 + len(self.cell.protocol.checkpoints)
        return self.n_cases * (self.seconds_edit + looks * self.seconds_measure)


def estimate(
    spec: BenchSpec, directory: str | Path | None = None, *, loaded: Mapping[str, Loaded] | None = None
) -> Iterator[RunEstimate]:
    """Estimate every cell, in order: load the models, make a few edits per method and measure a few cases.

    What is finished in `directory` takes no time.
    """
    loaded = read_inputs(spec) if loaded is None else loaded
    cells = cells_of(spec, {label: len(cases) for label, (cases, _) in loaded.items()})
    known: dict[tuple[str, str, str], tuple[float, float, float]] = {}
    for model in spec.models:
        bench = CellRunner(spec, model, loaded, time.perf_counter)
        for cell in (c for c in cells if c.model is model):
            everything, report = loaded[cell.dataset.label]
            cases = chosen_cases(everything, cell)
            if directory is not None:
                manifest = manifest_of(spec, cell, bench.lm, bench.method_of(cell), cases, report)
                if (place_of(cell, manifest, Path(directory))[1] / FINISHED).is_file():
                    yield RunEstimate(cell, len(cases), 0.0, 0.0, 0.0, finished_before=True)
                    continue
            key = (model.label, cell.dataset.label, cell.method.label)
            if key not in known:
                known[key] = _probe(bench, cell, cases)
            yield RunEstimate(cell, len(cases), *known[key])


def _probe(bench: CellRunner, cell: Cell, cases: Sequence[Case]) -> tuple[float, float, float]:
    """Return (seconds of a call for one edit, of each further edit in it, of measuring a case)."""
    lm, chosen = bench.lm, bench.method_of(cell)
    few = list(islice(editable(lm, cases, chosen.needs_subject), N_PROBED))
    edits = resolve_conflicts([edit for case in few for edit in case.edits], "drop")
    if not edits:
        raise InvalidSetting(f"{cell.dataset.label}: none of the {len(cases):,} cases can be edited")

    def seconds(some: Sequence[Edit]) -> float:
        started = time.perf_counter()
        in_steps(chosen, lm, some, moments=bench.moments)
        return time.perf_counter() - started

    seconds(edits[:1])  # statistics are collected, caches filled
    call, several = seconds(edits[:1]), seconds(edits)
    more = max(several - call, 0.0) / (len(edits) - 1) if len(edits) > 1 else call
    started = time.perf_counter()
    measure(lm, plan_queries(lm, few, bench.measures), bench.measures, "pre")
    return call, more, (time.perf_counter() - started) / len(few)
