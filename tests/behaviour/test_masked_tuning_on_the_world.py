"""KNE and CTP, as the presets have them, on an embedded model that knows its facts."""

import pytest

import retcon
from retcon import world


@pytest.fixture(scope="module")
def lm():
    return retcon.load("demo:llama")


@pytest.mark.parametrize("name", ["kne", "ctp"])
def test_a_few_facts_are_written_and_others_kept(name, lm):
    cases = world.cases(3, seed=0)
    method = retcon.method(name, for_model=lm)
    delta = method.propose(lm, [case.edits[0] for case in cases])
    assert all(report.stopped == "reached" for report in delta.report)
    summary = retcon.evaluate(lm, cases, delta=delta, generate=False).summary(n_resamples=2)
    assert summary["ES"].post.value == 1.0
    assert summary["GS"].post.value >= 0.3
    assert summary["LS"].post.value >= 0.5
    touched = sum(change.values().numel() for changes in delta.changes.values() for change in changes)
    assert touched <= 0.0105 * sum(parameter.numel() for parameter in lm.model.parameters())
