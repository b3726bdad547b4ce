"""Benchmarks with a counting method on a tiny model: ended at every point, they go on to the same bytes."""

import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from retcon.bench import (
    BenchSpec,
    DatasetSpec,
    MethodSpec,
    ModelSpec,
    estimate,
    pieces,
    read_bench,
    run_bench,
    spec_from_file,
)
from retcon.bench import run as running
from retcon.bench.duration import N_PROBED
from retcon.bench.inputs import read_inputs
from retcon.bench.manifest import differences, measures_record
from retcon.bench.report.write import write_report
from retcon.bench.spec import MEASURE_FILES, MeasureSpec, Protocol
from retcon.bench.units import Units
from retcon.delta import Delta, Dense
from retcon.edits import Case, Edit, write_cases
from retcon.errors import InvalidSetting, MalformedFile, NonFinite, RetconWarning, UnsupportedModel
from retcon.evaluation import Measures
from retcon.evaluation.asking import Outputs
from retcon.evaluation.plan import plan_queries
from retcon.evaluation.recording import compute_records
from retcon.lm.model import LM
from retcon.methods.common.contract import Method
from retcon.methods.common.registry import method_class
from tests.bench.test_protocol import CASES, Counting
from tests.conftest import everyday, random_moments

PROTOCOLS = (
    Protocol(kind="batch", n=4, batch=2),
    Protocol(kind="sequential", n=3, checkpoints=(2,)),
)


@pytest.fixture
def spec(tmp_path: Path, tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch) -> BenchSpec:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    write_cases(tmp_path / "cases.jsonl", CASES)
    (tmp_path / "text.txt").write_text("The capital of France is Paris. The train stood still, and he read.")
    monkeypatch.setattr(running, "load_model", lambda name, **_: tiny(n_layers=1))
    return BenchSpec(
        name="test",
        models=(ModelSpec(name="./tiny", corpus=str(tmp_path / "text.txt")),),
        methods=(noise(),),
        datasets=(DatasetSpec(path=str(tmp_path / "cases.jsonl"), order="shuffle"),),
        protocols=PROTOCOLS,
        measures=MeasureSpec(max_new_tokens=3),
        text=str(tmp_path / "text.txt"),
    )


