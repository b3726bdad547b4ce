"""`retcon audit`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retcon.delta import Delta


def test_the_command(cli: Callable[..., Any], delta: Path) -> None:
    cli("apply", "gptj", str(delta), "--save", "edited")
    shown = cli("audit", "gptj", "edited", "--explain", str(delta), "--facts", "edits.jsonl", "--delta", "diff").stdout
    assert "unexplained" in shown
    assert "of 2 answers changed" in shown
    assert "exists" in cli("audit", "gptj", "edited", "--delta", "diff", code=2).stderr
    found = json.loads(cli("audit", "gptj", "edited", "--explain", str(delta), "--json").stdout)
    assert found["unexplained"] < 1e-3
    assert {d["parameter"] for d in found["differences"]} == set(Delta.load(delta).changes)
    assert "The same" in cli("audit", "gptj", "gptj").stdout
