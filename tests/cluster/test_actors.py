"""Workers on Ray: the same delta to the bit, whatever their number, and whichever of them are killed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import retcon
from retcon import world
from retcon.bench import run_bench
from retcon.cluster import workers, working_on
from retcon.cluster.actors import RayCluster, on_own_cards
from retcon.edits import Edit
from retcon.errors import InvalidSetting, MissingPackage, NonFinite, WorkersLost
from retcon.lm.model import LM
from retcon.work import Here
from tests.cluster.test_whole_edits import FT, figures, files, presets, real, tuned  # noqa: F401
from tests.cluster.test_workers import (
    Fails,
    Square,
    equal,
    many_chunks,  # noqa: F401
    measured,
    moments,
    propose,
    same,
    small_chunks,  # noqa: F401
)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"pip install 'retcon-lm\[ray\]'"):
        workers("ray")


@pytest.fixture(scope="module")
def lm() -> LM:
    return retcon.load("demo:gptj")


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return [case.edits[0] for case in world.cases(6)]


class RayActorError(Exception):
    pass


class OutOfMemoryError(Exception):
    pass


class StubRay(ModuleType):
    """Ray in this process: what is asked for is done at once. The actors at each place fail to start as often as
    `failures` says, and then lose as many pieces as `losses` says."""

    def __init__(self, failures: Sequence[int], error: Exception, losses: int = 0) -> None:
        super().__init__("ray")
        self.failures, self.error, self.losses, self.starts = list(failures), error, losses, 0
        self.free = list(range(len(failures)))[::-1]
        self.killed: list[Any] = []
        self.exceptions = SimpleNamespace(
            RayTaskError=type("RayTaskError", (Exception,), {}),
            RayActorError=RayActorError,
            OutOfMemoryError=OutOfMemoryError,
        )

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1000, "memory": 2.0**50}}]

    def put(self, thing: Any) -> Any:
        return thing

    def wait(self, calls: list[Any]) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def get(self, call: Callable[[], Any]) -> Any:
        return call()

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)
        self.free.append(actor.place)

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def _actor(self, _: Any) -> Any:
        class StubActor:
            place = self.free.pop()
            lost = False
            ready: Any
            run: Any

        actor = StubActor()

        def ready() -> None:
            self.starts += 1
            assert self.starts < 100, "started for ever"
            if self.failures[actor.place] > 0:
                self.failures[actor.place] -= 1
                actor.lost = True
            if actor.lost:
                raise self.error

        def run(piece: int) -> int:
            if self.losses > 0:
                self.losses -= 1
                actor.lost = True
                raise self.error
            return piece**2

        actor.ready = SimpleNamespace(remote=lambda: lambda: ready())
        actor.run = SimpleNamespace(remote=lambda work, piece, deltas: lambda: run(piece))
        return actor


def squares(lm: LM, ray: StubRay, n: int, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    monkeypatch.setitem(sys.modules, "ray", ray)
    with RayCluster(n=n) as stub:
        return dict(stub.map(lm, Square(), [0, 1, 2, 3], lambda n: None))


DIED = RayActorError("The actor died in its creation task\nModuleNotFoundError: No module named 'retcon'")
FULL = OutOfMemoryError("Task was killed due to the node running low on memory")


@pytest.mark.parametrize(("error", "said"), [(DIED, "ModuleNotFoundError: No module named 'retcon'"), (FULL, "low on")])
def test_actors_that_cannot_be_created_are_given_up(
    error: Exception, said: str, lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = StubRay([99, 99], error)
    with pytest.raises(WorkersLost, match=f"no worker can be started(.|\n)*{said}"):
        squares(lm, ray, 2, monkeypatch)
    assert ray.starts == len(ray.killed) == 2 * 6


def test_the_others_go_on_without_an_actor_that_cannot_be_created(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = StubRay([99, 2], DIED)
    assert squares(lm, ray, 2, monkeypatch) == {0: 0, 1: 1, 2: 4, 3: 9}


@pytest.mark.parametrize("error", [DIED, FULL])
def test_a_lost_actor_is_made_anew(error: Exception, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = StubRay([5], error, losses=5)
    assert squares(lm, ray, 1, monkeypatch) == {0: 0, 1: 1, 2: 4, 3: 9}
    assert len(ray.killed) == 5 + 5 + 1  # the last one when the work is done


@pytest.mark.parametrize(
    ("given", "own"),
    [
        (dict(device="cpu"), dict(device="cpu", device_map=None)),
        (dict(device="cuda:3"), dict(device="cuda:0", device_map=None)),
        (dict(device=None, device_map="auto"), dict(device=None, device_map="auto")),
        (dict(device_map={"": 1}), dict(device=None, device_map={"": "cuda:0"})),
        (
            dict(device_map={"model": 5, "norm": "cuda:2", "lm_head": torch.device("cuda", 2), "vision": "cpu"}),
            dict(device=None, device_map={"model": "cuda:1", "norm": "cuda:0", "lm_head": "cuda:0", "vision": "cpu"}),
        ),
    ],
)
def test_an_actor_s_cards_are_counted_from_0(given: dict[str, Any], own: dict[str, Any]) -> None:
    assert on_own_cards({"packed": False, **given}) == {"packed": False, **own}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Ray on this machine with room for three workers, and two of them."""
    pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
    with RayCluster(n=3), RayCluster(n=2) as two:
        yield two


