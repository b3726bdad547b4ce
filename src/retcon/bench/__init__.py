"""A matrix of models, methods, datasets, protocols and seeds, run into a directory from which it can go on.

spec.py says what is asked, manifest.py what exactly was run, run.py runs it, piece by piece (pieces.py), directory.py
reads it back. Names are loaded when first used: reading what is asked needs no torch.
"""

from typing import TYPE_CHECKING

from retcon.lazily import lazily

if TYPE_CHECKING:
    from retcon.bench.directory import Bench as Bench
    from retcon.bench.directory import Run as Run
    from retcon.bench.directory import read_bench as read_bench
    from retcon.bench.duration import estimate as estimate
    from retcon.bench.protocol import run_protocol as run_protocol
    from retcon.bench.run import Event as Event
    from retcon.bench.run import run_bench as run_bench
    from retcon.bench.spec import BenchSpec as BenchSpec
    from retcon.bench.spec import Cell as Cell
    from retcon.bench.spec import DatasetSpec as DatasetSpec
    from retcon.bench.spec import MethodSpec as MethodSpec
    from retcon.bench.spec import ModelSpec as ModelSpec
    from retcon.bench.spec import Protocol as Protocol
    from retcon.bench.spec import spec_from_file as spec_from_file

__all__, __getattr__ = lazily(
    __name__,
    {
        "retcon.bench.directory": ("Bench", "Run", "read_bench"),
        "retcon.bench.duration": ("estimate",),
        "retcon.bench.protocol": ("run_protocol",),
        "retcon.bench.run": ("Event", "run_bench"),
        "retcon.bench.spec": (
            "BenchSpec",
            "Cell",
            "DatasetSpec",
            "MethodSpec",
            "ModelSpec",
            "Protocol",
            "spec_from_file",
        ),
    },
)
