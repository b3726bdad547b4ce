"""What is to be asked of a model: every query of the cases, tokenised once, with what cannot be asked and why."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from retcon.arguments import check_choice, list_of_texts
from retcon.edits import Case, Query
from retcon.errors import InvalidEdit, InvalidSetting
from retcon.evaluation.datasets.rows import Family, contaminated
from retcon.evaluation.metrics import Judge, accepted, is_locality
from retcon.evaluation.metrics.consistency import References
from retcon.evaluation.metrics.fluency import Fluency
from retcon.evaluation.records import NO_TARGET
from retcon.evaluation.writing import PRESETS
from retcon.extensions import named_function
from retcon.lm.batches import MAX_BATCH_TOKENS
from retcon.lm.generate import Writing
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.seed import check_seed

Place = tuple[str, str]
"""(case id, query id)."""

WRITTEN = ("rewrite", "paraphrase", "two_hop", "portability", "singlehop", "unedited_hop", "multihop", "ripple")
"""Axes on which the model also writes its own answer (`portability.<key>` included)."""
PREFIXED = "+edit"
"""Ends the ids of neighbour queries asked after the edited statement, and the variants of what they give."""
SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
NeighborhoodPrefix = Literal["none", "edit"]


ENTRY_POINTS = "retcon.metrics"
"""Group of entry points by which an installed package brings metrics."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured, beside what a dataset's family always has."""

    generate: bool = True
    """Let the model write its answers (`gen.*`, and all of MQuAKE and RippleEdits)."""
    preset: str = "qa"
    """How it writes them: a name of `retcon.evaluation.writing.PRESETS` that draws nothing; of any but `qa`, the name
    is in the variants."""
    max_new_tokens: int | None = None
    """Over the preset's."""
    stops: tuple[str, ...] | None = None
    """Over the preset's."""
    fluency: tuple[Fluency, ...] | None = None
    """Which fluencies; None: `flu.new` for EasyEdit's family, none for others."""
    locality_text: bool = False
    """Also compare generated text on locality queries with the unedited model's (`ee.loc.gen`)."""
    easyedit: bool = False
    """Also store EasyEdit's token accuracy (`ee.tok`) where the dataset is of another family."""
    divergence: bool = False
    """Also the divergence of next-token distributions on locality prompts (`loc.kl`)."""
    neighborhood_prefix: NeighborhoodPrefix = "none"
    """`edit`: also ask neighbours after the edited statement (CounterFact+, arXiv:2305.17553)."""
    references: References | None = None
    """Passages for consistency; None leaves it out."""
    judge: Judge | None = None
    """Says whether a written answer is right (`gen.judge`)."""
    max_batch_tokens: int = MAX_BATCH_TOKENS
    """Padded tokens per forward pass; a batch of prompts and the texts after them has some times as many
    (`retcon.lm.generate.written_batch`). Halved when memory runs out."""
    separator: str | None = None
    """What is written between prompt and answer, over the queries' own; None: as each query has it."""
    seed: int = 0
    """Of sampled text."""
    metrics: tuple[str, ...] = ()
    """Metrics of your own: each is "module:function", or a name that a package announces (`retcon.metrics`). The
    function takes a case, what the model wrote by query id, and what the unedited model wrote (the same texts where it
    is the one that is measured), and returns numbers by name; None where one could not be had."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        check_choice(self.neighborhood_prefix, NeighborhoodPrefix, "neighborhood_prefix")
        if self.fluency is not None:
            object.__setattr__(self, "fluency", list_of_texts(self.fluency, "fluency"))
            for fluency in self.fluency:
                check_choice(fluency, Fluency, "fluency")
        if self.stops is not None:
            object.__setattr__(self, "stops", list_of_texts(self.stops, "stops"))
        object.__setattr__(self, "metrics", list_of_texts(self.metrics, "metrics"))
        for metric in self.metrics:
            own_metric(metric)
        if self.metrics and not self.generate:
            raise InvalidSetting("metrics: those of your own read what the model writes; generate is off")
        if self.preset not in PRESETS:
            raise InvalidSetting(f"unknown way of writing {self.preset!r}; known: {', '.join(PRESETS)}")
        if PRESETS[self.preset].sample_top_k is not None:
            greedy = ", ".join(name for name, how in PRESETS.items() if how.sample_top_k is None)
            raise InvalidSetting(f"preset {self.preset!r} draws its text, and answers are written greedily: {greedy}")
        if self.max_batch_tokens < 1:
            raise InvalidSetting(f"max_batch_tokens must be at least 1, found {self.max_batch_tokens}")

    @property
    def answers(self) -> Writing:
        """How answers are written."""
        how = PRESETS[self.preset]
        if self.max_new_tokens is not None:
            how = replace(how, max_new_tokens=self.max_new_tokens)
        return how if self.stops is None else replace(how, stops=self.stops)

    def named(self, variant: str) -> str:
        """Return a generation variant by its full name, with the preset where that is not the default."""
        return variant if self.preset == "qa" else f"{variant}@{self.preset}"


def own_metric(name: str) -> Callable[..., Any]:
    """Return the function of a metric of the user's own.

    Raises:
        InvalidSetting: there is none.
    """
    return named_function(name, ENTRY_POINTS, "metric")


@dataclass(frozen=True)
class TokenizedQuery:
    """One query, tokenised."""

    case: Case
    query: Query
    rows: tuple[Row, ...]
    """Prompt with the target, then with the rival where there is one; empty where nothing can be scored."""
    reason: str | None
    """Why nothing can be scored."""
    notes: tuple[str, ...]
    prefixed: bool = False
    """A neighbour after the edited statement."""
    overlong: bool = False
    """The prompt, or prompt and answer, are more than the model can read."""

    @property
    def case_id(self) -> str:
        return self.case.id

    @property
    def subject(self) -> str:
        return subject_of(self.case)

    @property
    def place(self) -> Place:
        return self.case.id, self.query.id

    @property
    def readable(self) -> bool:
        """The prompt can be put to the model, with or without an answer after it."""
        return bool(self.rows) or not (self.query.target or self.overlong)

    def writing(self, measures: Measures) -> Writing | None:
        """Return how the model shall write its answer here, in the query's chat if it has one; None: not at all."""
        how = self._writing(measures)
        return how if how is None or self.query.chat is None else replace(how, chat=self.query.chat)

    def _writing(self, measures: Measures) -> Writing | None:
        axis = self.query.axis
        if not measures.generate or not self.readable or self.prefixed or not self.query.prompt.strip():
            return None
        if measures.locality_text and is_locality(axis):
            return measures.answers
        if axis.split(".")[0] not in WRITTEN or not accepted(self.query):
            return None
        if axis == "multihop" and self.case.meta.get("prompting") == "cot":
            return PRESETS["cot"]
        if family_of_case(self.case) == "ripple":
            return PRESETS["ripple"]
        return measures.answers


