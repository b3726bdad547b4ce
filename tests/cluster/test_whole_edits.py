"""Whole edits as pieces of work: trials of settings, by workers elsewhere as in one process."""

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
from retcon.cluster import workers, working_on
from retcon.errors import NonFinite, RetconWarning
from retcon.lm.model import LM
from retcon.memory.corpus import Corpus
from retcon.memory.moments import CorpusMoments
from retcon.methods.ft_l import FtL
from retcon.work import Done, Here, Workers, silent, whole_edits
from retcon.workflow import tuning
from retcon.workflow.tuning import EditAndMeasure, Trial, Tuned, tune

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


class Backwards:
    """This process as another place, where the last piece is done first and nothing inside one is shared."""

    def __init__(self) -> None:
        self.asked: list[tuple[type, int]] = []

    def map(self, lm, work, pieces, progress):  # type: ignore[no-untyped-def]
        self.asked.append((type(getattr(work, "work", work)), len(pieces)))
        with working_on(lm, Here()):
            done = [(i, loads(dumps(work))(lm, piece, progress)) for i, piece in enumerate(loads(dumps(pieces)))]
        yield from done[::-1]


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
    name, place = f"{__name__}:Failing", Backwards()
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
    place = Backwards()
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