@pytest.mark.long
def test_ray_gives_the_same_delta(cluster: RayCluster, lm: LM, edits: list[Edit]) -> None:
    wanted = propose(lm, edits[:4])
    with working_on(lm, cluster):
        assert same(propose(lm, edits[:4]), wanted)


@pytest.mark.long
@pytest.mark.parametrize("n", [1, 3])
def test_the_number_of_workers_changes_nothing(cluster: RayCluster, lm: LM, edits: list[Edit], n: int) -> None:
    wanted = propose(lm, edits)
    with lm.edited(wanted):  # values are searched on weights that are edited already
        on_top = propose(lm, edits[:3])
    cluster.__exit__()  # makes room
    with RayCluster(n=n) as others, working_on(lm, others):
        assert same(propose(lm, edits), wanted)
        with lm.edited(wanted):
            assert same(propose(lm, edits[:3]), on_top)
        assert len(others._actors) == n


@pytest.mark.long
def test_a_killed_actor_s_piece_is_done_again(cluster: RayCluster, lm: LM, tmp_path: Path) -> None:
    found = dict(cluster.map(lm, Square(2, tmp_path / "killed"), [0, 1, 2, 3], lambda n: None))
    assert (tmp_path / "killed").exists()
    assert found == {0: 0, 1: 1, 2: 4, 3: 9}


@pytest.mark.long
def test_an_error_of_the_work_arrives_as_it_is(cluster: RayCluster, lm: LM) -> None:
    with pytest.raises(NonFinite, match="piece 7 is not a number"):
        list(cluster.map(lm, Fails(), [7], lambda n: None))


@pytest.mark.long
def test_a_piece_that_always_kills_is_given_up(cluster: RayCluster, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retcon.cluster.actors.MAX_LOSSES", 1)
    with pytest.raises(WorkersLost, match="a piece of work lost its worker 2 times"):
        list(cluster.map(lm, Square(5), [5], lambda n: None))


@pytest.mark.long
def test_too_small_a_cluster_is_said(cluster: RayCluster, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retcon.cluster.actors._needs", lambda lm: {"memory": 2.0**50, "CPU": 1})
    with (
        RayCluster() as other,
        pytest.raises(InvalidSetting, match=r"one needs 1048576.0 GiB of memory, 1 cores; there are"),
    ):
        list(other.map(lm, Square(), [1], lambda n: None))


@pytest.mark.long
@pytest.mark.usefixtures("many_chunks")
def test_ray_gives_the_same_moments_and_the_same_evaluation(cluster: RayCluster, lm: LM, edits: list[Edit]) -> None:
    delta = propose(lm, edits)
    wanted = moments(lm), measured(lm, edits, delta)
    with working_on(lm, cluster):
        assert equal(moments(lm), wanted[0])
        found = measured(lm, edits, delta)
    assert found.records == wanted[1].records
    assert found.texts == wanted[1].texts


@pytest.mark.long
@pytest.mark.usefixtures("presets")
def test_ray_finds_the_same_settings_and_gives_the_same_benchmark(
    cluster: RayCluster, lm: LM, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert figures(tuned(lm, "ft", cluster, **FT)) == figures(tuned(lm, "ft", Here(), **FT))
    bench = request.getfixturevalue("real")
    for name, place in (("here", None), ("ray", cluster)):
        run_bench(bench, tmp_path / name, workers=place)
    assert files(tmp_path / "ray") == files(tmp_path / "here")
