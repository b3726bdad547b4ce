"""`evaluate`: every query of the cases, scored and answered, before an edit and after it."""

import builtins
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from retcon.attachment import Attachment
from retcon.edits import Case, Query, list_of_cases
from retcon.errors import InvalidSetting
from retcon.evaluation.drift import Scope, next_token_divergence
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
    plan_now,
    plan_queries,
    subject_of,
)
from retcon.evaluation.questions import Question, ask_questions
from retcon.evaluation.records import Record, Status, When
from retcon.evaluation.results import Evaluation
from retcon.evaluation.score import TokenScore, score_rows
from retcon.evaluation.writing import PRESETS
from retcon.files import as_json
from retcon.lm.decoding import remembers
from retcon.lm.generate import Writing, Written, generate, most_tokens
from retcon.lm.model import LM, require_lm
from retcon.lm.prompts import Row, encode
from retcon.seed import check_seed
from retcon.work import Progress, silent

ESSENCE_TOKENS = 100
"""Tokens of a passage read for its essence (ROME)."""


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
    progress: bool = False,
) -> Evaluation:
    """Measure all queries of `cases`, before an edit and after it. The model is left as it was.

    The model as it stands (deltas applied earlier included) gives the `pre` records; with `delta`, the model edited by
    it gives the `final` ones. With `pre` and no `delta`, the model as it stands is taken for the edited one. A query
    with a rival answer is measured in the CounterFact family, any other with a target in the zsRE family (EasyEdit's,
    where the loader says so); on axes without a published name the metric carries the axis's. What cannot be scored is
    recorded as skipped, and why.

    Args:
        pre: an earlier evaluation of the unedited model on at least these cases, so as not to repeat it. One read from
            a file has no predictions, so agreement with it (`ee.loc.argmax`) is recorded as skipped. Without `delta`,
            divergence (`loc.kl`) is from the model with its applied deltas off, and skipped where none are applied.
        measures: what is measured; None: as `Measures` has it. The next five, where given, stand above its fields.
        generate: also let the model write its answers on rewrite, paraphrase, two-hop, portability prompts (`gen.*`).
        max_new_tokens: how much it may write.
        stops: texts that end an answer.
        max_batch_tokens: padded tokens per forward pass; halved when memory runs out.
        seed: of the bootstrap and of sampled text.
        context: columns for all records (`protocol`, `run_id`, ...), over those known here.
        progress: draw a progress bar.

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
    before = None if pre is None else covering(pre, plan)
    with _bar(progress) as advance:
        parts = []
        if before is None:
            before = measure(lm, plan, measures, "pre", advance=advance)
        parts.append(before)
        if delta is not None:
            edited: Scope = lambda: lm.edited(delta)  # noqa: E731 (a scope to enter again and again)
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


# --- asking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """What a model made of the queries: all that metrics are computed from."""

    scores: Mapping[Place, tuple[TokenScore, ...]]
    texts: Mapping[Place, Written] = field(default_factory=dict)
    free: Mapping[tuple[str, str, Fluency], Written] = field(default_factory=dict)
    """Text for fluency."""
    essence: Mapping[str, float] = field(default_factory=dict)
    """Mean negative log-likelihood in nats of passages about a case's subject, by case."""


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
    """Measure the model as it stands; `before` is of the unedited one, None where this is it."""
    plan, outputs = run_queries(lm, plan, measures, advance)
    return compute_records(plan, measures, outputs, when, before, step=step)


def run_queries(lm: LM, plan: QueryPlan, measures: Measures, advance: Progress = silent) -> tuple[QueryPlan, Outputs]:
    """Put every query of the plan to the model; return the plan as it was scored, too.

    Each stage has a turn of its own, so that other threads wait for no more than one, and reads the prompts in it: what
    is attached may act on them.
    """
    with lm.scope():
        scored = plan_now(lm, plan, measures)
        if remembers(lm):
            scores, texts = _score_and_write(lm, scored, measures, advance)
        else:
            scores = _score(lm, scored, measures, advance)
    if not remembers(lm):
        with lm.scope():
            texts = _write(lm, plan_now(lm, plan, measures), measures, advance)
    with lm.scope():
        free = _write_freely(lm, plan_now(lm, plan, measures), measures)
    return scored, Outputs(scores, texts, free, _essence(lm, plan, measures))


