"""Interrupts anywhere in everything that changes a model: `python -m tests.attacks.signals`.

Half of the trials send a real signal (the timer's, some of them several in a row) at a random time; the other half
raise KeyboardInterrupt or MemoryError at a chosen bytecode of retcon's own files, and again while the next call
recovers. After each, `lm.applied` must be the state before or after the call, the weights must be that state's to the
bit, flags and hooks must be as they were, and `revert_all` must bring back the base's bytes.
"""

import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import retcon
from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import OutOfMemory
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from tests.attacks.tally import Tally, main
from tests.conftest import random_moments, tiny_model, tokenizer
from tests.lm.deltas import by_hand, random_delta, same_bytes

SOURCE = str(Path(retcon.__file__).parent)
EDITS = [Edit("You know {}", "France", "Rome", "Paris", id="france")]


class Cut(KeyboardInterrupt):
    """An interrupt of this attack."""


class CutMemory(MemoryError):
    """Memory that ran out, at the attack's word."""


class Subject:
    """A tiny model under attack, with a copy of its base beside it."""

    def __init__(self, seed: int) -> None:
        self.lm = LM(tiny_model("llama", torch.bfloat16 if seed % 2 else torch.float32), tokenizer())
        self.names = [self.lm.site(layer, "down_proj").name for layer in range(self.lm.n_layers)]
        self.base = {name: self.lm.parameter(name).detach().clone() for name in self.names}
        shapes = {name: tuple(w.shape) for name, w in self.base.items()}
        self.deltas = [random_delta(1000 * seed + i, shapes, self.lm.fingerprint()) for i in range(6)]
        self.moments = random_moments(self.lm, n_tokens=320)
        self.method = retcon.method("memit", layers=(0, 1), moment_weight=1.0, clamp=8.0, weight_decay=0.0, steps=2)
        self.flags = self.look()

    def look(self) -> Any:
        """Modes, flags, hooks and forwards."""
        return (
            [m.training for m in self.lm.model.modules()],
            [p.requires_grad for p in self.lm.model.parameters()],
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.lm.model.modules()),
            [n for n, m in self.lm.model.named_modules() if "forward" in m.__dict__],
        )

    def holds(self, deltas: tuple[Delta, ...]) -> bool:
        return all(
            same_bytes(self.lm.parameter(n), by_hand(base, n, list(deltas)) if touched(n, deltas) else base)
            for n, base in self.base.items()
        )


def touched(name: str, deltas: tuple[Delta, ...]) -> bool:
    return any(name in delta.changes for delta in deltas)


# --- what is interrupted -------------------------------------------------------------------------------------------


def apply(s: Subject, rng: random.Random) -> None:
    s.lm.apply(s.deltas[3])


def revert(s: Subject, rng: random.Random) -> None:
    s.lm.revert(s.deltas[rng.randrange(3)])


def revert_all(s: Subject, rng: random.Random) -> None:
    s.lm.revert_all()


def scope(s: Subject, rng: random.Random) -> None:
    with s.lm.edited(s.deltas[3], s.deltas[4]):
        pass


def nested(s: Subject, rng: random.Random) -> None:
    with s.lm.edited(s.deltas[3]), s.lm.without_deltas(), s.lm.frozen_eval():
        pass


def hidden(s: Subject, rng: random.Random) -> None:
    with s.lm.without_deltas():
        pass


def propose(s: Subject, rng: random.Random) -> None:
    s.method.propose(s.lm, EDITS, contexts=Contexts(("I read. ",)), moments=s.moments)


CALLS: dict[str, Callable[[Subject, random.Random], None]] = {
    c.__name__: c for c in (apply, revert, revert_all, scope, nested, hidden, propose)
}


def allowed(call: str, s: Subject) -> list[tuple[Delta, ...]]:
    """The states that may be in force after a cut call: the one before it and the one after it."""
    before = tuple(s.deltas[:3])
    after = {
        "apply": [(*before, s.deltas[3])],
        "revert": [tuple(d for d in before if d is not out) for out in before],
        "revert_all": [()],
    }
    return [before, *after.get(call, [])]


# --- how it is interrupted -----------------------------------------------------------------------------------------


