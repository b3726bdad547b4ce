"""The unedited model's numbers, measured once and kept in the cache under everything that determines them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from retcon.bench.manifest import bench_versions, measures_record
from retcon.bench.spec import MeasureSpec
from retcon.checked import Kind, as_bytes, cached, from_bytes, keep
from retcon.edits import cases_hash
from retcon.evaluation.measure import measure
from retcon.evaluation.plan import Measures, QueryPlan, own_metric
from retcon.evaluation.records import encode_records, parse_records
from retcon.evaluation.results import Evaluation
from retcon.extensions import code_hash
from retcon.files import cache_dir
from retcon.lm.model import LM
from retcon.lm.tokenizer import chat_hash

UNEDITED = Kind("records of an unedited model", format=2, computation=1)


def measure_unedited(lm: LM, plan: QueryPlan, measures: Measures, asked: MeasureSpec) -> Evaluation:
    """Return the unedited model's numbers on the plan's cases, from the cache where they are there; not kept where a
    metric's code cannot be known again."""
    code = {name: code_hash(own_metric(name)) for name in measures.metrics}
    if None in code.values():
        return measure(lm, plan, measures, "pre")
    key = {
        "model": lm.fingerprint(),
        "dtype": str(lm.dtype),
        "device": lm.device.type,
        "tokenizer": chat_hash(lm.tokenizer),
        "end_tokens": sorted(lm.end_tokens),
        "cases": cases_hash(plan.cases),
        "measures": measures_record(asked) | {"seed": measures.seed},
        "code": code,
        "versions": bench_versions(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_dir() / "pre" / f"{name}.safetensors"
    kept = cached(path, UNEDITED, key)
    if kept is not None:
        return _from_file(*kept, path)
    found = measure(lm, plan, measures, "pre")
    about = {
        "n_records": len(found.records),
        "texts": [[*place, text] for place, text in found.texts.items()],
        "predictions": [[*place, list(ids)] for place, ids in found.predictions.items()],
    }
    keep(path, UNEDITED, key, {"records": from_bytes(encode_records(found.records, {}))}, about)
    return found


def _from_file(tensors: Mapping[str, Tensor], about: Mapping[str, Any], path: Path) -> Evaluation:
    return Evaluation(
        parse_records(bytes(as_bytes(tensors["records"])), path) if about["n_records"] else [],
        {},
        {(when, case, query): text for when, case, query, text in about["texts"]},
        {(when, case, query): tuple(ids) for when, case, query, ids in about["predictions"]},
    )
