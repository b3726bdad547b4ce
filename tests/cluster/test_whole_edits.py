"""Whole edits as pieces of work: trials of settings and units of a bench, by workers as in one process."""

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import dumps, loads
from typing import Any

import pytest

import retcon
from retcon import world
from retcon.bench import BenchSpec, DatasetSpec, Event, MethodSpec, ModelSpec, run_bench
from retcon.bench import run as running
from retcon.bench.pieces import RunUnits
from retcon.bench.spec import MeasureSpec, Protocol
from retcon.cluster import workers, working_on
from retcon.errors import NonFinite, RetconWarning
from retcon.lm.model import LM
from retcon.memory.corpus import Corpus
from retcon.memory.moments import CorpusMoments
from retcon.methods.ft_l import FtL
from retcon.work import Done, Here, Workers, silent, whole_edits
from retcon.workflow import tuning
from retcon.workflow.tuning import EditAndMeasure, Trial, Tuned, tune
from tests.bench.test_bench import noise, spec  # noqa: F401

CASES = world.cases(12, seed=0)


@pytest.fixture(scope="module")
def lm() -> LM:
    return retcon.load("demo:gptj")


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    with workers("processes:2") as found:
        yield found


@pytest.fixture(autouse=True)
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_PRESETS", str(tmp_path / "presets"))


class Elsewhere:
    """This process as another place, last piece first; what is inside a piece is not shared."""

    def __init__(self, *, backwards: bool = True, sees_directory: bool = True) -> None:
        self.backwards, self.sees_directory = backwards, sees_directory
        self.asked: list[tuple[type, int]] = []

    def map(self, lm, work, pieces, progress):  # type: ignore[no-untyped-def]
        if not self.sees_directory and isinstance(getattr(work, "work", None), RunUnits):
            work = replace(work, work=replace(work.work, root=Path("/nowhere")))
        self.asked.append((type(getattr(work, "work", work)), len(pieces)))
        order = range(len(pieces))
        for i in order[::-1] if self.backwards else order:
            with working_on(lm, Here()):
                done = loads(dumps(work))(lm, loads(dumps(pieces[i])), progress)
            yield i, done


def untimed(trials: Sequence[Trial]) -> list[Trial]:
    return [replace(trial, seconds=0.0) for trial in trials]


def tuned(lm: LM, name: str, on: Workers, **more: Any) -> Tuned:
    heard: list[Trial] = []
    with working_on(lm, on):
        found = tune(lm, name, CASES, on_trial=heard.append, **more)
    assert heard == list(found.trials)
    return found


def figures(found: Tuned) -> tuple[Any, ...]:
    """All that must not depend on where trials are made."""
    before = found.start_summary and found.start_summary.as_dict()
    return found.method, untimed(found.trials), found.summary.as_dict(), before, found.differences


FT: dict[str, Any] = {"max_trials": 4, "given": {"epochs": 2}}
MEMIT: dict[str, Any] = {"max_trials": 5, "given": {"steps": 2, "layers": (1, 2)}}  # ends inside a candidate


@pytest.mark.parametrize(("name", "more"), [("ft", FT), ("memit", MEMIT)])
def test_processes_find_the_same_settings(name: str, more: dict[str, Any], lm: LM, two: Workers) -> None:
    wanted = tuned(lm, name, Here(), **more)
    assert len(wanted.trials) == more["max_trials"]
    assert figures(tuned(lm, name, two, **more)) == figures(wanted)


@dataclass(frozen=True, kw_only=True)
class Failing(FtL):
    """Cannot edit by high rates, and warns of the others."""

    def propose(self, *args: Any, **more: Any) -> Any:
        if self.learning_rate > 0.0025:  # the rule's
            raise NonFinite(f"not by {self.learning_rate}")
        warnings.warn(RetconWarning("slowly", option=", --set learning_rate"), stacklevel=2)
        return super().propose(*args, **more)


@pytest.mark.filterwarnings("ignore:no .*Failing preset:retcon.errors.RetconWarning")
def test_candidates_are_pieces_and_one_that_fails_is_a_trial(lm: LM) -> None:
    given: dict[str, Any] = {"epochs": 1, "layers": (1,), "stop_loss": 0.1}
    name, place = f"{__name__}:Failing", Elsewhere()
    with pytest.warns(RetconWarning, match="slowly") as heard:
        found = tuned(lm, name, place, max_trials=5, given=given)
    assert {str(w.message.on_command_line) for w in heard} == {"slowly, --set learning_rate"}  # type: ignore[union-attr]
    assert (EditAndMeasure, 5) in place.asked
    assert any(trial.problem.startswith("not by ") for trial in found.trials)
    with pytest.warns(RetconWarning, match="slowly"):
        assert figures(found) == figures(tuned(lm, name, Here(), max_trials=5, given=given))


def test_moments_travel_without_what_each_process_makes(lm: LM) -> None:
    site = lm.site(1, "down_proj")
    made: Any = {"factor": site}
    moments = CorpusMoments(Corpus(["some text"]), progress=lambda *_: None, _factors=made)
    assert loads(dumps(moments)) == replace(moments, progress=silent)
    assert loads(dumps(moments))._factors == {}