def _score(lm: LM, plan: QueryPlan, measures: Measures, advance: Progress) -> dict[Place, tuple[TokenScore, ...]]:
    rows = [row for q in plan.queries for row in q.rows]
    scores = iter(
        score_rows(
            lm,
            rows,
            max_batch_tokens=measures.max_batch_tokens,
            on_progress=lambda done, total: advance("score", done, total),
        )
    )
    return {q.place: tuple(next(scores) for _ in q.rows) for q in plan.queries if q.rows}


def _score_and_write(
    lm: LM, plan: QueryPlan, measures: Measures, advance: Progress
) -> tuple[dict[Place, tuple[TokenScore, ...]], dict[Place, Written]]:
    """Scores and the model's own answers; a prompt after which the model writes is run once for both.

    Other prompts are scored with their answers in one pass (`score_rows`), which takes less than two with a memory
    between them.
    """
    scored: dict[tuple[int, ...], dict[Row, None]] = {}
    for q in plan.queries:
        for row in q.rows:
            scored.setdefault(row.prompt_ids, {})[row] = None
    questions: list[Question] = []
    members: list[list[TokenizedQuery]] = []
    texts: dict[Place, Written] = {}
    for how, prompted in _written_groups(plan, measures).items():
        for (prompt, gold), askers in prompted.items():
            own = next((q.rows[0] for q in askers if q.rows and q.query.chat == how.chat), None)
            row = lm.encode(prompt, chat=how.chat) if own is None else Row(own.prompt_ids, own.n_prompt)
            limit = most_tokens(lm, row, how, None if measures.preset != "gold_length" else gold)
            if limit < 1:
                texts |= dict.fromkeys((q.place for q in askers), Written("", 0, True))
                continue
            questions.append(Question(row.ids, tuple(scored.pop(row.ids, ())), how, limit))
            members.append(askers)
    others = [row for rows in scored.values() for row in rows]
    scores = dict(
        zip(
            others,
            score_rows(
                lm,
                others,
                max_batch_tokens=measures.max_batch_tokens,
                on_progress=lambda done, total: advance("score", done, total),
            ),
            strict=True,
        )
    )
    replies = ask_questions(
        lm,
        questions,
        max_batch_tokens=2 * measures.max_batch_tokens,
        on_progress=lambda done, total: advance("write", done, total),
    )
    for question, (found, _) in zip(questions, replies, strict=True):
        scores |= zip(question.rows, found, strict=True)
    for askers, (_, text) in zip(members, replies, strict=True):
        texts |= dict.fromkeys((q.place for q in askers), text)
    return {q.place: tuple(scores[row] for row in q.rows) for q in plan.queries if q.rows}, texts


def _written_groups(
    plan: QueryPlan, measures: Measures
) -> dict[Writing, dict[tuple[str, int | None], list[TokenizedQuery]]]:
    """Return which queries the model shall answer in its own words, by how, and by prompt and length; each is written
    once."""
    groups: dict[Writing, dict[tuple[str, int | None], list[TokenizedQuery]]] = {}
    for q in plan.queries:
        if (how := q.writing(measures)) is not None:
            gold = len(q.rows[0].target_ids) if measures.preset == "gold_length" and q.rows else None
            groups.setdefault(how, {}).setdefault((q.query.prompt, gold), []).append(q)
    return groups


def _write(lm: LM, plan: QueryPlan, measures: Measures, advance: Progress) -> dict[Place, Written]:
    """Return the model's own answers; a prompt that several queries share is written once."""
    texts: dict[Place, Written] = {}
    for how, prompted in _written_groups(plan, measures).items():
        prompts = [prompt for prompt, _ in prompted]
        lengths = [gold if gold is not None else how.max_new_tokens for _, gold in prompted]
        written = generate(
            lm,
            prompts,
            how,
            lengths=lengths if measures.preset == "gold_length" else None,
            max_batch_tokens=2 * measures.max_batch_tokens,
            on_progress=lambda done, total: advance("write", done, total),
        )
        for members, text in zip(prompted.values(), written, strict=True):
            texts |= dict.fromkeys((q.place for q in members), text)
    return texts


