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
class Setting:
    """What a run needs beside the protocol."""

    lm: LM
    plan: QueryPlan
    """All cases of the run, in order."""
    measures: Measures
    propose: Propose
    pre: Evaluation
    """Of the unedited model, on all of the cases."""
    look: Callable[[When, int], list[Record]] = lambda when, step: []
    """Whatever belongs to the model rather than to cases (perplexity, tasks), where a sequence or a batch ends."""
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

    Timings are among the context, as `timings`. `retcon bench` is the same with manifests and files.

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
    before = measure(lm, plan, measures, "pre") if pre is None else covering(pre, plan)
    units = list(run_units(Setting(lm, plan, measures, propose, before), protocol, Units(None)))
    return Evaluation(
        [*before.records, *(record for unit in units for record in unit.records)],
        {"timings": [record for unit in units for record in unit.timings]},
        {**before.texts, **{key: text for unit in units for key, text in unit.texts.items()}},
    )


def run_units(setting: Setting, protocol: Protocol, units: Units) -> Generator[Unit]:
    """Return every unit of a run in order, those that `units` has from before included; each is kept before it is
    given.

    Raises:
        InvalidSetting: deltas are applied, so the model is not the base that runs start from.
    """
    if setting.lm.applied:
        raise InvalidSetting(
            f"{plural(len(setting.lm.applied), 'applied delta')}; revert first, for a run starts from the base"
        )
    _, size = protocol.sizes(len(setting.plan.cases))
    cases = setting.plan.cases
    chunks = [cases[i : i + size] for i in range(0, len(cases), size)]
    try:
        if protocol.restores:
            yield from _independent(setting, chunks, units, size)
        else:
            yield from _sequence(setting, chunks, units, protocol, size)
    finally:
        setting.lm.revert_all()


