"""What was verified: outcomes of `retcon doctor` per family, as data (status.json) that `make verify-all` writes."""

import json
from functools import cache
from pathlib import Path
from typing import Any

STATUS = Path(__file__).with_name("status.json")

Outcomes = dict[str, Any]
"""Of one family in one dtype: `passed`, the checks that held; `skipped` and `failed`, checks with the reason."""


@cache
def read_status() -> dict[str, dict[str, dict[str, Outcomes]]]:
    """Return the outcomes by version of transformers, `model_type` (of a wrapper its own) and dtype."""
    found: dict[str, dict[str, dict[str, Outcomes]]] = json.loads(STATUS.read_text(encoding="utf-8"))
    return found


def unverified(model_type: str, transformers_version: str) -> str | None:
    """Return why nothing is known of a family under a version of transformers, for a warning; None where it passed.

    Versions count by their major number: what held under 5.1 is expected to hold under 5.2.
    """
    status = read_status()
    majors = {
        version: families for version, families in status.items() if _major(version) == _major(transformers_version)
    }
    if not majors:
        return f"retcon was verified with transformers {', '.join(status)}, not with {transformers_version}"
    found = [families[model_type] for families in majors.values() if model_type in families]
    if not found:
        return f"model_type {model_type!r} is not among those that retcon was verified with"
    failed = {check for dtypes in found for outcomes in dtypes.values() for check in outcomes["failed"]}
    if failed:
        return (
            f"model_type {model_type!r} did not pass all checks when retcon was verified ({', '.join(sorted(failed))})"
        )
    return None


def _major(version: str) -> str:
    return version.partition(".")[0]
