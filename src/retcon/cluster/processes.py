"""Workers that are processes of this machine.

They are started afresh (`spawn`), so a script that uses them needs the usual `if __name__ == "__main__":`.
"""

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from pickle import dumps, loads
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary

from retcon.cluster.worker import FOLDER, Source, Worker, sendable, to_files
from retcon.errors import WorkersLost
from retcon.lm.model import LM
from retcon.work import Done, Piece, Result, Work

MAX_LOSSES = 5
"""Times that a piece may lose its worker, and that processes may be lost before they have loaded the model."""


class Process:
    """One worker process. It answers once when it has loaded the model, and once for each piece."""

    def __init__(self, source: Source, folder: Path) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, source, folder), daemon=True)
        self.process.start()
        theirs.close()
        self.busy = True
        """Whether an answer has yet to come; a map that was given up leaves some."""
        self.taken = False
        """Whether a map has it, or it is lost."""

    def ask(self, *asked: Any) -> None:
        """Send work (None: the same as before), a piece and the deltas; `answer` says so where the process is lost."""
        sent = ForkingPickler.dumps(asked)
        self.busy = True
        with suppress(OSError):
            self.pipe.send_bytes(sent)

    def answer(self) -> tuple[Any, Exception | None] | None:
        """Return the answer (a result, or an error) once it comes; None: the process is lost."""
        try:
            answer = self.pipe.recv_bytes()
        except (EOFError, OSError):
            self.process.join(5)  # it may be about to end by itself, which its exit code says
            self.end()
            return None
        self.busy = False
        return ForkingPickler.loads(answer)

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


class Processes:
    """N processes; each loads the model once. A lost process's piece is worked on again."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._workers: WeakKeyDictionary[LM, tuple[Source, list[Process]]] = WeakKeyDictionary()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Processes":
        self._folder = tempfile.TemporaryDirectory(prefix=FOLDER)
        return self

    @property
    def _place(self) -> Path:
        assert self._folder is not None, "Processes is a scope; use it in a `with`"
        return Path(self._folder.name)

    def __exit__(self, *_: object) -> None:
        for _source, processes in self._workers.values():
            _end(processes)
        self._workers.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def map(
        self, lm: LM, work: Work[Piece, Result], pieces: Sequence[Piece], progress: Done
    ) -> Iterator[tuple[int, Result]]:
        """Do as `Workers.map`.

        Raises:
            WorkersLost: a piece loses its worker again and again, or no process can begin.
            RetconError: a process cannot load the model; the error is its own.
        """
        deltas = to_files(lm.showing, self._place)
        source, sent = Source.of(lm, self._place), dumps(work)
        processes = self._take(lm, source, min(self.n, len(pieces)))
        waiting, losses = list(range(len(pieces)))[::-1], Counter[int | None]()
        doing: dict[Process, int] = {}
        have: set[Process] = set()
        """Those that the work was sent to; it may be large."""

        def hand_out() -> None:
            for process in processes:
                if waiting and not process.busy:
                    doing[process] = waiting.pop()
                    process.ask(None if process in have else sent, pieces[doing[process]], deltas)
                    have.add(process)

        try:
            hand_out()
            while waiting or doing:
                busy = {process.pipe: process for process in processes if process.busy}
                for pipe in wait(list(busy)):
                    process = busy[pipe]  # type: ignore[index]
                    answer, place = process.answer(), doing.pop(process, None)
                    if answer is None:
                        processes.remove(process)
                        losses[place] += 1
                        _check_losses(process, losses[place], place)
                        processes += self._take(lm, source, 1)
                        if place is not None:
                            waiting.append(place)
                    hand_out()  # before the result is looked at, so that nobody waits meanwhile
                    if answer is not None and place is not None:
                        result, error = answer
                        if error is not None:
                            raise error
                        yield place, result
        finally:
            for process in processes:
                process.taken = False

    def _take(self, lm: LM, source: Source, n: int) -> list[Process]:
        """Return n processes for one map, those first that no other map has."""
        before, processes = self._workers.get(lm, (source, []))
        if source != before:
            _end(processes)
            processes = []
        free = [process for process in processes if not process.taken][:n]
        new = [Process(source, self._place) for _ in range(n - len(free))]
        self._workers[lm] = source, processes + new
        for process in free + new:
            process.taken = True
        return free + new


def _end(processes: Sequence[Process]) -> None:
    for process in processes:
        process.end()


def _check_losses(process: Process, n: int, place: int | None) -> None:
    """Check that it makes sense to start another process in a lost one's place.

    Raises:
        WorkersLost: it would be lost too.
    """
    if place is None and (process.process.exitcode or 0) > 0:  # it has ended by itself
        raise WorkersLost(
            "no worker process could begin; each imports the script that asks for it, which needs "
            'if __name__ == "__main__": around what it runs (where it has that, memory may be short: use fewer of '
            "them, or none)"
        )
    if n > MAX_LOSSES:
        what = "worker processes were lost" if place is None else "a piece of work lost its worker process"
        raise WorkersLost(f"{what} {n} times (killed, or out of memory?); use fewer of them, or none")


def _serve(pipe: Connection, source: Source, folder: Path) -> None:
    """Be a worker until the asking process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the asking process ends this one
    ending = Thread(target=_end_with_the_asking_process, args=(folder,), daemon=True)
    ending.start()
    try:
        worker: Worker | Exception = Worker(source)
    except Exception as error:
        worker = error
    with suppress(EOFError, OSError):
        pipe.send_bytes(ForkingPickler.dumps((None, None)))
        while True:
            pipe.send_bytes(_answer(worker, pipe.recv_bytes()))
    ending.join()  # the pipe is closed: the asking process is gone, and its folder has yet to be removed


def _end_with_the_asking_process(folder: Path) -> None:
    asking = parent_process()
    assert asking is not None
    asking.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _answer(worker: Worker | Exception, asked: bytes) -> memoryview:
    try:
        if isinstance(worker, Exception):
            raise worker
        work, piece, deltas = ForkingPickler.loads(asked)
        worker.work = worker.work if work is None else loads(work)
        return ForkingPickler.dumps((worker.run(worker.work, piece, deltas), None))
    except Exception as error:
        return ForkingPickler.dumps((None, sendable(error)))
