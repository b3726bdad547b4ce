"""The four questions, on models that pass and fail them for known reasons."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from retcon.audit import audit
from retcon.chat import Chat
from retcon.delta import Delta, Dense
from retcon.edits import Case, Edit, Query
from retcon.errors import DeltaMismatch, InvalidSetting
from retcon.evaluation.drift import perplexity
from retcon.evaluation.generated_queries import with_generated_queries
from retcon.evaluation.intervals import ci_wilson
from retcon.evaluation.metrics import prompt_kind
from retcon.evaluation.safety import Thresholds, Verdict, check
from retcon.lm.model import LM
from retcon.store.index import with_target
from tests.evaluation.test_measure import WEIGHT, bump

TEXT = "The capital of France is Paris. He lived in Florence and in Milan, and the train stood still."


def cases(lm: LM) -> list[Case]:
    """Whatever the model says anyway is the new answer, so that edits take and generalise without a change."""
    made = []
    for name in ("France", "Italy", "Milan"):
        prompts = [f"The capital of {name} is", f"I read: the capital of {name} is", f"He lived near {name} in"]
        own = [lm.complete(p, max_new_tokens=2, stops=()).strip() or "x" for p in prompts]
        edit = Edit("The capital of {} is", name, own[0], id=name)
        queries = [
            Query(f"{axis}/0", axis, p, answer)
            for axis, p, answer in zip(("rewrite", "paraphrase", "locality.x"), prompts, own, strict=True)
        ]
        made.append(Case(name, (edit,), tuple(queries)))
    return made


def zero(lm: LM) -> Delta:
    return lm.delta({WEIGHT: [Dense(full=torch.zeros(lm.parameter(WEIGHT).shape, dtype=torch.float64))]})


def outcomes(verdict: Verdict) -> dict[str, str]:
    return {a.part: a.outcome for a in verdict.answers}


def test_a_change_of_nothing_is_local_and_keeps_the_language(
    tiny: Callable[..., LM], untouched: Callable[[LM], Any]
) -> None:
    lm = tiny(n_layers=2)
    asked, look = cases(lm), untouched(lm)
    verdict = check(lm, asked, [zero(lm)], text=TEXT)
    assert untouched(lm) == look
    assert verdict["local"].value == 1
    assert verdict["language"].value == 1
    assert verdict["took"].value == verdict["took"].before
    assert verdict["took"].n == 3
    assert verdict["language"].words.startswith("perplexity of held-out text is 1.000 times what it was")
    assert len(verdict.findings) == 9
    for finding in verdict.findings:
        assert finding.passed == finding.passed_before or finding.query.axis == "rewrite"
        if finding.query.axis == "locality.x":
            assert finding.passed
            assert finding.before == finding.after != ""


def test_what_another_speaker_asks_is_a_paraphrase(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    asked = [
        replace(
            case,
            queries=tuple(replace(q, axis=q.axis.replace("paraphrase", "paraphrase.persona")) for q in case.queries),
        )
        for case in cases(lm)
    ]
    verdict = check(lm, asked, [zero(lm)], text=TEXT)
    assert (verdict["generalised"].n, verdict["took"].n, verdict.notes) == (3, 3, ())
    assert prompt_kind("paraphrase.persona") == "paraphrase"
    amended = with_target(asked[0], "Rome")
    assert [(q.axis, q.target) for q in amended.queries][:2] == [("rewrite", "Rome"), ("paraphrase.persona", "Rome")]


def test_a_wrecked_model_fails_and_says_where(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    verdict = check(lm, cases(lm), [bump(lm, 20.0)], text=TEXT, own_words=True)
    assert not verdict.safe
    assert all(f.after for f in verdict.findings if not f.passed)
    assert all(f.before for f in verdict.findings if f.query.axis == "rewrite")
    assert outcomes(verdict)["local"] == "failed"
    worst = verdict["local"].worst
    assert worst
    assert worst[0].before != worst[0].after
    assert worst[0].wanted == "as before"
    assert "% of answers to other questions stay as they were (95 % interval" in verdict["local"].words
    assert "lower bound shall be 80 % or more; 3 cases)" in verdict["local"].words


def test_a_change_that_makes_other_text_unlikelier_fails_for_the_language(tiny: Callable[..., LM]) -> None:
    lm, head = tiny(n_layers=2), "lm_head.weight"
    sure = lm.delta({head: [Dense(full=50 * lm.parameter(head).detach())]})  # of the same words, right or wrong
    base = perplexity(lm, TEXT).ppl
    with lm.edited(sure):
        edited = perplexity(lm, TEXT).ppl
    verdict = check(lm, cases(lm), [sure], text=TEXT)
    assert (verdict["language"].value, verdict["language"].before) == (edited / base, base)
    assert edited > 2 * base
    assert (verdict["local"].value, outcomes(verdict)["language"]) == (1, "failed")


def test_one_prompt_in_two_chats_has_a_text_of_each(monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., LM]) -> None:
    def said(lm: LM, asked: Any, how: Any) -> list[str]:
        return ["plain" if chat is None else chat.system for _, chat in asked]

    monkeypatch.setattr("retcon.evaluation.writing.texts_after", said)
    lm = tiny(n_layers=2)
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chats = (None, Chat(system="Short."), Chat(system="Polite."))
    (first, *_) = cases(lm)
    asked = [
        Case(str(i), first.edits, (Query("rewrite/0", "rewrite", "He lived in", "Florence Milan", chat=chat),))
        for i, chat in enumerate(chats)
    ]
    verdict = check(lm, asked, [bump(lm, 20.0)], text=TEXT, own_words=True)
    wanted = {"plain", "Short.", "Polite."}
    asked_for = [f for f in verdict.findings if f.query.axis == "rewrite"]
    assert {f.after for f in asked_for} == {f.before for f in asked_for} == wanted
    assert {e.after for e in verdict["took"].worst} == {e.before for e in verdict["took"].worst} == wanted


def test_what_was_not_asked_is_not_known_and_not_safe(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    bare = [Case(c.id, c.edits, ()) for c in cases(lm)]
    verdict = check(lm, bare, [zero(lm)], text=TEXT)
    assert outcomes(verdict)["took"] == "unknown"
    assert verdict["took"].words.endswith("not known, the cases hold no edits that can be asked")
    assert not verdict.safe
    off = Thresholds(took=0, generalised=0, local=0, perplexity_ratio=math.inf)
    assert set(outcomes(check(lm, bare, [zero(lm)], text=TEXT, thresholds=off)).values()) == {"off"}
    assert check(lm, bare, [zero(lm)], text=TEXT, thresholds=off).safe


def test_what_the_model_cannot_read_is_listed(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    long = Query("rewrite/0", "rewrite", "very " * 150, "Rome", answers=(("Rome",),))
    verdict = check(lm, [Case("a", (), (long,))], [zero(lm)], text=TEXT)
    assert verdict["took"].outcome == "unknown"
    assert any(note.startswith("not asked: a, rewrite/0 (") and "model reads 128" in note for note in verdict.notes)


def test_paraphrases_and_neighbours_are_made_where_none_are_given(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    bare = [Case(c.id, c.edits, c.queries[:1]) for c in cases(lm)]
    verdict = check(lm, bare, [zero(lm)], text=TEXT)
    assert verdict["local"].value == 1  # a change of nothing: whatever is asked stays as it was
    assert verdict["generalised"].n == 3
    assert verdict.notes == (
        "no paraphrases are given; asked are its prompts after a sentence",
        "no neighbours are given; asked are the subjects' other facts and unrelated ones",
    )
    assert check(lm, cases(lm), [zero(lm)], text=TEXT).notes == ()


def test_what_is_made_comes_from_the_files_own_facts() -> None:
    facts = [
        Edit("The capital of {} is", "France", "Rome", relation_id="capital"),
        Edit("{}'s seat of government is", "Italy", "Bern", relation_id="capital"),
        Edit("The river of {} is", "Italy", "Sel", relation_id="river"),
    ]
    plain = [Case(str(i), (e,), (Query("rewrite/0", "rewrite", e.text, e.target_new),)) for i, e in enumerate(facts)]

    def say(queries: Any) -> list[str]:
        return ["Oslo"] * len(queries)

    found, _ = with_generated_queries(plain, say)
    prompts = {c.id: [q.prompt for q in c.queries if q.axis == "paraphrase"] for c in found}
    assert prompts["0"][0] == "France's seat of government is"
    assert prompts["1"][0] == "The capital of Italy is"
    assert prompts["2"][0].endswith(". The river of Italy is")
    assert {len(p) for p in prompts.values()} == {2}
    neighbours = {c.id: [q.prompt for q in c.queries if q.axis == "locality.made"] for c in found}
    assert neighbours["0"][0] == "The river of France is"  # the subject's other facts, none of which is edited
    edited = {e.text for e in facts}
    assert all(len(found) == 3 and edited.isdisjoint(found) for found in neighbours.values())
    assert {q.target for c in found for q in c.queries if q.axis == "locality.made"} == {"Oslo"}
    assert with_generated_queries(found, say) == (found, [])


def test_the_lower_bound_is_held_against_the_threshold(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    asked = cases(lm)
    low = ci_wilson(1.0, 3).low  # type: ignore[union-attr]
    for limit, wanted in ((low, "passed"), (low + 0.01, "unknown"), (0.99, "unknown")):
        found = check(lm, asked, [zero(lm)], text=TEXT, thresholds=Thresholds(local=limit))["local"]
        assert (found.value, found.outcome) == (1, wanted)
    assert "Too few to say: it takes 381 subjects that all pass" in found.words
    one = check(lm, asked[:1], [zero(lm)], text=TEXT)
    assert outcomes(one)["local"] == "unknown"
    assert not one.safe
    twice = check(lm, [asked[0], replace(asked[0], id="again")], [zero(lm)], text=TEXT)["local"]
    assert (twice.n, twice.interval) == (2, ci_wilson(1.0, 1))  # two cases of one subject are one observation


def test_a_model_loaded_from_elsewhere(tiny: Callable[..., LM]) -> None:
    base, other = tiny(n_layers=2), tiny(n_layers=2)
    other.apply(bump(other, 20.0))
    asked = cases(base)
    there, here = check(base, asked, [], edited=other, text=TEXT), check(base, asked, [bump(base, 20.0)], text=TEXT)
    assert [(a.value, a.outcome) for a in there.answers] == [(a.value, a.outcome) for a in here.answers]
    with pytest.raises(InvalidSetting, match="deltas and an edited model are given"):
        check(base, asked, [zero(base)], edited=other)
    strange = tiny(n_layers=2, tok="bos")
    with pytest.raises(InvalidSetting, match=r"makes other tokens of 'The capital of France is' than the base's"):
        check(base, asked, [], edited=strange)


def test_a_broken_model_counts_as_fallen_short(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=1)
    asked = cases(lm)
    with torch.no_grad():
        lm.parameter(WEIGHT).fill_(math.nan)
    verdict = check(lm, asked, [], text=TEXT)
    assert verdict["took"].value == verdict["local"].value == 0
    assert outcomes(verdict)["language"] == "failed"


def test_what_means_nothing_is_refused(tiny: Callable[..., LM]) -> None:
    with pytest.raises(InvalidSetting, match="local is a share from 0 to 1, found 95"):
        Thresholds(local=95)
    for ratio in (0.9, math.nan):
        with pytest.raises(InvalidSetting, match="perplexity_ratio must be at least 1"):
            Thresholds(perplexity_ratio=ratio)
    with pytest.raises(InvalidSetting, match="no cases to check with"):
        check(tiny(n_layers=1), [], [])
    lm = tiny(n_layers=2)
    for one in (lambda: check(lm, cases(lm), zero(lm)), lambda: audit(lm, lm, known=zero(lm))):  # type: ignore[arg-type]
        with pytest.raises(DeltaMismatch, match=r"one delta given where a list of them is wanted: \[delta\]"):
            one()
