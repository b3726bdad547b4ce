"""Protocols: in which order to edit, measure and restore. Edits are deltas, so restoring is exact.

`single` edits each case alone, `batch` a chunk of cases in one call; both restore before the next. `sequential` edits
one case after another and never restores, `batch_sequential` a chunk after another; both measure all cases after the
last step, and each step's own cases right after it. `curve` is `batch` for growing n. Cases whose edit fails are
measured all the same, on the model as it then is.
"""

import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from retcon.attachment import Attachment
from retcon.bench.spec import Protocol
from retcon.bench.units import Unit, Units
from retcon.checked import as_bytes
from retcon.edits import Case, Edit, list_of_cases, same_question
from retcon.errors import DeltaMismatch, InvalidEdit, InvalidSetting, RetconError
from retcon.evaluation.measure import covering, divergences, measure
from retcon.evaluation.plan import Measures, QueryPlan, plan_queries, subject_of
from retcon.evaluation.records import Record, When, whole_model_record
from retcon.evaluation.results import Evaluation
from retcon.lm.model import LM, require_lm
from retcon.lm.peak import Peak
from retcon.plural import plural

Propose = Callable[[LM, Sequence[Edit], "Mapping[str, torch.Tensor] | None"], Attachment]
"""From a model, edits and the state of the step before to the change that writes them."""


@dataclass(frozen=True)
class RunContext:
    """What a run needs beside the protocol."""

    lm: LM
    plan: QueryPlan
    """All cases of the run, in order."""
    measures: Measures
    propose: Propose
    pre: Evaluation
    """Of the unedited model, on all of the cases."""
    measure_model: Callable[[When, int], list[Record]] = lambda when, step: []
    """Measures what belongs to the model rather than to cases (perplexity, tasks), where a sequence or a batch ends."""
    excluded_seconds: Callable[[], float] = lambda: 0.0
    """Seconds spent so far inside `propose` on what is not editing (statistics)."""
    n_cached_values: Callable[[], int] = lambda: 0
    """Edits so far whose values `propose` found searched already; calls that did are not timed."""
    needs_subject: bool = True
    """Whether `propose` writes at the subject, so that it cannot make an edit that names none."""


def run_protocol(
    lm: LM,
    cases: Iterable[Case],
    propose: Propose,
    protocol: Protocol,
    *,
    measures: Measures | None = None,
    pre: Evaluation | None = None,
) -> Evaluation:
    """Run one protocol in memory: records of the unedited model, then of every unit. The model is left as it was.

    Timings are among the context, as `timings`; token scores and predictions are left out. `retcon bench` is the same
    with manifests and files.

    Raises:
        UnsupportedModel: `lm` is no `LM`.
        InvalidEdit: one case in place of several, or something that is no case.
        InvalidSetting: the protocol is a curve, or does not suit so many cases; `pre` does not cover their queries.
    """
    require_lm(lm)
    cases = list_of_cases(cases)
    if protocol.kind == "curve":
        raise InvalidSetting("a curve is one run for each point; give run_protocol each of protocol.parts(len(cases))")
    measures = measures or Measures()
    n, _ = protocol.sizes(len(cases))
    plan = plan_queries(lm, cases[:n], measures)
    before = measure(lm, plan, measures, "pre") if pre is None else covering(pre, plan, measures)
    units = list(run_units(RunContext(lm, plan, measures, propose, before), protocol, Units(None)))
    return Evaluation(
        [*before.records, *(record for unit in units for record in unit.records)],
        {"timings": [record for unit in units for record in unit.timings]},
        {**before.texts, **{key: text for unit in units for key, text in unit.texts.items()}},
    )


def run_units(
    run: RunContext, protocol: Protocol, units: Units, *, size: int | None = None, first: int = 0
) -> Generator[Unit]:
    """Return every unit of a run in order, also those that `units` has; each is kept before it is given.

    Args:
        size: cases edited in one call; None: as many as the protocol says of these cases.
        first: number of the first unit, where the cases are a part of a run that restores.
    """
    if run.lm.applied:
        raise InvalidSetting(
            f"{plural(len(run.lm.applied), 'applied delta')}; revert first, for a run starts from the base"
        )
    cases = run.plan.cases
    size = size or protocol.sizes(len(cases))[1]
    chunks = [cases[i : i + size] for i in range(0, len(cases), size)]
    try:
        if protocol.restores:
            yield from _independent(run, chunks, units, size, first)
        else:
            yield from _sequence(run, chunks, units, protocol, size)
    finally:
        run.lm.revert_all()


