"""What a notebook or a page calls: facts into a model without a word printed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import retcon
from retcon import workflow
from retcon.delta import Delta
from retcon.errors import InvalidSetting
from retcon.files import cache_dir
from retcon.methods.alphaedit import AlphaEdit
from retcon.methods.common.contract import made_by
from retcon.methods.common.sequence import state_after
from retcon.methods.rect import Rect

FACTS = """{"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
{"prompt": "The capital of {} is", "subject": "Spain", "target_new": "Oslo"}
"""
QUICK: dict[str, Any] = {"steps": 3, "low": [2, 3, 4], "high": [5, 6]}


@pytest.fixture
def facts(tmp_path: Path) -> workflow.Facts:
    (tmp_path / "facts.jsonl").write_text(FACTS)
    return workflow.read_facts(tmp_path / "facts.jsonl")


def test_a_fact_is_read_resolved_estimated_written_and_undone_without_printing(
    facts: workflow.Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    lm = retcon.load("demo:gptj")
    before = lm.fingerprint()
    resolved = workflow.resolve(lm, "jeep", given=QUICK)
    assert resolved.settings["steps"] == 3
    assert workflow.estimate(lm, resolved, iter(facts.edits)).edits == 2

    heard: list[tuple[str, int, int]] = []
    out = tmp_path / "facts.safetensors"
    made = workflow.write_facts(lm, resolved, facts.edits, out=out, progress=lambda *now: heard.append(now))
    assert Delta.load(out) == made.delta
    assert heard[-1][1:] == (2, 2)
    assert set(made.seconds) == {"moments", "edit"}
    assert 0 <= made.n_took <= 2
    took, search = workflow.took_line(made.delta.report), workflow.search_line(made.delta.report)
    assert took.startswith(f"{made.n_took} of 2 edits took: ")
    assert search.startswith(f"{sum(r.outcome == 'reached' for r in made.delta.report)} of 2 reached the target")
    assert not list((cache_dir() / "values").rglob("*.safetensors"))  # kept until the delta was, and no longer
    assert lm.fingerprint() == before
    assert not lm.applied

    workflow.check_replaces_its_like(out, lm, resolved, facts.edits, seed=0)  # the same run again may
    with pytest.raises(InvalidSetting, match=r"holds another delta .*jeep, edits: 2"):
        workflow.check_replaces_its_like(out, lm, resolved, facts.edits[:1], seed=0)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_a_sequential_method_takes_up_what_its_last_delta_kept(facts: workflow.Facts, tmp_path: Path) -> None:
    lm = retcon.load("demo:gptj")
    resolved = workflow.resolve(lm, "alphaedit", given={"steps": 2, "layers": [3]})
    first = workflow.write_facts(lm, resolved, facts.edits[:1], out=str(tmp_path / "first.st")).delta
    assert state_after([first], resolved.method) is first.state
    assert state_after([first], retcon.method("memit", for_model=lm)) is None
    assert state_after([], resolved.method) is None

    @dataclass(frozen=True, kw_only=True)
    class Own(AlphaEdit):
        """Another method, whose name is inherited."""

    assert state_after([first], Own(**resolved.method.settings)) is None
    unnamed = {name: value for name, value in first.provenance.items() if name != "class"}  # of an earlier version
    assert state_after([replace(first, provenance=unnamed)], resolved.method) is first.state

    over = {
        name: retcon.method("rect", base_method=name, base_settings={"layers": [3], "cache_keys": True})
        for name in ("alphaedit", "memit")
    }
    filtered = replace(first, provenance={**first.provenance, **made_by(over["alphaedit"])})
    assert state_after([filtered], over["alphaedit"]) is first.state
    assert state_after([filtered], over["memit"]) is None


def test_a_method_without_moments_reads_no_corpus(facts: workflow.Facts) -> None:
    lm = retcon.load("demo:gptj")
    method = workflow.resolve(lm, "ctp", given={"epochs": 1}).method
    assert not method.uses_moments
    assert workflow.needed_moments(lm, method, "no-such-file.txt").keys(lm, []) == {}


def test_an_empty_file_of_facts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text(FACTS)
    with pytest.raises(InvalidSetting, match="nothing to edit"):
        workflow.read_facts(tmp_path / "none.jsonl", workflow.Reading(start=5))


def test_a_filter_is_given_the_moments_that_its_base_method_may_have(tmp_path: Path) -> None:
    lm = retcon.load("demo:gptj")
    (tmp_path / "text.txt").write_text("The capital of France is Paris.")
    for shrink in (False, True):
        method = Rect(base_settings={"layers": (1,), "shrink": shrink})
        assert workflow.needed_moments(lm, method, tmp_path / "text.txt").shrink == shrink  # type: ignore[attr-defined]
