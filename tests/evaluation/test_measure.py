"""`evaluate` on tiny random models: what must be the same, what must be told, what must be left alone."""

import math
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import retcon
from retcon.delta import Delta, Dense, EditReport
from retcon.edits import Case, Edit, Query
from retcon.errors import InvalidEdit, InvalidSetting, UnknownMethod, UnsupportedModel
from retcon.evaluation import Evaluation, Measures, Record, asking, evaluate, read_cases
from retcon.evaluation.bar import drawn_bars
from retcon.evaluation.metrics import compare
from retcon.evaluation.score import score_rows
from retcon.lm.decoding import Prompts
from retcon.lm.forward import logits_at
from retcon.lm.model import LM
from tests.conftest import everyday

Make = Callable[..., LM]
FIXTURES = Path(__file__).parents[1] / "fixtures"
WEIGHT = "transformer.h.0.mlp.fc_out.weight"


def asked(axis: str, index: int, prompt: str, *answers: str | None, **more: Any) -> Query:
    return Query(f"{axis}/{index}", axis, prompt, *answers, **more)


CASES = [
    Case(
        "france",
        (Edit("The capital of {} is", "France", "Rome", "Paris", id="france"),),
        (
            asked("rewrite", 0, "The capital of France is", "Rome", "Paris"),
            asked("paraphrase", 0, "I read: the capital of France is", "Rome", "Paris"),
            asked("neighborhood", 0, "The capital of Italy is", "Paris", "Rome"),
            asked("neighborhood", 1, "He lived in", "Paris", "Rome"),
            asked("two_hop", 0, "They of the capital of France speak", "Italian", "French"),
        ),
        dataset="hand",
    ),
    Case(
        "lodz",
        (Edit("{} and", "Łódź", "東京", "Ελλάδα", id="lodz"),),
        (
            asked("rewrite", 0, "Łódź and", "東京", "Ελλάδα"),
            asked("neighborhood", 0, "The capital of France is", "Ελλάδα", "東京"),
        ),
        dataset="hand",
    ),
]
ZSRE = [
    Case(
        "q",
        (Edit("Which town is {}?", "Łódź", "São Paulo", id="q"),),
        (
            asked("rewrite", 0, "Which town is Łódź?", "São Paulo"),
            asked("paraphrase", 0, "Łódź is which town?", "São Paulo"),
            asked("locality.nq", 0, "nq question: who lived in Florence?", "Leonardo da Vinci"),
            asked("portability.one_hop", 0, "The land of Łódź is", answers=(("Greece",),)),
        ),
    )
]


def bump(lm: LM, size: float = 0.5, seed: int = 0) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    shape = lm.parameter(WEIGHT).shape
    return lm.delta({WEIGHT: [Dense(full=size * torch.randn(shape, generator=generator, dtype=torch.float64))]})


def values(records: list[Record], when: str | None = None) -> list[Any]:
    return [
        (r.case_id, r.query_id, r.metric, r.variant, r.value, r.n, r.status, r.detail)
        for r in records
        if when in (None, r.when)
    ]


def near(found: list[Any], wanted: list[Any]) -> bool:
    """Equal, numbers up to the rounding of other batches."""
    return len(found) == len(wanted) and all(
        a[:4] == b[:4] and a[5:] == b[5:] and a[4] == pytest.approx(b[4], abs=1e-5)
        for a, b in zip(found, wanted, strict=True)
    )


# --- what is measured ----------------------------------------------------------------------------------------------


