"""A matrix of models, methods, datasets, protocols and seeds, run into a directory from which it can go on.

spec.py says what is asked, manifest.py what exactly was run, run.py runs it, directory.py reads it back.
"""

from retcon.bench.directory import Bench, Run, read_bench
from retcon.bench.protocol import Protocol, run_protocol
from retcon.bench.run import Event, estimate, run_bench
from retcon.bench.spec import (
    BenchSpec,
    Cell,
    DatasetSpec,
    MethodSpec,
    ModelSpec,
    spec_from_file,
)

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
