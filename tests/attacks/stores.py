"""kill -9 at any point of what writes to a store: `python -m tests.attacks.stores`.

A process of its own edits, reverts, restores, amends, or collects garbage, and is killed: after a random time, or at a
chosen call that touches the disk (rename, sync, unlink, open), which hits the few milliseconds of the commit. After
each, the log must hold the entries before it or one more, every state must be rebuilt from files whose content is what
their names say, and git must see nothing but the files of that entry.
"""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from retcon.errors import MalformedFile, UnknownEntry
from retcon.lm.model import LM
from retcon.methods.memit import Memit
from retcon.store import Store
from tests.attacks.tally import Tally, main
from tests.conftest import random_moments, tiny_model, tokenizer
from tests.store.facts import FACTS

METHOD = Memit(layers=(0, 1), steps=2, moment_weight=100.0)
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.fsync=none")


def edit(store: Store, lm: LM, moments: Any, rng: random.Random) -> None:
    live = {line.fact for line in store.facts()}
    fresh = [case for case in FACTS if case.id not in live]
    store.edit(lm, fresh[:2], METHOD, moments=moments)


def revert(store: Store, lm: LM, moments: Any, rng: random.Random) -> None:
    store.revert(rng.choice(store.log()).id)


def revert_fact(store: Store, lm: LM, moments: Any, rng: random.Random) -> None:
    store.revert_fact(lm, rng.choice(store.facts()).fact, moments=moments, repropose=rng.random() < 0.5)


def amend(store: Store, lm: LM, moments: Any, rng: random.Random) -> None:
    store.amend(lm, rng.choice(store.facts()).fact, rng.choice(["Milan", "Greek", "late"]), moments=moments)


def gc(store: Store, lm: LM, moments: Any, rng: random.Random) -> None:
    store.gc(before="HEAD")


CALLS: dict[str, Callable[[Store, LM, Any, random.Random], None]] = {
    c.__name__: c for c in (edit, revert, revert_fact, amend, gc)
}


def die_at(n: int) -> None:
    """Let this process kill itself at its n-th call that touches the disk."""
    seen = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink", "mkdir", "rmdir", "open"):
        setattr(os, name, counted(getattr(os, name)))


def in_a_process(call: str, path: Path, lm: LM, moments: Any, seed: int, *, at: int | None, after: float) -> None:
    """Make the call in a copy of this process, and kill that."""
    child = os.fork()
    if child == 0:
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            if at is not None:
                die_at(at)
            CALLS[call](Store(path), lm, moments, random.Random(seed))
        finally:
            os._exit(0)
    if at is None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def git(where: Path, *arguments: str) -> str:
    return subprocess.run([*GIT, *arguments], cwd=where, capture_output=True, text=True, check=True).stdout


def faults(path: Path, before: tuple[Any, ...], lm: LM) -> list[str]:
    """What is wrong with a store after a kill."""
    store = Store(path)  # finishes what was committed
    found = []
    now = store.log()
    if now[: len(before)] != before or len(now) > len(before) + 1:
        found.append(f"the log went from {len(before)} to {len(now)} entries")
    gone: set[str] = set()
    for entry in now:  # an edit made again after gc has the delta that it had
        gone -= {f"{folder}/{new}.safetensors" for _, new in entry.sets.values() for folder in ("deltas", "values")}
        gone |= set(entry.about.get("removed", ()))
    named = {"log.jsonl"} | {f"facts/{entry.id}.jsonl" for entry in now[len(before) :]}
    for delta in {d for entry in now for pair in entry.sets.values() for d in pair if d}:
        if f"deltas/{delta}.safetensors" not in gone:
            store.delta(delta)  # reads the whole file and compares it with its checksum and its name
        elif (path / "deltas" / f"{delta}.safetensors").exists() and delta not in store.state().deltas:
            found.append(f"delta {delta} is there, and the log says it was removed")
        named |= {f"{folder}/{delta}.safetensors" for folder in ("deltas", "values")}
    named |= gone
    with store.at(lm):
        store.cases()
    status = git(path.parent, "status", "--porcelain", "-uall").splitlines()
    changed = {line[3:].removeprefix("edits/") for line in status}
    if debris := changed - named:
        found.append(f"git sees {sorted(debris)}")
    if len(now) == len(before) and changed:
        found.append(f"nothing was committed, and git sees {sorted(changed)}")
    return found


def attack(n: int, seed: int) -> Tally:
    warnings.simplefilter("ignore")
    rng = random.Random(seed)
    tally = Tally("stores")
    lm = LM(tiny_model("gptj"), tokenizer(), name="tiny")
    moments = random_moments(lm, n_tokens=320)
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RETCON_CACHE"] = str(Path(folder) / "cache")
        path = Path(folder) / "store" / "edits"
        start = Store.init(path, lm)
        start.edit(lm, FACTS[:3], METHOD, moments=moments)
        git(path.parent, "init", "-q")
        git(path.parent, "add", "-A")
        git(path.parent, "commit", "-qm", "start")
        committed = 0
        for trial in range(n):
            store = Store(path)
            before, live = store.log(), store.facts()
            calls = [c for c in CALLS if (len(live) < len(FACTS) if c == "edit" else live or c in ("revert", "gc"))]
            call = rng.choice(calls)
            if call not in took:  # how long it takes unharmed, in a copy
                copy = Path(folder) / "copy"
                shutil.copytree(path, copy)
                started = time.perf_counter()
                with suppress(UnknownEntry, MalformedFile):  # nothing to revert, or gc removed what would come back
                    CALLS[call](Store(copy), lm, moments, random.Random(trial))
                took[call] = time.perf_counter() - started
                shutil.rmtree(copy)
            at = rng.randint(1, 60) if rng.random() < 0.6 else None
            in_a_process(call, path, lm, moments, trial, at=at, after=rng.random() * 1.2 * took[call])
            try:
                found = faults(path, before, lm)
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"]
            where = f"disk call {at}" if at is not None else "a random time"
            tally.count(f"{found[0]}: trial {trial}, {call} killed at {where}" if found else None)
            committed += len(store.log()) > len(before)
            git(path.parent, "add", "-A")
            git(path.parent, "commit", "-qm", str(trial), "--allow-empty")
    tally.notes |= {"committed": committed}
    return tally


if __name__ == "__main__":
    main(attack, 200, __doc__)