def test_records_by_axis_and_family(tiny: Make) -> None:
    found = evaluate(tiny(n_layers=1), [*CASES, *ZSRE])
    counted = Counter((r.axis, r.metric, r.variant) for r in found.records if r.case_id == "france")
    compared = ["cf.prob_mean", "cf.prob_sum", "zsre.tok"]
    written = ["gen.em", "gen.prefix", "gen.contains", "gen.tokens", "gen.cut"]
    expected = {("rewrite", "ES", v): 1 for v in compared + written}
    expected |= {("rewrite", "EM", "cf.magnitude"): 1, ("rewrite", "EA", "cf.all_correct"): 1}
    expected |= {("paraphrase", "GS", v): 1 for v in compared + written}
    expected |= {("paraphrase", "PM", "cf.magnitude"): 1, ("paraphrase", "PA", "cf.all_correct"): 1}
    expected |= {("neighborhood", "LS", v): 2 for v in [*compared, "ee.loc.argmax"]}
    expected |= {("neighborhood", "NM", "cf.magnitude"): 2, ("neighborhood", "NA", "cf.all_correct"): 2}
    expected |= {("two_hop", "two_hop", v): 1 for v in [*compared, *written, "cf.magnitude", "cf.all_correct"]}
    assert counted == expected
    of_zsre = {(r.axis, r.metric, r.variant) for r in found.records if r.case_id == "q" and r.status == "ok"}
    assert of_zsre == {
        *(("rewrite", "ES", v) for v in ("zsre.tok", "zsre.seq", "zsre.first", *written)),
        *(("paraphrase", "GS", v) for v in ("zsre.tok", "zsre.seq", "zsre.first", *written)),
        *(("locality.nq", "LS", v) for v in ("zsre.tok", "zsre.seq", "zsre.first", "ee.loc.argmax")),
        *(("portability.one_hop", "Portability", v) for v in written),
    }
    assert {r.when for r in found.records} == {"pre"}
    assert {r.subject for r in found.records} == {"France", "Łódź"}
    assert not [r for r in evaluate(tiny(n_layers=1), CASES, generate=False).records if r.variant.startswith("gen.")]


