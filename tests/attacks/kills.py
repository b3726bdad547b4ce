"""kill -9 of commands that write: `python -m tests.attacks.kills`.

A process of its own edits, runs a benchmark, collects moments, or saves a checkpoint, and is killed: at a chosen call
that touches the disk, which hits saves, or after a random time. Every third trial kills it a second time. The same
command then runs to its end: its result must be that of a run that nobody killed, to the bit, and no file may be left
that such a run does not leave.
"""

import random
import shutil
import tempfile
import time
from pathlib import Path

from tests.attacks.processes import COMMANDS, debris, fork, furnish, names
from tests.attacks.tally import Tally, main

ORDER = ("edit", "edit", "edit", "bench", "moments", "apply", "edit", "edit")
"""Five trials of eight kill an edit."""


def trial(
    root: Path, call: str, rng: random.Random, unharmed: tuple[str, list[str], int, float]
) -> tuple[str | None, int, int]:
    """Kill a command once or twice and let it end; what did not hold, the kills, and those of them inside a save."""
    command, result = COMMANDS[call]
    wanted, files, n_calls, took = unharmed
    folder, said = root / "run", root / "said"
    shutil.rmtree(folder, ignore_errors=True)
    killed = inside = 0
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randint(1, n_calls) if rng.random() < 0.7 else 0
        process = fork(command, folder, said, die_at=at)
        if not at:
            time.sleep(rng.random() * took)
            process.kill()
        code, _ = process.wait()
        killed += code == -9
        inside += code == -9 and bool([p for p in debris(folder) if p.endswith((".tmp", ".new", ".old"))])
    code, text = fork(command, folder, said).wait()
    shown = f"{call}, killed {killed} times"
    if code != 0 or "traceback" in text:
        return f"failed afterwards: {shown}: {text[-300:]!r}", killed, inside
    if (found := result(folder)) != wanted:
        return f"another result: {shown}: {found[:12]}, wanted {wanted[:12]}", killed, inside
    if left := debris(folder):
        return f"left behind: {shown}: {left}", killed, inside
    if (now := names(folder)) != files:
        return f"other files: {shown}: {sorted(set(now) ^ set(files))}", killed, inside
    return None, killed, inside


def attack(n: int, seed: int) -> Tally:
    """`n` trials."""
    rng, tally = random.Random(seed), Tally("kills")
    kills = inside = of_edits = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        furnish(root)
        unharmed: dict[str, tuple[str, list[str], int, float]] = {}
        for i in range(n):
            call = ORDER[i % len(ORDER)]
            if call not in unharmed:
                process = fork(COMMANDS[call][0], root / "unharmed", root / "said")
                code, text = process.wait()
                assert code == 0, text
                took, n_calls = time.monotonic() - process.started, int(text.split("disk calls ")[1].split()[0])
                unharmed[call] = COMMANDS[call][1](root / "unharmed"), names(root / "unharmed"), n_calls, took
                assert not debris(root / "unharmed"), debris(root / "unharmed")
                shutil.rmtree(root / "unharmed")
            fault, killed, within = trial(root, call, rng, unharmed[call])
            tally.count(fault)
            kills, inside, of_edits = kills + killed, inside + within, of_edits + killed * (call == "edit")
            tally.notes |= {"kills": kills, "of edits": of_edits, "inside saves": inside}
    return tally


if __name__ == "__main__":
    main(attack, 80, __doc__)
