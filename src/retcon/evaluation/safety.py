"""Is an edit safe to ship? Four questions, each with a share, a threshold and the cases that fell short."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from retcon import world
from retcon.attachment import Attachment, list_of_deltas
from retcon.chat import Chat
from retcon.edits import Case, Query, list_of_cases
from retcon.errors import InvalidSetting
from retcon.evaluation.drift import Perplexity, perplexity
from retcon.evaluation.endpoint import Endpoint
from retcon.evaluation.generated_queries import with_generated_queries
from retcon.evaluation.intervals import Interval, ci_wilson
from retcon.evaluation.measure import measure
from retcon.evaluation.metrics import accepted, is_locality, matches, prompt_kind
from retcon.evaluation.plan import Measures, QueryPlan, plan_queries, subject_of
from retcon.evaluation.records import Record, passed
from retcon.evaluation.results import Evaluation
from retcon.evaluation.summary import case_means, unread_notes, unread_queries
from retcon.evaluation.writing import write_answers
from retcon.lm.model import LM
from retcon.pages import PromptKind
from retcon.plural import plural
from retcon.work import silent

Part = Literal["took", "generalised", "local", "language"]
Outcome = Literal["passed", "failed", "unknown", "off", "unmeasurable"]
"""`unknown`: not asked, or too few cases to say. `unmeasurable`: not to be had of a served model."""

N_WORST = 5
"""Failing prompts shown per question."""
MAX_ANSWERS = 400
"""Prompts at most for whose finding the models' own words are written."""

