"""A matrix of models, methods, datasets, protocols and seeds, run into a directory from which it can go on.

spec.py says what is asked, manifest.py what exactly was run, run.py runs it, directory.py reads it back. Names are
loaded when first used: reading what is asked needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retcon.bench.directory import Bench, Run, read_bench
    from retcon.bench.protocol import run_protocol
    from retcon.bench.run import Event, estimate, run_bench
    from retcon.bench.spec import (
        BenchSpec,
        Cell,
        DatasetSpec,
        MethodSpec,
        ModelSpec,
        Protocol,
        spec_from_file,
    )

_LAZY = {
    "Bench": "retcon.bench.directory",
    "BenchSpec": "retcon.bench.spec",
    "Cell": "retcon.bench.spec",
    "DatasetSpec": "retcon.bench.spec",
    "Event": "retcon.bench.run",
    "MethodSpec": "retcon.bench.spec",
    "ModelSpec": "retcon.bench.spec",
    "Protocol": "retcon.bench.spec",
    "Run": "retcon.bench.directory",
    "estimate": "retcon.bench.run",
    "read_bench": "retcon.bench.directory",
    "run_bench": "retcon.bench.run",
    "run_protocol": "retcon.bench.protocol",
    "spec_from_file": "retcon.bench.spec",
}

__all__ = [
    "Bench",
    "BenchSpec",
    "Cell",
    "DatasetSpec",
    "Event",
    "MethodSpec",
    "ModelSpec",
    "Protocol",
    "Run",
    "estimate",
    "read_bench",
    "run_bench",
    "run_protocol",
    "spec_from_file",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'retcon.bench' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