def _write_freely(lm: LM, plan: QueryPlan, measures: Measures) -> dict[tuple[str, str, Fluency], Written]:
    found: dict[tuple[str, str, Fluency], Written] = {}
    wanted = [(q, variant) for q in plan.queries for variant in _fluencies(q, measures)]
    for chat in dict.fromkeys(q.query.chat for q, _ in wanted):
        here = [(q, variant) for q, variant in wanted if q.query.chat == chat]
        greedy, drawn = (replace(PRESETS[name], chat=chat) for name in ("fluency", "fluency_rome"))
        plainly = [(q, variant) for q, variant in here if variant == "flu.new"]
        prompts = list(dict.fromkeys(q.query.prompt for q, _ in plainly))
        size = 2 * measures.max_batch_tokens
        written = generate(lm, prompts, greedy, max_batch_tokens=size) if prompts else []
        texts = dict(zip(prompts, written, strict=True))
        found |= {(*q.place, variant): texts[q.query.prompt] for q, variant in plainly}
        sampled = [(q, variant) for q, variant in here if variant != "flu.new"]
        if sampled:
            seeds = [derive_seed(measures.seed, "text", *q.place) for q, _ in sampled]
            written = generate(lm, [q.query.prompt for q, _ in sampled], drawn, seeds=seeds, max_batch_tokens=size)
            found |= {(*q.place, variant): text for (q, variant), text in zip(sampled, written, strict=True)}
    return found


def _fluencies(q: TokenizedQuery, measures: Measures) -> list[Fluency]:
    """Return which fluencies a query is asked for: generation prompts, or the edit's own where there are none."""
    usual: tuple[Fluency, ...] = ("flu.new",)
    if family_of_case(q.case) != "easyedit" and measures.references is None:
        usual = ()
    wanted = usual if measures.fluency is None else measures.fluency
    if not q.readable or q.prefixed:
        return []
    own = any(query.axis == "generation" for query in q.case.queries)
    first = next((q.id for q in q.case.queries if q.axis == "rewrite"), None) == q.query.id
    here = q.query.axis == "generation" if own else first
    return [variant for variant in wanted if (first if variant == "flu.easyedit" else here)]


def _essence(lm: LM, plan: QueryPlan, measures: Measures) -> dict[str, float]:
    if measures.references is None:
        return {}
    about = {c.id: measures.references.about.get(subject_of(c), ()) for c in plan.cases}
    rows = [(i, encode(lm.tokenizer, text).ids[:ESSENCE_TOKENS]) for i, texts in about.items() for text in texts]
    rows = [(i, ids) for i, ids in rows if len(ids) > 1]
    scores = score_rows(lm, [Row(ids, 1) for _, ids in rows], max_batch_tokens=measures.max_batch_tokens)
    sums: dict[str, tuple[float, int]] = {}
    for (i, _), score in zip(rows, scores, strict=True):
        nll, n = sums.get(i, (0.0, 0))
        sums[i] = nll + score.nll_sum, n + len(score.logp)
    return {i: nll / n for i, (nll, n) in sums.items()}


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
        return [_record(q, when, skipped, step) for q in chosen]
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
    return [
        _record(q, when, Measured("divergence", "loc.kl", None, 0, reasons[q.place]), step)
        if q.place in reasons
        else _record(q, when, _or_broken("divergence", "loc.kl", values[q.query.prompt, q.query.chat]), step)
        for q in chosen
    ]


