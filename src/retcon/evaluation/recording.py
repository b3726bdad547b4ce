"""What a model made of the queries becomes records; no model is needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from retcon.edits import Case, Query
from retcon.errors import InvalidSetting
from retcon.evaluation.asking import Outputs, fluencies
from retcon.evaluation.metrics import (
    Measured,
    accepted,
    accuracy,
    compare,
    easyedit,
    is_locality,
    length,
    matches,
    metric_names,
    same_text,
    unchanged,
)
from retcon.evaluation.metrics.consistency import consistency
from retcon.evaluation.metrics.fluency import Fluency, fluency
from retcon.evaluation.metrics.forced import NOT_FINITE
from retcon.evaluation.metrics.several import multihop, ripple
from retcon.evaluation.plan import (
    PREFIXED,
    Measures,
    Place,
    QueryPlan,
    TokenizedQuery,
    family_of_case,
    own_metric,
    subject_of,
)
from retcon.evaluation.records import Record, Status, When
from retcon.evaluation.results import Evaluation

_UNTOKENISED = ("gen.", "flu.", "ee.loc")
"""Variants that begin so are not of the answer's tokens, so a query's notes do not bear on them."""


def compute_records(
    plan: QueryPlan,
    measures: Measures,
    outputs: Outputs,
    when: When,
    before: Evaluation | None = None,
    *,
    step: int = 0,
) -> Evaluation:
    """Return the records of what a model made of the queries; no model is needed.

    Args:
        before: of the unedited model; None where `outputs` are its own.
    """
    texts = {place: written.text for place, written in outputs.texts.items()}
    predictions = {
        q.place: outputs.scores[q.place][0].pred for q in plan.queries if q.rows and is_locality(q.query.axis)
    }
    if before is None:
        old_texts, old_predictions = texts, predictions
    else:
        old_texts = {(c, q): text for (w, c, q), text in before.texts.items() if w == "pre"}
        old_predictions = {(c, q): ids for (w, c, q), ids in before.predictions.items() if w == "pre"}
    records: list[Record] = []
    by_case: dict[str, list[TokenizedQuery]] = {case.id: [] for case in plan.cases}
    for q in plan.queries:
        by_case[q.case_id].append(q)
    for case in plan.cases:
        for q in by_case[case.id]:
            records += _records_of_query(q, measures, outputs, old_texts, old_predictions, when, step)
        for measured in _records_of_case(case, measures, outputs, texts, old_texts):
            records.append(record_of(case, None, when, measured, step))
    return Evaluation(
        records,
        {},
        {(when, *place): text for place, text in texts.items()},
        {(when, *place): ids for place, ids in predictions.items()},
        {(when, *place): scores for place, scores in outputs.scores.items()},
    )


def _records_of_query(
    q: TokenizedQuery,
    measures: Measures,
    outputs: Outputs,
    old_texts: Mapping[Place, str],
    old_predictions: Mapping[Place, tuple[int, ...]],
    when: When,
    step: int,
) -> list[Record]:
    """Return the records of one query."""
    scores = outputs.scores.get(q.place, ())
    ee = family_of_case(q.case) == "easyedit"
    found: list[Measured] = []
    if not scores:
        success = metric_names(q.query.axis)[0]
        variant = "ee.tok" if ee else "zsre.tok" if q.query.contrast is None else "cf.prob_mean"
        skipped = record_of(q.case, q.query, when, Measured(success, variant, None, 0, q.reason), step, q.notes)
    elif len(scores) == 2:
        found += compare(q.query.axis, *scores)
    else:
        found += accuracy(q.query.axis, scores[0])
    if scores and (ee or measures.easyedit):
        found += easyedit(q.query.axis, scores[0])
    if ee:  # token accuracy goes by that family's name
        found = [m for m in found if m.variant != "zsre.tok"]
    if q.prefixed:
        found = [replace(m, variant=m.variant + PREFIXED) for m in found]
    elif scores and is_locality(q.query.axis):
        found.append(unchanged(scores[0], old_predictions.get(q.place)))
    if q.place in outputs.texts:
        written = outputs.texts[q.place]
        try:
            matched = matches(q.query, written.text, measures.judge) if accepted(q.query) else []
        except Exception as error:
            if measures.judge is None:
                raise
            named = f"judge, case {q.case.id!r}, query {q.query.id!r}"
            raise InvalidSetting(f"{named}: {type(error).__name__}: {error}") from error
        if is_locality(q.query.axis):
            matched.append(same_text(written.text, old_texts.get(q.place)))
        else:
            matched += length(q.query.axis, written.n_tokens, written.cut)
        found += [replace(m, variant=measures.named(m.variant)) for m in matched]
    for variant in fluencies(q, measures):
        if (*q.place, variant) not in outputs.free:  # what another thread attached since has made the prompt too long
            continue
        found.append(fluency(_text_for(variant, q.case_id, q.query, outputs), variant))
    records = [] if scores else [skipped]
    for m in found:
        notes = () if m.variant.startswith(_UNTOKENISED) else q.notes
        records.append(record_of(q.case, q.query, when, m, step, notes))
    return records


def _text_for(variant: Fluency, case_id: str, query: Query, outputs: Outputs) -> str:
    """Return what a fluency reads of a query: the continuation (`flu.new`), or the prompt with it."""
    text = outputs.free[case_id, query.id, variant].text
    return text if variant == "flu.new" else query.prompt + text


def _records_of_case(
    case: Case, measures: Measures, outputs: Outputs, texts: Mapping[Place, str], old_texts: Mapping[Place, str]
) -> list[Measured]:
    """Return what is measured of several queries of a case together."""
    found: list[Measured] = []
    family = family_of_case(case)
    now = {query.id: texts[case.id, query.id] for query in case.queries if (case.id, query.id) in texts}
    old = {query.id: old_texts[case.id, query.id] for query in case.queries if (case.id, query.id) in old_texts}
    if family in ("mquake", "ripple") and measures.generate:
        found += multihop(case, now) if family == "mquake" else ripple(case, old, now)
    for name in measures.metrics:
        found += _own(name, case, now, old)
    if measures.references is not None:
        relation, target = case.meta.get("relation_id"), case.meta.get("target_new_id")
        passages = measures.references.passages.get((str(relation), str(target)), ())
        free: dict[Fluency, list[str]] = {}
        for query in case.queries:
            for variant in get_args(Fluency):
                if (case.id, query.id, variant) in outputs.free:
                    free.setdefault(variant, []).append(_text_for(variant, case.id, query, outputs))
        for variant, written in (free or {"flu.new": []}).items():
            measured = consistency(written, passages, measures.references.tfidf)
            name = measured.variant if variant == "flu.new" else f"{measured.variant}@{variant}"
            found.append(replace(measured, variant=name))
        if case.id in outputs.essence:
            found.append(or_broken("essence", "ppl.essence.nll", outputs.essence[case.id]))
    return found


def _own(name: str, case: Case, texts: Mapping[str, str], old_texts: Mapping[str, str]) -> list[Measured]:
    """Return what a metric of the user's own gives for a case."""
    try:
        values = dict(own_metric(name)(case, texts, old_texts))
        numbers = {str(m): None if value is None else float(value) for m, value in values.items()}
    except Exception as error:
        raise InvalidSetting(f"metric {name}, case {case.id!r}: {type(error).__name__}: {error}") from error
    n = len(texts)
    return [
        Measured(m, name, None, 0, f"{name} gives no {m}")
        if value is None
        else or_broken(m, name, value, n, f"{m} is {value}")
        for m, value in numbers.items()
    ]


def record_of(case: Case, query: Query | None, when: When, m: Measured, step: int, notes: Sequence[str] = ()) -> Record:
    """Return the record of one measured number of a query; of the case as a whole with None.

    Args:
        notes: on the query, where they bear on the number.
    """
    return Record(
        when=when,
        case_id=case.id,
        subject=subject_of(case),
        axis=None if query is None else query.axis,
        query_id=None if query is None else query.id,
        metric=m.metric,
        variant=m.variant,
        value=m.value,
        n=m.n,
        status=_status(m),
        detail="; ".join(note for note in (*notes, m.note) if note) or None,
        step=step,
    )


def or_broken(metric: str, variant: str, value: float, n: int = 1, note: str = NOT_FINITE) -> Measured:
    """Return a measured number; none, for an error with this note, where it is NaN or infinite."""
    finite = math.isfinite(value)
    return Measured(metric, variant, value if finite else None, n, None if finite else note)


def _status(m: Measured) -> Status:
    """Return `skipped` where nothing could be asked (no value, of no tokens), `error` where something broke."""
    if m.value is not None:
        return "ok"
    return "error" if m.n else "skipped"
