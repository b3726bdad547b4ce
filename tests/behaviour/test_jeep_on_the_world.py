"""JEEP on the embedded models with their own presets: does it take, generalise, stay local, and go away again?"""

import pytest

import retcon
from retcon import world
from retcon.evaluation import evaluate
from retcon.lm.fingerprint import fingerprint
from retcon.methods.common.choosing import method
from retcon.methods.common.presets import preset_for

N = 20


@pytest.fixture(scope="module", params=["llama", pytest.param("gptj", marks=pytest.mark.long)])
def edited(request):
    """(model, cases, delta, evaluation before and after) for 20 facts in one batch."""
    lm = retcon.load(f"demo:{request.param}")
    cases = world.cases(N, seed=5)
    jeep = method("jeep", for_model=lm)
    delta = jeep.propose(lm, [c.edits[0] for c in cases])
    return lm, cases, delta, evaluate(lm, cases, delta=delta, stops=(".", "\n"))


def value(summary, metric, when="post", variant=None):
    line = summary[(metric, variant) if variant else metric]
    return 100 * getattr(line, when).value


def test_before_the_edit_the_model_gives_the_old_answers(edited):
    summary = edited[3].summary()
    assert value(summary, "ES", "pre") <= 5
    assert value(summary, "GS", "pre") <= 5
    assert value(summary, "LS", "pre") >= 98


def test_edits_take_generalise_and_stay_local(edited):
    summary = edited[3].summary()
    assert value(summary, "ES") >= 90
    assert value(summary, "GS") >= 80
    assert value(summary, "LS") >= 88
    assert value(summary, "ES", variant="gen.em") >= 85


def test_the_report_says_how_each_search_ended(edited):
    _, cases, delta, _ = edited
    assert [r.id for r in delta.report] == [c.edits[0].id for c in cases]
    assert sum(r.stopped == "reached" for r in delta.report) >= 0.6 * N
    assert set(delta.provenance) >= {"method", "settings", "moments", "seed", "versions", "model"}
    assert delta.edits == tuple(c.edits[0] for c in cases)
    assert len(delta.contexts) > 1


def test_the_base_comes_back_bit_for_bit(edited):
    lm, cases, delta, _ = edited
    before = fingerprint(lm.model)
    assert lm.fingerprint() == delta.base
    prompt = cases[0].edits[0].text
    said = lm.complete(prompt, stops=(".",))
    lm.apply(delta)
    assert fingerprint(lm.model) != before
    lm.revert(delta)
    assert fingerprint(lm.model) == before
    assert lm.complete(prompt, stops=(".",)) == said


def test_both_halves_count(edited):
    """The paper's Table 4 in small: neither half alone does what both do together."""
    lm, cases, delta, _ = edited
    high = {lm.site(layer, "down_proj").name for layer in preset_for("jeep", lm).settings["high"]}
    halves = [
        lm.delta({n: c for n, c in delta.changes.items() if (n in high) == wanted}, report=delta.report)
        for wanted in (False, True)
    ]
    whole = value(edited[3].summary(), "Score")
    for half in halves:
        assert value(evaluate(lm, cases, delta=half, generate=False).summary(), "Score") < whole