def n_units(protocol: Protocol, n_cases: int) -> int:
    """Return how many units a run of so many cases has."""
    n, size = protocol.sizes(n_cases)
    chunks = -(-n // size)
    return chunks if protocol.restores else chunks + 1


def _independent(setting: Setting, chunks: Sequence[Sequence[Case]], units: Units, size: int) -> Iterator[Unit]:
    for step, chunk in enumerate(chunks):
        key = units.key(step, [case.id for case in chunk])
        unit = units.load(key)
        if unit is None:
            with ExitStack() as scope:
                _, unit = _edit(
                    setting, key, chunk, None, step, size, lambda delta: scope.enter_context(setting.lm.edited(delta))
                )
                if asked := _editable(setting, chunk):
                    unit = unit.extended(_look(setting, asked, "final", step))
                    if size > 1:
                        unit = replace(unit, records=(*unit.records, *setting.look("final", step)))
            units.save(unit)
        yield unit


def _sequence(
    setting: Setting, chunks: Sequence[Sequence[Case]], units: Units, protocol: Protocol, size: int
) -> Iterator[Unit]:
    """Steps on one model; a step's delta is kept before anything is measured, and rebuilt from its file on resuming."""
    lm, state = setting.lm, None
    keys = [units.key(step, [case.id for case in chunk]) for step, chunk in enumerate(chunks)]
    last_key = units.key(len(chunks), ["final"])
    kept = [units.load(key) for key in keys]
    finished = units.load(last_key) if None not in kept else None  # a step made again needs those before it
    cheap = replace(setting.measures, generate=False, metrics=(), fluency=(), references=None, locality_text=False)
    done: list[Case] = []
    for step, (key, chunk) in enumerate(zip(keys, chunks, strict=True)):
        done += chunk
        unit, delta = kept[step], None
        if unit is not None and unit.weights_hash is not None and finished is None:
            delta = units.load_delta(unit)
        if unit is None or (unit.weights_hash is not None and finished is None and delta is None):
            delta, unit = _edit(setting, key, chunk, state, step, size, lm.apply)
            if delta is not None:
                units.save_delta(key, delta)
                unit = replace(unit, weights_hash=weights_hash(lm), delta=delta.id)
                state = delta.state
            if asked := _editable(setting, chunk):
                unit = unit.extended(_look(replace(setting, measures=cheap), asked, "immediate", step))
            asked = _editable(setting, done)
            if asked and len(done) in protocol.checkpoints and len(done) < sum(map(len, chunks)):
                unit = unit.extended(_look(setting, asked, "checkpoint", step))
                unit = replace(unit, records=(*unit.records, *setting.look("checkpoint", step)))
            units.save(unit)
        elif delta is not None:
            lm.apply(delta)
            _check_weights(lm, unit, key)
            state = delta.state
        yield unit
    if finished is None:
        step = len(chunks) - 1
        finished = Unit(last_key, (), {}, ())
        if asked := _editable(setting, done):
            finished = finished.extended(_look(setting, asked, "final", step))
            finished = replace(finished, records=(*finished.records, *setting.look("final", step)))
        units.save(finished)
    yield finished


def _look(setting: Setting, cases: Sequence[Case], when: When, step: int) -> Evaluation:
    """Measure the model as it is now on some of the cases."""
    part = setting.plan.of(cases)
    found = measure(setting.lm, part, setting.measures, when, setting.pre, step=step)
    if setting.measures.divergence:
        more = divergences(setting.lm, part, setting.measures, when, setting.lm.without_deltas, nullcontext, step=step)
        found = replace(found, records=[*found.records, *more])
    return found


def _editable(setting: Setting, cases: Sequence[Case]) -> list[Case]:
    """Return the cases whose edits the method can be asked for; the others are recorded as skipped."""
    return [case for case in cases if case.edits and not why_skipped(setting.lm, case, setting.needs_subject)]


def why_skipped(lm: LM, case: Case, needs_subject: bool) -> str | None:
    """Return why the edits of a case are skipped; None where they are made.

    Args:
        needs_subject: as `Setting` has it.
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
    setting: Setting,
    key: str,
    chunk: Sequence[Case],
    state: Mapping[str, torch.Tensor] | None,
    step: int,
    size: int,
    attach: Callable[[Attachment], object],
) -> tuple[Attachment | None, Unit]:
    """Return the chunk's delta, attached; None where there is none, or it failed; and a unit with a record of every
    edit and of the time."""
    owners: dict[str, Case] = {}
    edits: dict[tuple[tuple[str, str], str], Edit] = {}
    records = []
    for case in chunk:
        if reason := why_skipped(setting.lm, case, setting.needs_subject):
            records.append(_edit_record(case, None, 0, step, "skipped", reason))
        for edit in case.edits if not reason else ():
            edits.setdefault((same_question(edit), edit.target_new), edit)  # asked for twice, made once
            owners[edit.id] = case
    if not edits:
        return None, Unit(key, tuple(records), {}, ())
    before, n_cached_values = setting.excluded_seconds(), setting.n_cached_values()
    try:
        with Peak(setting.lm.device) as peak:
            started = time.perf_counter()
            delta = setting.propose(setting.lm, list(edits.values()), state)
            seconds = time.perf_counter() - started
        attach(delta)
    except RetconError as error:
        failed = f"{type(error).__name__}: {error}"
        records += [_edit_record(case, None, 1, step, "error", failed) for case in _editable(setting, chunk)]
        return None, Unit(key, tuple(records), {}, ())
    statistics = setting.excluded_seconds() - before
    for report in delta.report:
        if report.id in owners:
            owner = owners[report.id]
            records.append(_edit_record(owner, report.search_probability, report.steps, step, "ok", report.stopped))
    note = f"short chunk: {len(chunk)} of {size}" if len(chunk) < size else None
    if n_found := setting.n_cached_values() - n_cached_values:
        reason = f"the values of {n_found} edits had been searched before"
        timed = whole_model_record("immediate", "time", "time.edit", None, len(edits), step, reason)
    else:
        timed = whole_model_record(
            "immediate", "time", "time.edit", (seconds - statistics) / len(edits), len(edits), step, note
        )
    timings = [
        timed,
        whole_model_record("immediate", "time", "time.statistics", statistics, len(edits), step, note),
    ]
    if peak.nbytes is not None:
        timings.append(
            whole_model_record("immediate", "memory", f"memory.{peak.kind}", float(peak.nbytes), len(edits), step, note)
        )
    return delta, Unit(key, tuple(records), {}, tuple(timings))


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
    """Hash of the parameters that applied deltas touch, as they are now."""
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
