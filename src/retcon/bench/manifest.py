"""What exactly was run: everything that determines a result, and beside it what only the machine did."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from retcon.atomic import write_atomically
from retcon.bench.spec import MEASURE_FILES, BenchSpec, Cell, MeasureSpec
from retcon.checked import through_json
from retcon.edits import Case, cases_hash
from retcon.errors import InvalidSetting, MalformedFile
from retcon.evaluation.datasets import FORMATS, WORLD, LoadReport
from retcon.evaluation.plan import own_metric
from retcon.extensions import code_hash
from retcon.files import as_shared, sha256_of
from retcon.lm.model import LM
from retcon.lm.tokenizer import chat_hash
from retcon.methods.common.contract import files_of, recorded_settings
from retcon.methods.common.registry import method_class
from retcon.version import versions

FORMAT = "retcon-bench-1"
MOST_SHOWN = 120
"""Characters of a value in a message."""


def manifest_of(
    spec: BenchSpec, cell: Cell, lm: LM, method: Any, cases: Sequence[Case], report: LoadReport
) -> dict[str, Any]:
    """Return all that determines a run's records. Two runs with equal manifests give equal records on one machine."""
    protocol = {**asdict(cell.protocol.settled(len(cases))), "ns": None, "records_per_point": None}
    return through_json(
        {
            "format": FORMAT,
            "versions": bench_versions(),
            "model": {
                "name": cell.model.label,
                "revision": cell.model.revision,
                "fingerprint": lm.fingerprint(),
                "type": lm.model.config.model_type,
                "dtype": str(lm.dtype).removeprefix("torch."),
                "attention": getattr(lm.model.config, "_attn_implementation", None),
                "device": lm.device.type,
                "device_map": getattr(lm.model, "hf_device_map", None),
                **({"notes": list(lm.notes)} if lm.notes else {}),
            },
            "tokenizer": chat_hash(lm.tokenizer),
            "end_tokens": sorted(lm.end_tokens),
            "corpus": _content(cell.model.corpus),
            "method": {
                "name": cell.method.name,
                "label": cell.method.label,
                "preset": cell.method.preset,
                "settings": recorded_settings(method),
                **({"files": files} if (files := file_hashes(asdict(method))) else {}),
            },
            "dataset": {
                **asdict(report),
                "path": cell.dataset.label,
                "order": cell.dataset.order,
                **({} if is_ours(report) else {"read": cases_hash(cases)}),
            },
            "cases": [case.id for case in cases],
            "protocol": protocol,
            "measures": measures_record(spec.measures),
            "text": {"sha256": file_hash(spec.text), "tokens": spec.text_tokens},
            "tasks": [[_content(task) for task in spec.tasks], spec.task_limit],
            "keep": [spec.keep_text, spec.keep_tokens],
            "seed": cell.seed,
            **({"code": code} if (code := _own_code(cell, method, spec.measures.metrics)) else {}),
        }
    )


def dataset_hash(cases: Sequence[Case], report: LoadReport) -> str:
    """Return what a dataset is known by: its file, or what a format of the user's own makes of it."""
    return report.sha256 if is_ours(report) else cases_hash(cases)


def is_ours(report: LoadReport) -> bool:
    """Return whether a dataset was read by a format of retcon's, so that the file says all."""
    return report.format in (*FORMATS, WORLD)


def _own_code(cell: Cell, method: Any, metrics: Sequence[str]) -> dict[str, str]:
    """Return the hash of the files that the user's own code is in, by its name; what is in no file is left out."""
    names = [cell.method.name, *([method.base_method] if hasattr(method, "base_method") else [])]
    found = {name: code_hash(method_class(name)) for name in names}
    found |= {name: code_hash(own_metric(name)) for name in metrics}
    return {name: digest for name, digest in found.items() if digest}


def environment(command: str) -> dict[str, Any]:
    """Return the machine and the moment; nothing secret, no list of variables."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": _commit(),
        "os": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "command": command,
    }


def bench_versions() -> dict[str, str]:
    """Return the versions of what computes, Python and tokenizers among them."""
    return versions("tokenizers") | {"python": platform.python_version()}


def processor() -> str:
    """Return the processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if "model name" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def run_id(manifest: Mapping[str, Any]) -> str:
    """Return the identity of a run: a hash of its manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def _content(source: str | None) -> str | None:
    """Return a file's hash; what is no file (a dataset, a task) has its name."""
    return file_hash(source) if source is None or Path(source).is_file() else source


