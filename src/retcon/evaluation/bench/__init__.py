"""A matrix of models, methods, datasets, protocols and seeds, run into a directory from which it can go on.

spec.py says what is asked, manifest.py what exactly was run, run.py runs it, directory.py reads it back.
"""

from retcon.evaluation.bench.directory import Bench, Run, read_bench
from retcon.evaluation.bench.run import Event, estimate, run_bench
from retcon.evaluation.bench.spec import (
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
    "Run",
    "estimate",
    "read_bench",
    "run_bench",
    "spec_from_file",
]
