"""What can be measured on request, through `evaluate`."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from retcon.edits import Case, Edit, Query
from retcon.errors import InvalidSetting
from retcon.evaluation import Evaluation, Measures, evaluate
from retcon.evaluation.metrics.consistency import References, TfIdf, consistency
from retcon.evaluation.metrics.fluency import Fluency, fluency, word_tokenizer
from retcon.evaluation.plan import plan_queries
from retcon.evaluation.score import score, score_rows
from retcon.evaluation.writing import PRESETS
from retcon.lm.generate import generate
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.seed import derive_seed
from tests.evaluation.test_measure import CASES, bump

Make = Callable[..., LM]
WRITER = Case(
    "w",
    (Edit("The capital of {} is", "France", "Rome", "Paris", id="w"),),
    (
        Query("rewrite/0", "rewrite", "The capital of France is", "Rome", "Paris"),
        Query("generation/0", "generation", "France is"),
        Query("generation/1", "generation", "France is"),
        Query("generation/2", "generation", "He lived"),
    ),
    meta={"relation_id": "P36", "target_new_id": "Q1"},
)


def told(found: Evaluation, variant: str, when: str = "pre") -> list[Any]:
    return [(r.query_id, r.value) for r in found.records if r.variant.startswith(variant) and r.when == when]


def test_fluency_is_off_but_where_it_is_asked_for_or_usual(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    assert not told(evaluate(lm, [WRITER]), "flu.")
    texts = generate(lm, ["France is", "He lived"], PRESETS["fluency"])
    wanted = [fluency(w.text, "flu.new").value for w in (texts[0], texts[0], texts[1])]
    found = evaluate(lm, [WRITER], measures=Measures(fluency=("flu.new",)))
    assert [v for _, v in told(found, "flu.new")] == wanted
    usual = Case("k", WRITER.edits, WRITER.queries[:1], meta={"family": "easyedit"})
    assert [q for q, _ in told(evaluate(lm, [usual]), "flu.new")] == ["rewrite/0"]


def test_romes_fluency_samples_by_case_and_query_and_reads_the_prompt_too(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    measures = Measures(generate=False, fluency=("flu.rome", "flu.easyedit"))
    found = evaluate(lm, [WRITER], measures=measures, seed=3)
    seed = derive_seed(3, "text", "w", "generation/1")
    text = generate(lm, ["France is"], PRESETS["fluency_rome"], seeds=[seed])[0].text
    name = word_tokenizer()[0]
    by_query = dict(told(found, f"flu.rome.{name}"))
    assert by_query["generation/1"] == fluency("France is" + text, "flu.rome").value
    assert by_query["generation/0"] != by_query["generation/1"]  # repeats are drawn anew
    assert [q for q, _ in told(found, "flu.easyedit")] == ["rewrite/0"]
    beside = evaluate(lm, [*CASES, WRITER], measures=measures, seed=3)
    assert [x for x in told(beside, "flu.rome") if x[0].startswith("generation")] == told(found, "flu.rome")


def test_consistency_and_essence(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    *own, others = (w.text for w in generate(lm, ["France is", "He lived", "Łódź and"], PRESETS["fluency"]))
    passage = f"The capital of Italy is Rome. {own[0]}"
    tfidf = TfIdf.fit([passage, *own, others])
    about = ["The capital of Italy is Rome.", "He lived in Milan."]
    references = References({("P36", "Q1"): [passage]}, {"France": about}, tfidf)
    found = evaluate(lm, [WRITER, CASES[1]], measures=Measures(references=references))
    by_case = {r.case_id: r for r in found.records if r.metric == "consistency"}
    assert by_case["w"].value == consistency([own[0], own[0], own[1]], [passage], tfidf).value
    assert (by_case["lodz"].status, by_case["lodz"].detail) == ("skipped", "no reference passages")
    (essence,) = (r for r in found.records if r.metric == "essence")
    scores = score_rows(lm, [Row(lm.encode(text).ids, 1) for text in about])
    logp = [p for score in scores for p in score.logp]
    assert essence.value == pytest.approx(-math.fsum(logp) / len(logp))


def test_consistency_is_of_the_texts_of_one_fluency(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    passages = [f"{q.prompt} {w.text}" for q in WRITER.queries for w in generate(lm, [q.prompt], PRESETS["fluency"])]
    references = References({("P36", "Q1"): passages}, {}, TfIdf.fit(passages))

    def found(*fluencies: Fluency) -> dict[str, Any]:
        measures = Measures(generate=False, references=references, fluency=fluencies)
        return {r.variant: r for r in evaluate(lm, [WRITER], measures=measures).records if r.metric == "consistency"}

    new, rome, both = found("flu.new"), found("flu.rome"), found("flu.new", "flu.rome")
    assert both == new | rome
    assert both.keys() == {"cons.tfidf", "cons.tfidf@flu.rome"}
    assert rome["cons.tfidf@flu.rome"].n >= sum(len(q.prompt.split()) for q in WRITER.queries[1:])
    nothing = found()["cons.tfidf"]
    assert (nothing.status, nothing.value, nothing.detail) == ("skipped", None, "no text written")


def test_a_judge_decides(tiny: Make) -> None:
    asked: list[tuple[str, str, str]] = []

    def judge(question: str, gold: str, answer: str) -> bool:
        asked.append((question, gold, answer))
        return "France" in question

    found = evaluate(tiny(n_layers=1), CASES, measures=Measures(judge=judge))
    values = {(r.case_id, r.query_id): r.value for r in found.records if r.variant == "gen.judge"}
    assert values["france", "rewrite/0"] == 1
    assert values["lodz", "rewrite/0"] == 0
    assert ("The capital of France is", "Rome", found.texts["pre", "france", "rewrite/0"]) in asked


def test_a_judge_that_fails_is_named_with_the_query(tiny: Make) -> None:
    def judge(question: str, gold: str, answer: str) -> bool:
        raise KeyError(gold)

    with pytest.raises(InvalidSetting, match=r"judge, case 'france', query 'rewrite/0': KeyError: 'Rome'"):
        evaluate(tiny(n_layers=1), CASES, measures=Measures(judge=judge))


def test_other_ways_of_writing_carry_their_names(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    found = evaluate(lm, CASES, measures=Measures(preset="wild_paper", max_new_tokens=4))
    variants = {r.variant for r in found.records if r.variant.startswith("gen.")}
    assert variants == {f"gen.{v}@wild_paper" for v in ("em", "prefix", "contains", "tokens", "cut")}
    gold = evaluate(lm, CASES, measures=Measures(preset="gold_length"))
    lengths = {(r.case_id, r.query_id): r.value for r in gold.records if r.variant == "gen.tokens@gold_length"}
    for case in CASES:
        for query in case.queries:
            if (case.id, query.id) in lengths:
                n = len(lm.encode(query.prompt, query.target).target_ids)
                assert lengths[case.id, query.id] <= n  # type: ignore[operator]
    with pytest.raises(InvalidSetting, match="unknown way of writing 'loudly'"):
        Measures(preset="loudly")


def test_text_on_locality_prompts_is_held_against_the_unedited_models(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    delta = bump(lm, 0.5)
    found = evaluate(lm, CASES, delta=delta, measures=Measures(locality_text=True, max_new_tokens=3))
    assert {v for _, v in told(found, "ee.loc.gen")} == {1}
    for record in (r for r in found.records if r.variant == "ee.loc.gen" and r.when == "final"):
        texts = [found.texts[when, str(record.case_id), str(record.query_id)] for when in ("pre", "final")]
        assert record.value == float(texts[0] == texts[1])
    assert "gen.tokens" not in {r.variant for r in found.records if r.axis == "neighborhood"}


def test_neighbours_behind_the_edited_statement(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    plain = evaluate(lm, CASES, generate=False)
    found = evaluate(lm, CASES, measures=Measures(generate=False, neighborhood_prefix="edit"))
    more = [r for r in found.records if r.variant.endswith("+edit")]
    assert {r.query_id for r in more} == {"neighborhood/0+edit", "neighborhood/1+edit"}
    assert [r for r in found.records if r not in more] == plain.records
    prompt = "The capital of France is Rome. The capital of Italy is"
    new, old = score(lm, [(prompt, "Rome"), (prompt, "Paris")])
    values = {r.variant: r.value for r in more if (r.case_id, r.query_id) == ("france", "neighborhood/0+edit")}
    assert values["cf.prob_mean+edit"] == float(old.nll_mean < new.nll_mean)
    assert values["cf.magnitude+edit"] == pytest.approx(math.exp(-old.nll_mean) - math.exp(-new.nll_mean))


@pytest.mark.parametrize(("answer", "stop"), [("Acme Inc.", ""), ("東京。", ""), ("Rome", ".")])
def test_an_edited_statement_ends_in_one_stop(answer: str, stop: str, tiny: Make) -> None:
    (edit,), neighbour = CASES[0].edits, CASES[0].queries[2]
    case = replace(CASES[0], edits=(replace(edit, target_new=answer),), queries=(neighbour,))
    plan = plan_queries(tiny(n_layers=1), [case], Measures(neighborhood_prefix="edit"))
    assert plan.queries[1].query.prompt == f"{case.edits[0].statement}{stop} The capital of Italy is"


def test_easyedits_token_accuracy_beside_another_family(tiny: Make) -> None:
    found = evaluate(tiny(n_layers=1), CASES, measures=Measures(generate=False, easyedit=True))
    by_variant = {v: [r.value for r in found.records if r.variant == v] for v in ("ee.tok", "zsre.tok")}
    assert by_variant["ee.tok"] == by_variant["zsre.tok"] != []
    assert found.summary().family == "cf"


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_divergence_before_and_after(size: float, tiny: Make) -> None:
    lm = tiny(n_layers=1)
    found = evaluate(lm, CASES, delta=bump(lm, size), measures=Measures(generate=False, divergence=True))
    values = [v for _, v in told(found, "loc.kl", "final")]
    assert len(values) == 3
    assert all(v == 0 for v in values) if size == 0 else all(v > 0 for v in values)
    line = found.summary()["divergence", "loc.kl"]
    assert line.post is not None
    assert f"{line.post.value:.1f}" in found.summary().table()  # nats are not multiplied


def test_divergence_with_a_pre_evaluation_and_no_delta(tiny: Make) -> None:
    lm, how = tiny(n_layers=1), Measures(generate=False, divergence=True)
    delta = bump(lm)
    wanted = told(evaluate(lm, CASES, delta=delta, measures=how), "loc.kl", "final")
    pre = evaluate(lm, CASES, measures=how)
    skipped = [r for r in evaluate(lm, CASES, pre=pre, measures=how).records if r.variant == "loc.kl"]
    assert [(r.status, r.value, r.when) for r in skipped] == [("skipped", None, "final")] * 3
    assert "no delta is applied" in str(skipped[0].detail)
    lm.apply(delta)
    found = told(evaluate(lm, CASES, pre=pre, measures=how), "loc.kl", "final")
    assert [(case, pytest.approx(value, abs=1e-6)) for case, value in found] == wanted


def test_another_thread_waits_for_a_stage_and_not_for_the_whole(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny(n_layers=1)
    monkeypatch.setattr("retcon.lm.scopes.BUSY_SECONDS", 5)
    answers: list[str] = []
    other = threading.Thread(target=lambda: answers.append(lm.complete("He lived", max_new_tokens=2)))

    def scored(*args: Any, **more: Any) -> Any:
        other.start()
        other.join(0.3)
        assert not answers  # it waits for the stage
        return score_rows(*args, **more)

    def written(*args: Any, **more: Any) -> Any:
        other.join()
        assert len(answers) == 1
        return generate(*args, **more)

    monkeypatch.setattr("retcon.evaluation.asking.score_rows", scored)
    monkeypatch.setattr("retcon.evaluation.asking.generate", written)
    evaluate(lm, CASES[:1], measures=Measures(fluency=("flu.new",)))
    assert answers


@pytest.mark.parametrize("variant", ["flu.new", "flu.rome"])
def test_text_for_fluency_is_written_in_batches_of_the_size_asked_for(
    variant: Fluency, tiny: Make, monkeypatch: Any
) -> None:
    asked: list[int] = []

    def hear(*args: Any, max_batch_tokens: int, **more: Any) -> Any:
        asked.append(max_batch_tokens)
        return generate(*args, max_batch_tokens=max_batch_tokens, **more)

    monkeypatch.setattr("retcon.evaluation.asking.generate", hear)
    how = Measures(generate=False, fluency=(variant,), max_batch_tokens=300)
    evaluate(tiny(n_layers=1), CASES[:1], measures=how)
    assert asked == [300]


def test_seeds_are_derived_by_name() -> None:
    seeds: Sequence[int] = [derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a"), derive_seed(0, "a", "b")]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**56 for seed in seeds)
    assert math.isfinite(sum(seeds))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fluency": ("nope",)}, "unknown fluency 'nope'; known: flu.new, flu.rome, flu.easyedit"),
        ({"fluency": "flu.new"}, "fluency must be a list of texts, found 'flu.new'"),
        ({"preset": "fluency_rome"}, "preset 'fluency_rome' draws its text, and answers are written greedily: qa, "),
        ({"neighborhood_prefix": "edits"}, "unknown neighborhood_prefix 'edits'; known: none, edit"),
    ],
)
def test_measures_that_do_not_exist_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        Measures(**settings)


def test_text_of_a_locality_query_without_an_answer_is_only_compared(tiny: Make) -> None:
    case = replace(CASES[0], queries=(*CASES[0].queries, Query("locality/0", "locality", "He lived in")))
    found = evaluate(tiny(n_layers=1), [case], measures=Measures(locality_text=True, max_new_tokens=3))
    written = {r.variant for r in found.records if r.query_id == "locality/0" and r.status == "ok"}
    assert written == {"ee.loc.gen"}
