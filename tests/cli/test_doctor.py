"""`retcon doctor` on an embedded model."""

import json
from collections.abc import Callable
from typing import Any


def test_the_embedded_model_is_sound(cli: Callable[..., Any]) -> None:
    found = json.loads(cli("doctor", "demo:llama", "--json").stdout)
    assert found["passed"]
    assert found["model_type"] == "llama"
    assert {f["check"]: f["outcome"] for f in found["findings"]}["save"] == "passed"
    rome = next(f["detail"] for f in found["findings"] if f["check"] == "rome")
    assert rome.endswith(", 1 parameter")