class EveryNumber:
    """Work with several results for a piece, which notes when they are made."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, lm: LM, piece: int, progress: Done) -> Iterator[int]:
        for number in range(piece):
            self.made.append(number)
            yield number


def test_results_come_as_they_are_asked_for_in_this_process(lm: LM) -> None:
    work = EveryNumber()
    results = whole_edits(lm, work, [2, 3])
    assert (next(results), work.made) == (0, [0])
    assert [*results] == [1, 0, 1, 2]


def test_a_single_piece_stays_where_what_is_inside_it_is_shared(lm: LM) -> None:
    place = Elsewhere()
    with working_on(lm, place):
        assert [*whole_edits(lm, EveryNumber(), [2])] == [0, 1]
        assert place.asked == []
        assert [*whole_edits(lm, EveryNumber(), [2, 1])] == [0, 1, 0]
    assert place.asked == [(EveryNumber, 2)]


@dataclass(frozen=True, kw_only=True)
class Dying(EditAndMeasure):
    """Kills the first worker that comes by."""

    mark: Path

    def __call__(self, lm: LM, piece: Any, progress: Done) -> Iterator[Any]:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(lm, piece, progress)


@pytest.mark.long
def test_a_lost_worker_s_candidate_is_tried_again(
    lm: LM, two: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tuned(lm, "ft", Here(), **FT)
    mark = tmp_path / "killed"
    monkeypatch.setattr(tuning, "EditAndMeasure", lambda **given: Dying(mark=mark, **given))
    assert figures(tuned(lm, "ft", two, **FT)) == figures(wanted)
    assert mark.exists()


# --- benchmarks ----------------------------------------------------------------------------------------------------


def files(root: Path) -> dict[str, bytes]:
    """All that must not depend on where the units are made."""
    names = ("records.jsonl", "texts.jsonl", "cases.jsonl", "units/*", "deltas/*")
    found = {path.relative_to(root) for name in names for path in root.glob(f"runs/*/{name}")}
    timed = ("units", "deltas")
    return {"runs.json": (root / "runs.json").read_bytes()} | {
        str(path): b"" if path.parent.name in timed else (root / path).read_bytes() for path in sorted(found)
    }


def events(asked: BenchSpec, root: Path, on: Workers) -> list[tuple[str, int]]:
    heard: list[tuple[str, int]] = []
    run_bench(asked, root, workers=on, watch=lambda event: heard.append((event.run_id, event.done)))
    return sorted(heard)


@pytest.fixture
def small(request: pytest.FixtureRequest) -> BenchSpec:
    """The counting method on a tiny model."""
    made: BenchSpec = request.getfixturevalue("spec")
    return made


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> BenchSpec:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("The capital of France is Paris. The train stood still, and he read.")
    return BenchSpec(
        models=(ModelSpec(name="demo:gptj"),),
        methods=(
            MethodSpec(name="memit", settings={"steps": 2}),
            MethodSpec(name="ft", settings={"epochs": 1}),
        ),
        datasets=(DatasetSpec(path="world", limit=3),),
        protocols=(Protocol(kind="batch", batch=2), Protocol(kind="sequential", n=2)),
        measures=MeasureSpec(max_new_tokens=2),
        text=str(text),
    )


def test_processes_give_the_same_benchmark(real: BenchSpec, two: Workers, tmp_path: Path) -> None:
    heard = events(real, tmp_path / "here", Here())
    assert events(real, tmp_path / "two", two) == heard
    assert files(tmp_path / "two") == files(tmp_path / "here")
    assert not (tmp_path / "two" / "values").exists()


def test_all_that_can_be_measured_travels(small: BenchSpec, tmp_path: Path) -> None:
    own = MeasureSpec(
        max_new_tokens=2,
        locality_text=True,
        divergence=True,
        easyedit=True,
        neighborhood_prefix="edit",
        metrics=("tests.bench.test_protocol:n_texts",),
    )
    asked = replace(small, measures=own, keep_tokens=True, seeds=(0, 1), warm_up=False)
    run_bench(asked, tmp_path / "here")
    run_bench(asked, tmp_path / "there", workers=(place := Elsewhere()))
    assert place.asked[-1] == (RunUnits, 6)
    assert files(tmp_path / "there") == files(tmp_path / "here")


@pytest.mark.parametrize("sees_directory", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
def test_an_interrupted_sweep_goes_on_to_the_same_bytes(
    small: BenchSpec, backwards: bool, sees_directory: bool, tmp_path: Path
) -> None:
    sweep = replace(small, methods=(noise("low"), noise("high", size=0.6)))
    run_bench(sweep, tmp_path / "here")
    wanted, at = files(tmp_path / "here"), Elsewhere(backwards=backwards, sees_directory=sees_directory)

    def stop(event: Event) -> None:
        if event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(sweep, tmp_path / "out", workers=at, watch=stop)
    run_bench(sweep, tmp_path / "out", workers=at)
    n_pieces = [n for work, n in at.asked if work is RunUnits]
    assert n_pieces == ([6] if backwards else [6, 5])  # two units of each batch, two sequences; what has come is kept
    if not sees_directory:  # deltas stay where they were made
        wanted = {path: content for path, content in wanted.items() if "deltas" not in path}
    assert files(tmp_path / "out") == wanted


def test_one_run_that_is_left_shares_what_is_inside(small: BenchSpec, tmp_path: Path) -> None:
    at = Elsewhere()
    run_bench(replace(small, protocols=(Protocol(kind="sequential", n=3),)), tmp_path / "out", workers=at)
    assert RunUnits not in {work for work, _ in at.asked}


@dataclass(frozen=True)
class DyingUnits(RunUnits):
    """Kills the first worker that comes to a sequence, after its first step."""

    def __call__(self, lm: LM, piece: Any, progress: Done) -> Iterator[Any]:
        for unit in super().__call__(lm, piece, progress):
            yield unit
            mark = self.root / "killed"
            if not piece.protocol.restores and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_a_lost_worker_s_run_is_gone_on_with(
    real: BenchSpec, two: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_bench(real, tmp_path / "here")
    monkeypatch.setattr(running, "RunUnits", DyingUnits)
    run_bench(real, tmp_path / "two", workers=two)
    assert (tmp_path / "two" / "killed").exists()
    assert files(tmp_path / "two") == files(tmp_path / "here")