# --- records -----------------------------------------------------------------------------------------------------


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
            records.append(_of_case(case, when, measured, step))
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
    """Records of one query."""
    scores = outputs.scores.get(q.place, ())
    ee = family_of_case(q.case) == "easyedit"
    found: list[Measured] = []
    if not scores:
        success = metric_names(q.query.axis)[0]
        variant = "ee.tok" if ee else "zsre.tok" if q.query.contrast is None else "cf.prob_mean"
        skipped = _record(q, when, Measured(success, variant, None, 0, q.reason), step, skipped=True)
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
    for variant in _fluencies(q, measures):
        if (*q.place, variant) not in outputs.free:  # what another thread attached since has made the prompt too long
            continue
        found.append(fluency(_text_for(variant, q.case_id, q.query, outputs), variant))
    records = [] if scores else [skipped]
    return records + [_record(q, when, m, step) for m in found]


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
            found.append(_or_broken("essence", "ppl.essence.nll", outputs.essence[case.id]))
    return found


def _own(name: str, case: Case, texts: Mapping[str, str], old_texts: Mapping[str, str]) -> list[Measured]:
    """Return what a metric of the user's own gives for a case."""
    try:
        values = dict(own_metric(name)(case, texts, old_texts))
        numbers = {m: None if value is None else float(value) for m, value in values.items()}
    except Exception as error:
        raise InvalidSetting(f"metric {name}, case {case.id!r}: {type(error).__name__}: {error}") from error
    n = len(texts)
    return [
        Measured(m, name, None, 0, f"{name} gives no {m}")
        if value is None
        else _or_broken(m, name, value, n, f"{m} is {value}")
        for m, value in numbers.items()
    ]


def _record(q: TokenizedQuery, when: When, m: Measured, step: int, *, skipped: bool = False) -> Record:
    notes = (
        [*q.notes, *([m.note] if m.note else [])] if not m.variant.startswith(("gen.", "flu.", "ee.loc")) else [m.note]
    )
    return Record(
        when=when,
        case_id=q.case_id,
        subject=q.subject,
        axis=q.query.axis,
        query_id=q.query.id,
        metric=m.metric,
        variant=m.variant,
        value=m.value,
        n=m.n,
        status="skipped" if skipped else _status(m),
        detail="; ".join(note for note in notes if note) or None,
        step=step,
    )


def _of_case(case: Case, when: When, m: Measured, step: int) -> Record:
    return Record(
        when=when,
        case_id=case.id,
        subject=subject_of(case),
        axis=None,
        query_id=None,
        metric=m.metric,
        variant=m.variant,
        value=m.value,
        n=m.n,
        status=_status(m),
        detail=m.note,
        step=step,
    )


def _or_broken(metric: str, variant: str, value: float, n: int = 1, note: str = NOT_FINITE) -> Measured:
    """Return a measured number; none, for an error with this note, where it is NaN or infinite."""
    finite = math.isfinite(value)
    return Measured(metric, variant, value if finite else None, n, None if finite else note)


def _status(m: Measured) -> Status:
    """Return `skipped` where nothing could be asked (no value, of no tokens), `error` where something broke."""
    if m.value is not None:
        return "ok"
    return "error" if m.n else "skipped"


def derive_seed(seed: int, *names: str) -> int:
    """Return a seed of its own for everything that has a name, so that changing one draw does not move the others."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *names]).encode()).digest()[:7], "big")


def covering(pre: Evaluation, plan: QueryPlan) -> Evaluation:
    """Return the part of `pre` that is about these queries.

    Raises:
        InvalidSetting: it is no evaluation, or lacks some of them.
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


@contextmanager
def _bar(shown: bool) -> Iterator[Progress]:
    """Draw a progress bar per stage, on stderr or in a notebook, or nothing."""
    if not shown:
        yield silent
        return
    if hasattr(builtins, "get_ipython"):  # rich draws nothing lasting there
        from tqdm.auto import tqdm

        bars: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in bars or bars[stage].n >= bars[stage].total:
                bars[stage] = tqdm(total=total, desc=f"evaluate: {stage}")
            bars[stage].update(done - bars[stage].n)

        yield draw
        for each in bars.values():
            each.close()
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        tasks: list[Any] = []

        def advance(stage: str, done: int, total: int) -> None:
            if not tasks or bar.tasks[-1].finished:
                tasks.append(bar.add_task(f"evaluate: {stage}", total=total))
            bar.update(tasks[-1], completed=done, total=total)

        yield advance