class AtBytecode:
    """Counts bytecodes of retcon's files, and raises at the n-th."""

    def __init__(self, n: int | None, error: type[BaseException] = Cut) -> None:
        self.n, self.error, self.seen = n, error, 0
        self.place: tuple[str, int] | None = None

    def __enter__(self) -> "AtBytecode":
        sys.settrace(self.call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def call(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        frame.f_trace_opcodes = True
        return self.step

    def step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            self.seen += 1
            if self.seen == self.n:
                self.place = (frame.f_code.co_filename, frame.f_code.co_firstlineno * 100_000 + frame.f_lasti)
                raise self.error("cut here")
        return self.step


class AtTime:
    """A real signal after `seconds`, and two more each `again` seconds; it raises only inside the call under attack."""

    def __init__(self, call: Callable[..., None], seconds: float, again: float) -> None:
        self.inside, self.seconds, self.again = call.__code__, seconds, again
        self.left = 3 if again else 1

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self.handle)
        signal.setitimer(signal.ITIMER_REAL, self.seconds, self.again)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def handle(self, number: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code is not self.inside:
            frame = frame.f_back
        if frame is not None and self.left > 0:
            self.left -= 1
            raise Cut("signal")


def measure(s: Subject, call: str) -> tuple[int, float]:
    """How many bytecodes and seconds an uncut call takes."""
    ready(s)
    with AtBytecode(None) as tracer:
        CALLS[call](s, random.Random(0))
    ready(s)
    started = time.perf_counter()
    CALLS[call](s, random.Random(0))
    return tracer.seen, time.perf_counter() - started


def ready(s: Subject) -> None:
    """Three deltas applied, nothing else."""
    s.lm.revert_all()
    for delta in s.deltas[:3]:
        s.lm.apply(delta)


def trial(s: Subject, call: str, size: tuple[int, float], rng: random.Random, places: set[Any]) -> str | None:
    """One cut call; what did not hold afterwards, or None."""
    ready(s)
    if rng.random() < 0.5:
        with suppress(Cut), AtTime(CALLS[call], rng.random() * size[1] * 1.1 + 1e-6, rng.choice([0, 5e-5, 3e-4])):
            CALLS[call](s, rng)
    else:
        error = rng.choice([Cut, CutMemory])
        tracer = AtBytecode(rng.randrange(1, size[0] + 1), error)
        with suppress(Cut, CutMemory, OutOfMemory), tracer:
            CALLS[call](s, rng)
        places.add(tracer.place)
        if rng.random() < 0.5:  # while the next call recovers
            tracer = AtBytecode(rng.randrange(1, 400), error)
            with suppress(Cut, CutMemory, OutOfMemory), tracer:
                s.lm.applied  # noqa: B018
            places.add(tracer.place)
    found = s.lm.applied
    if found not in allowed(call, s):
        return f"inconsistent: {call}: neither the state before nor the one after, but {found}"
    if not s.lm.consistent:
        return f"inconsistent: {call}: still between two states after a call"
    if not s.holds(found):
        return f"inconsistent: {call}: the weights are not those of {found}"
    s.lm.fingerprint()
    if s.look() != s.flags:
        return f"inconsistent: {call}: flags, hooks or forwards are not as they were"
    s.lm.revert_all()
    if not s.holds(()):
        return f"base lost: {call}"
    return None


def attack(n: int, seed: int) -> Tally:
    """`n` cuts, spread over all calls."""
    rng, tally, places = random.Random(seed), Tally("signals"), set()
    warnings.simplefilter("ignore")
    subjects = [Subject(i) for i in range(2)]
    sizes = [{call: measure(s, call) for call in CALLS} for s in subjects]
    for i in range(n):
        call = list(CALLS)[i % len(CALLS)]
        which = rng.randrange(2)
        fault = trial(subjects[which], call, sizes[which][call], rng, places)
        tally.count(fault)
        if fault is not None:  # a model whose state is lost is of no use for the next trial
            subjects[which] = Subject(which)
    tally.notes["bytecodes covered"] = len(places - {None})
    return tally


if __name__ == "__main__":
    main(attack, 1000, __doc__)