def test_cases_may_come_from_a_generator(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    wanted = evaluate(lm, CASES, generate=False)
    found = evaluate(lm, (case for case in CASES), generate=False)
    assert (values(found.records), found.context) == (values(wanted.records), wanted.context)


def test_the_seed_of_what_is_measured_counts(tiny: Make) -> None:
    ask = lambda **given: evaluate(tiny(n_layers=1), CASES, generate=False, **given).context["seed"]  # noqa: E731
    assert [ask(), ask(measures=Measures(seed=5)), ask(measures=Measures(seed=5), seed=0)] == [0, 5, 0]


def test_values_are_those_of_the_scores(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    records = evaluate(lm, CASES, generate=False).records
    for case in CASES:
        for query in case.queries:
            rows = [lm.encode(query.prompt, answer) for answer in (query.target, query.contrast)]
            wanted = {(m.metric, m.variant): m.value for m in compare(query.axis, *score_rows(lm, rows))}
            found = {
                (r.metric, r.variant): r.value
                for r in records
                if (r.case_id, r.query_id) == (case.id, query.id) and r.variant != "ee.loc.argmax"
            }
            assert found == pytest.approx(wanted, abs=1e-6)


def test_the_models_own_answer_is_found(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    prompt = "The capital of France is"
    own = lm.complete(prompt, max_new_tokens=4)
    right = Case("own", (), (asked("rewrite", 0, prompt, own), asked("paraphrase", 0, prompt, "Paris")))
    found = evaluate(lm, [right], max_new_tokens=4)
    assert found.texts == {("pre", "own", "rewrite/0"): own, ("pre", "own", "paraphrase/0"): own}
    by_axis = {(r.axis, r.variant): r.value for r in found.records}
    assert by_axis["rewrite", "gen.em"] == 1
    assert by_axis["paraphrase", "gen.em"] == 0


def test_an_answer_in_the_prompt_alone_does_not_count(tiny: Make) -> None:
    case = Case("c", (), (asked("rewrite", 0, "Paris is Paris and Paris is", "Paris"),))
    found = evaluate(tiny(n_layers=1), [case], max_new_tokens=1)
    assert "Paris" not in found.texts["pre", "c", "rewrite/0"]
    assert {r.value for r in found.records if r.variant in ("gen.em", "gen.contains")} == {0}


def test_swapping_the_answers_gives_the_complement(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    swapped = [
        replace(c, queries=tuple(replace(q, target=q.contrast, contrast=q.target) for q in c.queries)) for c in CASES
    ]
    one, two = (evaluate(lm, cases, generate=False).records for cases in (CASES, swapped))
    for a, b in zip(one, two, strict=True):
        assert a.value is not None
        assert b.value is not None
        if a.variant in ("cf.prob_mean", "cf.prob_sum"):
            assert a.value == 1 - b.value
        if a.variant == "cf.magnitude":
            assert a.value == pytest.approx(-b.value)


def test_equal_answers_tie_and_fail(tiny: Make) -> None:
    same = [replace(c, queries=tuple(replace(q, contrast=q.target) for q in c.queries)) for c in CASES]
    found = evaluate(tiny(n_layers=1), same, generate=False)
    compared = [r for r in found.records if r.variant in ("cf.prob_mean", "cf.prob_sum")]
    assert {r.value for r in compared} == {0}
    assert all(r.noted("tie") for r in compared)
    summary = found.summary()
    for metric in ("ES", "GS", "LS"):
        estimate = summary[metric].pre
        assert estimate is not None
        assert estimate.value == 0
        assert estimate.ties == estimate.n_queries
    assert summary["Score"].pre.value == 0  # type: ignore[union-attr]
    assert summary.counts["tie"] == 7


# --- before and after ----------------------------------------------------------------------------------------------


def test_a_delta_is_measured_after_and_taken_off_again(tiny: Make, untouched: Callable[[LM], Any]) -> None:
    lm = tiny(n_layers=2)
    delta, look = bump(lm), untouched(lm)
    found = evaluate(lm, CASES, delta=delta)
    assert untouched(lm) == look
    assert values(found.records, "pre") == values(evaluate(lm, CASES).records)
    with lm.edited(delta):
        assert values(found.records, "final") != values(found.records, "pre")
        there = [v for v in values(evaluate(lm, CASES).records) if v[3] != "ee.loc.argmax"]
        assert [v for v in values(found.records, "final") if v[3] != "ee.loc.argmax"] == there
    agreement = [r for r in found.records if r.variant == "ee.loc.argmax"]
    assert {r.value for r in agreement if r.when == "pre"} == {1}
    assert any(r.value != 1 for r in agreement if r.when == "final")
    assert [r.when for r in found.records] == sorted((r.when for r in found.records), reverse=True)


def test_agreement_is_the_share_of_equal_choices(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    found = evaluate(lm, ZSRE, delta=bump(lm, 0.2), generate=False)
    (record,) = (r for r in found.records if r.variant == "ee.loc.argmax" and r.when == "final")
    pre, post = (found.predictions[when, "q", "locality.nq/0"] for when in ("pre", "final"))
    assert record.n == len(pre) == len(post) == len(lm.encode("x", "Leonardo da Vinci").target_ids)
    assert record.value == sum(a == b for a, b in zip(pre, post, strict=True)) / len(pre)


def test_an_unchanged_model_is_the_same_to_the_bit(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    zero = lm.delta({WEIGHT: [Dense(full=torch.zeros(lm.parameter(WEIGHT).shape))]})
    found = evaluate(lm, [*CASES, *ZSRE], delta=zero)
    assert values(found.records, "final") == values(found.records, "pre")
    assert {r.value for r in found.records if r.variant == "ee.loc.argmax"} == {1}
    change = found.summary()["LS", "cf.ls.delta"].post
    assert change is not None
    assert change.value == 0
    delta = bump(lm)
    lm.apply(delta)
    lm.revert(delta)
    assert values(evaluate(lm, [*CASES, *ZSRE]).records) == values(found.records, "pre")


def test_an_earlier_evaluation_saves_the_first_half(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny(n_layers=2)
    delta = bump(lm)
    whole = evaluate(lm, CASES, delta=delta)
    pre = evaluate(lm, [*ZSRE, *CASES])
    passes = 0

    def counting(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        return logits_at(*args)

    monkeypatch.setattr(sys.modules[score_rows.__module__], "logits_at", counting)
    again = evaluate(lm, CASES, delta=delta, pre=pre)
    assert passes == 1
    assert near(values(again.records), values(whole.records))
    assert again.texts == whole.texts
    with lm.edited(delta):
        as_it_stands = evaluate(lm, CASES, pre=pre)
    assert near(values(as_it_stands.records), values(whole.records))


def test_an_earlier_evaluation_from_a_file_lacks_predictions_and_says_so(tiny: Make, tmp_path: Path) -> None:
    lm = tiny(n_layers=1)
    evaluate(lm, ZSRE).write(tmp_path / "pre.jsonl")
    found = evaluate(lm, ZSRE, delta=bump(lm), pre=Evaluation.read(tmp_path / "pre.jsonl"))
    before, after = (r for r in found.records if r.variant == "ee.loc.argmax")
    assert (before.value, before.status) == (1, "ok")
    assert (after.value, after.status) == (None, "skipped")
    assert after.detail == "no predictions of the unedited model for these tokens"
    assert found.summary()["LS", "ee.loc.argmax"].post is None


def test_an_earlier_evaluation_of_other_cases_is_refused(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    pre = evaluate(lm, CASES[:1], generate=False)
    with pytest.raises(InvalidSetting, match=r"lacks 2 of 7 queries \(case 'lodz', query 'neighborhood/0'\); evaluate"):
        evaluate(lm, CASES, pre=pre, generate=False)


BATCHES = [dict(max_batch_tokens=1), dict(max_batch_tokens=30)]


@pytest.mark.parametrize("options", everyday(BATCHES[1], of=BATCHES))
def test_batches_and_other_cases_are_of_no_account(options: dict[str, int], tiny: Make) -> None:
    lm = tiny(n_layers=2)
    together = evaluate(lm, [*CASES, *ZSRE])
    assert near(values(evaluate(lm, [*CASES, *ZSRE], **options).records), values(together.records))
    alone = [v for case in [*CASES, *ZSRE] for v in values(evaluate(lm, [case], **options).records)]
    contaminated = [v for v in values(together.records) if v[7] and "contaminated" in v[7]]
    assert {v[:2] for v in contaminated} == {("lodz", "neighborhood/0")}
    clean = [(*v[:7], None) if v in contaminated else v for v in values(together.records)]
    assert near(alone, clean)


def test_batch_limit_holds_for_written_answers_too(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny(n_layers=1)
    limits: list[int] = []
    real = asking.ask_questions

    def noted(*args: Any, **options: Any) -> Any:
        limits.append(options["max_batch_tokens"])
        return real(*args, **options)

    monkeypatch.setattr(asking, "ask_questions", noted)
    evaluate(lm, CASES, max_batch_tokens=77)
    assert limits == [77]


# --- what is told --------------------------------------------------------------------------------------------------


def test_what_cannot_be_scored_is_skipped_with_its_reason(tiny: Make) -> None:
    case = Case(
        "c",
        (),
        (
            asked("rewrite", 0, "I read", "home"),
            asked("generation", 0, "I read"),
            asked("rewrite", 1, "I read", " "),
            asked("rewrite", 2, "I read", "home", " "),
            asked("portability.x", 0, "I read", answers=(("home",),)),
        ),
    )
    found = evaluate(tiny(n_layers=1), [case])
    skipped = {r.query_id: (r.value, r.n, r.detail) for r in found.records if r.status == "skipped"}
    assert {name: detail for name, (_, _, detail) in skipped.items()} == {
        "generation/0": "no target",
        "rewrite/1": "the target after 'I read' is empty; give the answer the model shall say",
        "portability.x/0": "no target",
    }
    assert {(value, n) for value, n, _ in skipped.values()} == {(None, 0)}
    assert {r.query_id for r in found.records if r.variant == "gen.em"} == {
        "rewrite/0",
        "rewrite/2",  # a blank rival is none
        "portability.x/0",
    }
    summary = found.summary()
    assert summary.counts["skipped"] == 1
    assert summary["ES"].pre.n_queries == 2  # type: ignore[union-attr]


def test_not_a_number_is_an_error_not_a_value(tiny: Make, tmp_path: Path) -> None:
    lm = tiny(n_layers=1)
    with torch.no_grad():
        lm.parameter(WEIGHT).fill_(math.nan)
    found = evaluate(lm, CASES[:1], generate=False)
    broken = [r for r in found.records if r.variant != "ee.loc.argmax"]
    assert {(r.status, r.value) for r in broken} == {("error", None)}
    assert all(r.noted("NaN or infinite log-probability") for r in broken)
    summary = found.summary()
    assert summary.counts["error"] == 5
    assert summary["ES"].pre.value is None  # type: ignore[union-attr]
    found.write(tmp_path / "records.jsonl")
    assert Evaluation.read(tmp_path / "records.jsonl").summary() == summary


def test_boundary_merges_are_counted(tiny: Make) -> None:
    lm = tiny(n_layers=1, tok="piece")  # breaks no text at spaces
    found = evaluate(lm, CASES[:1], generate=False)
    merged = {r.query_id for r in found.records if r.noted("boundary_merge")}
    rows = {q.id: [lm.encode(q.prompt, a).boundary_merge for a in (q.target, q.contrast)] for q in CASES[0].queries}
    assert merged == {name for name, either in rows.items() if any(either)} != set()
    assert found.summary().counts["boundary_merge"] == len(merged)


def test_the_context_says_what_was_run(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    found = evaluate(lm, CASES, generate=False, seed=7, context={"protocol": "single", "run_id": "x"})
    assert found.context == {
        "model": f"tiny-gptj@{lm.fingerprint()[:12]}",
        "method": "none",
        "dataset": "hand",
        "protocol": "single",
        "n_edits": 0,
        "edit_batch": 0,
        "seed": 7,
        "run_id": "x",
    }
    delta = lm.delta({}, provenance={"method": "by hand"})
    edited = evaluate(lm, CASES, delta=delta, generate=False)
    assert edited.context["method"] == "by hand"
    ids = [evaluate(lm, c, generate=False).context["run_id"] for c in (CASES, CASES, CASES[:1])]
    assert ids[0] == ids[1] != ids[2]
    assert edited.context["run_id"] not in ids
    with lm.edited(delta):
        assert evaluate(lm, CASES, generate=False).context["method"] == "by hand"
        with lm.without_deltas():
            assert evaluate(lm, CASES, generate=False).context["method"] == "none"


def test_two_cases_of_one_id_are_refused(tiny: Make) -> None:
    with pytest.raises(InvalidEdit, match="two cases share the id 'france'; ids must be unique within an evaluation"):
        evaluate(tiny(n_layers=1), [CASES[0], CASES[0]])


def test_nothing_to_measure_is_fine(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    assert evaluate(lm, [], delta=bump(lm)).records == []
    assert evaluate(lm, [Case("empty", (), ())]).summary().lines == ()


@pytest.mark.parametrize("progress", [True, np.True_, 1])
def test_the_progress_bar_goes_to_stderr(tiny: Make, capsys: pytest.CaptureFixture[str], progress: Any) -> None:
    lm = tiny(n_layers=1)
    found = evaluate(lm, CASES, delta=bump(lm), progress=progress)
    assert capsys.readouterr().out == ""
    assert values(found.records) == values(evaluate(lm, CASES, delta=bump(lm)).records)


def test_a_function_hears_how_far_each_stage_is(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    heard: list[tuple[str, int, int]] = []
    evaluate(lm, CASES, delta=bump(lm), progress=lambda *step: heard.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in heard)) == [
        f"{stage} ({when})" for when in ("pre", "final") for stage in ("scoring", "writing")
    ]
    assert all(0 < done <= total for _, done, total in heard)


def test_the_prompts_written_after_are_counted_over_all_ways_of_writing(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "remembers", lambda lm: False)
    heard: list[tuple[str, int, int]] = []
    two_ways = [CASES[0], replace(ZSRE[0], meta={"family": "ripple"})]
    evaluate(tiny(n_layers=1), two_ways, progress=lambda *step: heard.append(step))
    steps = [(done, total) for stage, done, total in heard if stage == "writing (pre)"]
    assert len({total for _, total in steps}) == 1
    assert steps == sorted(set(steps))
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize("fails", [False, True])
def test_the_bars_of_a_notebook_are_closed(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Bar(SimpleNamespace):
        def __init__(self, **about: Any) -> None:
            super().__init__(n=0, closed=False, **about)
            made.append(self)

        def update(self, n: int) -> None:
            self.n += n

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr("builtins.get_ipython", None, raising=False)
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), drawn_bars() as advance:
        advance("scoring", 1, 2)
        advance("scoring", 2, 2 // (not fails))
    assert [(bar.desc, bar.total, bar.n, bar.closed) for bar in made] == [("evaluate: scoring", 2, 2 - fails, True)]


# --- what is left alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_model_tokenizer_and_generators_are_left_as_they_were(
    fails: bool, tiny: Make, untouched: Callable[[LM], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny(n_layers=1)
    lm.model.train()
    next(lm.model.parameters()).requires_grad_(False)
    lm.model.generation_config.do_sample = True
    shipped = lm.model.generation_config.to_dict()
    lm.tokenizer.padding_side, side = "left", lm.tokenizer.padding_side
    try:
        tokenizer, delta, look = str(lm.tokenizer), bump(lm), untouched(lm)
        if fails:
            monkeypatch.setattr(Prompts, "take", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                evaluate(lm, CASES, delta=delta)
        else:
            evaluate(lm, CASES, delta=delta)
        assert untouched(lm) == look
        assert str(lm.tokenizer) == tokenizer
        assert lm.model.generation_config.to_dict() == shipped
    finally:
        lm.tokenizer.padding_side = side


# --- from a file to a file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["counterfact.json", "counterfact-flat.json", "zsre.json", "cases.jsonl"])
def test_every_dirty_file_is_measured_and_its_records_read_back(name: str, tiny: Make, tmp_path: Path) -> None:
    lm = tiny(n_layers=1)
    cases = read_cases(FIXTURES / name, conflicts="keep", on_error="skip")[0]
    found = retcon.evaluate(lm, cases, delta=bump(lm), max_new_tokens=4)
    assert {(r.case_id, r.query_id) for r in found.records} == {(c.id, q.id) for c in cases for q in c.queries}
    found.write(tmp_path / "records.jsonl")
    read = Evaluation.read(tmp_path / "records.jsonl")
    assert read.records == found.records
    assert read.context == found.context
    assert read.summary() == found.summary()
    assert str(read.summary()) == str(found.summary())


def test_the_context_names_the_deltas_in_force(tiny: Make) -> None:
    lm = tiny("llama")
    site = lm.site(0, "down_proj")
    delta = lm.delta(
        {site.name: [Dense(full=torch.zeros_like(site.weight))]},
        report=(EditReport("a", 1.0, 1, "reached"), EditReport("b", 1.0, 1, "reached")),
        provenance={"method": "nothing"},
    )
    pre = evaluate(lm, CASES, generate=False)
    assert (pre.context["method"], pre.context["n_edits"]) == ("none", 0)
    lm.apply(delta)
    for found in (evaluate(lm, CASES, pre=pre, generate=False), evaluate(lm, CASES, generate=False)):
        assert (found.context["method"], found.context["n_edits"], found.context["edit_batch"]) == ("nothing", 2, 2)


def test_a_query_longer_than_the_context_is_skipped_and_said(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    long = Query("long", "paraphrase", "very " * 150 + "long", "Rome")
    short = Query("short", "rewrite", "The capital of France is", "Rome")
    unanswered = Query("unanswered", "locality.text", "much " * 150 + "more")
    found = evaluate(lm, [Case("a", (), (long, short, unanswered))])
    told = {r.query_id: r for r in found.records}
    assert (told["long"].status, told["short"].status) == ("skipped", "ok")
    assert "unanswered" not in told or told["unanswered"].status == "skipped"
    assert "reads 128" in str(told["long"].detail)


def test_what_is_no_model_and_what_is_no_case_are_named(tiny: Make) -> None:
    lm = tiny()
    with pytest.raises(UnsupportedModel, match=r"load it first: retcon.load\('demo:gptj'\)"):
        evaluate("demo:gptj", CASES)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match=r"GPTJForCausalLM given where an LM is wanted: retcon.LM\(model, tok"):
        evaluate(lm.model, CASES)
    with pytest.raises(InvalidEdit, match="Edit given where a Case is wanted"):
        evaluate(lm, CASES[0].edits)  # type: ignore[arg-type]
    with pytest.raises(InvalidEdit, match="one case given where a list of them is wanted"):
        evaluate(lm, CASES[0])  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="pre must be what evaluate returned, found dict"):
        evaluate(lm, CASES, pre={})  # type: ignore[arg-type]
    with pytest.raises(UnknownMethod, match=r"'memit' given where a method is wanted: retcon\.method\("):
        retcon.in_steps("memit", lm, CASES[0].edits)  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match=r"contexts must be retcon\.Contexts\(\[\.\.\.\]\), found \['The'\]"):
        retcon.method("memit", layers=(0,)).propose(lm, CASES[0].edits, contexts=["The"])  # type: ignore[arg-type]
    with pytest.raises(InvalidEdit, match=r"Case given where an Edit is wanted; a case's own are case\.edits"):
        retcon.in_steps(retcon.method("memit", layers=(0,)), lm, CASES)  # type: ignore[arg-type]


@pytest.mark.parametrize("context", [{"path": Path("a")}, {"n": torch.tensor(3)}, {"share": math.nan}, {"seed": "q"}])
def test_a_context_that_no_file_holds_is_refused_before_anything_is_measured(
    tiny: Make, context: dict[str, Any]
) -> None:
    with pytest.raises(InvalidSetting, match=r"context must be JSON values|seed: expected a whole number"):
        evaluate(tiny(), CASES, context=context)
