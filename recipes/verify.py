"""Try `retcon doctor` on a tiny random model of every family, and write what it found.

    python -m recipes.verify                  # all families: status.json of the package and the table in docs/models.md
    python -m recipes.verify llama mixtral    # these only; the others' outcomes stay
    python -m recipes.verify --dtype float32  # in that dtype only

Outcomes are kept per version of transformers, so that a run in another environment adds to them. Exit code 1: a check
failed somewhere.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from recipes.tiny import FAMILIES, UNLIKE, WRAPPERS, tiny_model, tiny_wrapper, tokenizer
from retcon.lm.model import LM
from retcon.lm.status import STATUS, Outcomes, read_status
from retcon.workflow.doctor import Examination, examine

MODEL_TYPES = (*FAMILIES, *UNLIKE, *WRAPPERS)
DTYPES = ("float32", "bfloat16")
PAGE = Path(__file__).parents[1] / "docs/models.md"
START, END = "<!-- from status.json: make verify-all -->\n", "<!-- end -->\n"
Status = dict[str, dict[str, dict[str, Outcomes]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeat; default: all")
    args = parser.parse_args()
    asked = args.model_types or MODEL_TYPES
    if unknown := sorted(set(asked) - set(MODEL_TYPES)):
        parser.error(f"no tiny model of {', '.join(unknown)}; known: {', '.join(MODEL_TYPES)}")
    whole: Status = json.loads(json.dumps(read_status())) if STATUS.exists() else {}
    families = whole.setdefault(transformers.__version__, {})
    sound = True
    for dtype in args.dtype or DTYPES:
        for model_type in asked:
            started = time.monotonic()
            found = outcomes(verify(model_type, getattr(torch, dtype)))
            families.setdefault(model_type, {})[dtype] = found
            sound = sound and not found["failed"]
            print(said(model_type, dtype, found, time.monotonic() - started), flush=True)
            STATUS.write_text(as_text(whole), encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), whole), encoding="utf-8")
    sys.exit(0 if sound else 1)


def verify(model_type: str, dtype: torch.dtype) -> Examination:
    """Examine a tiny random model of that family."""
    make: Any = tiny_wrapper if model_type in WRAPPERS else tiny_model
    with warnings.catch_warnings(action="ignore"):
        return examine(LM(make(model_type, dtype), tokenizer(), name=model_type))


def outcomes(found: Examination) -> Outcomes:
    """Return what is kept of an examination."""
    by_outcome: dict[str, dict[str, str]] = {"passed": {}, "skipped": {}, "failed": {}}
    for finding in found.findings:
        by_outcome[finding.outcome][finding.check] = finding.detail
    return {**by_outcome, "passed": list(by_outcome["passed"])}


def said(model_type: str, dtype: str, found: Outcomes, seconds: float) -> str:
    """Return the line that a run prints."""
    failed = "; ".join(f"{check}: {reason}" for check, reason in found["failed"].items())
    what = f"FAILED {failed}" if failed else f"{len(found['passed'])} checks passed"
    skipped = f", {len(found['skipped'])} skipped ({', '.join(found['skipped'])})" if found["skipped"] else ""
    return f"{model_type} {dtype}: {what}{skipped}, {seconds:.0f} s"


def as_text(status: Status) -> str:
    """Return the file's text: one line per family and dtype, in order of their names."""
    versions = []
    for version in sorted(status):
        families = []
        for model_type in sorted(status[version]):
            rows = [
                f'   "{dtype}": {json.dumps(found)}' for dtype, found in sorted(status[version][model_type].items())
            ]
            families.append(f'  "{model_type}": {{\n' + ",\n".join(rows) + "\n  }")
        versions.append(f' "{version}": {{\n' + ",\n".join(families) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def with_table(page: str, status: Status) -> str:
    """Return the page with the table of the status between its marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(status)}\n{END}{after}"


def table(status: Status) -> str:
    """Return the outcomes of all versions as a Markdown table; families with the same row share it."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for version in sorted(status):
        for model_type, dtypes in sorted(status[version].items()):
            rows.setdefault((version, *_cells(dtypes.values()), ", ".join(sorted(dtypes))), []).append(
                f"`{model_type}`"
            )
    lines = ["| `model_type` | outcome | not tried | dtypes | transformers |", "|---|---|---|---|---|"]
    for (version, outcome, skipped, dtypes_text), model_types in sorted(rows.items(), key=lambda row: -len(row[1])):
        lines.append(f"| {', '.join(model_types)} | {outcome} | {skipped} | {dtypes_text} | {version} |")
    return "\n".join(lines) + "\n"


def _cells(found: Iterable[Outcomes]) -> tuple[str, str]:
    """What failed and what was skipped, each reason once, checks that share one together."""
    texts = []
    for kind in ("failed", "skipped"):
        by_reason: dict[str, list[str]] = {}
        for outcome in found:
            for check, reason in outcome[kind].items():
                if check not in by_reason.setdefault(reason, []):
                    by_reason[reason].append(check)
        texts.append("; ".join(f"{', '.join(checks)}: {reason}" for reason, checks in by_reason.items()))
    return texts[0] or "all passed", texts[1]


if __name__ == "__main__":
    main()
