"""Workers elsewhere: the same delta to the bit, whatever their number, and whichever of them are killed."""

import copy
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import dumps, loads
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import retcon
from retcon import world
from retcon.cluster import workers, working_on
from retcon.cluster.processes import Processes
from retcon.cluster.worker import Source, Worker, from_bytes, to_bytes
from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite, WorkersLost, WorkFailed, WrongBase
from retcon.evaluation import Evaluation, evaluate, score
from retcon.evaluation.score import ScoreBatch, TokenScore
from retcon.lm import batches
from retcon.lm.generate import Writing, generate
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.lm.site import Unit
from retcon.locate import attribution
from retcon.locate.attribution import Attribution, attribute
from retcon.memory import collect
from retcon.memory.collect import Collected, SumOfChunk
from retcon.memory.values import plan
from retcon.work import Done, Here, in_order

N_EDITS = 6
ZEROS = "0" * 64


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

    def __call__(self, lm: LM, piece: int, progress: Done) -> int:
        if piece == self.at and not (self.mark and self.mark.exists()):
            if self.mark:
                self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return piece**2


class Fails:
    def __call__(self, lm: LM, piece: int, progress: Done) -> int:
        raise NonFinite(f"piece {piece} is not a number")


class Stiff(Exception):
    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} is {why}")


class FailsStiffly:
    def __call__(self, lm: LM, piece: int, progress: Done) -> int:
        raise Stiff(f"piece {piece}", "odd")


class Looks:
    """Work that says how the worker's model is."""

    def __call__(self, lm: LM, piece: int, progress: Done) -> tuple[Any, ...]:
        return looks(lm)


def looks(lm: LM) -> tuple[Any, ...]:
    weight = lm.base_weight(lm.site(1, "down_proj").name).sum().item()
    return weight, lm.dtype, lm.config._attn_implementation, lm.end_tokens, torch.get_num_threads()


class LeavesAMark:
    """Slow work that marks each piece it begins, and fails at one."""

    def __init__(self, folder: Path, fails_at: int | None = None) -> None:
        self.folder, self.fails_at = folder, fails_at

    def __call__(self, lm: LM, piece: int, progress: Done) -> int:
        (self.folder / str(piece)).touch()
        if piece == self.fails_at:
            raise NonFinite(f"piece {piece} is not a number")
        time.sleep(0.1)
        return piece


def test_here_is_one_after_the_other(lm: LM) -> None:
    assert list(Here().map(lm, Square(), [3, 4], lambda n: None)) == [(0, 9), (1, 16)]


@pytest.mark.parametrize("on", ["processes:0", "processes", "processes:two", "elsewhere", "ray:", ""])
def test_an_unknown_place_is_refused(on: str) -> None:
    with pytest.raises(InvalidSetting, match="known: local, processes:N"):
        workers(on)


def test_a_worker_has_the_deltas_of_the_asking_process(lm: LM, edits: list[Edit]) -> None:
    delta = propose(lm, edits[:2])
    sent = to_bytes([delta])
    id_, _, content = sent[0]
    assert isinstance(content, bytes)
    assert from_bytes(content).id == id_ == delta.id
    worker = Worker.__new__(Worker)  # over the same model, so that nothing is loaded twice
    worker.lm, worker._deltas = lm, {}

    def applied(lm: LM, piece: None, progress: Done) -> list[str]:
        return [d.id for d in lm.applied]

    assert worker.run(applied, None, sent) == [delta.id]
    assert worker.run(applied, None, []) == []
    foreign = replace(delta, base=ZEROS)  # applied with other_base=True, which the asking process decides
    assert worker.run(applied, None, to_bytes([foreign])) == [foreign.id]
    worker.run(applied, None, [])


def test_another_checkpoint_is_refused() -> None:
    with pytest.raises(WrongBase, match="a worker has loaded another 'demo:gptj' than the asking process has"):
        Worker(Source("demo:gptj", {"dtype": "float32"}, "0" * 64, 1))


