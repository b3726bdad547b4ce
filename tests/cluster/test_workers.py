"""Workers elsewhere: the same delta to the bit, whatever their number, and whichever of them are killed."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import retcon
from retcon import world
from retcon.cluster import workers, working_on
from retcon.cluster.processes import Processes
from retcon.cluster.worker import Source, Worker, from_bytes, to_bytes
from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite, WorkersLost, WrongBase
from retcon.lm.model import LM
from retcon.memory.values import plan
from retcon.work import Here, Progress

N_EDITS = 6


@pytest.fixture(scope="module")
def lm() -> LM:
    return retcon.load("demo:gptj")


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return [case.edits[0] for case in world.cases(N_EDITS)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_EDITS", {"cpu": 2})


def propose(lm: LM, edits: Sequence[Edit]) -> Delta:
    return retcon.method("jeep", for_model=lm, steps=3).propose(lm, edits)


def same(one: Delta, other: Delta) -> bool:
    return one.id == other.id and one.report == other.report


class Square:
    """Work that needs no model, and kills its process at one piece, once."""

    def __init__(self, at: int | None = None, mark: Path | None = None) -> None:
        self.at, self.mark = at, mark

    def __call__(self, lm: LM, piece: int, progress: Progress) -> int:
        if piece == self.at and not (self.mark and self.mark.exists()):
            if self.mark:
                self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return piece**2


class Fails:
    def __call__(self, lm: LM, piece: int, progress: Progress) -> int:
        raise NonFinite(f"piece {piece} is not a number")


def test_here_is_one_after_the_other(lm: LM) -> None:
    assert list(Here().map(lm, Square(), [3, 4], lambda n: None)) == [(0, 9), (1, 16)]


@pytest.mark.parametrize("on", ["processes:0", "processes", "processes:two", "elsewhere", "ray:", ""])
def test_an_unknown_place_is_refused(on: str) -> None:
    with pytest.raises(InvalidSetting, match="known: local, processes:N"):
        workers(on)


def test_a_worker_has_the_deltas_of_the_asking_process(lm: LM, edits: list[Edit]) -> None:
    delta = propose(lm, edits[:2])
    (id_, content), *_ = to_bytes([delta])
    assert from_bytes(content).id == id_ == delta.id
    worker = Worker.__new__(Worker)  # over the same model, so that nothing is loaded twice
    worker.source, worker.lm, worker._deltas = Source("", {}, lm.fingerprint(), 1), lm, {}

    def applied(lm: LM, piece: None, progress: Progress) -> list[str]:
        return [d.id for d in lm.applied]

    assert worker.run(applied, None, [(id_, content)]) == [delta.id]
    assert worker.run(applied, None, []) == []


def test_another_checkpoint_is_refused() -> None:
    with pytest.raises(WrongBase, match="a worker has loaded another 'demo:gptj' than the asking process has"):
        Worker(Source("demo:gptj", {"dtype": "float32"}, "0" * 64, 1))


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with workers("processes:2") as found:
        assert isinstance(found, Processes)
        yield found


def test_processes_give_the_same_delta(two: Processes, lm: LM, edits: list[Edit]) -> None:
    wanted = propose(lm, edits)
    assert len(wanted.provenance["values"][0]["chunks"]) > 1
    with working_on(lm, two):
        assert same(propose(lm, edits), wanted)
        with lm.edited(wanted):  # values are searched on weights that are edited already
            found = propose(lm, edits[:3])
    assert isinstance(lm.workers, Here)
    with lm.edited(wanted):
        assert same(propose(lm, edits[:3]), found)


@pytest.mark.long
def test_a_killed_process_s_piece_is_done_again(two: Processes, lm: LM, tmp_path: Path) -> None:
    found = dict(two.map(lm, Square(2, tmp_path / "killed"), [0, 1, 2, 3], lambda n: None))
    assert (tmp_path / "killed").exists()
    assert found == {0: 0, 1: 1, 2: 4, 3: 9}


def test_an_error_of_the_work_arrives_as_it_is(two: Processes, lm: LM) -> None:
    with pytest.raises(NonFinite, match="piece 7 is not a number"):
        list(two.map(lm, Fails(), [7], lambda n: None))


@pytest.mark.long
def test_processes_that_always_die_are_given_up(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retcon.cluster.processes.MAX_LOSSES", 0)
    with workers("processes:1") as one, pytest.raises(WorkersLost, match="lost 1 times before a piece was done"):
        list(one.map(lm, Square(5), [5], lambda n: None))
