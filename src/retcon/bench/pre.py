"""The unedited model's numbers, measured once and kept in the cache under everything that determines them."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from retcon.bench.manifest import file_hash, tokenizer_hash, versions
from retcon.bench.spec import MeasureSpec
from retcon.errors import MalformedFile
from retcon.evaluation.datasets import LoadReport
from retcon.evaluation.measure import measure
from retcon.evaluation.plan import Measures, Plan
from retcon.evaluation.records import encode_records, read_records
from retcon.evaluation.results import Evaluation
from retcon.files import cache_dir, write_atomically
from retcon.lm.model import LM


def unedited(lm: LM, plan: Plan, measures: Measures, asked: MeasureSpec, report: LoadReport) -> Evaluation:
    """The unedited model on the plan's cases, from the cache where it is there."""
    key = {
        "model": lm.fingerprint(),
        "dtype": str(lm.dtype),
        "device": lm.device.type,
        "tokenizer": tokenizer_hash(lm.tokenizer),
        "dataset": report.sha256,
        "format": report.format,
        "options": dict(report.options),
        "cases": [case.id for case in plan.cases],
        "measures": {**asdict(asked), "snippets": file_hash(asked.snippets), "seed": measures.seed},
        "versions": versions(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = cache_dir() / "pre" / f"{name}.json"
    try:
        return _read(path)
    except MalformedFile:  # none there, or damaged: it is made anew
        found = measure(lm, plan, measures, "pre")
        _write(path, found)
        return found


def _write(path: Path, found: Evaluation) -> None:
    write_atomically(path.with_suffix(".jsonl"), encode_records(found.records, {}))
    rest = {
        "n_records": len(found.records),
        "texts": [[*key, text] for key, text in found.texts.items()],
        "predictions": [[*key, list(ids)] for key, ids in found.predictions.items()],
    }
    write_atomically(path, json.dumps(rest, ensure_ascii=False).encode())


def _read(path: Path) -> Evaluation:
    try:
        rest = json.loads(path.read_text("utf-8"))
        texts = {(when, case, query): text for when, case, query, text in rest["texts"]}
        predictions = {(when, case, query): tuple(ids) for when, case, query, ids in rest["predictions"]}
        n_records = rest["n_records"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MalformedFile(f"{path}: not an evaluation of an unedited model ({error!r})") from None
    records = read_records(path.with_suffix(".jsonl"))[0] if n_records else []
    if len(records) != n_records:
        raise MalformedFile(f"{path}: {len(records)} records, expected {n_records}")
    return Evaluation(records, {}, texts, predictions)