@pytest.mark.parametrize("change", ["weight", "dtype", "attention", "generation", "tokenizer", "threads"])
def test_a_model_that_has_changed_has_another_source(
    change: str, tiny: Callable[..., LM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, n_threads = tiny("llama", torch.float32), torch.get_num_threads()
    before = Source.of(lm, tmp_path)
    assert Source.of(lm, tmp_path) == before
    if change == "weight":
        lm.parameter(lm.site(1, "down_proj").name).data.mul_(0.5)
    elif change == "dtype":
        lm.model.to(torch.bfloat16)
    elif change == "attention":
        lm.model.set_attn_implementation("eager")
    elif change == "generation":  # with settings that transformers would not save
        lm.model.generation_config = GenerationConfig(temperature=0.6, do_sample=False, eos_token_id=[4, 5])
    elif change == "tokenizer":
        lm.tokenizer.chat_template = "{{ messages[0].content }}"
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads + 1)
    after = Source.of(lm, tmp_path)
    assert after != before
    try:
        worker = Worker(after)
        assert looks(worker.lm) == looks(lm)
        assert worker.lm.tokenizer.chat_template == lm.tokenizer.chat_template
    finally:
        torch.set_num_threads(n_threads)


def test_workers_follow_a_model_that_changes(tiny: Callable[..., LM]) -> None:
    place = Processes(1)
    for _ in range(2):  # a place can be used again
        lm = tiny("gptj", torch.float32)
        with place as one:
            for factor in (1, 0.5):
                lm.parameter(lm.site(1, "down_proj").name).data.mul_(factor)
                assert list(one.map(lm, Looks(), [0], lambda n: None)) == [(0, looks(lm))]


def test_a_copy_works_here(lm: LM) -> None:
    with working_on(lm, Processes(1)):
        assert isinstance(copy.deepcopy(lm).workers, Here)


def test_a_caller_s_model_goes_to_the_same_cards(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "source", None)
    monkeypatch.setattr(lm.model, "save_pretrained", lambda folder: None)
    monkeypatch.setattr(LM, "fingerprint", lambda lm: ZEROS)

    def place() -> dict[str, Any]:
        options = Source.of(lm, tmp_path).options
        return {name: options[name] for name in ("device", "device_map") if name in options}

    assert place() == {"device": "cpu"}
    monkeypatch.setattr(LM, "device", torch.device("cuda", 1))
    assert place() == {"device": "cuda:1"}
    monkeypatch.setattr(lm.model, "hf_device_map", {"": 1}, raising=False)
    assert place() == {"device": "cuda:1"}
    monkeypatch.setattr(lm.model, "hf_device_map", {"transformer": 0, "lm_head": 1})
    assert place() == {"device_map": {"transformer": 0, "lm_head": 1}}


def test_results_are_put_in_order() -> None:
    assert list(in_order(iter([(2, "c"), (0, "a"), (1, "b"), (3, "d")]))) == ["a", "b", "c", "d"]


def test_inside_without_deltas_none_travel(lm: LM, edits: list[Edit]) -> None:
    delta = propose(lm, edits[:1])
    with lm.edited(delta):
        assert lm.showing == lm.applied == (delta,)
        with lm.without_deltas():
            assert lm.applied == (delta,)
            assert lm.showing == ()
    assert lm.showing == ()


def test_shards_of_batches_give_what_one_process_gives(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backwards(Here):
        def map(self, lm, work, pieces, progress):  # type: ignore[no-untyped-def]
            assert len(pieces) == 3
            yield from [*super().map(lm, work, pieces, progress)][::-1]

    def noted(lm: LM, items: Sequence[int]) -> list[tuple[int, ...]]:
        return [(item, *items) for item in items]  # with its batch

    lengths = [5, 3, 9, 3, 2, 7, 8, 8, 1]
    wanted = batches.shared_in_batches(lm, noted, list(range(9)), lengths, max_tokens=16)
    monkeypatch.setattr(batches, "MAX_SHARDS", 3)
    monkeypatch.setattr(batches, "Here", Processes)  # so that this process counts as another place
    with working_on(lm, Backwards()):
        heard: list[tuple[int, int]] = []
        found = batches.shared_in_batches(
            lm, noted, list(range(9)), lengths, max_tokens=16, on_progress=lambda *n: heard.append(n)
        )
    assert found == wanted
    assert [item for item, *_ in found] == list(range(9))
    assert heard[-1] == (9, 9)


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


def test_an_error_that_cannot_be_sent_is_told(two: Processes, lm: LM) -> None:
    with pytest.raises(WorkFailed, match="a piece of work ended in a worker with Stiff: piece 7 is odd") as caught:
        list(two.map(lm, FailsStiffly(), [7], lambda n: None))
    assert "in __call__" in caught.value.__notes__[0]


OWN_KIND = """
from retcon.attachment import Beside, register

@register
class Quiet(Beside):
    kind = "quiet"
"""


class Applied:
    def __call__(self, lm: LM, piece: int, progress: Done) -> list[str]:
        return [delta.id for delta in lm.applied]


def test_a_kind_of_one_s_own_is_known_to_workers(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quiet_kind.py").write_text(OWN_KIND)
    monkeypatch.syspath_prepend(tmp_path)  # before the workers start
    quiet = importlib.import_module("quiet_kind").Quiet(base=lm.fingerprint())
    with workers("processes:1") as one, lm.edited(quiet):
        assert list(one.map(lm, Applied(), [1], lambda n: None)) == [(0, [quiet.id])]


def test_a_map_inside_another_has_its_own_processes(lm: LM) -> None:
    with workers("processes:1") as one:
        outer = one.map(lm, Square(), [1, 2, 3], lambda n: None)
        assert [next(outer), *one.map(lm, Square(), [5, 6], lambda n: None), *outer] == [
            *((0, 1), (0, 25), (1, 36), (1, 4), (2, 9))
        ]


def test_no_piece_is_begun_after_an_error(two: Processes, lm: LM, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="piece 0 is not a number"):
        list(two.map(lm, LeavesAMark(tmp_path, fails_at=0), range(40), lambda n: None))
    assert list(two.map(lm, Square(), [3], lambda n: None)) == [(0, 9)]
    assert len(list(tmp_path.iterdir())) < 30  # those that were begun before the error had arrived


def test_no_piece_is_begun_once_nobody_reads_the_results(two: Processes, lm: LM, tmp_path: Path) -> None:
    results = two.map(lm, LeavesAMark(tmp_path), range(40), lambda n: None)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert list(two.map(lm, Square(), [3], lambda n: None)) == [(0, 9)]
    assert len(list(tmp_path.iterdir())) < 30


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            Source("demo:gptj", {}, ZEROS, 1, versions={"retcon": "0.0"}),
            InvalidSetting,
            "a worker has other versions than",
        ),
        (Source("demo:gptj", {}, ZEROS, 1), WrongBase, "a worker has loaded another 'demo:gptj' than"),
    ],
    ids=["versions", "checkpoint"],
)
def test_a_worker_that_cannot_start_says_why(
    lm: LM, monkeypatch: pytest.MonkeyPatch, source: Source, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr("retcon.cluster.processes.Source.of", lambda lm, folder: source)
    with workers("processes:1") as one:
        assert isinstance(one, Processes)
        with pytest.raises(error, match=message):
            list(one.map(lm, Square(), range(8), lambda n: None))
        processes = list(one._workers[lm][1])  # not lost, nor started again
        with pytest.raises(error, match=message):
            list(one.map(lm, Square(), [1], lambda n: None))
        assert one._workers[lm][1] == processes


@pytest.mark.long
def test_processes_that_always_die_are_given_up(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retcon.cluster.processes.MAX_LOSSES", 0)
    with workers("processes:1") as one, pytest.raises(WorkersLost, match="lost its worker process 1 times"):
        list(one.map(lm, Square(5), [5], lambda n: None))


@pytest.mark.long
def test_a_script_that_its_workers_cannot_import_is_named_at_once(lm: LM, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from unittest.mock import patch\n"
        "from retcon.cluster import workers\n"
        "class LM: showing = ()\n"
        "with patch('retcon.cluster.processes.Source.of', return_value=None), workers('processes:2') as on:\n"
        "    list(on.map(LM(), abs, [1], print))\n"
    )
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert 'which needs if __name__ == "__main__":' in ran.stderr
    assert ran.stderr.count("bootstrapping phase") <= 2  # none is started again


def test_a_process_ends_with_the_one_that_asked(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from unittest.mock import patch\n"
        "from retcon.cluster import workers\n"
        "class LM: showing = ()\n"
        "if __name__ == '__main__':\n"
        "    lm = LM()\n"
        "    with patch('retcon.cluster.processes.Source.of', return_value=None), workers('processes:1') as on:\n"
        "        try: list(on.map(lm, abs, [1], print))\n"
        "        except AttributeError: print(on._place, end='', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    folder = Path(ran.stdout)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert folder.name.startswith("retcon-workers-")
    for _ in range(600):
        if not folder.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{folder} is there a minute later")


# --- moments and evaluation ----------------------------------------------------------------------------------------


def moments(lm: LM) -> list[Collected]:
    """Second moments of two sites, from some dozen chunks."""
    rows = [lm.encode(text) for text in world.text(40, seed=1)]
    sites = [lm.site(2, "down_proj"), lm.site(3, "o_proj")]
    return [found for _, found in collect.collect(lm, sites, rows, max_batch_tokens=128)]


def equal(one: list[Collected], other: list[Collected]) -> bool:
    return all(a.moment.equal(b.moment) and a.convergence == b.convergence for a, b in zip(one, other, strict=True))


def measured(lm: LM, edits: Sequence[Edit], delta: Delta) -> Evaluation:
    return evaluate(lm, world.cases(len(edits)), delta=delta, max_batch_tokens=64, max_new_tokens=4)


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(collect.CHUNK_TOKENS, "cpu", 100)


class DiesOnce:
    """Kills the first worker that comes by."""

    mark: Path

    def die(self) -> None:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class DyingSum(SumOfChunk, DiesOnce):
    def __call__(self, lm: LM, piece: Sequence[Row], progress: Done):  # type: ignore[no-untyped-def]
        self.die()
        return super().__call__(lm, piece, progress)


class DyingScore(ScoreBatch, DiesOnce):
    def __init__(self, max_tokens: int, mark: Path) -> None:
        super().__init__(max_tokens)
        object.__setattr__(self, "mark", mark)

    def __call__(self, lm: LM, items: Sequence[score.Family]) -> list[list[list[TokenScore]]]:
        self.die()
        return super().__call__(lm, items)


KILLED = pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)])