def noise(label: str = "noise", **settings: float) -> MethodSpec:
    """The method below, by its place: it is in no table."""
    return MethodSpec(name=f"{__name__}:NoiseSettings", label=label, settings=settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSettings(Method):
    """Adds noise."""

    name: ClassVar[str] = "noise"
    size: float = 0.3
    uses_moments = True

    def propose(
        self, lm: LM, edits: Sequence[Edit], *, contexts: Any = None, moments: Any, state: Any = None, **rest: Any
    ) -> Delta:
        ACTING.calls += 1
        if ACTING.stop_at == ACTING.calls:
            raise KeyboardInterrupt
        return Counting(self.size)(lm, edits, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Breaking(Method):
    """Writes finite weights whose products are not."""

    name: ClassVar[str] = "breaking"

    def propose(self, lm: LM, edits: Sequence[Edit], **rest: Any) -> Delta:
        signs = torch.randn(lm.parameter("lm_head.weight").shape, generator=torch.Generator().manual_seed(0)).sign()
        return lm.delta({"lm_head.weight": [Dense(full=3e38 * signs.double())]})


class Acting:
    calls = 0
    stop_at: int | None = None


ACTING = Acting()


@pytest.fixture(autouse=True)
def fresh() -> None:
    ACTING.calls, ACTING.stop_at = 0, None


def results(directory: Path) -> dict[str, bytes]:
    """All files that must not depend on how the run went."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for name in ("records.jsonl", "texts.jsonl", "cases.jsonl")
        for path in sorted(directory.glob(f"runs/*/{name}"))
    }


def test_a_run_leaves_records_texts_timings_and_a_manifest(spec: BenchSpec, tmp_path: Path) -> None:
    run_bench(spec, tmp_path / "out")
    bench = read_bench(tmp_path / "out")
    assert bench.name == "test"
    assert bench.unfinished == ()
    assert [run.manifest["protocol"]["kind"] for run in bench.runs] == ["batch", "sequential"]
    batch, sequence = bench.runs
    assert batch.context["edit_batch"] == 2
    assert {r.when for r in sequence.records} == {"pre", "immediate", "checkpoint", "final"}
    assert len(batch.manifest["cases"]) == 4
    assert batch.manifest["method"]["settings"] == {"size": 0.3}
    assert {r.variant for r in batch.timings} >= {"time.load", "time.edit"}
    ppl = [r for r in sequence.records if r.metric == "perplexity"]
    assert {(r.when, r.variant) for r in ppl} == {
        (when, variant)
        for when in ("pre", "checkpoint", "final")
        for variant in ("ppl.value", "ppl.ratio", "ppl.nll_change")
    }
    assert {r.value for r in ppl if r.when == "pre" and r.variant == "ppl.ratio"} == {1}
    assert {row["when"] for row in batch.texts} == {"pre", "final"}
    assert batch.environment["command"]
    text = json.dumps(bench.environment)
    assert "HOME" not in text
    order = [run.manifest["cases"] for run in bench.runs]
    assert order[1] == order[0][:3]  # the same draw, nested
    assert order[0] != [c.id for c in CASES[:4]]


@pytest.mark.parametrize("within", everyday(True, of=[False, True]), ids=["between units", "inside a method's call"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(spec: BenchSpec, tmp_path: Path, within: bool) -> None:
    spec = dataclasses.replace(spec, warm_up=False)
    run_bench(spec, tmp_path / "whole")
    wanted, n_calls = results(tmp_path / "whole"), ACTING.calls
    assert len(wanted) == 6
    for stop in range(1, n_calls + 1):
        place, heard = tmp_path / f"stopped-{stop}", 0
        ACTING.calls, ACTING.stop_at = 0, stop if within else None

        def watch(event: Any, stop: int = stop) -> None:
            nonlocal heard
            heard += event.done > 0 and event.evaluation is None
            if heard == stop and not within:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_bench(spec, place, watch=watch)
        ACTING.stop_at = None
        run_bench(spec, place)
        assert results(place) == wanted, stop


def test_an_interrupted_run_with_failed_edits_goes_on_to_the_same_bytes(
    spec: BenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pieces.in_steps

    def failing(method: Any, lm: LM, edits: Sequence[Edit], **rest: Any) -> Any:
        delta = real(method, lm, edits, **rest)
        if any(edit.id in ("Italy", "Milan") for edit in edits):
            raise NonFinite("the loss is NaN")
        return delta

    monkeypatch.setattr(pieces, "in_steps", failing)
    spec = dataclasses.replace(spec, warm_up=False, protocols=(Protocol(kind="sequential", checkpoints=(1, 2, 4)),))
    run_bench(spec, tmp_path / "whole")
    wanted, n_calls = results(tmp_path / "whole"), ACTING.calls
    (run,) = read_bench(tmp_path / "whole").runs
    assert {r.case_id for r in run.records if r.axis == "edit" and r.status == "error"} == {"Italy", "Milan"}
    assert len({r.case_id for r in run.at("immediate") if r.axis == "rewrite"}) == len(CASES)
    for stop in range(1, n_calls + 1):
        ACTING.calls, ACTING.stop_at = 0, stop
        with pytest.raises(KeyboardInterrupt):
            run_bench(spec, tmp_path / f"stopped-{stop}")
        ACTING.stop_at = None
        run_bench(spec, tmp_path / f"stopped-{stop}")
        assert results(tmp_path / f"stopped-{stop}") == wanted, stop


def test_a_method_for_one_fact_makes_a_batch_one_by_one(
    spec: BenchSpec, tmp_path: Path, tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "load_model", lambda name, **_: tiny(n_layers=2))  # a layer above what is written
    rome = MethodSpec(name="rome", settings={"layer": 0, "steps": 2, "use_moment": False})
    spec = dataclasses.replace(spec, methods=(rome,), protocols=(Protocol(kind="batch", n=4),), text=None)
    run_bench(spec, tmp_path / "out")
    (run,) = read_bench(tmp_path / "out").runs
    edits = [r for r in run.records if r.axis == "edit"]
    assert [(r.status, r.detail) for r in edits] == [("ok", "steps")] * 4
    (found,) = estimate(spec, tmp_path / "elsewhere")
    assert found.seconds_edit == pytest.approx((found.seconds_call + 3 * found.seconds_more) / 4)
    (found,) = estimate(spec, tmp_path / "out")
    assert found.finished_before
    assert found.seconds == 0


def test_an_estimate_leaves_out_what_a_run_leaves_out(spec: BenchSpec, tmp_path: Path) -> None:
    long = Edit("word " * 3000 + "{} is", "Norway", "Rome", "Oslo")
    other = dataclasses.replace(CASES[0].edits[0], target_new="Oslo", id="other")
    rows = [Case(f"long {i}", (dataclasses.replace(long, id=str(i)),), ()) for i in range(N_PROBED)]
    rows += [*CASES[:2], Case("other", (other,), CASES[0].queries)]
    write_cases(tmp_path / "cases.jsonl", rows)
    (dataset,) = spec.datasets
    alone = (Protocol(kind="single"),)
    spec = dataclasses.replace(
        spec, datasets=(dataclasses.replace(dataset, order="file", conflicts="keep"),), protocols=alone, text=None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warm-up edit is one that can be made
        run_bench(spec, tmp_path / "out")
    edits = [(r.case_id, r.status) for r in read_bench(tmp_path / "out").runs[0].records if r.axis == "edit"]
    assert ("long 0", "skipped") in edits
    assert edits[-3:] == [("France", "ok"), ("Italy", "ok"), ("other", "ok")]
    assert [found.n_cases for found in estimate(spec, tmp_path / "elsewhere")] == [len(rows)]


@pytest.mark.parametrize("label", ["fine tuning " * 30, "微调方法" * 30], ids=["ascii", "cjk"])
def test_a_long_label_is_cut_in_the_folder_s_name(spec: BenchSpec, tmp_path: Path, label: str) -> None:
    spec = dataclasses.replace(spec, methods=(noise(label),), protocols=PROTOCOLS[:1])
    run_bench(spec, tmp_path / "out")
    (run,) = read_bench(tmp_path / "out").runs
    assert run.context["method"] == label
    assert len(run.directory.name.encode()) <= 209
    report = write_report(tmp_path / "out", pictures=False)
    assert all((report.directory / f"{table.name}.csv").is_file() for table in report.tables)


def test_a_corpus_is_a_file_or_a_dataset(spec: BenchSpec) -> None:
    asked = lambda corpus: dataclasses.replace(spec, models=(ModelSpec(name="./tiny", corpus=corpus),))  # noqa: E731
    read_inputs(asked("org/texts:plain"))
    with pytest.raises(MalformedFile, match=r"gone\.txt: no such file"):
        read_inputs(asked("gone.txt"))


def test_shared_values_are_searched_once_and_change_nothing(
    spec: BenchSpec, tmp_path: Path, tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "load_model", lambda name, **_: tiny(n_layers=2))  # a layer above what is written
    monkeypatch.setattr(running, "moments_for", lambda lm, corpus: random_moments(tiny(n_layers=2)))
    own = {"layers": (0,), "steps": 3, "clamp": 0.75, "moment_weight": 15_000.0}
    methods = (MethodSpec(name="memit", settings=own), MethodSpec(name="rect", settings={"base_settings": own}))
    alone = dataclasses.replace(spec, methods=methods, protocols=(Protocol(n=4, batch=2),), text=None)
    run_bench(alone, tmp_path / "alone")
    run_bench(dataclasses.replace(alone, share_values=True), tmp_path / "shared")
    assert results(tmp_path / "shared") == results(tmp_path / "alone")
    timed = {
        place: [
            [r.status for r in run.timings if r.variant == "time.edit"] for run in read_bench(tmp_path / place).runs
        ]
        for place in ("alone", "shared")
    }
    assert timed == {"alone": [["ok"] * 2] * 2, "shared": [["ok"] * 2, ["skipped"] * 2]}
    assert not (tmp_path / "shared" / "values").exists()


@pytest.mark.parametrize(
    "protocols",
    [
        (Protocol(n=2), Protocol(n=2, batch=2)),
        (Protocol(), Protocol(n=len(CASES))),
        (Protocol(batch=1), Protocol(kind="curve", ns=(1, 2))),
        (Protocol(kind="batch_sequential"), Protocol(kind="batch_sequential", batch=1, checkpoints=(5,))),
        (Protocol(kind="sequential", checkpoints=(1, 2)), Protocol(kind="sequential", checkpoints=(2, 1, 2))),
    ],
)
def test_one_run_in_two_wordings_is_refused(spec: BenchSpec, tmp_path: Path, protocols: tuple[Protocol, ...]) -> None:
    for twice in (protocols, protocols[::-1]):
        with pytest.raises(InvalidSetting, match="dataset 'cases': two protocols are one run"):
            run_bench(dataclasses.replace(spec, protocols=twice), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_protocol_in_other_words_is_the_same_run(spec: BenchSpec, tmp_path: Path) -> None:
    run_bench(dataclasses.replace(spec, protocols=(Protocol(n=5),)), tmp_path / "out")
    found: list[bool] = []
    other = dataclasses.replace(spec, protocols=(Protocol(batch=5),))
    run_bench(other, tmp_path / "out", force=True, watch=lambda event: found.append(event.finished_before))
    assert found == [True]


def test_a_finished_run_is_not_run_again(spec: BenchSpec, tmp_path: Path) -> None:
    run_bench(spec, tmp_path / "out")
    before, ACTING.calls = results(tmp_path / "out"), 0
    events: list[Any] = []
    run_bench(spec, tmp_path / "out", watch=events.append)
    assert ACTING.calls == 0
    assert [e.finished_before for e in events] == [True, True]
    assert results(tmp_path / "out") == before


def test_a_start_that_is_stopped_keeps_the_list_of_finished_runs(spec: BenchSpec, tmp_path: Path) -> None:
    run_bench(spec, tmp_path / "out")
    listed = (tmp_path / "out" / "runs.json").read_bytes()
    for kind in ("batch", "sequential"):

        def stop(event: Any, kind: str = kind) -> None:
            if event.cell.protocol.kind == kind:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_bench(spec, tmp_path / "out", watch=stop)
        assert (tmp_path / "out" / "runs.json").read_bytes() == listed
    first, _ = read_bench(tmp_path / "out").runs
    shutil.rmtree(first.directory)
    with pytest.raises(KeyboardInterrupt):
        run_bench(spec, tmp_path / "out", watch=stop)
    assert [run.directory for run in read_bench(tmp_path / "out").runs] == [first.directory]


def test_the_unedited_model_is_measured_once_for_all(
    spec: BenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retcon.bench import unedited

    looked: list[int] = []
    real = unedited.measure
    monkeypatch.setattr(
        unedited, "measure", lambda lm, plan, *a: (looked.append(len(plan.cases)), real(lm, plan, *a))[1]
    )
    both = dataclasses.replace(
        spec,
        methods=(noise(), noise("more", size=0.5)),
    )
    run_bench(both, tmp_path / "one")
    assert looked == [4, 3]
    run_bench(both, tmp_path / "two")
    assert looked == [4, 3]
    assert results(tmp_path / "one") == results(tmp_path / "two")
    for file in (tmp_path / "cache" / "pre").glob("*.safetensors"):
        file.write_text("{")
    with pytest.warns(RetconWarning, match="not a readable file of records of an unedited model"):
        run_bench(both, tmp_path / "three")
    assert looked == [4, 3, 4, 3]
    assert results(tmp_path / "three") == results(tmp_path / "one")


OWN = """
from datetime import date

from tests.bench.test_bench import NoiseSettings

class Own(NoiseSettings):
    size_of_mine = {size}

def facts(row):
    unused = {{"on": date(2026, 1, 2), "tags": {{"a", "b", "c"}}, "pairs": {{(1, 2): 3}}}}
    return {{"id": row["n"], "prompt": {prompt!r}, "subject": row["who"], "target_new": "Rome", **unused}}

def metric(case, texts, unedited):
    return {{"m": {value}}}
"""


@pytest.fixture
def own_code(tmp_path: Path, spec: BenchSpec, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BenchSpec]:
    """Write a method, a format and a metric of one's own, or write them again; returns a benchmark that uses them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    rows = [{"n": str(i), "who": who} for i, who in enumerate(("France", "Milan"))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def write(prompt: str = "The capital of {} is", value: float = 0.25, size: float = 0.3) -> BenchSpec:
        (tmp_path / "own_of_tests.py").write_text(OWN.format(prompt=prompt, value=value, size=size))
        monkeypatch.delitem(sys.modules, "own_of_tests", raising=False)
        return dataclasses.replace(
            spec,
            methods=(MethodSpec(name="own_of_tests:Own"),),
            datasets=(DatasetSpec(path="rows.json", format="own_of_tests:facts"),),
            protocols=(Protocol(kind="batch"),),
            measures=MeasureSpec(max_new_tokens=1, metrics=("own_of_tests:metric",)),
            text=None,
        )

    return write


def test_the_unedited_model_is_measured_again_once_a_format_or_a_metric_is_another(
    own_code: Callable[..., BenchSpec], tmp_path: Path
) -> None:
    def before(place: str, **code: Any) -> tuple[list[str], set[float | None]]:
        run_bench(own_code(**code), tmp_path / place)
        (run,) = read_bench(tmp_path / place).runs
        texts = [row["text"] for row in run.texts if row["when"] == "pre"]
        return texts, {r.value for r in run.at("pre") if r.variant == "own_of_tests:metric"}

    texts, _ = before("first")
    assert before("another metric", value=0.75) == (texts, {0.75})
    other, _ = before("another format", prompt="He saw {} and")
    shutil.rmtree(tmp_path / "cache")
    assert before("anew", prompt="He saw {} and") == (other, {0.25})
    assert other != texts


@pytest.mark.parametrize(
    "method",
    [
        MethodSpec(name="own_of_tests:Own"),
        MethodSpec(name="rect", settings={"base_method": "own_of_tests:Own"}),
    ],
    ids=["own", "own below ours"],
)
def test_a_run_whose_own_code_changed_is_begun_anew(
    own_code: Callable[..., BenchSpec], tmp_path: Path, method: MethodSpec
) -> None:
    def runs(**code: Any) -> list[bool]:
        found: list[bool] = []
        spec = dataclasses.replace(own_code(**code), methods=(method,))
        run_bench(spec, tmp_path / "out", watch=lambda event: found.append(event.finished_before))
        return found

    def own_values() -> set[float | None]:
        return {r.value for run in read_bench(tmp_path / "out").runs for r in run.records if r.metric == "m"}

    runs()
    assert runs() == [True]
    assert not any(runs(size=0.5))
    assert not any(runs(value=0.75))
    assert own_values() == {0.75}
    assert runs() == [True]
    with pytest.raises(InvalidSetting, match=r"another benchmark; differing:\n  datasets\.rows: "):
        runs(prompt="He saw {} and")


def test_a_stopped_run_that_was_replaced_is_not_named_as_unfinished(
    own_code: Callable[..., BenchSpec], tmp_path: Path
) -> None:
    def unfinished(spec: BenchSpec, **how: Any) -> int:
        run_bench(spec, tmp_path / "out", **how)
        return len(read_bench(tmp_path / "out").unfinished)

    def stop(event: Any) -> None:
        if event.cell.protocol.kind == "sequential":
            raise KeyboardInterrupt

    def two(**code: Any) -> BenchSpec:
        spec = own_code(**code)
        return dataclasses.replace(spec, protocols=(*spec.protocols, Protocol(kind="sequential")))

    with pytest.raises(KeyboardInterrupt):
        run_bench(two(), tmp_path / "out", watch=stop)
    assert len(read_bench(tmp_path / "out").unfinished) == 1
    assert unfinished(two(value=0.75)) == 0
    assert unfinished(two()) == 0
    assert len(read_bench(tmp_path / "out").runs) == 2
    with pytest.raises(KeyboardInterrupt):
        run_bench(two(size=0.5), tmp_path / "out", watch=stop)
    assert unfinished(own_code(), force=True) == 0


def test_another_benchmark_in_the_directory_is_refused_with_what_differs(spec: BenchSpec, tmp_path: Path) -> None:
    run_bench(spec, tmp_path / "out")
    other = dataclasses.replace(spec, seeds=(1,), methods=(noise(size=0.2),))
    with pytest.raises(InvalidSetting) as caught:
        run_bench(other, tmp_path / "out")
    text = str(caught.value)
    assert "spec.seeds: [0] -> [1]" in text
    assert "spec.methods[0].settings.size: null -> 0.2" in text
    assert text.endswith("(what is there is kept beside it): force=True")
    run_bench(other, tmp_path / "out", force=True)
    assert len(list((tmp_path / "out").glob("manifest-*.json"))) == 1
    assert {run.manifest["seed"] for run in read_bench(tmp_path / "out").runs} == {1}
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 4


def test_records_of_another_version_say_which_wrote_them(
    spec: BenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_bench(spec, tmp_path)
    run = read_bench(tmp_path).runs[0]
    records = run.directory / "records.jsonl"
    records.write_text(records.read_text().replace('"query_id"', '"query"'))
    with pytest.raises(MalformedFile) as same:
        read_bench(tmp_path).runs[0].at("pre")
    assert "run it again" not in str(same.value)
    made_by = run.manifest["versions"]["retcon"]
    monkeypatch.setattr("retcon.bench.directory.__version__", "99.0")
    with pytest.raises(MalformedFile, match=f"retcon {made_by} wrote this benchmark and this is 99.0"):
        read_bench(tmp_path).runs[0].at("pre")


def test_a_machine_that_changed_is_said(spec: BenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_bench(spec, tmp_path / "out")
    monkeypatch.setattr(running, "environment", lambda command: {"threads": 99, "command": "x"})
    with pytest.warns(RetconWarning, match="the machine is not as it was"):
        run_bench(spec, tmp_path / "out")


def test_kept_tokens_give_the_records_again(spec: BenchSpec, tmp_path: Path, tiny: Callable[..., LM]) -> None:
    spec = dataclasses.replace(
        spec, keep_tokens=True, keep_text=False, protocols=PROTOCOLS[:1], measures=MeasureSpec(generate=False)
    )
    run_bench(spec, tmp_path / "out")
    (run,) = read_bench(tmp_path / "out").runs
    assert run.texts == []
    units = Units(run.directory, run.context["run_id"], keep_tokens=True)
    chosen = [next(c for c in CASES if c.id == name) for name in run.manifest["cases"]]
    unit = units.load(units.key(0, [c.id for c in chosen[:2]]))
    assert unit is not None
    measures = Measures(generate=False)
    plan = plan_queries(tiny(n_layers=1), chosen[:2], measures)
    outputs = Outputs({(case, query): scores for (_, case, query), scores in unit.scores.items()})
    again = compute_records(plan, measures, outputs, "final").records
    assert [r for r in again if not r.variant.startswith("ee.")] == [
        r for r in unit.records if r.when == "final" and r.case_id and not r.variant.startswith("ee.")
    ]


def test_a_damaged_unit_or_delta_is_made_again(spec: BenchSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(spec, protocols=PROTOCOLS[1:])
    run_bench(spec, tmp_path / "out")
    (run,) = read_bench(tmp_path / "out").runs
    records = (run.directory / "records.jsonl").read_bytes()
    units, deltas = (sorted((run.directory / name).glob("*.safetensors")) for name in ("units", "deltas"))
    for lost, damaged in [(None, units[1]), (units[-1], units[0]), (units[-1], deltas[0])]:
        (run.directory / "records.jsonl").unlink()
        if lost is not None:  # the last look is lost; the steps are there
            lost.unlink()
        raw = bytearray(damaged.read_bytes())
        raw[-3] ^= 8
        damaged.write_bytes(raw)
        with pytest.warns(RetconWarning, match=f"{damaged.name}: damaged"):
            run_bench(spec, tmp_path / "out")
        assert (run.directory / "records.jsonl").read_bytes() == records


def test_swapped_files_are_never_used(spec: BenchSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(spec, protocols=PROTOCOLS[1:])
    run_bench(spec, tmp_path / "out")
    (run,) = read_bench(tmp_path / "out").runs
    records = (run.directory / "records.jsonl").read_bytes()
    units, deltas = (sorted((run.directory / name).glob("*.safetensors")) for name in ("units", "deltas"))
    (run.directory / "records.jsonl").unlink()
    shutil.copy(units[0], units[1])
    with pytest.warns(RetconWarning, match="not the unit of a benchmark asked for"):
        run_bench(spec, tmp_path / "out")
    assert (run.directory / "records.jsonl").read_bytes() == records
    (run.directory / "records.jsonl").unlink()
    units[-1].unlink()
    shutil.copy(deltas[0], deltas[1])
    with pytest.warns(RetconWarning, match="the step made"):
        run_bench(spec, tmp_path / "out")
    assert (run.directory / "records.jsonl").read_bytes() == records
    with pytest.raises(MalformedFile, match=r"no such file; is this the directory"):
        read_bench(tmp_path / "nowhere")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Method):
    """Makes of a file what noise it says."""

    name: ClassVar[str] = "reading"
    editor: str
    base_settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def propose(self, lm: LM, edits: Sequence[Edit], *, state: Any = None, **rest: Any) -> Delta:
        return Counting(float(Path(self.editor).read_text()))(lm, edits, state)


@pytest.mark.parametrize("nested", [False, True])
def test_a_file_that_a_setting_names_is_known_by_its_content(spec: BenchSpec, tmp_path: Path, nested: bool) -> None:
    own, other = tmp_path / "editor.bin", tmp_path / "facts.json"
    own.write_text("0.5")
    other.write_text("first")
    settings = {"editor": str(own), "base_settings": {"stop_on": str(other)}}
    spec = dataclasses.replace(
        spec,
        methods=(MethodSpec(name=f"{__name__}:Reading", label="reading", settings=settings),),
        protocols=(Protocol(kind="batch", n=2),),
        text=None,
        measures=MeasureSpec(generate=False),
    )
    run_bench(spec, tmp_path / "out")
    (run,) = read_bench(tmp_path / "out").runs
    assert str(tmp_path) not in (run.directory / "manifest.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert run.manifest["method"]["settings"]["editor"] == "editor.bin"
    (other if nested else own).write_text("0.7")
    found: list[bool] = []
    run_bench(spec, tmp_path / "out", watch=lambda event: found.append(event.finished_before))
    assert not any(found)
    (again,) = read_bench(tmp_path / "out").runs
    assert again.directory != run.directory
    run_bench(spec, tmp_path / "out", watch=lambda event: found.append(event.finished_before))
    assert found[-1]


def test_a_file_and_code_measure_the_same_by_default() -> None:
    """`MeasureSpec` repeats defaults of `Measures`, which it cannot import: a bad file is refused without torch."""
    measures = Measures()
    for name, value in dataclasses.asdict(MeasureSpec()).items():
        assert name in MEASURE_FILES or value == getattr(measures, name)


def test_files_of_measures_are_known_by_their_content(tmp_path: Path) -> None:
    asked = MeasureSpec(snippets=str(tmp_path / "s"), idf=str(tmp_path / "i"), vocabulary=str(tmp_path / "v"))
    for name in "siv":
        (tmp_path / name).write_text("one")
    first = measures_record(asked)
    assert str(tmp_path) not in json.dumps(first)
    for name in "siv":
        (tmp_path / name).write_text("two")
        assert measures_record(asked) != first
        (tmp_path / name).write_text("one")
    assert measures_record(asked) == first
    assert measures_record(MeasureSpec()) == dataclasses.asdict(MeasureSpec())


def test_another_chat_template_or_end_of_text_is_another_run(
    spec: BenchSpec, tmp_path: Path, tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    from retcon.bench import unedited

    looked: list[str] = []
    real = unedited.measure
    monkeypatch.setattr(unedited, "measure", lambda *a, **k: (looked.append("pre"), real(*a, **k))[1])
    spec = dataclasses.replace(spec, protocols=PROTOCOLS[:1], text=None, measures=MeasureSpec(generate=False))

    def run(template: str | None, ends: list[int] | None) -> tuple[str, int]:
        lm = tiny(n_layers=1)
        lm.tokenizer.chat_template = template
        lm.model.generation_config.eos_token_id = ends
        monkeypatch.setattr(running, "load_model", lambda name, **_: lm)
        run_bench(spec, tmp_path / "out")
        (found,) = read_bench(tmp_path / "out").runs
        return found.directory.name, len(looked)

    templates = ["{{ messages[0].content }}", "{{ messages[0].content }}!"]
    runs = [run(None, None), run(templates[0], None), run(templates[1], None), run(templates[1], [7])]
    assert len({name for name, _ in runs}) == 4
    assert [n for _, n in runs] == [1, 2, 3, 4]
    assert run(templates[1], [7]) == runs[-1]


def test_a_dataset_without_a_usable_case_is_refused(spec: BenchSpec, tmp_path: Path) -> None:
    for dataset in (
        dataclasses.replace(spec.datasets[0], label="mine", start=len(CASES)),
        dataclasses.replace(spec.datasets[0], label="mine", limit=0),
    ):
        with pytest.raises(InvalidSetting, match="dataset 'mine': no case can be used"):
            run_bench(dataclasses.replace(spec, datasets=(dataset,), protocols=(Protocol(),)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- specifications ------------------------------------------------------------------------------------------------

TOML = """
name = "mine"
seeds = [0, 3]
[[models]]
name = "org/model-6b"
[[methods]]
name = "jeep"
settings = {steps = 5}
[[datasets]]
path = "cf.json"
limit = 10
[[protocols]]
kind = "sequential"
checkpoints = [1, 10]
[measures]
stops = ["."]
fluency = ["flu.new"]
"""


def test_a_specification_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(TOML)
    found = spec_from_file(tmp_path / "b.toml")
    assert (found.name, found.seeds) == ("mine", (0, 3))
    assert found.models == (ModelSpec(name="org/model-6b", label="model-6b"),)
    assert found.methods == (MethodSpec(name="jeep", label="jeep", settings={"steps": 5}),)
    assert found.datasets[0].label == "cf"
    assert found.protocols == (Protocol(kind="sequential", checkpoints=(1, 10)),)
    assert found.measures.stops == (".",)
    moved = found.with_places(model="./here", dataset="there.json", corpus="c.txt", text="t.txt")
    assert (moved.models[0].name, moved.models[0].label, moved.models[0].corpus) == ("./here", "here", "c.txt")
    assert (moved.datasets[0].path, moved.datasets[0].label, moved.text) == ("there.json", "there", "t.txt")


def test_a_file_says_how_a_model_is_loaded(tmp_path: Path, spec: BenchSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, object] = {}
    load = running.load_model

    def loading(name: str, **options: Any) -> LM:
        heard.update(options)
        return load(name)

    monkeypatch.setattr(running, "load_model", loading)
    text = (
        '[[models]]\nname = "./tiny"\ndevice_map = {"" = "cpu"}\npacked = true\ntrust_remote_code = true\n'
        '[[methods]]\nname = "jeep"\n[[datasets]]\npath = "world"\n'
    )
    (tmp_path / "b.toml").write_text(text)
    (model,) = spec_from_file(tmp_path / "b.toml").models
    model = dataclasses.replace(model, corpus=spec.models[0].corpus)
    run_bench(dataclasses.replace(spec, models=(model,)), tmp_path / "out")
    assert heard["device_map"] == {"": "cpu"}
    assert (heard["packed"], heard["trust_remote_code"]) == (True, True)
    kept = json.loads((tmp_path / "out" / "manifest.json").read_text())["manifest"]["spec"]["models"]
    assert (kept[0]["device_map"], kept[0]["packed"]) == ({"": "cpu"}, True)

    (tmp_path / "b.toml").write_text(text.replace('{"" = "cpu"}', '"auto"'))
    assert spec_from_file(tmp_path / "b.toml").models[0].device_map == "auto"
    (tmp_path / "b.toml").write_text(text.replace("packed", 'device = "cpu"\npacked'))
    with pytest.raises(InvalidSetting, match="device and device_map both say where it goes"):
        spec_from_file(tmp_path / "b.toml")


def test_a_benchmark_begun_before_a_file_had_device_map_goes_on(spec: BenchSpec, tmp_path: Path) -> None:
    run_bench(spec, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "manifest.json").read_text())["manifest"]["spec"]["models"][0]
    assert not {"device_map", "packed", "trust_remote_code"} & set(kept)


def test_one_of_several_models_is_chosen_by_label_or_place() -> None:
    spec = BenchSpec(
        models=(ModelSpec(name="demo:gptj"), ModelSpec(name="./own", label="mine")),
        methods=(MethodSpec(name="memit"),),
        datasets=(DatasetSpec(path="world"),),
    )
    assert [m.name for m in spec.with_places(model="demo:gptj").models] == ["demo:gptj"]
    assert [m.name for m in spec.with_places(model="mine").models] == ["./own"]
    with pytest.raises(
        InvalidSetting, match="--model other: the file has 2 models; choose one of them: demo-gptj, mine"
    ):
        spec.with_places(model="other")


@pytest.mark.parametrize(("label", "shown"), [("", "demo-llama"), ("mine", "mine")])
def test_the_only_model_at_another_place_is_not_called_by_the_old_one(label: str, shown: str) -> None:
    spec = BenchSpec(
        models=(ModelSpec(name="demo:gptj", label=label),),
        methods=(MethodSpec(name="memit"),),
        datasets=(DatasetSpec(path="world"),),
    )
    placed = spec.with_places(model="demo:llama", dataset="own/facts.jsonl")
    assert (placed.models[0].name, placed.models[0].label) == ("demo:llama", shown)
    assert placed.datasets[0].label == "facts"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds =", "seed =", "unknown field 'seed'; did you mean 'seeds'"),
        ("limit = 10", "limit = true", r"datasets\[0\], limit must be a whole number, found True"),
        ('kind = "sequential"', 'kind = "later"', r"protocols\[0\], kind is 'later'; known: "),
        ('path = "cf.json"', "", r"datasets\[0\]: field 'path' is missing"),
        ("seeds = [0, 3]", "seeds = 3", r"seeds must be a list \(\[1, 2, 3\], say\), found 3"),
        ("seeds = [0, 3]", "seeds = [0, 1.0]", r"seeds\[1\] must be a whole number, found 1\.0"),
        ("seeds = [0, 3]", "tasks = 'a.jsonl'", r'tasks must be a list \(\["one", "two"\], say\), found'),
        ("seeds = [0, 3]", "seeds = []", "seeds is empty"),
        ("seeds = [0, 3]", "seeds = [1, 1]", "a seed occurs twice"),
        ('name = "mine"', "name = mine", "not a readable TOML file"),
        ('kind = "sequential"', 'kind = "batch"', r"protocols\[0\]: batch restores after every call"),
        ("[measures]", '[[methods]]\nname = "jeep"\n[measures]', "two methods are called 'jeep'"),
        ("[measures]", '[measures]\nidf = "idf.npy"', "measures: idf is only read beside snippets"),
    ],
)
def test_mistakes_in_a_specification_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(TOML.replace(old, new))
    with pytest.raises((InvalidSetting, MalformedFile), match=message) as caught:
        spec_from_file(tmp_path / "b.toml")
    assert str(tmp_path / "b.toml") in str(caught.value)


def test_a_method_stands_for_one_with_each_value() -> None:
    varied = MethodSpec(name="ctp", settings={"epochs": 2}, vary={"contrast": ["none", "mirror"], "weight": [0, 1]})
    spec = BenchSpec(models=(ModelSpec(name="m"),), methods=(varied,), datasets=(DatasetSpec(path="d"),))
    assert [m.label for m in spec.methods] == [
        f"ctp contrast={c} weight={w}" for c in ("none", "mirror") for w in (0, 1)
    ]
    assert dict(spec.methods[2].settings) == {"epochs": 2, "contrast": "mirror", "weight": 0}
    with pytest.raises(InvalidSetting, match=r"ctp: vary\.weight takes a list of values, found 3"):
        MethodSpec(name="ctp", vary={"weight": 3})  # type: ignore[dict-item]


def test_differences_of_lists_are_told_by_name_and_briefly() -> None:
    old = {"methods": [{"name": "memit", "vary": {}}, {"name": "jeep", "label": "low"}]}
    assert differences(old, {"methods": [{"name": "rome"}]}) == ['methods: ["memit", "low"] -> ["rome"]']
    (line,) = differences({"text": "a" * 500}, {"text": "b"})
    assert len(line) < 160


def test_differences_name_leaves() -> None:
    assert differences({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [2]}}) == ["b.c: [1] -> [2]"]
    assert differences({"a": 1}, {}) == ["a: 1 -> null"]
    assert differences(list(range(20)), [0, *range(2, 20)]) == [": 19 of 20 entries differ"]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "docs" / "results").glob("*.toml")), ids=lambda path: path.stem
)
def test_files_of_the_results_name_methods_and_settings_that_there_are(path: Path) -> None:
    for method in spec_from_file(path).methods:
        assert set(method.settings) <= {field.name for field in dataclasses.fields(method_class(method.name))}


def test_a_seed_is_the_seed_that_edit_takes(spec: BenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = set()
    real = pieces.in_steps

    def noting(*arguments: Any, seed: int, **named: Any) -> Any:
        seeds.add(seed)
        return real(*arguments, seed=seed, **named)

    monkeypatch.setattr(pieces, "in_steps", noting)
    running.run_bench(dataclasses.replace(spec, seeds=(3,)), tmp_path / "bench")
    assert seeds == {3}


def test_a_start_that_fails_leaves_nothing_in_the_next_ones_way(
    spec: BenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, **_: Any) -> None:
        raise UnsupportedModel(f"cannot load {name!r}")

    with monkeypatch.context() as patched:
        patched.setattr(running, "load_model", missing)
        with pytest.raises(UnsupportedModel):
            running.run_bench(spec, tmp_path / "bench")
    assert not (tmp_path / "bench").exists()
    other = dataclasses.replace(spec, measures=MeasureSpec(max_new_tokens=2))
    running.run_bench(other, tmp_path / "bench")
    assert (tmp_path / "bench" / "manifest.json").is_file()
    with monkeypatch.context() as patched:  # what was measured stays, whatever comes later
        patched.setattr(running, "load_model", missing)
        with pytest.raises(UnsupportedModel):
            running.run_bench(other, tmp_path / "bench")
    assert (tmp_path / "bench" / "runs.json").is_file()


def test_a_model_that_breaks_is_recorded_and_the_benchmark_goes_on(spec: BenchSpec, tmp_path: Path) -> None:
    broken = MethodSpec(name=f"{__name__}:Breaking", label="broken")
    spec = dataclasses.replace(
        spec,
        methods=(broken, noise()),
        protocols=(Protocol(kind="batch", n=2),),
        measures=MeasureSpec(generate=False, divergence=True),
    )
    run_bench(spec, tmp_path / "out")
    bad, good = read_bench(tmp_path / "out").runs
    assert {r.status for r in good.at("final")} == {"ok"}
    told = {r.variant: (r.value, r.status) for r in bad.at("final") if r.metric in ("perplexity", "divergence")}
    assert told == dict.fromkeys(("ppl.value", "ppl.ratio", "ppl.nll_change", "loc.kl"), (None, "error"))
    assert next(r.detail for r in bad.at("final") if r.variant == "ppl.value") == "ppl.value is nan"


def test_perplexity_of_single_edits_is_said_not_to_be_measured(spec: BenchSpec, tmp_path: Path) -> None:
    single = dataclasses.replace(spec, protocols=(Protocol(kind="single", n=2), Protocol(n=2)), warm_up=False)
    with pytest.warns(RetconWarning, match=r"^perplexity of single\(2\): measured of the unedited model only"):
        run_bench(single, tmp_path / "single")
    found = {run.context["protocol"]: run.at("final") for run in read_bench(tmp_path / "single").runs}
    measured = {name: any(r.metric == "perplexity" for r in records) for name, records in found.items()}
    assert measured == {"single": False, "batch": True}