def file_hash(path: str | None) -> str | None:
    """Return the SHA-256 of a file.

    Raises:
        MalformedFile: it cannot be read.
    """
    if path is None:
        return None
    try:
        return sha256_of(path)
    except OSError as error:
        raise MalformedFile(f"{path}: cannot be read ({error.strerror})") from None


def measures_record(asked: MeasureSpec) -> dict[str, Any]:
    """Return what is measured, with the content's hash for each file."""
    return asdict(asked) | {name: file_hash(getattr(asked, name)) for name in MEASURE_FILES}


def file_hashes(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of every file that a method's settings name (an editor, cases), by the setting's name; a
    setting inside another by both."""
    return {name: str(file_hash(path)) for name, path in files_of(settings).items() if Path(path).is_file()}


def write_or_verify(
    path: Path, manifest: Mapping[str, Any], around: Mapping[str, Any], *, force: bool, what: str
) -> list[str]:
    """Write a manifest, or check that the one that is there says the same.

    Returns:
        What differs around the run (machine, threads, commit): the results may then differ in the last bits.

    Raises:
        InvalidSetting: the one that is there is another; the message lists what differs.
    """
    if path.is_file():
        old = read_manifest(path)
        if old["manifest"] == manifest:
            kept, now = old["environment"], dict(around)
            return [line for line in differences(kept, now) if not line.startswith("command")]
        lines = differences(old["manifest"], manifest)
        if not force:
            shown = "\n  ".join(lines[:20]) + ("" if len(lines) <= 20 else f"\n  ... and {len(lines) - 20} more")
            raise InvalidSetting(
                f"{path.parent} holds another {what}; differing:\n  {shown}\nTake another directory, or start a "
                "new one here (what is there is kept beside it)",
                python=": force=True",
                option=": --force",
            )
        os.replace(path, path.with_name(f"{path.stem}-{run_id(old['manifest'])}.json"))
    record = {"id": run_id(manifest), "manifest": manifest, "environment": dict(around)}
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return []


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest file.

    Raises:
        MalformedFile: there is none, or it is none.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found["manifest"], dict) or not isinstance(found["environment"], dict):
            raise TypeError("manifest and environment must be objects")
    except FileNotFoundError:
        raise MalformedFile(f"{path}: no such file; is this the directory of a benchmark?") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MalformedFile(f"{path}: not a manifest ({error!r})") from None
    return found


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Return `field: old -> new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        return [line for n in names for line in differences(old.get(n), new.get(n), f"{at}.{n}" if at else n)]
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and isinstance(new[0], dict):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{at}[{i}]")]
    if isinstance(old, list) and isinstance(new, list) and len(old) + len(new) > 12:
        places = sum(a != b for a, b in zip(old, new, strict=False)) + abs(len(old) - len(new))
        return [f"{at}: {places} of {max(len(old), len(new))} entries differ"]
    return [f"{at}: {_briefly(old)} -> {_briefly(new)}"]


def _briefly(value: Any) -> str:
    """Return a value as JSON; of a list of named things the names, and of a long one its beginning."""
    if isinstance(value, list) and value and all(isinstance(each, dict) and each.get("name") for each in value):
        value = [each.get("label") or each["name"] for each in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _commit() -> str | None:
    """Return the commit of the checkout that this package is in, with `+` where files differ; None outside one."""
    here = Path(__file__).parent
    try:
        asked = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def command_line() -> str:
    """Return what was typed, by the program's name; absolute paths are relative, or their last part."""
    return " ".join([Path(sys.argv[0]).name, *map(_from_here, sys.argv[1:])])


def _from_here(argument: str) -> str:
    """Return an argument without the folders of this machine that it begins with."""
    option, equals, path = argument.partition("=")
    if not (option.startswith("-") and equals):
        option, equals, path = "", "", argument
    whole = Path(path)
    inside = whole.is_absolute() and whole.is_relative_to(Path.cwd())
    return option + equals + (str(whole.relative_to(Path.cwd())) if inside else as_shared(path))
