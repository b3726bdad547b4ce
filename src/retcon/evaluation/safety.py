"""Is an edit safe to ship? Four questions, each with a share, a threshold and the cases that fell short."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch

from retcon import world
from retcon.attachment import Attachment
from retcon.edits import Case
from retcon.errors import InvalidSetting
from retcon.evaluation.drift import perplexity
from retcon.evaluation.intervals import Interval, ci_boot
from retcon.evaluation.measure import measure
from retcon.evaluation.metrics import is_locality
from retcon.evaluation.plan import Measures, Plan, make_plan
from retcon.evaluation.records import Record
from retcon.evaluation.results import Evaluation
from retcon.evaluation.summary import case_values
from retcon.evaluation.writing import PRESETS
from retcon.lm.generate import generate
from retcon.lm.model import LM

Part = Literal["took", "generalised", "local", "language"]
Outcome = Literal["passed", "failed", "unknown", "off"]

N_WORST = 5
"""Failing prompts shown per question."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What counts as good enough. 0 (infinity for the ratio) turns a question off."""

    took: float = 0.95
    """Share of edited prompts whose whole new answer is the model's own greedy choice, at least."""
    generalised: float = 0.6
    """The same on paraphrases, at least."""
    local: float = 0.95
    """Share of answer tokens on locality prompts that the edited model chooses as the unedited one does, at least."""
    perplexity_ratio: float = 1.05
    """Perplexity of held-out text, edited over unedited, at most."""

    def __post_init__(self) -> None:
        for name in ("took", "generalised", "local"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidSetting(f"{name} is a share from 0 to 1, found {getattr(self, name)}")
        if self.perplexity_ratio < 1:
            raise InvalidSetting(f"perplexity_ratio must be at least 1, found {self.perplexity_ratio}")


@dataclass(frozen=True)
class Example:
    """One prompt that fell short, and what the model says there before and after."""

    prompt: str
    wanted: str
    before: str
    after: str


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

    @property
    def words(self) -> str:
        """The finding as a sentence."""
        return _sentence(self)


@dataclass(frozen=True)
class Verdict:
    """All answers. `safe` is True where every question that was not turned off was asked and passed."""

    answers: tuple[Answer, ...]
    n_cases: int

    @property
    def safe(self) -> bool:
        return all(answer.outcome in ("passed", "off") for answer in self.answers)

    def __getitem__(self, part: Part) -> Answer:
        return next(answer for answer in self.answers if answer.part == part)


def check(
    lm: LM,
    cases: Sequence[Case],
    deltas: Sequence[Attachment],
    *,
    thresholds: Thresholds = Thresholds(),
    text: str | None = None,
    stops: Sequence[str] = ("\n",),
    other_base: bool = False,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Verdict:
    """Ask the four questions of `deltas`, applied together; the model is left as it was.

    Args:
        text: held-out text for the fourth; None takes the plain paragraphs of the embedded world.
        stops: end an answer shown among the examples.
        other_base: apply the deltas even though they were made for another base.

    Raises:
        InvalidSetting: no cases.
        WrongBase: a delta was made for another model.
    """
    if not cases:
        raise InvalidSetting("no cases to check with; give at least the edits themselves")
    measures = Measures(generate=False)
    plan = make_plan(lm, cases, measures)
    held_out = "\n\n".join(world.text(60, seed=0)) if text is None else text
    on_progress("the unedited model")
    pre, base = measure(lm, plan, measures, "pre"), perplexity(lm, held_out)
    with ExitStack() as stack:
        on_progress("the edited model")
        for delta in deltas:
            stack.enter_context(lm.edited(delta, other_base=other_base))
        post, edited = measure(lm, plan, measures, "final", pre), perplexity(lm, held_out)
        shares = [
            _share("took", plan, pre, post, thresholds.took),
            _share("generalised", plan, pre, post, thresholds.generalised),
            _share("local", plan, pre, post, thresholds.local),
        ]
        after = _texts(lm, shares, stops)
    before = _texts(lm, shares, stops)
    answers = [
        replace(a, worst=tuple(replace(e, before=before[e.prompt], after=after[e.prompt]) for e in a.worst))
        for a in shares
    ]
    ratio = edited.ppl / base.ppl
    fine = math.isfinite(ratio) and ratio <= thresholds.perplexity_ratio
    outcome: Outcome = "off" if math.isinf(thresholds.perplexity_ratio) else "passed" if fine else "failed"
    answers.append(Answer("language", outcome, ratio, base.ppl, thresholds.perplexity_ratio, edited.n_tokens, None))
    return Verdict(tuple(answers), len(cases))


def _share(part: Part, plan: Plan, pre: Evaluation, post: Evaluation, threshold: float) -> Answer:
    """One of the first three questions, texts of its examples still to be written."""
    found = _values(part, post.records)
    subjects = {a.case_id: a.subject for a in plan.asked}
    if not found:
        return Answer(part, "off" if threshold == 0 else "unknown", None, None, threshold, 0, None)
    value = math.fsum(found.values()) / len(found)
    before = _values(part, pre.records)
    column = torch.tensor([[v] for v in found.values()], dtype=torch.float64)
    interval = ci_boot(column, [subjects[case] for case in found])[0]
    outcome: Outcome = "off" if threshold == 0 else "passed" if value >= threshold else "failed"
    old = math.fsum(before.values()) / len(before) if before and part != "local" else None
    return Answer(part, outcome, value, old, threshold, len(found), interval, _worst(part, plan, post.records))


def _values(part: Part, records: Iterable[Record]) -> dict[str, float]:
    """By case. A prompt that broke (NaN) counts as fallen short."""
    told = [r._replace(metric="x", variant="x", value=r.value or 0.0, status="ok") for r in records if _speaks(part, r)]
    return case_values(told, "x", "x")


def _speaks(part: Part, record: Record) -> bool:
    """The record is the one that answers the question for its query."""
    if record.status == "skipped" or record.axis is None:
        return False
    if part == "local":
        return record.variant == "ee.loc.argmax" and is_locality(record.axis)
    axis = "rewrite" if part == "took" else "paraphrase"
    return record.axis == axis and record.variant in ("cf.all_correct", "zsre.seq")


def _worst(part: Part, plan: Plan, records: Iterable[Record]) -> tuple[Example, ...]:
    low = sorted((r for r in records if _speaks(part, r) and (r.value or 0.0) < 1), key=lambda r: r.value or 0.0)
    queries = {a.place: a.query for a in plan.asked}
    chosen = [queries[str(r.case_id), str(r.query_id)] for r in low[:N_WORST]]
    return tuple(Example(q.prompt, "as before" if part == "local" else q.target or "", "", "") for q in chosen)


def _texts(lm: LM, answers: Sequence[Answer], stops: Sequence[str]) -> dict[str, str]:
    prompts = list(dict.fromkeys(e.prompt for a in answers for e in a.worst))
    how = replace(PRESETS["qa"], stops=tuple(stops), max_new_tokens=12)
    return {p: w.text.strip() for p, w in zip(prompts, generate(lm, prompts, how), strict=True)} if prompts else {}


def _sentence(answer: Answer) -> str:
    name = {
        "took": "edited prompts give the whole new answer",
        "generalised": "rephrased prompts give it too",
        "local": "answers to other questions stay as they were",
    }
    if answer.part == "language":
        change = f"perplexity of held-out text is {answer.value:.3f} times what it was"
        return f"{change} (at most {answer.threshold:g} was asked; it was {answer.before:.1f}; {answer.n:,} tokens)"
    if answer.value is None:
        missing = {"took": "edits", "generalised": "paraphrases", "local": "locality prompts"}[answer.part]
        return f"{name[answer.part]}: not known, the cases hold no {missing}"
    low, high = (answer.interval.low, answer.interval.high) if answer.interval else (answer.value, answer.value)
    was = "" if answer.before is None else f", {100 * answer.before:.1f} % before the edit"
    return (
        f"{100 * answer.value:.1f} % of {name[answer.part]} (at least {100 * answer.threshold:g} % was asked; 95 % "
        f"interval {100 * low:.1f} to {100 * high:.1f}, {answer.n:,} cases{was})"
    )