@KILLED
@pytest.mark.usefixtures("many_chunks")
def test_processes_give_the_same_moments(
    two: Processes, lm: LM, edits: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    wanted = moments(lm)

    def dying(*args: Any) -> SumOfChunk:
        work = DyingSum(*args)
        work.mark = tmp_path / "killed"
        return work

    if killed:
        monkeypatch.setattr(collect, "SumOfChunk", dying)
    with working_on(lm, two), lm.edited(propose(lm, edits[:1])):
        assert equal(moments(lm), wanted)  # of the unedited weights
    assert (tmp_path / "killed").exists() == killed


@KILLED
def test_processes_give_the_same_evaluation(
    two: Processes, lm: LM, edits: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    delta = propose(lm, edits)
    wanted = measured(lm, edits, delta)
    if killed:
        monkeypatch.setattr(score, "ScoreBatch", partial(DyingScore, mark=tmp_path / "killed"))
    with working_on(lm, two):
        found = measured(lm, edits, delta)
    assert (tmp_path / "killed").exists() == killed
    assert found.records == wanted.records
    assert (found.texts, found.scores) == (wanted.texts, wanted.scores)


def test_processes_draw_the_same_text(two: Processes, lm: LM, edits: list[Edit]) -> None:
    how = Writing(max_new_tokens=4, sample_top_k=5)
    prompts = [edit.text for edit in edits]
    wanted = generate(lm, prompts, how, seeds=range(len(edits)), max_batch_tokens=32)
    with working_on(lm, two):
        assert generate(lm, prompts, how, seeds=range(len(edits)), max_batch_tokens=32) == wanted


@pytest.mark.parametrize("unit", ["row", "entry"])
def test_processes_give_the_same_attribution(
    two: Processes, lm: LM, edits: list[Edit], unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [lm.site(1, "down_proj"), lm.site(3, "q_proj")]
    monkeypatch.setattr(attribution, "MAX_BATCH_TOKENS", 40)
    how = Attribution(n_points=4)
    heard: list[int] = []
    pieces = []

    class Noted:
        def map(self, lm, work, given, progress):  # type: ignore[no-untyped-def]
            pieces.extend(given)
            return two.map(lm, work, given, progress)

    with lm.edited(propose(lm, edits[:1])):
        wanted = attribute(lm, edits, sites, how, unit)
        with working_on(lm, Noted()):
            found = attribute(lm, edits, sites, how, unit, progress=lambda done, _: heard.append(done))
    assert len(pieces) > 2
    assert heard[-1] == len(edits)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_expert_s_attribution_travels_by_its_name(tiny: Callable[..., LM], monkeypatch: pytest.MonkeyPatch) -> None:
    class Sending(Here):
        def map(self, lm, work, pieces, progress):  # type: ignore[no-untyped-def]
            return ((i, loads(dumps(work))(lm, piece, progress)) for i, piece in enumerate(pieces))

    lm = tiny("mixtral", torch.float32)
    sites, facts = lm.expert_sites(1), [Edit("The capital of {} is", who, "Rome") for who in ("France", "Peru")]
    monkeypatch.setattr(attribution, "MAX_BATCH_TOKENS", 1)
    wanted = attribute(lm, facts, sites, Attribution(n_points=2))
    monkeypatch.setattr(attribution, "Here", Processes)  # so that this process counts as another place
    with working_on(lm, Sending()):
        found = attribute(lm, facts, sites, Attribution(n_points=2))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
