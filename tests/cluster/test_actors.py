"""Workers on Ray: the same delta to the bit, whatever their number, and whichever of them are killed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import retcon
from retcon import world
from retcon.cluster import workers, working_on
from retcon.cluster.actors import RayCluster
from retcon.edits import Edit
from retcon.errors import InvalidSetting, MissingPackage, NonFinite, WorkersLost
from retcon.lm.model import LM
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
        assert len(others._actors[lm]) == n


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
