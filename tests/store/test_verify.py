"""Knowledge regression tests: what broke is found, and since which entry; hostile text stays text."""

import copy
import random
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retcon.chat import Chat
from retcon.delta import Delta, Dense
from retcon.edits import Case, Edit, Query, in_chat
from retcon.errors import InvalidEdit, InvalidSetting, MalformedFile
from retcon.lm.model import LM
from retcon.methods.common.contract import recorded
from retcon.methods.common.proposal import answers, reported
from retcon.methods.rome import Rome
from retcon.store import Store
from retcon.store import verify as verifying
from retcon.store.history import Entry, states
from retcon.store.verify import verify
from tests.conftest import tiny_model, tokenizer

Tiny = Callable[..., LM]
HOSTILE = '<script>alert("x")</script> | `a` ]]> & \x07'


class Scripted(Rome):
    """A method whose delta does nothing, or wrecks the model."""

    def __init__(self, scale: float) -> None:
        super().__init__(layer=1)
        object.__setattr__(self, "scale", scale)

    def propose(self, lm: LM, edits: Any, **_: Any) -> Delta:
        site = lm.site(1, "down_proj")
        weight = lm.parameter(site.name)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(lm.applied)))
        full = self.scale * weight.detach().std() * noise  # type: ignore[attr-defined]
        record = recorded(Rome(layer=1), lm, edits, seed=0)
        return reported(lm, lm.delta({site.name: [Dense(full=full.to(weight))]}, **record))


def fact(name: str, prompt: str, answer: str) -> Case:
    """A fact with a check of its own, one of locality, and one that never passes."""
    edit = Edit(prompt, None, answer, id=name)
    queries = (
        Query("rewrite/0", "rewrite", prompt, answer),
        Query("locality.x/0", "locality.x", "The train to Milan stood", "still"),
        Query("paraphrase/0", "paraphrase", f"{HOSTILE} is", "never this"),
    )
    return Case(name, (edit,), queries)


def answered(lm: LM, n: int) -> list[Case]:
    """Facts that the model knows: the word it would go on with by itself is asked for."""
    prompts = [f"{start} {i}" for start in ("Numbers like", "It was late", "Therefore", "You know") for i in range(40)]
    said = lm.generate(prompts, max_new_tokens=1)
    cases = [fact(f"f{i}", p, s.strip()) for i, (p, s) in enumerate(zip(prompts, said, strict=True)) if s.strip()]
    known = answers(lm, [case.edits[0] for case in cases])
    found = [case for case, (_, match) in zip(cases, known, strict=True) if match]
    assert len(found) >= n
    return found[:n]


