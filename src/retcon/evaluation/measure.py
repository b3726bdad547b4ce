"""`evaluate`: every query of the cases, scored and answered, before an edit and after it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from retcon.attachment import Attachment
from retcon.edits import Case, list_of_cases
from retcon.errors import InvalidSetting
from retcon.evaluation.asking import run_queries
from retcon.evaluation.bar import drawn_bars
from retcon.evaluation.drift import Scope, next_token_divergence
from retcon.evaluation.metrics import Measured, is_locality
from retcon.evaluation.plan import Measures, Place, QueryPlan, plan_now, plan_queries
from retcon.evaluation.recording import compute_records, or_broken, record_of
from retcon.evaluation.records import Record, When
from retcon.evaluation.results import Evaluation
from retcon.files import as_json
from retcon.lm.model import LM, require_lm
from retcon.seed import check_seed
from retcon.work import Progress, silent


def evaluate(
    lm: LM,
    cases: Iterable[Case],
    *,
    delta: Attachment | None = None,
    pre: Evaluation | None = None,
    measures: Measures | None = None,
    generate: bool | None = None,
    max_new_tokens: int | None = None,
    stops: Sequence[str] | None = None,
    max_batch_tokens: int | None = None,
    seed: int | None = None,
    context: Mapping[str, Any] | None = None,
    progress: bool | Progress = False,
) -> Evaluation:
    """Measure all queries of `cases`, before an edit and after it. The model is left as it was.

    The current model (deltas applied earlier included) gives the `pre` records; with `delta`, the model edited by it
    gives the `final` ones. With `pre` and no `delta`, the current model is taken for the edited one. A query
    with a rival answer is measured in the CounterFact family, any other with a target in the zsRE family (EasyEdit's,
    where the loader says so); on axes without a published name the metric carries the axis's. What cannot be scored is
    recorded as skipped, and why.

    Args:
        pre: an earlier evaluation of the unedited model on at least these cases, so as not to repeat it. One read from
            a file has no predictions, so agreement with it (`ee.loc.argmax`) is recorded as skipped. Without `delta`,
            divergence (`loc.kl`) is from the model with its applied deltas off, and skipped where none are applied.
        measures: what is measured; None: as `Measures` has it. The next five, where given, override its fields.
        generate: also let the model write its answers on rewrite, paraphrase, two-hop, portability prompts (`gen.*`).
        max_new_tokens: how much it may write.
        stops: texts that end an answer.
        max_batch_tokens: padded tokens per forward pass; halved when memory runs out.
        seed: of the bootstrap and of sampled text.
        context: columns for all records (`protocol`, `run_id`, ...), over those known here.
        progress: True draws a progress bar; a function is called with (stage, done, total).

    Raises:
        InvalidEdit: two cases share an id, or something is no case.
        UnsupportedModel: `lm` is no `LM`.
        InvalidSetting: `pre` does not cover the queries, or `context` is more than JSON holds.
    """
    require_lm(lm)
    about = as_json(context or {}, "context", allow_nan=False)
    if "seed" in about:
        check_seed(about["seed"])
    given: dict[str, Any] = {
        "generate": generate,
        "max_new_tokens": max_new_tokens,
        "stops": stops,
        "max_batch_tokens": max_batch_tokens,
        "seed": seed,
    }
    measures = replace(measures or Measures(), **{name: value for name, value in given.items() if value is not None})
    cases = list_of_cases(cases)
    plan = plan_queries(lm, cases, measures)
    before = None if pre is None else covering(pre, plan, measures)
    reporting = drawn_bars() if progress and not callable(progress) else nullcontext(progress or silent)
    with reporting as advance:
        parts = []
        if before is None:
            before = measure(lm, plan, measures, "pre", advance=advance)
        parts.append(before)
        if delta is not None:
            edited = partial(lm.edited, delta)  # a scope to enter again and again
            with edited():
                parts.append(measure(lm, plan, measures, "final", before, advance=advance))
            if measures.divergence:
                parts.append(Evaluation(divergences(lm, plan, measures, "final", nullcontext, edited)))
        elif pre is not None:
            parts.append(measure(lm, plan, measures, "final", before, advance=advance))
            if measures.divergence:
                unedited = lm.without_deltas if lm.applied else None
                parts.append(Evaluation(divergences(lm, plan, measures, "final", unedited, nullcontext)))
    return Evaluation(
        [record for part in parts for record in part.records],
        _context(lm, cases, lm.showing if delta is None else (*lm.showing, delta), measures.seed) | about,
        {key: text for part in parts for key, text in part.texts.items()},
        {key: ids for part in parts for key, ids in part.predictions.items()},
        {key: scores for part in parts for key, scores in part.scores.items()},
    )


def measure(
    lm: LM,
    plan: QueryPlan,
    measures: Measures,
    when: When,
    before: Evaluation | None = None,
    *,
    step: int = 0,
    advance: Progress = silent,
) -> Evaluation:
    """Measure the current model; `before` is of the unedited one, None where this is it."""
    plan, outputs = run_queries(lm, plan, measures, lambda stage, *of: advance(f"{stage} ({when})", *of))
    return compute_records(plan, measures, outputs, when, before, step=step)


def divergences(
    lm: LM, plan: QueryPlan, measures: Measures, when: When, before: Scope | None, after: Scope, *, step: int = 0
) -> list[Record]:
    """Return `loc.kl`: divergence of the next-token distribution on locality prompts, in nats.

    Args:
        before: puts the model into the unedited state; None where it is not at hand, and the records are skipped.
    """
    chosen = [q for q in plan.queries if is_locality(q.query.axis) and q.readable and not q.prefixed]
    if before is None:
        skipped = Measured("divergence", "loc.kl", None, 0, "no delta is applied, so the unedited model is not at hand")
        return [record_of(q.case, q.query, when, skipped, step, q.notes) for q in chosen]
    reasons: dict[Place, str | None] = {}
    for scope in (before, after):
        with scope():
            now = plan_now(lm, QueryPlan(plan.cases, tuple(chosen)), measures)
        reasons |= {q.place: q.reason for q in now.queries if not q.readable}
    prompts = list(dict.fromkeys((q.query.prompt, q.query.chat) for q in chosen if q.place not in reasons))
    found = next_token_divergence(
        lm,
        [prompt for prompt, _ in prompts],
        before,
        after,
        chats=[chat for _, chat in prompts],
        max_batch_tokens=measures.max_batch_tokens,
    )
    values = dict(zip(prompts, found, strict=True))
    records = []
    for q in chosen:
        if q.place in reasons:
            measured = Measured("divergence", "loc.kl", None, 0, reasons[q.place])
        else:
            measured = or_broken("divergence", "loc.kl", values[q.query.prompt, q.query.chat])
        records.append(record_of(q.case, q.query, when, measured, step, q.notes))
    return records


def covering(pre: Evaluation, plan: QueryPlan, measures: Measures) -> Evaluation:
    """Return the part of `pre` that is about these queries.

    Raises:
        InvalidSetting: it is no evaluation, or lacks some of them, or the texts that metrics of one's own read.
    """
    if not isinstance(pre, Evaluation):
        raise InvalidSetting(f"pre must be what evaluate returned, found {type(pre).__name__}")
    wanted = {q.place for q in plan.queries}
    cases = {case.id for case in plan.cases}
    records = [
        r
        for r in pre.records
        if r.when == "pre" and ((r.case_id, r.query_id) in wanted or (r.case_id in cases and r.query_id is None))
    ]
    if missing := wanted - {(r.case_id, r.query_id) for r in records}:
        case_id, query_id = min(missing)
        raise InvalidSetting(
            f"the given pre evaluation lacks {len(missing)} of {len(wanted)} queries (case {case_id!r}, query "
            f"{query_id!r}); evaluate the unedited model on these cases, or leave pre out"
        )

    written = [q.place for q in plan.queries if measures.metrics and q.writing(measures) is not None]
    if unwritten := [place for place in written if ("pre", *place) not in pre.texts]:
        case_id, query_id = unwritten[0]
        raise InvalidSetting(
            f"the given pre evaluation has no text of the unedited model (case {case_id!r}, query {query_id!r}), which "
            f"{measures.metrics[0]} reads: texts are not in a file of records; leave pre out"
        )

    def keep(items: Mapping[tuple[str, str, str], Any]) -> dict[tuple[str, str, str], Any]:
        return {key: value for key, value in items.items() if key[0] == "pre" and key[1:] in wanted}

    return Evaluation(records, pre.context, keep(pre.texts), keep(pre.predictions), keep(pre.scores))


def _context(lm: LM, cases: Sequence[Case], deltas: Sequence[Attachment], seed: int) -> dict[str, Any]:
    """Return what holds for the whole run; `deltas` are those in force at the end of it."""
    n_edits = sum(len(delta.report) for delta in deltas)
    methods = dict.fromkeys(str(delta.provenance.get("method", "unknown")) for delta in deltas)
    known = {
        "model": lm.label if lm.offloaded else f"{lm.label}@{lm.fingerprint()[:12]}",
        "method": "+".join(methods) or "none",
        "dataset": ",".join(sorted({case.dataset for case in cases})),
        "protocol": "batch",
        "n_edits": n_edits,
        "edit_batch": len(deltas[-1].report) if deltas else 0,
        "seed": seed,
    }
    identity = [known, [case.id for case in cases], [delta.id for delta in deltas]]
    return known | {"run_id": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}
