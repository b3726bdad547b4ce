"""What the runs of a benchmark are made of: units, as work that can be sent to workers, and what is left of a run."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from retcon.attachment import Attachment
from retcon.bench.protocol import RunContext, run_units, unit_keys
from retcon.bench.spec import BenchSpec, Cell, Protocol
from retcon.bench.units import Unit, Units
from retcon.edits import Case, Edit
from retcon.evaluation.ability import ability
from retcon.evaluation.drift import Perplexity, perplexity
from retcon.evaluation.measure import covering
from retcon.evaluation.plan import Measures, QueryPlan
from retcon.evaluation.records import Record, When, whole_model_record
from retcon.evaluation.results import Evaluation
from retcon.lm.model import LM
from retcon.memory.timed import TimedMoments
from retcon.memory.values import ValueCache
from retcon.methods.common.sequence import in_steps
from retcon.work import Done

VALUES = "values"
"""Folder of values found by a batch that has not ended."""


@dataclass
class WholeModel:
    """What is measured of a model rather than of cases: perplexity and tasks."""

    spec: BenchSpec
    text: str | None
    unedited: Perplexity | None = None

    def __call__(self, lm: LM, when: When, step: int) -> list[Record]:
        """Measure the model as it is now; the first look is at the unedited one."""
        records = []
        if self.text is not None:
            found = perplexity(lm, self.text, max_tokens=self.spec.text_tokens)
            base = self.unedited = self.unedited or found
            for variant, value in (
                ("ppl.value", found.ppl),
                ("ppl.ratio", found.ppl / base.ppl),
                ("ppl.nll_change", found.nll - base.nll),
            ):
                records.append(whole_model_record(when, "perplexity", variant, value, found.n_tokens, step))
        if self.spec.tasks:
            records += ability(lm, self.spec.tasks, when=when, step=step, limit=self.spec.task_limit)
        return records


@dataclass(frozen=True)
class RunPart:
    """A run, or one unit of a run that restores, with all that is its own."""

    method: Any
    seed: int
    protocol: Protocol
    plan: QueryPlan
    """Of its cases."""
    pre: Evaluation
    """Of the unedited model on them."""
    units: Units
    size: int
    """Cases edited in one call."""
    first: int = 0
    """Number of the first unit."""

    @property
    def chunks(self) -> list[tuple[Case, ...]]:
        """The cases of each call."""
        return [self.plan.cases[i : i + self.size] for i in range(0, len(self.plan.cases), self.size)]

    def unit(self, step: int, measures: Measures) -> "RunPart":
        """Return one unit of the whole run; whoever asked for it keeps what comes of it."""
        plan = self.plan.of(self.chunks[step])
        pre = covering(self.pre, plan, measures)
        return replace(self, plan=plan, pre=pre, units=Units(None, self.units.run_id), first=step)


@dataclass(frozen=True)
class RunUnits:
    """The units of a run, or one of them, as work that can be sent elsewhere."""

    moments: TimedMoments
    whole_model: WholeModel
    measures: Measures
    root: Path
    """The benchmark's directory, on the machine that asks."""
    share_values: bool

    def propose(
        self, lm: LM, part: RunPart, edits: Sequence[Edit], state: Any = None, values: ValueCache | None = None
    ) -> Attachment:
        """Return the change that writes `edits` by the method of a run."""
        return in_steps(part.method, lm, edits, moments=self.moments, state=state, values=values, seed=part.seed)

    def __call__(self, lm: LM, piece: RunPart, progress: Done) -> Iterator[Unit]:
        """Yield the units in order; those that the directory has, where it is seen, are not made again."""
        seen, run_id = self.root.is_dir(), piece.units.run_id  # a worker on another machine does not see it
        kept = ValueCache(self.root / VALUES / ("" if self.share_values else run_id[:8])) if seen else None
        run = RunContext(
            lm=lm,
            plan=piece.plan,
            measures=replace(self.measures, seed=piece.seed),
            propose=lambda lm, edits, state: self.propose(lm, piece, edits, state, kept),
            pre=piece.pre,
            measure_model=partial(self.whole_model, lm),
            excluded_seconds=lambda: self.moments.seconds,
            n_cached_values=lambda: 0 if kept is None else kept.resumed,
            needs_subject=piece.method.needs_subject,
        )
        units = piece.units if seen else Units(None, run_id)
        with closing(run_units(run, piece.protocol, units, size=piece.size, first=piece.first)) as made:
            for unit in made:  # closed, it restores the model
                if kept is not None and not self.share_values:
                    kept.discard()
                yield unit


@dataclass(frozen=True)
class BegunRun:
    """A run whose folder is there, and what is left of it."""

    cell: Cell
    directory: Path
    identity: str
    part: RunPart | None
    """All of it; None where it had been finished."""

    @cached_property
    def kept(self) -> list[Unit | None]:
        """The units of a run, as far as the directory has them; one None for a sequence that lacks one."""
        if (part := self.part) is None:
            return []
        found = [part.units.load(key) for key in unit_keys(part.protocol, part.units, part.chunks)]
        return found if part.protocol.restores or None not in found else [None]

    def units(self, made: Iterator[Iterable[Unit]]) -> Generator[Unit]:
        """Yield all units, those that are not kept as they come from workers."""
        for unit in self.kept:
            yield from next(made) if unit is None else [unit]


class Pieces(Sequence[RunPart]):
    """What is left of several runs, each piece made when it is sent."""

    def __init__(self, runs: Iterable[BegunRun], measures: Measures) -> None:
        self.measures = measures
        self.left = [
            (run.part, i) for run in runs if run.part is not None for i, unit in enumerate(run.kept) if unit is None
        ]

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, place: Any) -> Any:
        part, i = self.left[place]
        return part.unit(i, self.measures) if part.protocol.restores else part

    def saved(self, results: Iterable[tuple[int, Iterable[Unit]]]) -> Iterator[tuple[int, list[Unit]]]:
        """Keep the units of each piece on disk as they come."""
        for place, made in results:
            units = list(made)
            for unit in units:
                self.left[place][0].units.save(unit)
            yield place, units
