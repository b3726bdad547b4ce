"""How the verbs report progress: bars and spinners on a terminal, lines of a log elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from retcon.cli.printing import console, seconds
from retcon.escaping import printable
from retcon.work import Progress


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Draw a progress bar per stage on stderr, gone when done; where stderr is no terminal, log what takes long."""
    if not console(stderr=True).is_terminal:
        with log_lines():
            yield StageLog().advance
        return
    shown = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = shown.add_task(stage, total=total)
        shown.update(tasks[stage], completed=done, total=total)

    with shown:
        yield advance


LOGGED_SECONDS, LOG_EVERY = 5.0, 30.0
"""A stage is logged once it takes longer than the first, and again each time the second has passed."""


def _log() -> logging.Logger:
    return logging.getLogger("retcon.progress")


class StageLog:
    """How far each stage is, as lines of the logger `retcon.progress`: done, rate, time left; one line when it ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began: dict[str, float] = {}
        self.logged: dict[str, float] = {}

    def advance(self, stage: str, done: int, total: int) -> None:
        """Hear that `done` of `total` are done."""
        now = self.clock()
        began = self.began.setdefault(stage, now)
        took = now - began
        if took < LOGGED_SECONDS or done < 1:
            return
        if done >= total:
            _log().info("%s: %s done in %s, %.3g a second", stage, f"{total:,}", seconds(took), done / took)
            del self.began[stage]
        elif now - self.logged.get(stage, -LOG_EVERY) >= LOG_EVERY:
            self.logged[stage] = now
            left = took / done * (total - done)
            _log().info(
                "%s: %s of %s, %.3g a second, %s left", stage, f"{done:,}", f"{total:,}", done / took, seconds(left)
            )


@contextmanager
def log_lines() -> Iterator[None]:
    """Send the progress log to stderr, unless the caller has given it a handler of its own."""
    if _log().hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stderr), _log().level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    _log().addHandler(handler)
    _log().setLevel(logging.INFO)
    try:
        yield
    finally:
        _log().removeHandler(handler)
        _log().setLevel(level)


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Draw a spinner for a stage whose length is not known; in a pipe, log one that takes long."""
    if not console(stderr=True).is_terminal:
        late = threading.Timer(LOGGED_SECONDS, _log().info, (printable(what),))
        late.daemon = True
        with log_lines():
            late.start()
            try:
                yield
            finally:
                late.cancel()
        return
    shown = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
    )
    with shown:
        shown.add_task(what, total=None)
        yield
