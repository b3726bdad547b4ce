"""`evaluate`: every query of the cases, scored and answered, before an edit and after it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from retcon.delta import Delta
from retcon.edits import Case, Query
from retcon.errors import InvalidEdit, InvalidSetting
from retcon.evaluation.datasets import contaminated
from retcon.evaluation.metrics import accepted, accuracy, agreement, compare, is_locality, matches, metric_names
from retcon.evaluation.results import Evaluation, Record, Status, When
from retcon.evaluation.score import MAX_BATCH_TOKENS, TokenScore, score_rows
from retcon.lm.model import LM
from retcon.lm.prompts import Row, encode

GENERATED = ("rewrite", "paraphrase", "two_hop", "portability")
"""Axes on which the model also writes its own answer (`portability.<key>` included)."""

Place = tuple[str, str]
"""(case id, query id)."""


def evaluate(
    lm: LM,
    cases: Sequence[Case],
    *,
    delta: Delta | None = None,
    pre: Evaluation | None = None,
    generate: bool = True,
    max_new_tokens: int = 16,
    stops: Sequence[str] = ("\n",),
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    separator: str = " ",
    seed: int = 0,
    context: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure all queries of `cases`, before an edit and after it. The model is left as it was.

    The model as it stands (deltas applied earlier included) gives the `pre` records; with `delta`, the model edited by
    it gives the `final` ones. With `pre` and no `delta`, the model as it stands is taken for the edited one. A query
    with a rival answer is measured in the CounterFact family, any other with a target in the zsRE family; on axes
    without a published name the metric carries the axis's. What cannot be scored is recorded as skipped, and why.

    Args:
        pre: an earlier evaluation of the unedited model on at least these cases, so as not to repeat it. One read from
            a file has no predictions, so agreement with it (`ee.loc.argmax`) is recorded as skipped.
        generate: also let the model write its answers on rewrite, paraphrase, two-hop, portability prompts (`gen.*`).
        max_new_tokens: how much it may write.
        stops: texts that end an answer.
        max_batch_tokens: padded tokens per forward pass; halved when memory runs out.
        separator: what stands between prompt and answer; "" for scripts without spaces.
        seed: of the bootstrap; nothing else is drawn.
        context: columns for all records (`protocol`, `step`, `run_id`, ...), over those known here.
        progress: draw a progress bar.

    Raises:
        InvalidEdit: two cases share an id.
        InvalidSetting: `pre` does not cover the queries.
    """
    asked = _plan(lm, cases, separator)
    options = _Options(generate, max_new_tokens, tuple(stops), max_batch_tokens)
    before = None if pre is None else _covering(pre, asked)
    with _bar(progress) as advance:
        parts = []
        if before is None:
            before = _measure(lm, asked, "pre", None, options, advance)
        parts.append(before)
        if delta is not None:
            with lm.edited(delta):
                parts.append(_measure(lm, asked, "final", before, options, advance))
        elif pre is not None:
            parts.append(_measure(lm, asked, "final", before, options, advance))
    return Evaluation(
        [record for part in parts for record in part.records],
        _context(lm, cases, (*lm.live, delta) if delta is not None else lm.live, seed) | dict(context or {}),
        {key: text for part in parts for key, text in part.texts.items()},
        {key: ids for part in parts for key, ids in part.predictions.items()},
    )


@dataclass(frozen=True)
class _Options:
    generate: bool
    max_new_tokens: int
    stops: tuple[str, ...]
    max_batch_tokens: int


@dataclass(frozen=True)
class _Asked:
    """One query, tokenised."""

    case_id: str
    subject: str
    query: Query
    rows: tuple[Row, ...]
    """Prompt with the target, then with the rival where there is one; empty where nothing can be scored."""
    reason: str | None
    """Why nothing can be scored."""
    notes: tuple[str, ...]

    @property
    def readable(self) -> bool:
        """The prompt can be put to the model, with or without an answer behind it."""
        return bool(self.rows) or not self.query.target

    @property
    def place(self) -> Place:
        return self.case_id, self.query.id


def _plan(lm: LM, cases: Sequence[Case], separator: str) -> list[_Asked]:
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise InvalidEdit(f"two cases share the id {twice!r}; ids must be unique within an evaluation")
    dirty = contaminated(cases)
    return [
        _ask(lm, case, query, query.id in dirty.get(case.id, ()), separator) for case in cases for query in case.queries
    ]


def _ask(lm: LM, case: Case, query: Query, dirty: bool, separator: str) -> _Asked:
    rows: tuple[Row, ...] = ()
    reason = None if query.target else "no target"
    if query.target:
        try:
            answers = [query.target] if query.contrast is None else [query.target, query.contrast]
            rows = tuple(encode(lm.tokenizer, query.prompt, answer, separator=separator) for answer in answers)
        except InvalidEdit as error:
            reason = str(error)
    notes = ["contaminated"] if dirty else []
    if any(row.boundary_merge for row in rows):
        notes.append("boundary_merge")
    subject = case.edits[0].subject if case.edits else case.id
    return _Asked(case.id, subject, query, rows, reason, tuple(notes))


