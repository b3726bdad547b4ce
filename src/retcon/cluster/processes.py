"""Workers that are processes of this machine.

They are started afresh (`spawn`), so a script that uses them needs the usual `if __name__ == "__main__":`.
"""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from retcon.cluster.worker import Source, Worker, to_files
from retcon.errors import WorkersLost
from retcon.lm.model import LM
from retcon.work import Done, Piece, Result, Work

MAX_LOSSES = 5
"""Pools that may break in a row without a piece done in between."""


class Processes:
    """N processes; each loads the model when its first piece comes, and keeps it. A lost process's piece is worked on
    again."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._pools: WeakKeyDictionary[LM, ProcessPoolExecutor] = WeakKeyDictionary()
        self._sources: WeakKeyDictionary[LM, Source] = WeakKeyDictionary()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Processes":
        self._folder = tempfile.TemporaryDirectory(prefix="retcon-workers-")
        return self

    @property
    def _begun(self) -> Path:
        """File that is there once a process has come as far as its own start."""
        assert self._folder is not None, "Processes is a scope; use it in a `with`"
        return Path(self._folder.name) / "begun"

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
        self._pools.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def map(
        self, lm: LM, work: Work[Piece, Result], pieces: Sequence[Piece], progress: Done
    ) -> Iterator[tuple[int, Result]]:
        """Do as `Workers.map`.

        Raises:
            WorkersLost: processes die as often as they are started, or none can begin.
            RetconError: a process cannot load the model; the error is its own.
        """
        deltas = to_files(lm.showing, self._begun.parent)
        waiting, losses = set(range(len(pieces))), 0
        while waiting:
            pool = self._pool(lm)
            asked: dict[Future[Any], int] = {}
            try:
                for place in sorted(waiting):
                    asked[pool.submit(_work, work, pieces[place], deltas)] = place
                for future in as_completed(asked):
                    result = future.result()
                    waiting.remove(asked[future])
                    losses = 0
                    yield asked[future], result
            except BrokenProcessPool:
                losses += 1
                self._pools.pop(lm).shutdown(cancel_futures=True)
                if not self._begun.exists():
                    raise WorkersLost(
                        "no worker process could begin; each imports the script that asks for it, which needs "
                        'if __name__ == "__main__": around what it runs (where it has that, memory may be short: use '
                        "fewer of them, --on processes:N, or --on local)"
                    ) from None
                if losses > MAX_LOSSES:
                    raise WorkersLost(
                        f"worker processes were lost {losses} times before a piece was done (killed, or out of memory?)"
                        "; use fewer of them (--on processes:N), or --on local"
                    ) from None
            finally:
                for future in asked:
                    future.cancel()

    def _pool(self, lm: LM) -> ProcessPoolExecutor:
        if lm not in self._sources:
            self._sources[lm] = Source.of(lm, self._begun.with_name(str(len(self._sources))))
        if lm not in self._pools:
            self._pools[lm] = ProcessPoolExecutor(
                self.n, mp_context=get_context("spawn"), initializer=_start, initargs=(self._sources[lm], self._begun)
            )
        return self._pools[lm]


_WORKER: list[Worker | Exception] = []
"""The worker that this process is, where it is one, or why it is none."""


def _start(source: Source, begun: Path) -> None:
    begun.touch()
    try:
        _WORKER.append(Worker(source))
    except Exception as error:  # raised here, it would break the pool, which does not pass it on
        _WORKER.append(error)


def _work(work: Any, piece: Any, deltas: Sequence[tuple[str, Path]]) -> Any:
    worker = _WORKER[0]
    if isinstance(worker, Exception):
        raise worker
    return worker.run(work, piece, deltas)