@pytest.fixture
def store(tmp_path: Path, lm: LM, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Three entries; the third wrecks the model."""
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    store = Store.init(tmp_path / "edits", lm)
    one, two = answered(lm, 2)
    store.edit(lm, [one], Scripted(0.0), message="one")
    store.edit(lm, [two], Scripted(1e-9), message="two")
    store.edit(lm, [fact("wreck", "So it goes with", "Rome")], Scripted(30.0), message="the one to blame")
    return store


def test_a_bisect_names_the_entry_that_broke_a_fact(store: Store, lm: LM) -> None:
    _, two, wreck = store.log()
    fine = verify(store, lm, at=two.id)
    assert fine.ok
    assert fine.counts()["took"] == {"passed": 2, "broke": 0, "never": 0}
    assert fine.counts()["generalised"] == {"passed": 0, "broke": 0, "never": 2}
    assert not verify(store, lm, at=two.id, strict=True).ok
    now = verify(store, lm)
    assert not now.ok
    assert {c.since.id for c in now.checks if c.outcome == "broke" and c.since} == {wreck.id}
    (own,) = [c for c in now.checks if c.fact == "wreck" and c.kind == "took"]
    assert (own.outcome, own.since) == ("never", None)
    assert own.words.endswith("has never passed")
    unasked = verify(store, lm, bisect=False)
    assert {c.outcome for c in unasked.checks} == {"broke"}
    assert all(c.words.endswith("the entry that broke it was not searched for") for c in unasked.failed)
    assert "not looked for" in unasked.markdown()
    for case in store.cases(two.id):
        (check,) = [c for c in now.checks if c.fact == case.id and c.kind == "took"]
        with store.at(lm):
            assert (check.outcome == "passed") == answers(lm, case.edits)[0][1]
    assert lm.applied == ()


def test_an_entry_that_was_taken_back_is_not_to_blame(store: Store, lm: LM) -> None:
    store.revert("HEAD")
    store.edit(lm, [fact("another", "So it goes with", "Rome")], Scripted(40.0), message="in force")
    broken = [check for check in verify(store, lm).checks if check.outcome == "broke"]  # passed, failed, passed, failed
    assert {check.fact for check in broken} == {case.id for case in store.cases("HEAD~3")}
    assert {check.since.message for check in broken if check.since} == {"in force"}


def entry(place: int, slot: str, before: str | None, now: str | None) -> Entry:
    return Entry(f"e{place}", "", "edit", "", None, {slot: (before, now)})


def blamed(entries: list[Entry], passes: dict[tuple[str, ...], bool], born: int = -1) -> str | None:
    """Return the entry that `verify` blames for a check, whose outcome is known in the states that it may ask about."""

    class Known:
        def again(self, at: Any, places: Any) -> Any:
            return dict.fromkeys(places, passes[at.deltas])

    base, *after = states("base", entries, Path("log.jsonl"))
    history = list(zip(entries, after, strict=True))
    found = verifying._blame(Known(), base, history, [("f", "q")], {"f": born})  # type: ignore[arg-type]
    return found["f", "q"].id if found else None


def random_log(draw: random.Random) -> tuple[list[Entry], list[tuple[int, str, str]]]:
    """Edits, amendments, what took them back and what restored them; and, of those in force, place, slot and delta."""
    entries: list[Entry] = []
    in_force: dict[str, list[tuple[int, str]]] = {}
    gone: dict[str, list[tuple[int, str]]] = {}
    while len(entries) < 14:
        place, doing = len(entries), draw.choice(["edit", "edit", "amend", "unamend", "revert", "restore"])
        among = {"edit": [f"d{place}"], "restore": list(gone)}.get(doing, list(in_force))
        if not among:
            continue
        slot = draw.choice(among)
        before = in_force[slot][-1][1] if slot in in_force else None
        if doing in ("edit", "amend"):
            in_force.setdefault(slot, []).append((place, f"d{place}"))
        elif doing == "restore":
            in_force[slot] = gone.pop(slot)
        elif doing == "revert" or len(in_force[slot]) == 1:
            gone[slot] = in_force.pop(slot)
        else:
            in_force[slot].pop()
        entries.append(entry(place, slot, before, in_force[slot][-1][1] if slot in in_force else None))
    return entries, sorted((place, slot, delta) for slot, steps in in_force.items() for place, delta in steps)


@pytest.mark.parametrize("seed", range(100))
def test_who_is_to_blame_is_found_as_by_applying_all_that_is_in_force_one_by_one(seed: int) -> None:
    draw = random.Random(seed)
    entries, in_force = random_log(draw)
    slots: dict[str, str] = {}
    applied: list[tuple[str, ...]] = [()]
    for _, slot, delta in in_force:
        slots[slot] = delta
        applied.append(tuple(slots.values()))
    assert applied[-1] == states("base", entries, Path("log.jsonl"))[-1].deltas
    for first in range(1, len(applied)):  # it fails from there on until the end
        passes = {deltas: n < first for n, deltas in enumerate(applied)}
        assert blamed(entries, passes) == f"e{in_force[first - 1][0]}"
    if in_force:
        flips = [True, *(draw.random() < 0.5 for _ in applied[2:]), False]
        broke = [f"e{place}" for n, (place, _, _) in enumerate(in_force) if flips[n] and not flips[n + 1]]
        assert blamed(entries, dict(zip(applied, flips, strict=True))) in broke
        if flips[-2]:
            assert blamed(entries, dict(zip(applied, flips, strict=True))) == broke[-1]


def test_what_took_an_entry_back_is_to_blame_for_what_needed_it() -> None:
    entries = [
        entry(0, "a", None, "a"),
        entry(1, "b", None, "b"),
        entry(2, "c", None, "c"),
        entry(3, "c", "c", None),
        entry(4, "a", "a", None),
        entry(5, "d", None, "d"),
    ]
    assert blamed(entries, {("a", "b"): True, ("b",): False, ("b", "d"): False}, born=1) == "e4"
    assert blamed(entries, {("a", "b"): False}, born=1) is None


def test_words_are_asked_for_what_broke_before_what_never_passed(
    store: Store, lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(verifying, "MAX_ANSWERS", 3)
    monkeypatch.setattr(verifying._Asker, "say", lambda self, at, places: asked.extend(places) or {})
    found = verify(store, lm)
    failing = {(c.fact, c.query.id): (c.outcome, c.kind) for c in found.checks if c.outcome != "passed"}
    assert list(failing.values())[1] != ("broke", "took")
    assert [failing[place] for place in asked[:2]] == [("broke", "took")] * 2
    assert [failing[place][0] for place in asked] == ["broke"] * 3


def test_a_state_that_gc_took_is_named_with_the_way_out(store: Store, lm: LM) -> None:
    _, two, _ = store.log()
    store.revert(two.id)
    removed, _ = store.gc(before="HEAD")
    assert removed
    with pytest.raises(MalformedFile, match=r"\(gc\) removed it. An earlier state .* alone \(bisect=False\)"):
        verify(store, lm)
    assert not verify(store, lm, bisect=False).ok
    assert lm.applied == ()


def test_an_entry_that_was_taken_back_and_restored_is_not_to_blame(tmp_path: Path, lm: LM) -> None:
    store = Store.init(tmp_path / "edits", lm)
    with lm.edited(Scripted(30.0).propose(lm, [Edit("So it goes with", None, "Rome")])):
        said = answered(lm, 8)
    known = answers(lm, [case.edits[0] for case in said])
    new = next(case for case, (_, match) in zip(said, known, strict=True) if not match)  # the base says something else
    store.edit(lm, [new], Scripted(30.0))
    store.revert(store.revert("HEAD").id)
    store.edit(lm, [fact("wreck", "So it goes with", "Rome")], Scripted(300.0), message="the one to blame")
    (own,) = [c for c in verify(store, lm).checks if c.fact == new.id and c.kind == "took"]
    assert (own.outcome, own.since) == ("broke", store.log()[-1])


def test_what_must_stay_is_blamed_from_the_base_on(store: Store, lm: LM) -> None:
    known = answered(lm, 8)[2:]
    with store.at(lm):
        broken = [case.id for case in known if not answers(lm, case.edits)[0][1]]
    assert broken
    checks = [c for c in verify(store, lm, stay=known).checks if c.kind == "stays" and c.query.axis == "rewrite"]
    assert [c.fact for c in checks if c.outcome != "passed"] == broken
    assert all(c.outcome == "broke" and c.since == store.log()[-1] for c in checks if c.fact in broken)
    with pytest.raises(InvalidEdit, match="is in force, and in the list of what must stay"):
        verify(store, lm, stay=[store.cases()[0]])


def test_reports_hold_every_check_and_hostile_text_stays_text(store: Store, lm: LM) -> None:
    found = verify(store, lm)
    root = ET.fromstring(found.junit())
    cases = root.findall(".//testcase")
    assert len(cases) == len(found.checks) == int(root.attrib["tests"])
    assert len(root.findall(".//failure")) == len(found.failed) == int(root.attrib["failures"])
    assert any('<script>alert("x")' in str(c.get("name")) for c in cases)
    page = found.html()
    assert page.count("<tr data-broke=") == 3
    assert "the one to blame" in page
    assert "<script>alert" not in page
    assert page.count("<script") == 1
    assert "http" not in page
    text = verify(store, lm, strict=True).markdown()
    assert "<script>" not in text
    assert "&lt;script>" in text  # a lone > is text
    rows = [line for line in text.splitlines() if line.startswith("| f")]
    assert all(line.replace("\\|", "").count("|") == 6 for line in rows)


def test_what_the_model_says_is_asked_in_the_facts_own_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    tok = copy.deepcopy(tokenizer())
    tok.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    lm = LM(tiny_model("gptj"), tok)
    (chatted,) = in_chat([fact("one", "Who made it?", "Rome")], Chat("Be brief."))
    store = Store.init(tmp_path / "edits", lm)
    store.edit(lm, [chatted], Scripted(0.0), message="one")
    found = {c.query.id: c.said for c in verify(store, lm).checks}
    said = lm.complete("Who made it?", max_new_tokens=12, chat=Chat("Be brief.")).strip()
    assert found["rewrite/0"] == said != lm.complete("Who made it?", max_new_tokens=12).strip()


def test_newlines_before_an_answer_do_not_end_it(tmp_path: Path, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.init(tmp_path / "edits", lm)
    store.edit(lm, [fact("one", "Who made it?", "Rome")], Scripted(0.0), message="one")
    skips: list[bool] = []

    def texts_after(lm: LM, asked: Any, how: Any) -> list[str]:
        skips.append(how.skip_newlines)
        return ["said"] * len(asked)

    monkeypatch.setattr("retcon.evaluation.writing.texts_after", texts_after)
    assert {c.said for c in verify(store, lm).checks if c.outcome != "passed"} == {"said"}
    assert skips == [True]


def test_there_must_be_something_to_verify(tmp_path: Path, lm: LM) -> None:
    with pytest.raises(InvalidSetting, match="nothing to verify"):
        verify(Store.init(tmp_path / "edits", lm), lm)