_KINDS: Mapping[Part, PromptKind] = {"took": "own", "generalised": "paraphrase", "local": "neighbour"}
"""What the first three questions are about."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What counts as good enough. 0 (infinity for the ratio) turns a question off.

    A share has to be above its threshold with the lower bound of its 95 % interval (Wilson's, over subjects), so that a
    handful of cases proves little: 0.8 takes 16 subjects that all pass.
    """

    took: float = 0.8
    """Share of edited prompts whose whole new answer is the model's own greedy choice, at least."""
    generalised: float = 0.5
    """The same on paraphrases, at least."""
    local: float = 0.8
    """Share of answer tokens on locality prompts that the edited model chooses as the unedited one does, at least."""
    perplexity_ratio: float = 1.05
    """Perplexity of held-out text, edited over unedited, at most."""

    def __post_init__(self) -> None:
        for name in ("took", "generalised", "local"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidSetting(f"{name} is a share from 0 to 1, found {getattr(self, name)}")
        if not self.perplexity_ratio >= 1:
            raise InvalidSetting(f"perplexity_ratio must be at least 1, found {self.perplexity_ratio}")


@dataclass(frozen=True)
class Example:
    """One prompt that fell short, and what the model says there before and after."""

    prompt: str
    wanted: str
    before: str
    after: str


@dataclass(frozen=True)
class Finding:
    """One prompt of a case: what is wanted there, and what the model answers before and after."""

    case: Case
    query: Query
    passed: bool
    passed_before: bool
    before: str
    """The unedited model's own words; empty where they were not asked for."""
    after: str
    """The edited model's; what was wanted, where the whole answer is its own choice."""


@dataclass(frozen=True)
class Answer:
    """One question and what was found."""

    part: Part
    outcome: Outcome
    value: float | None
    """A share, or the ratio of perplexities."""
    before: float | None
    """The same of the unedited model, where that says something."""
    threshold: float
    n: int
    """Cases asked (for the language: tokens)."""
    interval: Interval | None
    """Of the share, over subjects."""
    worst: tuple[Example, ...] = ()
    measured_by: str = ""
    """How, where it is not by the model's own choices of tokens."""

    @property
    def words(self) -> str:
        """The finding as a sentence."""
        return _sentence(self)


@dataclass(frozen=True)
class Verdict:
    """All answers. `safe` is True where every question that was not turned off, and can be asked, passed."""

    answers: tuple[Answer, ...]
    n_cases: int
    notes: tuple[str, ...] = ()
    """What was made for the cases, and other things worth knowing."""
    findings: tuple[Finding, ...] = ()
    """Prompt by prompt, in the order of cases; of a served model none."""

    @property
    def safe(self) -> bool:
        return all(answer.outcome in ("passed", "off", "unmeasurable") for answer in self.answers)

    def __getitem__(self, part: Part) -> Answer:
        return next(answer for answer in self.answers if answer.part == part)


def check(
    lm: LM,
    cases: Iterable[Case],
    deltas: Iterable[Attachment],
    *,
    thresholds: Thresholds = Thresholds(),
    text: str | None = None,
    edited: LM | None = None,
    stops: Sequence[str] = ("\n",),
    other_base: bool = False,
    own_words: bool = False,
    seed: int = 0,
) -> Verdict:
    """Ask the four questions of `deltas`, applied together; the model is left as it was.

    Cases without paraphrases or neighbours get some (`retcon.evaluation.generated_queries`); `notes` says so.

    Args:
        text: held-out text for the fourth; None takes the plain paragraphs of the embedded world.
        edited: the edited model, loaded from elsewhere (a merged checkpoint, an adapter), in place of deltas; with the
            same tokenizer.
        stops: end an answer shown among the examples.
        other_base: apply the deltas even though they were made for another base.
        own_words: let both models write their answers to the edited prompts and to what fails, for the findings
            (`MAX_ANSWERS` prompts at most).
        seed: of the queries that are generated.

    Raises:
        InvalidSetting: no cases, or `edited` reads them as other tokens.
        WrongBase: a delta was made for another model.
    """
    cases, deltas = list_of_cases(cases), list_of_deltas(deltas)
    if not cases:
        raise InvalidSetting("no cases to check with; give at least the edits themselves")
    if edited is not None and deltas:
        raise InvalidSetting("deltas and an edited model are given; check one of them")

    def write(queries: Sequence[Query]) -> list[str]:
        return write_answers(lm, [_prompt(query) for query in queries], ("\n", ".", ","), 5)

    cases, notes = with_generated_queries(cases, write, seed=seed)
    measures = Measures(generate=False)
    plan = plan_queries(lm, cases, measures)
    if edited is not None:
        _check_same_tokens(plan, plan_queries(edited, cases, measures))
    held_out = "\n\n".join(world.text(60, seed=0)) if text is None else text
    pre, base = measure(lm, plan, measures, "pre"), perplexity(lm, held_out)
    with ExitStack() as stack:
        for delta in deltas:
            stack.enter_context(lm.edited(delta, other_base=other_base))
        now = lm if edited is None else edited
        post, language = measure(now, plan, measures, "final", pre), perplexity(now, held_out)
        limits: dict[Part, float] = {name: getattr(thresholds, name) for name in ("took", "generalised", "local")}
        shares = [_share(part, plan, pre, post, limit) for part, limit in limits.items()]
        findings = _findings(lm, plan, pre, post)
        deciding = [f.query for f in findings if not f.passed or f.query.axis == "rewrite"] if own_words else []
        worst = {part: _worst(part, plan, post.records) for part in limits}
        shown = [*(query for queries in worst.values() for query in queries), *deciding[:MAX_ANSWERS]]
        after = _texts(now, shown, stops)
    before = _texts(lm, shown, stops)
    findings = [
        replace(
            f, before=f.before or before.get(_prompt(f.query), ""), after=f.after or after.get(_prompt(f.query), "")
        )
        for f in findings
    ]

    def example(part: Part, q: Query) -> Example:
        wanted = "as before" if part == "local" else q.target or ""
        return Example(q.prompt, wanted, before[_prompt(q)], after[_prompt(q)])

    answers = [replace(a, worst=tuple(example(a.part, query) for query in worst[a.part])) for a in shares]
    answers.append(_language(base, language, thresholds.perplexity_ratio))
    notes += unread_notes(unread_queries([*pre.records, *post.records]))
    return Verdict(tuple(answers), len(cases), tuple(notes), tuple(findings))


def _check_same_tokens(base: QueryPlan, edited: QueryPlan) -> None:
    """Refuse an edited model that reads prompts otherwise than the base: its numbers would be of other texts.

    Raises:
        InvalidSetting: it does.
    """
    for ours, its in zip(base.queries, edited.queries, strict=True):
        if ours.rows != its.rows:
            raise InvalidSetting(
                f"the edited model's tokenizer makes other tokens of {ours.query.prompt!r} than the base's; name the "
                "base that it was made from"
            )


def check_endpoint(
    endpoint: Endpoint,
    cases: Iterable[Case],
    *,
    thresholds: Thresholds = Thresholds(),
    max_tokens: int = 32,
    on_progress: Callable[[int, int], None] = silent,
) -> Verdict:
    """Ask a served model what text can say: whether edited prompts, and paraphrases, give the new answer.

    What it writes has to begin with the answer (`gen.prefix`). The other two questions need the unedited model's tokens
    and probabilities, which an endpoint does not give.

    Raises:
        InvalidSetting: no cases.
        EndpointFailed: the server cannot be asked.
    """
    cases = list_of_cases(cases)
    if not cases:
        raise InvalidSetting("no cases to check with; give at least the edits themselves")
    cases, notes = with_generated_queries(cases, None)
    parts: tuple[Part, ...] = ("took", "generalised")
    kinds = {_KINDS[part] for part in parts}
    places = [(c, q) for c in cases for q in c.queries if prompt_kind(q.axis) in kinds and accepted(q)]
    endpoint.check()
    queries = [query for _, query in places]
    newline = any("\n" in (q.separator or "") for q in queries)  # it would end an answer before it begins
    texts = endpoint.write(
        [q.prompt for q in queries],
        [q.chat for q in queries],
        max_tokens=max_tokens,
        stops=() if newline else ("\n",),
        on_progress=on_progress,
    )
    if newline:
        texts = [t if q.chat else t.lstrip().partition("\n")[0] for q, t in zip(queries, texts, strict=True)]
    if n_empty := sum(not text.strip() for text in texts):
        still = f"a model that is still reasoning after {plural(max_tokens, 'token')} gives none"
        notes.append(f"{plural(n_empty, 'answer')} without text; {still}")
    answers = []
    for part in parts:
        asked = [(c, q, t) for (c, q), t in zip(places, texts, strict=True) if prompt_kind(q.axis) == _KINDS[part]]
        answers.append(_written_share(part, asked, getattr(thresholds, part)))
    others: dict[Part, float] = {"local": thresholds.local, "language": thresholds.perplexity_ratio}
    answers += [
        Answer(part, "unmeasurable", value=None, before=None, threshold=limit, n=0, interval=None)
        for part, limit in others.items()
    ]
    return Verdict(tuple(answers), len(cases), tuple(notes))


def _written_share(part: Part, asked: Sequence[tuple[Case, Query, str]], threshold: float) -> Answer:
    """Return the share of written answers that begin with the right one, by case."""
    right: dict[str, list[float]] = {}
    worst = []
    for case, query, text in asked:
        value = next(m.value for m in matches(query, text) if m.variant == "gen.prefix")
        right.setdefault(case.id, []).append(value or 0.0)
        if not value:
            worst.append(Example(query.prompt, query.target or "", "", text.strip()))
    found = {case: math.fsum(values) / len(values) for case, values in right.items()}
    subjects = {case.id: subject_of(case) for case, _, _ in asked}
    answer = _judged(part, found, subjects, None, threshold)
    return replace(answer, worst=tuple(worst[:N_WORST]), measured_by="what the model writes begins with the answer")


def _judged(
    part: Part, found: Mapping[str, float], subjects: Mapping[str, str], before: float | None, threshold: float
) -> Answer:
    """Return one of the first three questions from its value in each case."""
    if not found:
        outcome: Outcome = "off" if threshold == 0 else "unknown"
        return Answer(part, outcome, value=None, before=None, threshold=threshold, n=0, interval=None)
    value = math.fsum(found.values()) / len(found)
    interval = ci_wilson(value, len({subjects[case] for case in found}))
    assert interval is not None
    outcome = "unknown"  # too few cases to say
    if threshold == 0:
        outcome = "off"
    elif interval.low >= threshold:
        outcome = "passed"
    elif value < threshold:
        outcome = "failed"
    return Answer(part, outcome, value=value, before=before, threshold=threshold, n=len(found), interval=interval)


def _language(before: Perplexity, after: Perplexity, threshold: float) -> Answer:
    """Return the fourth question."""
    ratio = after.ppl / before.ppl
    outcome: Outcome = "off" if math.isinf(threshold) else "passed" if ratio <= threshold else "failed"
    return Answer(
        "language", outcome, value=ratio, before=before.ppl, threshold=threshold, n=after.n_tokens, interval=None
    )


def _share(part: Part, plan: QueryPlan, pre: Evaluation, post: Evaluation, threshold: float) -> Answer:
    """Return one of the first three questions, without its examples."""
    found = _values(part, post.records)
    subjects = {q.case_id: q.subject for q in plan.queries}
    before = _values(part, pre.records)
    old = math.fsum(before.values()) / len(before) if before and part != "local" else None
    return _judged(part, found, subjects, old, threshold)


def _values(part: Part, records: Iterable[Record]) -> dict[str, float]:
    """Return the values by case. A prompt that broke (NaN) counts as fallen short."""
    return case_means(r._replace(value=r.value or 0.0) for r in records if _speaks(part, r))


def _speaks(part: Part, record: Record) -> bool:
    """Return whether the record is the one that answers the question for its query."""
    return passed(record) is not None and prompt_kind(record.axis or "") == _KINDS[part]


def _worst(part: Part, plan: QueryPlan, records: Iterable[Record]) -> list[Query]:
    low = sorted((r for r in records if _speaks(part, r) and (r.value or 0.0) < 1), key=lambda r: r.value or 0.0)
    queries = {q.place: q.query for q in plan.queries}
    return [queries[str(r.case_id), str(r.query_id)] for r in low[:N_WORST]]


def _findings(lm: LM, plan: QueryPlan, pre: Evaluation, post: Evaluation) -> list[Finding]:
    """Return every prompt with an answer: neighbours with the tokens chosen, other texts still to be written."""
    values = {
        (when, r.case_id, r.query_id): right
        for when, found in (("pre", pre), ("final", post))
        for r in found.records
        if (right := passed(r)) is not None
    }

    def chosen(found: Evaluation, when: str, place: tuple[str, str]) -> str:
        ids = found.predictions.get((when, *place))
        return "" if ids is None else str(lm.tokenizer.decode(list(ids))).strip()

    findings = []
    for q in plan.queries:
        took = values.get(("final", *q.place))
        if took is None:
            continue
        local = is_locality(q.query.axis)
        before = chosen(pre, "pre", q.place) if local else ""
        after = chosen(post, "final", q.place) if local else (q.query.target or "") if took else ""
        # what must stay is right before the edits by definition
        was = local or values.get(("pre", *q.place), False)
        findings.append(Finding(q.case, q.query, took, was, before, after))
    return findings


def _texts(lm: LM, asked: Iterable[Query], stops: Sequence[str]) -> dict[tuple[str, Chat | None], str]:
    """Return what a model writes after prompts, by prompt and chat."""
    prompts = list(dict.fromkeys(map(_prompt, asked)))
    return dict(zip(prompts, write_answers(lm, prompts, stops), strict=True))


def _prompt(query: Query) -> tuple[str, Chat | None]:
    return query.prompt, query.chat


def _sentence(answer: Answer) -> str:
    name = {
        "took": "edited prompts give the whole new answer",
        "generalised": "rephrased prompts give it too",
        "local": "answers to other questions stay as they were",
    }
    if answer.outcome == "unmeasurable":
        what = name.get(answer.part, "perplexity of held-out text")
        return f"{what}: not measurable there, an endpoint gives text only"
    if answer.part == "language":
        change = f"perplexity of held-out text is {answer.value:.3f} times what it was"
        n = plural(answer.n, "token")
        return f"{change} (at most {answer.threshold:g} was asked; it was {answer.before:.1f}; {n})"
    if answer.value is None:
        missing = {"took": "edits", "generalised": "paraphrases", "local": "locality prompts"}[answer.part]
        return f"{name[answer.part]}: not known, the cases hold no {missing} that can be asked"
    low, high = (answer.interval.low, answer.interval.high) if answer.interval else (answer.value, answer.value)
    was = "" if answer.before is None else f", {100 * answer.before:.1f} % before the edit"
    how = f"; {answer.measured_by}" if answer.measured_by else ""
    few = ""
    if answer.outcome == "unknown":
        least = _least(answer.threshold)
        enough = (
            f"it takes {plural(least, 'subject')} that all pass, or a lower threshold"
            if least
            else "no number proves 100 %"
        )
        few = f". Too few to say: {enough}"
    return (
        f"{100 * answer.value:.1f} % of {name[answer.part]} (95 % interval {100 * low:.1f} to {100 * high:.1f}, whose "
        f"lower bound shall be {100 * answer.threshold:g} % or more; {plural(answer.n, 'case')}{was}{how}){few}"
    )


def _least(threshold: float) -> int:
    """Return how many subjects must all pass for the lower bound to reach a threshold: z^2 t / (1 - t), rounded up."""
    return math.ceil(1.959964**2 * threshold / (1 - threshold)) if threshold < 1 else 0
