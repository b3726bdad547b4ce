"""Two processes at once: `python -m tests.attacks.twoatonce`.

Both run on one empty cache, and write one delta, one benchmark, one checkpoint, or the same moments; or two other
deltas to one file. Each must end with the right result, or with an error that says why not; afterwards the place holds
the result of one that ended well, and nothing else is left.
"""

import random
import re
import shutil
import tempfile
import time
from pathlib import Path

from tests.attacks.processes import COMMANDS, EDIT, debris, fork, furnish, result_of_edit
from tests.attacks.tally import Tally, main

OTHER = tuple(part.replace("edits.jsonl", "others.jsonl") for part in EDIT)
KINDS = ("edit", "other", "bench", "apply", "moments")
REFUSED = {
    "edit": "holds another delta",
    "other": "holds another delta",
    "bench": "another process is at work in this folder",
    "apply": "exists",
    "moments": "never",
}
"""What the error of a process says that does not get its way."""


def trial(root: Path, kind: str, wait: float, wanted: dict[str, str]) -> tuple[str | None, int]:
    """One round: what did not hold, and how many were refused."""
    call = "edit" if kind == "other" else kind
    command = tuple(part for part in COMMANDS[call][0] if part != "--force")
    commands = [command, OTHER if kind == "other" else command]
    results = [wanted[call], wanted[kind]]
    shutil.rmtree(root / "run", ignore_errors=True)
    first = fork(commands[0], root / "run", root / "said 1")
    time.sleep(wait)
    second = fork(commands[1], root / "run", root / "said 2")
    ended = [first.wait(), second.wait()]
    well = [i for i, (code, _) in enumerate(ended) if code == 0]
    for code, text in ended:
        if "traceback" in text or "cannot be written" in text:
            return f"a fault's own words: {kind}: {text[-300:]!r}", 0
        if code != 0 and not re.search(f"error: .*{REFUSED[kind]}", text):
            return f"not clearly refused: {kind}: {text[-300:]!r}", 0
    if not well:
        return f"both refused: {kind}: {ended[0][1][-200:]!r}", 0
    if len(well) == 2 and results[0] != results[1]:
        return f"replaced silently: {kind}", 0
    found = COMMANDS[call][1](root / "run")
    if found not in [results[i] for i in well]:
        return f"another result: {kind}: of {well}", 0
    refused_values = len(well) < 2 and call == "edit"  # they are found again by the same edits to another file
    left = [p for p in debris(root / "run") if not (refused_values and "values" in p)]
    return (f"left behind: {kind}: {left}" if left else None), 2 - len(well)


def attack(n: int, seed: int) -> Tally:
    """`n` rounds."""
    rng, tally = random.Random(seed), Tally("two at once")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        furnish(root)
        wanted: dict[str, str] = {}
        took: dict[str, float] = {}
        refused = 0
        for i in range(n):
            kind = KINDS[i % len(KINDS)]
            if kind not in wanted:
                started = time.monotonic()
                code, text = fork(OTHER if kind == "other" else COMMANDS[kind][0], root / "alone", root / "said").wait()
                assert code == 0, text
                took[kind] = time.monotonic() - started
                wanted[kind] = result_of_edit(root / "alone") if kind == "other" else COMMANDS[kind][1](root / "alone")
                shutil.rmtree(root / "alone")
            late = rng.choice((0.0, 0.0, rng.random() * took[kind]))
            fault, n_refused = trial(root, kind, late, wanted)
            tally.count(fault)
            refused += n_refused
            tally.notes["refused"] = refused
    return tally


if __name__ == "__main__":
    main(attack, 50, __doc__)