def _measure(
    lm: LM, asked: Sequence[_Asked], when: When, before: Evaluation | None, options: _Options, advance: "_Advance"
) -> Evaluation:
    scores = iter(
        score_rows(
            lm,
            [row for a in asked for row in a.rows],
            max_batch_tokens=options.max_batch_tokens,
            on_progress=lambda done, total: advance("score", done, total),
        )
    )
    records: list[Record] = []
    predictions: dict[tuple[str, str, str], tuple[int, ...]] = {}
    for a in asked:
        found = [next(scores) for _ in a.rows]
        records += _scored(a, found, when)
        if found and is_locality(a.query.axis):
            own = predictions[when, *a.place] = found[0].pred
            reference = (before.predictions if before else predictions).get(("pre", *a.place))
            if reference is None or len(reference) != len(own):
                why = "no predictions of the unedited model for these tokens"
                records.append(_record(a, when, "LS", "ee.loc.argmax", None, 0, "skipped", why))
            elif not found[0].finite:  # a broken model agrees with itself
                why = "NaN or infinite log-probability"
                records.append(_record(a, when, "LS", "ee.loc.argmax", None, len(own), "error", why))
            else:
                records.append(_record(a, when, "LS", "ee.loc.argmax", agreement(reference, own), len(own)))
    texts: dict[tuple[str, str, str], str] = {}
    if options.generate:
        for a, text in _written(lm, asked, options, advance):
            texts[when, *a.place] = text
            records += [_record(a, when, m.metric, m.variant, m.value, m.n) for m in matches(a.query, text)]
    return Evaluation(records, {}, texts, predictions)


def _scored(a: _Asked, found: Sequence[TokenScore], when: When) -> list[Record]:
    if not found:
        variant = "zsre.tok" if a.query.contrast is None else "cf.prob_mean"
        return [_record(a, when, metric_names(a.query.axis)[0], variant, None, 0, "skipped", a.reason)]
    measured = compare(a.query.axis, *found) if len(found) == 2 else accuracy(a.query.axis, found[0])
    records = []
    for m in measured:
        notes = [
            *a.notes,
            *(["tie"] if m.tie else []),
            *(["NaN or infinite log-probability"] if m.value is None else []),
        ]
        status: Status = "error" if m.value is None else "ok"
        records.append(_record(a, when, m.metric, m.variant, m.value, m.n, status, "; ".join(notes)))
    return records


def _record(
    a: _Asked,
    when: When,
    metric: str,
    variant: str,
    value: float | None,
    n: int,
    status: Status = "ok",
    detail: str | None = None,
) -> Record:
    return Record(
        when=when,
        case_id=a.case_id,
        subject=a.subject,
        axis=a.query.axis,
        probe_id=a.query.id,
        metric=metric,
        variant=variant,
        value=value,
        n=n,
        status=status,
        detail=detail or None,
    )


def _written(lm: LM, asked: Sequence[_Asked], options: _Options, advance: "_Advance") -> list[tuple[_Asked, str]]:
    """The model's own answers; a prompt that several queries share is written once."""
    chosen = [a for a in asked if a.query.axis.split(".")[0] in GENERATED and accepted(a.query) and a.readable]
    prompts = list(dict.fromkeys(a.query.prompt for a in chosen))
    answers: dict[str, str] = {}
    for start in range(0, len(prompts), 256):
        part = prompts[start : start + 256]
        texts = lm.generate(
            part,
            max_new_tokens=options.max_new_tokens,
            stops=options.stops,
            max_batch_tokens=options.max_batch_tokens,
        )
        answers |= dict(zip(part, texts, strict=True))
        advance("write", min(start + 256, len(prompts)), len(prompts))
    return [(a, answers[a.query.prompt]) for a in chosen]


def _covering(pre: Evaluation, asked: Sequence[_Asked]) -> Evaluation:
    """The part of `pre` that speaks of these queries."""
    wanted = {a.place for a in asked}
    records = [r for r in pre.records if r.when == "pre" and (r.case_id, r.probe_id) in wanted]
    if missing := wanted - {(r.case_id, r.probe_id) for r in records}:
        case_id, query_id = min(missing)
        raise InvalidSetting(
            f"the given pre evaluation lacks {len(missing)} of {len(wanted)} queries (case {case_id!r}, query "
            f"{query_id!r}); evaluate the unedited model on these cases, or leave pre out"
        )

    def keep(items: Mapping[tuple[str, str, str], Any]) -> dict[tuple[str, str, str], Any]:
        return {key: value for key, value in items.items() if key[0] == "pre" and key[1:] in wanted}

    return Evaluation(records, pre.context, keep(pre.texts), keep(pre.predictions))


def _context(lm: LM, cases: Sequence[Case], deltas: Sequence[Delta], seed: int) -> dict[str, Any]:
    """What holds for the whole run; `deltas` are those in force at the end of it."""
    n_edits = sum(len(delta.report) for delta in deltas)
    methods = dict.fromkeys(str(delta.provenance.get("method", "unknown")) for delta in deltas)
    known = {
        "model": f"{lm.name}@{lm.fingerprint()[:12]}",
        "method": "+".join(methods) or "none",
        "dataset": ",".join(sorted({case.dataset for case in cases})),
        "protocol": "batch",
        "n_edits": n_edits,
        "edit_batch": len(deltas[-1].report) if deltas else 0,
        "step": 0,
        "seed": seed,
    }
    identity = [known, [case.id for case in cases], [delta.id for delta in deltas]]
    return known | {"run_id": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}


_Advance = Callable[[str, int, int], None]


@contextmanager
def _bar(shown: bool) -> Iterator[_Advance]:
    """A progress bar on stderr per stage, or nothing."""
    if not shown:
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: list[Any] = []

        def advance(stage: str, done: int, total: int) -> None:
            if not tasks or bar.tasks[-1].finished:
                tasks.append(bar.add_task(f"evaluate: {stage}", total=total))
            bar.update(tasks[-1], completed=done, total=total)

        yield advance
