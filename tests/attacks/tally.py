"""What an attack counts and prints."""

import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Trials and what went wrong in them."""

    what: str
    tried: int = 0
    faults: list[str] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    """Further figures."""

    def __post_init__(self) -> None:
        BEGUN.append(self)

    def count(self, fault: str | None) -> None:
        """Count one trial; `fault` says what did not hold."""
        self.tried += 1
        if fault is not None:
            self.faults.append(fault)

    def __str__(self) -> str:
        kinds = Counter(fault.split(":")[0] for fault in self.faults)
        parts = [f"{self.what}: {self.tried} tried, {self.tried - len(self.faults)} held, {len(self.faults)} faults"]
        parts += [f"{name} {value}" for name, value in (*self.notes.items(), *kinds.items())]
        return "; ".join(parts)


BEGUN: list[Tally] = []
"""The tallies of this process, so that what was counted can be printed where an attack is stopped."""


class Stopped(BaseException):
    """A signal has asked the attack to end."""


def _stop(*_: object) -> None:
    raise Stopped


def main(attack: Callable[[int, int], Tally], n: int, doc: str | None) -> None:
    """Run an attack from the command line. One that is stopped (SIGTERM, Ctrl-C) prints what it has tried by then."""
    parser = ArgumentParser(description=doc)
    parser.add_argument("--n", type=int, default=n, help=f"trials ({n})")
    parser.add_argument("--seed", type=int, default=0)
    asked: Namespace = parser.parse_args()
    started = time.perf_counter()
    signal.signal(signal.SIGTERM, _stop)
    try:
        tally = attack(asked.n, asked.seed)
    except (Stopped, KeyboardInterrupt):
        tally = BEGUN[-1]
        print(f"stopped before {asked.n}:", end=" ")
    print(f"{tally}  ({time.perf_counter() - started:.0f} s, seed {asked.seed})")
    for fault in tally.faults[:10]:
        print(f"  {fault}", file=sys.stderr)
    sys.exit(1 if tally.faults else 0)
