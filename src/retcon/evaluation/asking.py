"""Queries are put to a model: scores, its own answers, free text, essence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from retcon.evaluation.metrics.fluency import Fluency
from retcon.evaluation.plan import Measures, Place, QueryPlan, TokenizedQuery, family_of_case, plan_now, subject_of
from retcon.evaluation.questions import Question, ask_questions
from retcon.evaluation.score import TokenScore, score_rows
from retcon.evaluation.writing import PRESETS
from retcon.lm.decoding import remembers
from retcon.lm.generate import Writing, Written, generate, most_tokens
from retcon.lm.model import LM
from retcon.lm.prompts import Row, encode
from retcon.seed import derive_seed
from retcon.work import Progress, silent

ESSENCE_TOKENS = 100
"""Tokens of a passage read for its essence (ROME)."""


@dataclass(frozen=True)
class Outputs:
    """What a model made of the queries: all that metrics are computed from."""

    scores: Mapping[Place, tuple[TokenScore, ...]]
    texts: Mapping[Place, Written] = field(default_factory=dict)
    free: Mapping[tuple[str, str, Fluency], Written] = field(default_factory=dict)
    """Text for fluency."""
    essence: Mapping[str, float] = field(default_factory=dict)
    """Mean negative log-likelihood in nats of passages about a case's subject, by case."""


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
    scores = iter(_scores_of(lm, [row for q in plan.queries for row in q.rows], measures, advance))
    return {q.place: tuple(next(scores) for _ in q.rows) for q in plan.queries if q.rows}


def _scores_of(lm: LM, rows: Sequence[Row], measures: Measures, advance: Progress) -> list[TokenScore]:
    size = measures.max_batch_tokens
    return score_rows(lm, rows, max_batch_tokens=size, on_progress=partial(advance, "scoring"))


def _score_and_write(
    lm: LM, plan: QueryPlan, measures: Measures, advance: Progress
) -> tuple[dict[Place, tuple[TokenScore, ...]], dict[Place, Written]]:
    """Return scores and the model's own answers; a prompt after which the model writes is run once for both.

    Other prompts are scored with their answers in one pass (`score_rows`), not in two with a memory between.
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
    scores = dict(zip(others, _scores_of(lm, others, measures, advance), strict=True))
    size = measures.max_batch_tokens
    replies = ask_questions(lm, questions, max_batch_tokens=size, on_progress=partial(advance, "writing"))
    for question, (found, _) in zip(questions, replies, strict=True):
        scores |= zip(question.rows, found, strict=True)
    for askers, (_, text) in zip(members, replies, strict=True):
        texts |= dict.fromkeys((q.place for q in askers), text)
    return {q.place: tuple(scores[row] for row in q.rows) for q in plan.queries if q.rows}, texts


def _written_groups(
    plan: QueryPlan, measures: Measures
) -> dict[Writing, dict[tuple[str, int | None], list[TokenizedQuery]]]:
    """Return the queries that the model answers in its own words, by how, prompt and length; each is written once."""
    groups: dict[Writing, dict[tuple[str, int | None], list[TokenizedQuery]]] = {}
    for q in plan.queries:
        if (how := q.writing(measures)) is not None:
            gold = len(q.rows[0].target_ids) if measures.preset == "gold_length" and q.rows else None
            groups.setdefault(how, {}).setdefault((q.query.prompt, gold), []).append(q)
    return groups


def _write(lm: LM, plan: QueryPlan, measures: Measures, advance: Progress) -> dict[Place, Written]:
    """Return the model's own answers; a prompt that several queries share is written once."""
    texts: dict[Place, Written] = {}
    groups = _written_groups(plan, measures)
    earlier, total = 0, sum(map(len, groups.values()))

    def report(done: int, _: int) -> None:
        advance("writing", earlier + done, total)

    for how, prompted in groups.items():
        prompts = [prompt for prompt, _ in prompted]
        lengths = [gold if gold is not None else how.max_new_tokens for _, gold in prompted]
        written = generate(
            lm,
            prompts,
            how,
            lengths=lengths if measures.preset == "gold_length" else None,
            max_batch_tokens=measures.max_batch_tokens,
            on_progress=report,
        )
        earlier += len(prompts)
        for members, text in zip(prompted.values(), written, strict=True):
            texts |= dict.fromkeys((q.place for q in members), text)
    return texts


def _write_freely(lm: LM, plan: QueryPlan, measures: Measures) -> dict[tuple[str, str, Fluency], Written]:
    found: dict[tuple[str, str, Fluency], Written] = {}
    wanted = [(q, variant) for q in plan.queries for variant in fluencies(q, measures)]
    for chat in dict.fromkeys(q.query.chat for q, _ in wanted):
        here = [(q, variant) for q, variant in wanted if q.query.chat == chat]
        greedy, drawn = (replace(PRESETS[name], chat=chat) for name in ("fluency", "fluency_rome"))
        plainly = [(q, variant) for q, variant in here if variant == "flu.new"]
        prompts = list(dict.fromkeys(q.query.prompt for q, _ in plainly))
        size = measures.max_batch_tokens
        written = generate(lm, prompts, greedy, max_batch_tokens=size) if prompts else []
        texts = dict(zip(prompts, written, strict=True))
        found |= {(*q.place, variant): texts[q.query.prompt] for q, variant in plainly}
        sampled = [(q, variant) for q, variant in here if variant != "flu.new"]
        if sampled:
            seeds = [derive_seed(measures.seed, "text", *q.place) for q, _ in sampled]
            written = generate(lm, [q.query.prompt for q, _ in sampled], drawn, seeds=seeds, max_batch_tokens=size)
            found |= {(*q.place, variant): text for (q, variant), text in zip(sampled, written, strict=True)}
    return found


def fluencies(q: TokenizedQuery, measures: Measures) -> list[Fluency]:
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
