"""Workers that are actors of a Ray cluster (extra `ray`).

A piece is one call of an actor. Ray finds room for the actors. A lost one is made anew, wherever there is room, and its
piece goes to whichever actor is free first. Ray's own restarts are off: it would make them for ever without a word.
"""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from retcon.cluster.worker import FOLDER, Sent, Source, Worker, sendable, to_bytes
from retcon.errors import InvalidSetting, MissingPackage, WorkersLost, how_to_install
from retcon.lm.model import LM
from retcon.work import Done, Piece, Result, Work

MAX_LOSSES = 5
"""Times that a piece may lose its worker, and that an actor may fail to start."""


class Actor:
    """What runs in Ray's process: a worker that loads its model when its first piece comes."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.worker: Worker | None = None

    def ready(self) -> None:
        """Return once the process runs."""

    def run(self, work: Any, piece: Any, deltas: Sequence[Sent]) -> Any:
        """Do as `Worker.run`."""
        try:
            self.worker = self.worker or Worker(self.source)
            return self.worker.run(work, piece, deltas)
        except Exception as error:
            raise sendable(error) from None


class RayCluster:
    """Actors of a Ray cluster; each loads the model once. A lost actor's piece is worked on again.

    An actor reserves what the model takes in the asking process: as many GPUs as it is spread over, or as many cores as
    torch has threads, and memory for its weights.

    Args:
        address: of a cluster that runs ("auto": this machine's); None: Ray is started on this machine and stopped when
            the scope ends. Where the process is connected to a cluster already, that one is used.
        n: actors; None: as many as the cluster has room for.
        folder: where models are written that were not loaded by name; a cluster of several machines needs one that
            all of them see.

    Raises:
        MissingPackage: Ray is not installed.
        InvalidSetting: no cluster answers at the address.
    """

    def __init__(self, address: str | None = None, n: int | None = None, folder: str | Path | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingPackage(f"working on Ray needs the package ray: {how_to_install('ray')}") from error
        self.ray: Any = ray
        self.address, self.n, self.folder = address, n, folder
        self._source: Source | None = None
        self._actors: list[Any] = []
        """Of that source."""
        self._make: Callable[[], Any]
        """Makes one more actor of those that there are."""
        self._root: Path
        """Where models are written."""
        self._scope = ExitStack()

    def __enter__(self) -> "RayCluster":
        with ExitStack() as stack:
            if not self.ray.is_initialized():
                self._connect(stack)
            stack.callback(self._dismiss)
            self._root = Path(self.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix=FOLDER)))
            self._scope = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._scope.close()

    def map(
        self, lm: LM, work: Work[Piece, Result], pieces: Sequence[Piece], progress: Done
    ) -> Iterator[tuple[int, Result]]:
        """Do as `Workers.map`.

        Raises:
            WorkersLost: a piece loses its worker again and again, or no actor can be started.
        """
        errors = self.ray.exceptions
        shared = self.ray.put(work), self.ray.put(to_bytes(lm.showing))
        waiting, losses = list(range(len(pieces)))[::-1], [0] * len(pieces)
        failed_starts: dict[Any, int] = {}
        idle: list[Any] = []
        busy: dict[Any, tuple[int | None, Any]] = {}
        """By the call that runs: the piece's place (None: the actor is being started) and the actor."""

        def start(actor: Any) -> None:
            busy[actor.ready.remote()] = None, actor

        left = len(pieces)
        for actor in self._actors_for(lm) if pieces else ():
            start(actor)
        while left:
            while waiting and idle:
                place, actor = waiting.pop(), idle.pop()
                busy[actor.run.remote(shared[0], pieces[place], shared[1])] = place, actor
            done, _ = self.ray.wait(list(busy))
            done_place, actor = busy.pop(done[0])
            try:
                result = self.ray.get(done[0])
            except errors.RayTaskError as error:
                raise (error.cause or error) from None
            except (errors.RayActorError, errors.OutOfMemoryError) as error:
                failed = 0 if done_place is not None else failed_starts.pop(actor, 0) + 1
                if failed > MAX_LOSSES:
                    self._drop(actor, error)
                    continue
                new = self._made_anew(actor)
                failed_starts[new] = failed
                start(new)
                if done_place is not None:
                    waiting.append(done_place)
                    losses[done_place] += 1
                    if losses[done_place] > MAX_LOSSES:
                        raise WorkersLost(
                            f"a piece of work lost its worker {losses[done_place]} times (killed, or out of memory?); "
                            f"use machines with more memory, or do without workers. Ray says: {_first_line(error)}"
                        ) from None
                continue
            idle.append(actor)
            failed_starts.pop(actor, None)
            if done_place is not None:
                left -= 1
                yield done_place, result

    def _connect(self, stack: ExitStack) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "retcon"}
        if self.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # else those of pieces that a map has given up
            os.environ.setdefault("RAY_worker_niceness", "0")  # else workers give way to all other processes
            options["include_dashboard"] = False
            if self.n is not None:
                import torch

                options["num_cpus"] = max(self.n * torch.get_num_threads(), os.cpu_count() or 1)
        before = signal.getsignal(signal.SIGTERM)  # Ray sets one of its own
        try:
            self.ray.init(self.address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InvalidSetting(f"no Ray cluster answers at {self.address!r}: {_first_line(error)}") from error
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        stack.callback(self.ray.shutdown)

    def _actors_for(self, lm: LM) -> list[Any]:
        source = self._source_of(lm)
        if source != self._source or not self._actors:
            self._dismiss()  # one model at a time: another one's actors may have all the room
            needs = _needs(lm)
            machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            room = sum(min(int(has.get(kind, 0) / n) for kind, n in needs.items()) for has in machines)
            if room < 1:
                raise InvalidSetting(
                    f"no machine of the Ray cluster has room for a worker: one needs {_said(needs)}; there are "
                    + "; ".join(_said({kind: has.get(kind, 0) for kind in needs}) for has in machines)
                )
            actor = self.ray.remote(Actor).options(
                num_cpus=needs.get("CPU", 1), num_gpus=needs.get("GPU", 0), memory=needs["memory"]
            )
            self._make = partial(actor.remote, source)
            self._source, self._actors = source, [self._make() for _ in range(min(self.n or room, room))]
        return self._actors

    def _made_anew(self, actor: Any) -> Any:
        """Return a new actor in the place of one that is lost."""
        self.ray.kill(actor)
        new = self._actors[self._actors.index(actor)] = self._make()
        return new

    def _drop(self, actor: Any, error: Exception) -> None:
        """Do without an actor that cannot be started.

        Raises:
            WorkersLost: it was the last one.
        """
        self.ray.kill(actor)
        self._actors.remove(actor)
        if not self._actors:
            raise WorkersLost(
                "no worker can be started on the Ray cluster (is retcon installed on its machines?); mend what Ray "
                f"says, or do without workers. Ray says: {str(error).strip()}"
            ) from None

    def _source_of(self, lm: LM) -> Source:
        if self.folder is None and lm.source is None and sum(node["Alive"] for node in self.ray.nodes()) > 1:
            raise InvalidSetting(
                f"{lm.name!r} was not loaded by name, so that the machines of the Ray cluster cannot load it; name "
                "a folder that all of them see: RayCluster(address, folder=...)"
            )
        source = Source.of(lm, self._root)
        return replace(source, options=on_own_cards(source.options))

    def _dismiss(self) -> None:
        for actor in self._actors:
            self.ray.kill(actor)
        self._actors.clear()


def on_own_cards(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of `load` with the cards that they name numbered from 0 on: an actor sees its own cards only."""
    device, device_map = options.get("device"), options.get("device_map")
    places = [device, *(device_map.values() if isinstance(device_map, Mapping) else [device_map])]
    cards = sorted({card for place in places if (card := _card(place)) is not None})

    def own(place: Any) -> Any:
        card = _card(place)
        return place if card is None else f"cuda:{cards.index(card)}"

    if isinstance(device_map, Mapping):
        return {**options, "device": own(device), "device_map": {module: own(at) for module, at in device_map.items()}}
    return {**options, "device": own(device), "device_map": own(device_map)}


def _card(place: Any) -> int | None:
    """Return the number of the card that is named as a place; None where it names another."""
    if isinstance(place, int):
        return place
    kind, _, number = str(place).partition(":")
    return int(number or 0) if kind == "cuda" else None


def _needs(lm: LM) -> dict[str, float]:
    """Return what one worker reserves, by Ray's name of the resource."""
    import torch

    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    cards = {x.device for x in tensors if x.device.type == "cuda"}
    memory = sum(x.nbytes for x in {id(x): x for x in tensors}.values())
    return {"memory": float(memory), **({"GPU": len(cards)} if cards else {"CPU": torch.get_num_threads()})}


def _said(resources: dict[str, float]) -> str:
    named = {"memory": lambda n: f"{n / 2**30:.1f} GiB of memory", "GPU": lambda n: f"{n:g} GPUs"}
    return ", ".join(named.get(kind, lambda n: f"{n:g} cores")(n) for kind, n in resources.items())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
