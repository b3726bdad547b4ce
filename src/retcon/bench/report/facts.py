"""Every fact of a benchmark: what each method made of its prompts, in the model's own words where it wrote any."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retcon.bench import Run
from retcon.bench.report.groups import Group, by_dataset
from retcon.evaluation.metrics import is_locality, prompt_kind
from retcon.evaluation.records import Record
from retcon.evaluation.summary import ScoreFamily, main_variant
from retcon.pages import Answered, Fact, FactOutcome, FactTable, worst_first

MAX_OUTCOMES = 4_000
"""Facts times methods in one table at most; a page of more is slow to open. Facts with most failures are kept."""
MAX_CHARACTERS = 160
"""Of a written answer."""


def fact_tables(groups: Sequence[Group]) -> list[FactTable]:
    """Return one table for each model, protocol and dataset; its sides are the methods, of each the first run."""
    tables = []
    for model, protocol, dataset, own in by_dataset(groups):
        made = [_outcomes(g) for g in own]
        cases = {case_id: row for g in own for case_id, row in g.runs[0].cases.items()}
        facts = [
            Fact(
                case_id,
                "; ".join(e["prompt"] for e in row["edits"]),
                "; ".join(e["target_true"] or "" for e in row["edits"]),
                "; ".join(e["target_new"] for e in row["edits"]),
                tuple(outcomes.get(case_id) for outcomes in made),
            )
            for case_id, row in cases.items()
            if any(case_id in outcomes for outcomes in made)
        ]
        most = MAX_OUTCOMES // max(1, len(own))
        tables.append(
            FactTable(
                f"{model}, {dataset}, {protocol}, seed {own[0].runs[0].manifest['seed']}",
                tuple(g.method for g in own),
                worst_first(facts)[:most],
                max(0, len(facts) - most),
                _passes(own[0].family),
            )
        )
    return tables


def _passes(family: ScoreFamily) -> str:
    if family == "cf":
        return "A prompt passes where the wanted answer is likelier than its rival."
    return "A prompt passes where every token of the wanted answer is the model's own choice."


def _outcomes(group: Group) -> dict[str, FactOutcome]:
    """Return, by case id, what the group's first run made of the case's prompts."""
    run = group.runs[0]
    was = {(r.case_id, r.query_id): r.value for r in _deciding(group, run.at("pre"))}
    texts = {(row["when"], row["case_id"], row["query_id"]): row for row in run.texts}
    answers: dict[str, list[Answered]] = {}
    for record in _deciding(group, run.at("final")):
        place = (str(record.case_id), str(record.query_id))
        query = _query(run, *place) | texts.get(("final", *place), {})
        axis = record.axis or ""
        local, value, old = is_locality(axis), record.value or 0.0, was.get(place)
        # what stays is held to the unedited model where that was wrong already
        passed = value >= 1 or (local and old is not None and value >= old)
        answers.setdefault(place[0], []).append(
            Answered(
                prompt_kind(axis),
                query["prompt"],
                query["target"],
                _said(texts.get(("pre", *place)), old, query),
                _said(texts.get(("final", *place)), value, query),
                passed,
                broke=not passed and old is not None and old > value,
            )
        )
    return {case_id: FactOutcome(tuple(own)) for case_id, own in answers.items()}


def _deciding(group: Group, records: Iterable[Record]) -> list[Record]:
    """Return the records that say whether a prompt passes: the family's own variant of success and locality."""
    found = []
    for r in records:
        if (
            r.case_id is None
            or r.query_id is None
            or r.value is None
            or r.metric not in ("ES", "GS", "LS", "Portability")
        ):
            continue
        if r.variant == main_variant(group.family, r.metric):
            found.append(r)
    return found


def _query(run: Run, case_id: str, query_id: str) -> dict[str, str]:
    """Return a query as the benchmark kept it; older versions kept the prompts of written answers only."""
    row = run.cases.get(case_id, {})
    for query in row.get("queries", ()):
        if query["query_id"] == query_id:
            return {"prompt": query["prompt"], "target": query["target"] or "", "rival": query["contrast"] or ""}
    own = prompt_kind(query_id.partition("/")[0]) in ("own", "paraphrase")
    wanted = row["edits"][0]["target_new"] if own and row.get("edits") else "as before"
    return {"prompt": f"{query_id} (its text was not kept)", "target": wanted, "rival": ""}


def _said(text: Mapping[str, Any] | None, value: float | None, query: Mapping[str, str]) -> str:
    """Return what the model wrote, or else what the score says of its answer."""
    if text is not None and text["text"].strip():
        flat = " ".join(text["text"].split())
        return flat if len(flat) <= MAX_CHARACTERS else flat[: MAX_CHARACTERS - 1] + "…"
    if value is None:
        return ""
    if query["rival"]:
        return f"{query['target'] if value >= 1 else query['rival']} (likelier of the two)"
    return query["target"] if value >= 1 else f"{100 * value:.0f} % of its tokens"
