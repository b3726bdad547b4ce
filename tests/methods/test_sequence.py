"""Edits in steps: one delta, the same as step after step by hand."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close

from retcon.attachment import EditReport
from retcon.delta import Dense, Entries, LowRank, Region
from retcon.edits import Edit
from retcon.errors import ConflictingEdits, InvalidSetting
from retcon.methods.common.choosing import method
from retcon.methods.common.contract import Method, recorded
from retcon.methods.common.sequence import combined, in_steps
from tests.conftest import everyday, random_moments
from tests.methods.common import CONTEXTS, EASY, EASY_TOO, SEARCH

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight")
BASE = dict(layers=(0, 1), moment_weight=1.0) | SEARCH
METHODS = {
    "rome": dict(layer=1) | SEARCH,
    "r_rome": dict(layer=1) | SEARCH,
    "memit": BASE | dict(cache_keys=True),
    "alphaedit": dict(layers=(0, 1), null_threshold=0.6, threshold_mode="rank", ridge=0.5) | SEARCH,
    "rect": dict(base_method="memit", base_settings=BASE),
    "prune": dict(base_method="memit", base_settings=BASE | dict(moment_weight=1e-6, clamp=50.0)),
}


@pytest.mark.parametrize("name", everyday("rome", "memit", of=METHODS))
def test_one_delta_is_all_the_steps(name, tiny, edits, untouched):
    lm = tiny("llama")
    moments, chosen = random_moments(lm), method(name, **METHODS[name])
    before = untouched(lm)
    heard = []
    whole = in_steps(
        chosen, lm, edits, batch_size=1, contexts=CONTEXTS, moments=moments, progress=lambda *a: heard.append(a)
    )
    assert untouched(lm) == before
    assert heard == [("values", n, 4) for n in (1, 2, 3, 4)]
    state = None
    for edit in edits:
        step = chosen.propose(lm, [edit], contexts=CONTEXTS, moments=moments, state=state)
        lm.apply(step)
        state = step.state
    wanted = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    lm.revert_all()
    assert (whole.state is None) == (state is None)
    for key, value in (state or {}).items():
        assert_close(whole.state[key], value)
    assert whole.supersedes == ()
    assert whole.provenance["batch_size"] == 1
    assert [e.id for e in whole.edits] == [r.id for r in whole.report] == [e.id for e in edits]
    with lm.edited(whole):
        for n, parameter in lm.model.named_parameters():
            assert_close(parameter.detach(), wanted[n], rtol=1e-6, atol=1e-9)


def test_a_restraint_in_steps_replaces_what_was_live_before(tiny, edits):
    lm = tiny("llama")
    moments = random_moments(lm)
    first = method("memit", **BASE).propose(lm, edits[:1], contexts=CONTEXTS, moments=moments)
    lm.apply(first)
    whole = in_steps(
        method("prune", **METHODS["prune"]), lm, edits[1:], batch_size=1, contexts=CONTEXTS, moments=moments
    )
    assert whole.supersedes == (first.id,)
    lm.apply(whole)
    assert [d.id for d in lm.applied] == [whole.id]


@dataclass(frozen=True, kw_only=True)
class Counted(Method):
    """Counts the edits of all batches, and does not say so in `state_description`."""

    name: ClassVar[str] = "counted"

    def propose(self, lm, edits, *, state=None, seed=0, **given):
        n = torch.zeros(1) if state is None else state["n"]
        report = tuple(EditReport(e.id, 1.0, 0, "written") for e in edits)
        return lm.delta({}, report=report, state={"n": n + len(edits)}, **recorded(self, lm, edits, seed=seed))


class CountedNoMore(Counted):
    """Says that it keeps nothing."""

    state_description = ""


@pytest.mark.parametrize("over", [{}, {"base_method": f"{__name__}:Counted"}])
def test_a_method_of_ones_own_gets_its_state_back_without_a_description(over, tiny, edits):
    lm = tiny("llama")
    chosen = method("rect", **over) if over else Counted()
    assert in_steps(chosen, lm, edits[:3], batch_size=1, contexts=CONTEXTS).state["n"] == 3
    with pytest.raises(InvalidSetting, match=r"^counted keeps nothing between batches, but a state was given"):
        CountedNoMore().propose(lm, edits[:1], state={"n": torch.zeros(1)})


def test_all_at_once_is_one_proposal(tiny, edits):
    lm = tiny("llama")
    chosen, given = method("memit", **BASE), dict(contexts=CONTEXTS, moments=random_moments(lm))
    assert in_steps(chosen, lm, edits, **given) == chosen.propose(lm, edits, **given)
    assert not in_steps(chosen, lm, [], **given).changes
    assert not in_steps(method("rome", **METHODS["rome"]), lm, [], **given).changes


def test_batches_that_do_not_suit_are_refused(tiny, edits):
    lm = tiny("llama")
    with pytest.raises(InvalidSetting, match="batch_size 2: rome takes 1"):
        in_steps(method("rome", **METHODS["rome"]), lm, edits, batch_size=2)
    with pytest.raises(InvalidSetting, match="batch_size 0: memit takes any number from 1"):
        in_steps(method("memit", **BASE), lm, edits[:1], batch_size=0)
    with pytest.raises(InvalidSetting, match="batch_size -1: memit takes any number from 1"):
        in_steps(method("memit", **BASE), lm, edits, batch_size=-1)
    again = Edit(edits[0].prompt, edits[0].subject, "Milan", id="again")
    with pytest.raises(ConflictingEdits):
        in_steps(method("rome", **METHODS["rome"]), lm, [*edits, again])


def test_an_edit_that_a_later_one_undoes_is_a_conflict(tiny):
    """The report is of the end, not of each step."""
    lm = tiny("gpt2")
    settings = dict(layer=3, clamp=50.0, weight_decay=0.0, steps=60, kl_factor=0.0, stop="probability", threshold=0.1)
    report = in_steps(
        method("r_rome", **settings), lm, [EASY, EASY_TOO], contexts=CONTEXTS, moments=random_moments(lm)
    ).report
    assert [r.stopped for r in report] == ["reached", "reached"]
    assert [r.outcome for r in report] == ["conflict", "reached"]


def test_sums_of_changes_take_their_smallest_form(randn):
    low = [LowRank(left=randn(6, 1), right=randn(1, 8)) for _ in range(5)]
    full = sum(c.dense((6, 8)) for c in low)
    (two,) = combined(low[:2], torch.Size((6, 8)))
    assert isinstance(two, LowRank)
    (five,) = combined(low, torch.Size((6, 8)))
    assert isinstance(five, Dense)
    assert_close(five.full, full)
    entries = Entries(index=torch.tensor([3]), entries=randn(1))
    (mixed,) = combined([*low, entries], torch.Size((6, 8)))
    assert_close(mixed.dense((6, 8)), full + entries.dense((6, 8)))
    sliced = Dense(region=Region(0, 0, 3), full=randn(3, 8))
    assert combined([sliced, low[0]], torch.Size((6, 8))) == (sliced, low[0])