@dataclass(frozen=True)
class QueryPlan:
    """All queries of the cases, in order."""

    cases: tuple[Case, ...]
    queries: tuple[TokenizedQuery, ...]

    def of(self, cases: Iterable[Case]) -> "QueryPlan":
        """Return the part that belongs to some of the cases, in the order of `cases`."""
        chosen = tuple(cases)
        by_case: dict[str, list[TokenizedQuery]] = {case.id: [] for case in chosen}
        for q in self.queries:
            if q.case_id in by_case:
                by_case[q.case_id].append(q)
        return QueryPlan(chosen, tuple(q for case in chosen for q in by_case[case.id]))


def subject_of(case: Case) -> str:
    """Return the subject of the case's first edit; the case's id where it has none."""
    return (case.edits[0].subject if case.edits else None) or case.id


def family_of_case(case: Case) -> Family:
    """Return the dataset's family as its loader says, else by the rival answers."""
    for family in get_args(Family):
        if case.meta.get("family") == family:
            return family
    return "counterfact" if any(q.contrast is not None for q in case.queries) else "zsre"


def plan_queries(lm: LM, cases: Sequence[Case], measures: Measures) -> QueryPlan:
    """Tokenise everything once.

    Raises:
        InvalidEdit: two cases share an id.
    """
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise InvalidEdit(f"two cases share the id {twice!r}; ids must be unique within an evaluation")
    dirty = contaminated(cases)
    queries = []
    with lm.scope():  # another thread may be inside one whose attachments act on prompts
        for case in cases:
            for query in case.queries:
                queries.append(_tokenized(lm, case, query, query.id in dirty.get(case.id, ()), measures))
                if measures.neighborhood_prefix == "edit" and query.axis == "neighborhood" and case.edits:
                    after = _after_the_edit(case, query)
                    queries.append(replace(_tokenized(lm, case, after, False, measures), prefixed=True))
    return QueryPlan(tuple(cases), tuple(queries))


def _tokenized(lm: LM, case: Case, query: Query, dirty: bool, measures: Measures) -> TokenizedQuery:
    reason, too_long = None if query.target else NO_TARGET, None
    try:
        rows = _rows(lm, query, measures) if query.target else ()
    except InvalidEdit as error:
        rows, reason = (), str(error)
    else:
        too_long = _too_long(lm, query, rows)
        rows, reason = ((), too_long) if too_long else (rows, reason)
    notes = ["contaminated"] if dirty else []
    if any(row.boundary_merge for row in rows):
        notes.append("boundary_merge")
    return TokenizedQuery(case, query, rows, reason, tuple(notes), overlong=too_long is not None)


def _rows(lm: LM, query: Query, measures: Measures) -> tuple[Row, ...]:
    """Return a query's prompt with its target, and with the rival answer if it has one, as the model reads them now."""
    separator = query.separator if measures.separator is None else measures.separator
    first = lm.encode(query.prompt, query.target, separator=separator, chat=query.chat)
    if query.contrast is None:
        return (first,)
    return first, lm.encode(query.prompt, query.contrast, separator=separator, chat=query.chat, known=first)


def plan_now(lm: LM, plan: QueryPlan, measures: Measures) -> QueryPlan:
    """Return the plan tokenised again where something attached since acts on the prompt; a query that is then more than
    the model can read has no rows, and the reason."""
    return QueryPlan(plan.cases, tuple(_tokenized_now(lm, q, measures) for q in plan.queries))


def _tokenized_now(lm: LM, query: TokenizedQuery, measures: Measures) -> TokenizedQuery:
    if not query.readable or lm.prompted(query.query.prompt) == query.query.prompt:
        return query
    rows = _rows(lm, query.query, measures) if query.rows else ()
    if too_long := _too_long(lm, query.query, rows):
        return replace(query, rows=(), reason=too_long, overlong=True)
    return replace(query, rows=rows)


def _too_long(lm: LM, query: Query, rows: tuple[Row, ...]) -> str | None:
    """Return why the model cannot read these rows, or the prompt alone where there are none; None where it can."""
    limit = lm.context_length
    if limit is None:
        return None
    longest = max(rows or (lm.encode(query.prompt, chat=query.chat),), key=lambda row: row.n_needed)
    if longest.n_needed <= limit:
        return None
    return f"{len(longest.ids):,} tokens, and the model reads {limit:,}, the answer included"


def _after_the_edit(case: Case, query: Query) -> Query:
    statement = case.edits[0].statement
    stop = "" if statement.endswith(SENTENCE_ENDS) else "."
    return replace(query, id=query.id + PREFIXED, prompt=f"{statement}{stop} {query.prompt}")