def n_units(protocol: Protocol, n_cases: int) -> int:
    """Return how many units a run of so many cases has."""
    n, size = protocol.sizes(n_cases)
    chunks = -(-n // size)
    return chunks if protocol.restores else chunks + 1


def unit_keys(protocol: Protocol, units: Units, chunks: Sequence[Sequence[Case]]) -> list[str]:
    """Return the keys of all units; a sequence's last one is of what is measured after its last step."""
    keys = [units.key(step, [case.id for case in chunk]) for step, chunk in enumerate(chunks)]
    return keys if protocol.restores else [*keys, units.key(len(chunks), ["final"])]


def _independent(
    run: RunContext, chunks: Sequence[Sequence[Case]], units: Units, size: int, first: int
) -> Iterator[Unit]:
    for step, chunk in enumerate(chunks, first):
        key = units.key(step, [case.id for case in chunk])
        unit = units.load(key)
        if unit is None:
            with ExitStack() as scope:

                def attach(delta: Attachment) -> None:
                    scope.enter_context(run.lm.edited(delta))

                _, unit = _edit(run, key, chunk, None, step, _short(chunk, size), attach)
                unit = unit.extended(_measure(run, chunk, "final", step, whole_model=size > 1))
            units.save(unit)
        yield unit


def _sequence(
    run: RunContext, chunks: Sequence[Sequence[Case]], units: Units, protocol: Protocol, size: int
) -> Iterator[Unit]:
    """Take the steps on one model; a step's delta is kept before anything is measured, and read again on resuming."""
    lm, state = run.lm, None
    *keys, last_key = unit_keys(protocol, units, chunks)
    kept = [units.load(key) for key in keys]
    finished = units.load(last_key) if None not in kept else None  # a step made again needs those before it
    cheap = replace(run.measures, generate=False, metrics=(), fluency=(), references=None, locality_text=False)
    done: list[Case] = []
    for step, (key, chunk) in enumerate(zip(keys, chunks, strict=True)):
        done += chunk
        unit, delta = kept[step], None
        if unit is not None and unit.weights_hash is not None and finished is None:
            delta = units.load_delta(unit)
            unit = None if delta is None else unit  # its file is gone, so the step is made again
        if unit is None:
            delta, unit = _edit(run, key, chunk, state, step, _short(chunk, size), lm.apply)
            if delta is not None:
                units.save_delta(key, delta)
                unit = replace(unit, weights_hash=weights_hash(lm), delta=delta.id)
                state = delta.state
            cheaply = replace(run, measures=cheap)
            unit = unit.extended(_measure(cheaply, chunk, "immediate", step, whole_model=False))
            if len(done) in protocol.checkpoints and len(done) < sum(map(len, chunks)):
                unit = unit.extended(_measure(run, done, "checkpoint", step))
            units.save(unit)
        elif delta is not None:
            lm.apply(delta)
            _check_weights(lm, unit, key)
            state = delta.state
        yield unit
    if finished is None:
        finished = Unit(last_key, (), {}, ()).extended(_measure(run, done, "final", len(chunks) - 1))
        units.save(finished)
    yield finished


def _short(chunk: Sequence[Case], size: int) -> str | None:
    """Return the note on a chunk that is smaller than the others."""
    return f"short chunk: {len(chunk)} of {size}" if len(chunk) < size else None


def _measure(run: RunContext, cases: Sequence[Case], when: When, step: int, *, whole_model: bool = True) -> Evaluation:
    """Measure the current model on those of the cases that can be edited; nothing where none can.

    Args:
        whole_model: also measure what belongs to no case.
    """
    asked = list(editable(run.lm, cases, run.needs_subject))
    if not asked:
        return Evaluation([])
    part = run.plan.of(asked)
    found = measure(run.lm, part, run.measures, when, run.pre, step=step)
    records = list(found.records)
    if run.measures.divergence:
        records += divergences(run.lm, part, run.measures, when, run.lm.without_deltas, nullcontext, step=step)
    if whole_model:
        records += run.measure_model(when, step)
    return replace(found, records=records)


def editable(lm: LM, cases: Iterable[Case], needs_subject: bool) -> Iterator[Case]:
    """Return the cases whose edits the method can be asked for, in order; the others are recorded as skipped."""
    return (case for case in cases if case.edits and not why_skipped(lm, case, needs_subject))


def why_skipped(lm: LM, case: Case, needs_subject: bool) -> str | None:
    """Return why the edits of a case are skipped; None where they are made.

    Args:
        needs_subject: as `RunContext` has it.
    """
    for edit in case.edits:
        if edit.subject is None:
            if needs_subject:
                return f"edit {edit.id!r} names no subject, which this method needs"
        elif edit.subject_span is None:
            return f"subject {edit.subject!r} does not occur in the prompt"
        try:
            lm.check_edit_length(edit)
        except InvalidEdit as error:
            return str(error)
    return None


def _edit(
    run: RunContext,
    key: str,
    chunk: Sequence[Case],
    state: Mapping[str, torch.Tensor] | None,
    step: int,
    note: str | None,
    attach: Callable[[Attachment], object],
) -> tuple[Attachment | None, Unit]:
    """Return the chunk's delta, attached (None: there is none), and a unit with a record of every edit and of the time.

    Args:
        note: of the records of time.
    """
    cases, records = [], []
    for case in chunk:
        if reason := why_skipped(run.lm, case, run.needs_subject):
            records.append(_edit_record(case, None, 0, step, "skipped", reason))
        elif case.edits:
            cases.append(case)
    if not cases:
        return None, Unit(key, tuple(records), {}, ())
    try:
        delta, timings = _timed(run, cases, state, step, note)
        attach(delta)
    except RetconError as error:
        failed = f"{type(error).__name__}: {error}"
        records += [_edit_record(case, None, 1, step, "error", failed) for case in cases]
        return None, Unit(key, tuple(records), {}, ())
    owners = {edit.id: case for case in cases for edit in case.edits}
    records += [
        _edit_record(owners[made.id], made.search_probability, made.steps, step, "ok", made.stopped)
        for made in delta.report
        if made.id in owners
    ]
    return delta, Unit(key, tuple(records), {}, timings)


def _timed(
    run: RunContext, cases: Sequence[Case], state: Mapping[str, torch.Tensor] | None, step: int, note: str | None
) -> tuple[Attachment, tuple[Record, ...]]:
    """Return the delta of these cases' edits, and records of the time and the memory that it took."""
    edits: dict[tuple[tuple[str, str], str], Edit] = {}
    for edit in (edit for case in cases for edit in case.edits):
        edits.setdefault((same_question(edit), edit.target_new), edit)  # asked for twice, made once
    excluded, n_cached_values = run.excluded_seconds(), run.n_cached_values()
    with Peak(run.lm.device) as peak:
        started = time.perf_counter()
        delta = run.propose(run.lm, list(edits.values()), state)
        seconds = time.perf_counter() - started
    statistics = run.excluded_seconds() - excluded

    def record(metric: str, variant: str, value: float | None, detail: str | None = note) -> Record:
        return whole_model_record("immediate", metric, variant, value, len(edits), step, detail)

    if n_found := run.n_cached_values() - n_cached_values:
        timed = record("time", "time.edit", None, f"the values of {plural(n_found, 'edit')} had been searched before")
    else:
        timed = record("time", "time.edit", (seconds - statistics) / len(edits))
    timings = [timed, record("time", "time.statistics", statistics)]
    if peak.nbytes is not None:
        timings.append(record("memory", f"memory.{peak.kind}", float(peak.nbytes)))
    return delta, tuple(timings)


def _edit_record(case: Case, value: float | None, n: int, step: int, status: Any, detail: str | None) -> Record:
    """Return how the making of an edit ended: the probability it reached, after n steps."""
    finite = value is None or math.isfinite(value)
    return Record(
        when="immediate",
        case_id=case.id,
        subject=subject_of(case),
        axis="edit",
        query_id=None,
        metric="edit",
        variant="edit.probability",
        value=value if finite else None,
        n=n,
        status=status if finite else "error",
        detail=detail,
        step=step,
    )


def weights_hash(lm: LM) -> str:
    """Return a hash of the parameters that applied deltas touch, as they are now."""
    digest = hashlib.sha256()
    for name in sorted({name for delta in lm.applied for name in delta.changes}):
        digest.update(name.encode())
        digest.update(as_bytes(lm.parameter(name)))
    return digest.hexdigest()


def _check_weights(lm: LM, unit: Unit, key: str) -> None:
    if weights_hash(lm) != unit.weights_hash:
        raise DeltaMismatch(
            f"unit {key}: the weights rebuilt from the kept deltas are not those that were measured; the run's "
            "directory is damaged, or was made on another machine. Start it anew in another directory."
        )
