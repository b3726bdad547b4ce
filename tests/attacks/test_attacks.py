"""The attacks at a small size; `make attack` runs them at full size.

Each in a process of its own: what checks shapes while tests run keeps the arguments of a call that is cut.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ATTACKS = [("signals", 42), ("sequences", 10), ("threads", 2), ("stores", 6), ("malformed", 30)]
ATTACKS += [("kills", 3), ("damaged", 12), ("twoatonce", 5)]


@pytest.mark.parametrize(("attack", "n"), ATTACKS)
def test_nothing_gives_way(attack: str, n: int) -> None:
    command = [sys.executable, "-m", f"tests.attacks.{attack}", "--n", str(n), "--seed", "7"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert f"{n} tried, {n} held, 0 faults" in ran.stdout, ran.stdout + ran.stderr
    assert ran.returncode == 0
