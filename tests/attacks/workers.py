"""Workers that are killed: `python -m tests.attacks.workers`. Each trial kills (SIGKILL) one of two workers, drawn at
random, at a random moment of a proposal; the delta and its records are those of one process. Half the trials are on
processes, half on Ray where it is installed."""

import importlib.util
import os
import random
import signal
import threading
import time
from contextlib import ExitStack

import retcon
from retcon import world
from retcon.cluster import workers, working_on
from retcon.cluster.actors import RayCluster
from retcon.delta import Delta
from retcon.lm.model import LM
from retcon.memory.values import plan
from retcon.work import Done, Workers
from tests.attacks.tally import Tally, main

N_EDITS, CHUNK = 12, 2


class ProcessId:
    """Work that says where it is done."""

    def __call__(self, lm: LM, piece: int, progress: Done) -> int:
        time.sleep(0.2)  # so that every worker gets some
        return os.getpid()


def propose(lm: LM) -> Delta:
    edits = [case.edits[0] for case in world.cases(N_EDITS)]
    return retcon.method("jeep", for_model=lm, steps=5).propose(lm, edits)


def trial(lm: LM, place: Workers, wanted: Delta, takes: float, rng: random.Random) -> str | None:
    """Kill one worker during a proposal; what did not hold, or None."""
    pids = {pid for _, pid in place.map(lm, ProcessId(), range(6), lambda n: None)}
    victim = rng.choice(sorted(pids))
    timer = threading.Timer(rng.random() * takes, os.kill, (victim, signal.SIGKILL))
    timer.start()
    with working_on(lm, place):
        found = propose(lm)
    timer.join()
    if found.id != wanted.id or found.report != wanted.report:
        return f"another delta: {type(place).__name__}"
    return None


def attack(n: int, seed: int) -> Tally:
    """`n` trials."""
    rng, tally = random.Random(seed), Tally("workers")
    plan.MAX_EDITS = {"cpu": CHUNK}
    lm = retcon.load("demo:gptj")
    wanted = propose(lm)
    with ExitStack() as stack:
        places: list[Workers] = [stack.enter_context(workers("processes:2"))]
        if importlib.util.find_spec("ray"):
            places.append(stack.enter_context(RayCluster(n=2)))
        for i in range(n):
            place = places[i % len(places)]
            list(place.map(lm, ProcessId(), range(6), lambda n: None))  # both workers have the model
            with working_on(lm, place):
                started = time.perf_counter()
                propose(lm)
                takes = time.perf_counter() - started
            tally.count(trial(lm, place, wanted, takes, rng))
            tally.notes[type(place).__name__] = tally.notes.get(type(place).__name__, 0) + 1  # type: ignore[operator]
    return tally


if __name__ == "__main__":
    main(attack, 20, __doc__)
