"""The attacks at a small size; `make attack` runs them at full size.

In a process of their own: what checks shapes while tests run keeps the arguments of a call that is cut.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = {"signals": 28, "sequences": 8, "threads": 2, "stores": 3, "malformed": 16, "kills": 1, "damaged": 5}
SMALL |= {"twoatonce": 2}
LARGER = {"signals": 84, "sequences": 40, "threads": 5, "stores": 12, "malformed": 60, "kills": 8, "damaged": 24}
LARGER |= {"twoatonce": 10}


@pytest.mark.parametrize("size", [SMALL, pytest.param(LARGER, marks=pytest.mark.long)], ids=["small", "larger"])
def test_nothing_gives_way(size: dict[str, int]) -> None:
    command = [sys.executable, "-m", "tests.attacks", *(f"{attack}={n}" for attack, n in size.items()), "--seed", "7"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    held = re.findall(r"(\d+) tried, (\d+) held, 0 faults", ran.stdout)
    assert held == [(str(n), str(n)) for n in size.values()], ran.stdout
