"""Whether results are what they were: every method on both embedded models, recorded once and compared to the bit.

    python -m benchmarks.same_deltas record FOLDER     # with the code as it was
    python -m benchmarks.same_deltas compare FOLDER    # with the code as it is

Each method edits a few facts of the embedded world at fixed settings, in one step and in steps, and is measured; those
with an editor train one for a few steps first.
`compare` does the same again and wants every tensor and every figure identical, on the same machine and number of
threads. What was renamed since the record was made is in `RENAMED`, and nowhere else. Fingerprints, ids, times and
versions are no results.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import retcon
from benchmarks.common import command_line

MODELS = ("demo:gptj", "demo:llama")
N_CASES, STEP = 6, 4
N_TRAINED = 20
"""Other facts, which the editors of methods that have one are trained on."""
SEARCH = dict(steps=4)
SETTINGS: dict[str, dict[str, Any]] = {
    "kne": dict(epochs=3, n_points=2, budget=0.02),
    "ctp": dict(epochs=3),
    "kn": dict(n_points=4, n_prefixes=1),
    **{name: dict(epochs=3) for name in ("ft", "ft_l", "ft_m", "ft_wd", "full_c", "lora", "adalora")},
    "prune": dict(base_method="memit", base_settings=SEARCH),
    "rect": dict(base_method="memit", base_settings=SEARCH),
}
"""What differs from `SEARCH`, over the model's preset."""
RENAMED = {
    "host": "base_method",
    "host_settings": "base_settings",
    "probe_id": "query_id",
    "written": "final_probability",
    "said": "greedy_match",
    "probability": "search_probability",
    "subject_last_delta": "subject_last_offset",
    "prediction_delta": "prediction_offset",
}
"""Settings, fields of reports and of records: the name when recorded -> the name now."""


def results(names: list[str], models: list[str]) -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, Any]]]:
    """Return (method/model/way, tensors by name, figures by name) of every run."""
    from retcon import world

    for model, name in product(models, names):
        lm = retcon.load(model)
        cases = world.cases()[:N_CASES]
        edits = [edit for case in cases for edit in case.edits]
        with TemporaryDirectory() as folder:
            method = make(name, lm)
            if hasattr(method, "fit"):
                others = world.cases()[N_CASES : N_CASES + N_TRAINED]
                method = replace(method, editor=str(method.fit(lm, others, Path(folder) / "editor.safetensors")))
            for way, size in (("whole", len(edits)), ("steps", STEP)):
                if size > 1 and not getattr(method, "supports_batches", getattr(method, "batch", True)):
                    if way == "whole":
                        continue
                    size = 1
                delta = retcon.in_steps(method, lm, edits, batch_size=size, seed=0)
                measured = retcon.evaluate(lm, cases, delta=delta, seed=0)
                yield f"{name}/{model}/{way}", tensors_of(delta), figures_of(delta, measured)


def make(name: str, lm: Any) -> Any:
    """Return the method at the settings of this benchmark, under whatever names the code has for them."""
    own = SETTINGS.get(name, SEARCH)
    old = {new: before for before, new in RENAMED.items()}
    for names in (own, {old.get(k, k): v for k, v in own.items()}):
        try:
            return retcon.method(name, for_model=lm, **names)
        except retcon.errors.InvalidSetting as error:
            if "has no setting" not in str(error):
                raise
    raise SystemExit(f"{name}: none of its settings is known here")


def tensors_of(delta: Any) -> dict[str, torch.Tensor]:
    """Return every tensor of a delta's changes, by parameter, number, kind and field."""
    found = {}
    for parameter, changes in delta.changes.items():
        for i, change in enumerate(changes):
            for field, tensor in change.tensors().items():
                found[f"{parameter}/{i}/{change.kind}/{field}"] = tensor.detach().cpu().contiguous().clone()
    for field, tensor in (delta.state or {}).items():
        if field != "base":  # AlphaEdit's and MEMIT-seq's states name the base by its fingerprint
            found[f"state/{field}"] = tensor.detach().cpu().contiguous().clone()
    return found


def figures_of(delta: Any, measured: Any) -> dict[str, Any]:
    """Return every figure of a delta's report and of an evaluation's records."""
    report = [{k: v for k, v in as_dict(r).items() if k != "id"} for r in delta.report]
    records = [as_dict(r) for r in measured.records]
    return json.loads(json.dumps({"report": report, "records": records}, default=str))


def as_dict(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass or of a named tuple."""
    return asdict(record) if is_dataclass(record) and not isinstance(record, type) else record._asdict()


def renamed(value: Any) -> Any:
    """Return the same with old names of fields as they are now; a name that has stayed is its own."""
    if isinstance(value, Mapping):
        return {RENAMED.get(k, k): renamed(v) for k, v in value.items()}
    return [renamed(v) for v in value] if isinstance(value, list) else value


def record(folder: Path, names: list[str], models: list[str]) -> int:
    """Write everything down."""
    for where, tensors, figures in results(names, models):
        path = folder / where.replace("/", "__").replace(":", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors or {"none": torch.zeros(0)}, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps(figures), "utf-8")
        print(f"recorded  {where}  {len(tensors)} tensors", flush=True)
    return 0


def compare(folder: Path, names: list[str], models: list[str]) -> int:
    """Name every difference; 1 if there is one."""
    n_differ = 0
    for where, tensors, figures in results(names, models):
        path = folder / where.replace("/", "__").replace(":", "-")
        before = {k: t for k, t in load_file(path.with_suffix(".safetensors")).items() if k != "none"}
        old = renamed(json.loads(path.with_suffix(".json").read_text("utf-8")))
        found = [*tensor_differences(before, tensors), *figure_differences(old, renamed(figures))]
        n_differ += bool(found)
        print(f"{'differs  ' if found else 'the same '} {where}", flush=True)
        for line in found[:5]:
            print(f"    {line}")
    return 1 if n_differ else 0


def tensor_differences(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Return one line for each tensor that is not the same."""
    for name in sorted(before.keys() | now.keys()):
        if name not in before or name not in now:
            yield f"{name}: only {'now' if name in now else 'before'}"
            continue
        one, other = before[name], now[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            yield f"{name}: {one.dtype} {tuple(one.shape)} -> {other.dtype} {tuple(other.shape)}"
        elif not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            yield f"{name}: by up to {float((one.double() - other.double()).abs().max()):.3g}"


def figure_differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Return one line for each figure that is not the same."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            yield from figure_differences(before.get(key), now.get(key), f"{where}/{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from figure_differences(one, other, f"{where}/{i}")
    elif before != now and not (before != before and now != now):
        yield f"{where}: {before!r} -> {now!r}"


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=retcon.list_methods(), metavar="METHOD")
    parser.add_argument("--model", nargs="+", default=list(MODELS))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.perf_counter()
    code = (record if asked.what == "record" else compare)(asked.folder, asked.only, asked.model)
    print(f"{time.perf_counter() - started:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
