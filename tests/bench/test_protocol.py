"""Protocols with a method that counts: what is edited when, what is measured with what in force, what is restored."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from retcon import world
from retcon.bench.protocol import n_units, run_protocol
from retcon.bench.spec import CURVE, DatasetSpec, ModelSpec, Protocol
from retcon.delta import Delta, Dense, EditReport
from retcon.edits import Case, Edit, Query
from retcon.errors import InvalidEdit, InvalidSetting, NonFinite, UnsupportedModel
from retcon.evaluation import Evaluation, Measures, evaluate
from retcon.lm.model import LM

Make = Callable[..., LM]
WEIGHT = "transformer.h.0.mlp.fc_out.weight"
QUIET = Measures(generate=False)
NAMES = ["France", "Italy", "Florence", "Milan", "Zürich"]
CASES = [
    Case(
        name,
        (Edit("The capital of {} is", name, "Rome", "Paris", id=name),),
        (
            Query("rewrite/0", "rewrite", f"The capital of {name} is", "Rome", "Paris"),
            Query("neighborhood/0", "neighborhood", f"He lived near {name} in", "Paris", "Rome"),
        ),
    )
    for name in NAMES
]


class Counting:
    """Adds noise named after the edits; remembers what was asked, and what was in force then."""

    def __init__(self, size: float = 0.3, fails: Sequence[int] = ()) -> None:
        self.size, self.fails = size, fails
        self.calls: list[tuple[list[str], int, Any]] = []

    def __call__(self, lm: LM, edits: Sequence[Edit], state: Mapping[str, torch.Tensor] | None) -> Delta:
        self.calls.append(([e.id for e in edits], len(lm.applied), state and int(state["n"])))
        if len(self.calls) - 1 in self.fails:
            raise NonFinite("the loss is NaN")
        seed = int.from_bytes(hashlib.sha256(repr([e.id for e in edits]).encode()).digest()[:4], "big")
        noise = torch.randn(lm.parameter(WEIGHT).shape, generator=torch.Generator().manual_seed(seed))
        return lm.delta(
            {WEIGHT: [Dense(full=self.size * noise.double())]},
            report=tuple(EditReport(e.id, 0.9, 3, "reached") for e in edits),
            state={"n": torch.tensor((int(state["n"]) if state else 0) + len(edits))},
        )


def final(found: Evaluation, *cases: str) -> list[Any]:
    """What was measured after the last edit, without what only the protocol decides."""
    return [
        (r.case_id, r.query_id, r.metric, r.variant, r.value, r.n, r.status)
        for r in found.records
        if r.when == "final" and (not cases or r.case_id in cases)
    ]


def run(lm: LM, protocol: Protocol, editor: Counting | None = None, cases: Sequence[Case] = CASES) -> Evaluation:
    return run_protocol(lm, cases, editor or Counting(), protocol, measures=QUIET)


def test_what_is_edited_when(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    for protocol, calls in (
        (Protocol(kind="single"), [([n], 0, None) for n in NAMES]),
        (Protocol(kind="batch"), [(NAMES, 0, None)]),
        (Protocol(kind="batch", batch=2), [(NAMES[:2], 0, None), (NAMES[2:4], 0, None), (NAMES[4:], 0, None)]),
        (Protocol(kind="sequential", n=3), [(NAMES[:1], 0, None), (NAMES[1:2], 1, 1), (NAMES[2:3], 2, 2)]),
        (Protocol(kind="batch_sequential", n=4, batch=2), [(NAMES[:2], 0, None), (NAMES[2:4], 1, 2)]),
    ):
        editor = Counting()
        found = run(lm, protocol, editor)
        assert editor.calls == calls
        n = protocol.n or len(CASES)
        assert {r.case_id for r in found.records if r.when == "final" and r.axis == "rewrite"} == set(NAMES[:n])
        assert {r.case_id for r in found.records if r.when == "pre"} == set(NAMES[:n])


def test_cases_are_checked_and_may_come_from_a_generator(tiny: Make) -> None:
    lm, protocol = tiny(n_layers=1), Protocol(kind="single")
    found = run_protocol(lm, iter(CASES), Counting(), protocol, measures=QUIET)
    assert final(found) == final(run(lm, protocol))
    for given, message in (
        (CASES[0], r"one case given where a list of them is wanted: \[case\]"),
        (CASES[0].edits, "Edit given where a Case is wanted"),
    ):
        with pytest.raises(InvalidEdit, match=message):
            run_protocol(lm, given, Counting(), protocol, measures=QUIET)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="given where an LM is wanted"):
        run_protocol(lm.model, CASES, Counting(), protocol, measures=QUIET)
    for pre, message in (([], "pre must be what evaluate returned"), (Evaluation([]), "lacks .* of .* queries")):
        with pytest.raises(InvalidSetting, match=message):
            run_protocol(lm, CASES, Counting(), protocol, measures=QUIET, pre=pre)  # type: ignore[arg-type]


def test_a_curve_is_run_point_by_point(tiny: Make) -> None:
    with pytest.raises(InvalidSetting, match=r"one run for each point.*protocol\.parts"):
        run(tiny(n_layers=1), Protocol(kind="curve", ns=(1, 2)))


def n_texts(case: Case, texts: Mapping[str, str], unedited: Mapping[str, str]) -> dict[str, float]:
    """A metric of one's own."""
    return {"texts": len(texts)}


