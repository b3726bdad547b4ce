"""Jobs of the page: one thread owns the model, and does one after the other."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from retcon.errors import RetconError
from retcon.work import Progress

if TYPE_CHECKING:
    from retcon.lm.model import LM

JobState = Literal["waiting", "running", "done", "failed", "cancelled"]
N_JOBS = 20
"""Jobs that have ended and are remembered."""


class Cancelled(BaseException):
    """Ends the job that is running; no error of retcon's, so that nothing on the way catches it."""


@dataclass
class Job:
    """One thing that the model's thread does."""

    name: str
    run: "Callable[[LM, Progress], str]"
    """Does it, and returns what is reported; a call of its progress may end it."""
    state: JobState = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    message: str = ""
    seconds: float = 0.0
    cancel: bool = False

    @property
    def ended(self) -> bool:
        """Whether it neither waits nor runs."""
        return self.state not in ("waiting", "running")

    @property
    def percent(self) -> int | None:
        """How far it is; None where that is not known."""
        return round(100 * self.done / self.total) if self.total else None


class Jobs:
    """What the model's thread has done, does and will do.

    Args:
        load: loads the first model; called in the thread.
        changed: called after every change.
    """

    def __init__(self, load: "Callable[[], LM]", changed: Callable[[], None]) -> None:
        self.lm: LM | None = None
        """The model that jobs are done on; None until it is loaded."""
        self.problem = ""
        """Why there is none."""
        self.all: list[Job] = []
        self.n_steps = 0
        """Goes up with every step of a job."""
        self._load, self._changed = load, changed
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Load the model, in its thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a job that runs is cancelled at its next step."""
        for job in self.all:
            job.cancel = True
        self._queue.put(None)
        self._thread.join(timeout=60)

    def submit(self, name: str, run: "Callable[[LM, Progress], str]") -> Job:
        """Add a job."""
        job = Job(name, run)
        n_ended = sum(job.ended for job in self.all)  # the first ones: jobs are done in order
        self.all = [*self.all[max(0, n_ended - N_JOBS) :], job]
        self._queue.put(job)
        self._changed()
        return job

    def cancel(self) -> None:
        """Cancel whatever runs or waits."""
        for job in self.all:
            if not job.ended:
                job.cancel = True
        self._changed()

    @property
    def current(self) -> Job | None:
        """The job that runs, or the last one."""
        running = [job for job in self.all if job.state == "running"]
        return running[0] if running else self.all[-1] if self.all else None

    def _work(self) -> None:
        try:
            self.lm = self._load()
        except (RetconError, OSError) as error:
            self.problem = f"the model cannot be loaded: {problem_of(error)}"
        self._changed()
        while (job := self._queue.get()) is not None:
            self._do(job)

    def _do(self, job: Job) -> None:
        def report(stage: str, done: int, total: int) -> None:
            if job.cancel:
                raise Cancelled
            job.stage, job.done, job.total = stage, done, total
            self.n_steps += 1

        started = time.perf_counter()
        if job.cancel:
            job.state = "cancelled"
        elif self.lm is None:
            job.state, job.message = "failed", self.problem
        else:
            job.state = "running"
            self._changed()
            try:
                job.message = job.run(self.lm, report)
                job.state = "done"
            except Cancelled:
                job.state, job.message = "cancelled", "cancelled; nothing was changed"
            except RetconError as error:
                job.state, job.message = "failed", error.on_page
            except Exception as error:  # else the thread would end, and every later job would wait
                job.state, job.message = "failed", f"{type(error).__name__}: {error}"
        job.seconds = time.perf_counter() - started
        self._changed()


def problem_of(error: RetconError | OSError) -> str:
    """Return what went wrong, in the page's words."""
    return error.on_page if isinstance(error, RetconError) else str(error)