@pytest.mark.parametrize("kind", ["single", "batch", "sequential", "batch_sequential"])
def test_a_metric_of_ones_own_is_measured_where_the_model_writes(kind: Any, tiny: Make) -> None:
    lm, measures = tiny(n_layers=1), Measures(metrics=(f"{__name__}:n_texts",), max_new_tokens=2)
    found = run_protocol(lm, CASES[:2], Counting(), Protocol(kind=kind), measures=measures)
    own = [(r.when, r.case_id, r.value) for r in found.records if r.variant == f"{__name__}:n_texts"]
    assert own == [(when, name, 1) for when in ("pre", "final") for name in NAMES[:2]]


def test_single_is_batch_of_one_and_a_sequence_of_one_its_first(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    single = final(run(lm, Protocol(kind="single")))
    assert single == final(run(lm, Protocol(kind="batch", batch=1)))
    assert final(run(lm, Protocol(kind="sequential", n=1))) == [r for r in single if r[0] == NAMES[0]]
    assert final(run(lm, Protocol(kind="batch_sequential", batch=5))) == final(run(lm, Protocol(kind="batch")))


def test_final_is_measured_with_all_edits_and_immediate_with_those_so_far(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    found = run(lm, Protocol(kind="sequential", n=3, checkpoints=(2,)))
    deltas: list[Delta] = []
    editor = Counting()
    for step, case in enumerate(CASES[:3]):
        deltas.append(editor(lm, case.edits, deltas[-1].state if deltas else None))
        lm.apply(deltas[-1])
        now = evaluate(lm, CASES[: step + 1], generate=False).records
        here = {(r.case_id, r.query_id, r.variant): r.value for r in now if r.variant.startswith("cf.")}
        for when, cases in (("immediate", [case]), ("checkpoint", CASES[:2]), ("final", CASES[:3])):
            told = {
                (r.case_id, r.query_id, r.variant): r.value
                for r in found.records
                if r.when == when and r.step == step and r.variant.startswith("cf.")
            }
            expected = when == "immediate" or step == {"checkpoint": 1, "final": 2}[when]
            wanted = {k: v for k, v in here.items() if k[0] in {c.id for c in cases}} if expected else {}
            assert told == pytest.approx(wanted)
    lm.revert_all()


def test_agreement_is_with_the_unedited_model(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    found = run(lm, Protocol(kind="sequential", n=3), Counting(size=0.0))
    values = {r.value for r in found.records if r.variant == "ee.loc.argmax"}
    assert values == {1}
    assert final(found) == [
        (r.case_id, r.query_id, r.metric, r.variant, r.value, r.n, r.status) for r in found.records if r.when == "pre"
    ]


@pytest.mark.parametrize("kind", ["single", "batch", "sequential", "batch_sequential"])
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_the_base_comes_back(
    kind: Any, error: type[BaseException] | None, tiny: Make, untouched: Callable[[LM], Any]
) -> None:
    lm = tiny(n_layers=1)
    look = untouched(lm)
    editor = Counting()

    def propose(lm: LM, edits: Sequence[Edit], state: Any) -> Delta:
        if error is not None and len(editor.calls) == (0 if kind == "batch" else 2):
            raise error
        return editor(lm, edits, state)

    if error is None:
        run_protocol(lm, CASES, propose, Protocol(kind=kind), measures=QUIET)
    else:
        with pytest.raises(error):
            run_protocol(lm, CASES, propose, Protocol(kind=kind), measures=QUIET)
    assert untouched(lm) == look


def test_a_method_that_fails_is_recorded_and_the_run_goes_on(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    found = run(lm, Protocol(kind="sequential", n=3), Counting(fails=[1]))
    told = {r.case_id: (r.status, r.value, r.detail) for r in found.records if r.axis == "edit"}
    assert told["France"] == ("ok", 0.9, "reached")
    assert told["Italy"] == ("error", None, "NonFinite: the loss is NaN")
    assert {r.case_id for r in found.records if r.when == "final"} == set(NAMES[:3])


@pytest.mark.parametrize("kind", ["single", "batch", "sequential", "batch_sequential"])
def test_cases_whose_edit_fails_are_measured_on_the_model_as_it_is(kind: Any, tiny: Make) -> None:
    """A method that fails on three cases of four is not perfect because it succeeds on the fourth."""
    lm = tiny(n_layers=1)
    batch = 2 if kind in ("batch", "batch_sequential") else None
    found = run(
        lm, Protocol(kind=kind, n=4, batch=batch, checkpoints=(2,) if "seq" in kind else ()), Counting(fails=range(9))
    )
    unedited = [(r.case_id, r.query_id, r.variant, r.value) for r in found.records if r.when == "pre"]
    assert [r[:2] + r[3:5] for r in final(found)] == unedited
    moments = {"pre", "immediate", "final"} | ({"checkpoint"} if "seq" in kind else set())
    for when in moments:
        assert {r.case_id for r in found.records if r.when == when} == set(NAMES[: 2 if when == "checkpoint" else 4])
    summary = found.summary(n_resamples=10)
    assert summary["ES"].post.n == summary["ES"].pre.n == 4  # type: ignore[union-attr]
    assert summary.counts["failed_edits"] == 4
    assert "failed edits 4" in summary.table()
    some = run(lm, Protocol(kind=kind, n=4, batch=batch), Counting(fails=[0]))
    assert some.summary(n_resamples=10)["ES"].post.n == 4  # type: ignore[union-attr]
    assert some.summary(n_resamples=10).counts["failed_edits"] == (2 if batch else 1)


def test_a_batch_of_a_curve_that_fails_is_measured_whole(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    measures = Measures(generate=False, divergence=True)
    found = run_protocol(lm, CASES, Counting(fails=[0]), Protocol(kind="batch", batch=3), measures=measures)
    assert {r.value for r in found.records if r.variant == "loc.kl" and r.case_id in NAMES[:3]} == {0}
    assert all(r.value for r in found.records if r.variant == "loc.kl" and r.case_id in NAMES[3:])


@pytest.mark.parametrize("kind", ["batch", "sequential"])
def test_a_change_that_the_weights_cannot_hold_is_a_failed_edit(kind: Any, tiny: Make) -> None:
    lm = tiny(dtype=torch.float32, n_layers=1)
    found = run(lm, Protocol(kind=kind, n=2), Counting(size=1e39))
    told = {(r.status, str(r.detail).partition(":")[0]) for r in found.records if r.axis == "edit"}
    assert told == {("error", "NonFinite")}
    assert {r.case_id for r in found.records if r.when == "final"} == set(NAMES[:2])
    assert not lm.applied


def test_an_edit_without_its_subject_is_skipped_and_said(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    lost = Case("lost", (Edit("Here is", "nobody", "x", id="lost"),), (Query("rewrite/0", "rewrite", "Here is", "x"),))
    editor = Counting()
    found = run(lm, Protocol(kind="batch"), editor, [*CASES[:2], lost])
    assert editor.calls == [(NAMES[:2], 0, None)]
    (told,) = (r for r in found.records if r.case_id == "lost" and r.when != "pre")
    assert (told.status, told.detail) == ("skipped", "subject 'nobody' does not occur in the prompt")
    assert found.summary(n_resamples=10).counts["skipped_edits"] == 1


def test_an_edit_asked_for_twice_is_made_once(tiny: Make) -> None:
    twice = Case("again", (Edit("The capital of {} is", "France", "Rome", id="again"),), CASES[0].queries)
    editor = Counting()
    found = run(tiny(n_layers=1), Protocol(kind="batch"), editor, [CASES[0], twice])
    assert editor.calls == [(["France"], 0, None)]
    assert {r.case_id for r in found.records if r.when == "final"} == {"France", "again"}


def test_time_and_memory_are_told_apart_from_the_records(tiny: Make) -> None:
    found = run(tiny(n_layers=1), Protocol(kind="batch", batch=2))
    timings = found.context["timings"]
    assert [(r.variant, r.n, r.detail) for r in timings if r.variant == "time.edit"] == [
        ("time.edit", 2, None),
        ("time.edit", 2, None),
        ("time.edit", 1, "short chunk: 1 of 2"),
    ]
    assert all(r.value >= 0 for r in timings)
    assert {r.variant for r in timings} >= {"time.edit", "time.statistics"}
    assert not [r for r in found.records if r.variant.startswith(("time.", "memory."))]


def test_divergence_is_measured_where_it_is_asked_for(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    measures = Measures(generate=False, divergence=True)
    found = run_protocol(lm, CASES, Counting(), Protocol(kind="sequential", n=2), measures=measures)
    told = [r for r in found.records if r.variant == "loc.kl"]
    assert {r.when for r in told} == {"immediate", "final"}
    assert all(r.value is not None and r.value > 0 for r in told)


def test_the_points_of_a_curve() -> None:
    assert CURVE == (1, 2, 3, 6, 10, 18, 32, 56, 100, 178, 316, 562, 1000, 1778, 3162, 5623, 10000)
    parts = Protocol(kind="curve").parts(2000)
    assert [p.batch for p in parts] == [n for n in CURVE if n <= 2000]
    assert {p.kind for p in parts} == {"batch"}
    assert [p.n for p in parts] == [1000] * 13 + [1778]
    assert [p.n for p in Protocol(kind="curve", ns=(1, 10), records_per_point=20).parts(15)] == [15, 15]
    points = Protocol(kind="curve", ns=(1, 10, 100), records_per_point=20).parts(500)
    assert [(p.n, p.batch) for p in points] == [(20, 1), (20, 10), (100, 100)], "a point of 100 edits has all 100"
    assert Protocol(kind="batch").parts(7) == [Protocol(kind="batch")]


def test_n_bounds_the_points_of_a_curve_and_their_cases() -> None:
    parts = Protocol(kind="curve", n=20).parts(500)
    assert [(p.n, p.batch) for p in parts] == [(20, n) for n in (1, 2, 3, 6, 10, 18)]
    with pytest.raises(InvalidSetting, match="asks for 20 cases, the dataset has 7"):
        Protocol(kind="curve", n=20).parts(7)
    with pytest.raises(InvalidSetting, match="a curve from 10 edits on has no point in 7 cases"):
        Protocol(kind="curve", ns=(100, 10)).parts(7)


def test_checkpoints_are_looked_at_where_batches_end() -> None:
    protocol = Protocol(kind="batch_sequential", batch=2, checkpoints=(2, 5))  # 5 is the end, or nothing
    assert protocol.sizes(5) == (5, 2)
    with pytest.raises(InvalidSetting, match="checkpoint 5 is inside a batch of 2"):
        protocol.sizes(6)
    with pytest.raises(InvalidSetting, match="checkpoint 5 is beyond the 4 cases"):
        protocol.sizes(4)


def test_sizes_and_units() -> None:
    assert Protocol(kind="batch").sizes(7) == (7, 7)
    assert Protocol(kind="batch", n=5, batch=2).sizes(7) == (5, 2)
    assert n_units(Protocol(kind="batch", n=5, batch=2), 5) == 3
    assert n_units(Protocol(kind="sequential", n=5), 5) == 6
    with pytest.raises(InvalidSetting, match="asks for 9 cases, the dataset has 7"):
        Protocol(n=9).sizes(7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="parallel"), "unknown protocol 'parallel'"),
        (dict(n=0), "n must be at least 1"),
        (dict(kind="batch", checkpoints=(1,)), "has no checkpoints"),
        (dict(kind="single", batch=2), "edits one case at a time"),
        (dict(kind="curve", batch=5), "a curve's batches are its points"),
        (dict(kind="curve", ns=()), "a curve needs a point"),
        (dict(kind="batch", ns=(1, 2)), "ns are the points of a curve, found with kind='batch'"),
        (dict(kind="sequential", records_per_point=9), "records_per_point is a curve's, found with kind='sequential'"),
        (dict(kind="sequential", n=3, checkpoints=(2, 4)), r"checkpoint 4 is beyond the 3 cases"),
        (dict(kind="batch_sequential", n=6, batch=2, checkpoints=(2, 3)), r"checkpoint 3 is inside a batch of 2"),
    ],
)
def test_protocols_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        Protocol(**fields)


def test_a_run_starts_from_the_base(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    lm.apply(Counting()(lm, CASES[0].edits, None))
    with pytest.raises(InvalidSetting, match="a run starts from the base"):
        run(lm, Protocol())


def test_the_worlds_cases_run_too(tiny: Make) -> None:
    found = run(tiny(n_layers=1), Protocol(kind="single", n=1), cases=world.cases(2))
    assert {r.when for r in found.records} == {"pre", "immediate", "final"}


def test_paths_in_a_specification_are_text() -> None:
    assert DatasetSpec(path=Path("facts/mine.jsonl")) == DatasetSpec(path="facts/mine.jsonl")  # type: ignore[arg-type]
    assert ModelSpec(name=Path("models/mine")) == ModelSpec(name="models/mine")  # type: ignore[arg-type]
