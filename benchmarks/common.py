"""What the benchmark scripts share: cases, moments, and a line about the machine."""

import os
import platform
from pathlib import Path

import torch

import retcon
from retcon import world
from retcon.edits import Case
from retcon.evaluation import load_counterfact
from retcon.lm.model import LM
from retcon.memory.defaults import default_moments
from retcon.memory.moments import Corpus, CorpusMoments, Moments


def cases_of(data: str | None, start: int, n: int, seed: int) -> list[Case]:
    """Cases of a CounterFact file in file order, or of the embedded world, drawn by seed."""
    if data is None:
        return world.cases(start + n, seed=seed)[start:]
    cases, report = load_counterfact(data, start=start, limit=n)
    print(report)
    return cases


def moments_of(lm: LM, corpus: str | None) -> Moments:
    """Moments from a text file, or the model's default."""
    return CorpusMoments(Corpus.from_file(corpus)) if corpus else default_moments(lm)


def machine() -> str:
    """One line for the record: processor, threads, versions."""
    import transformers

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"retcon {retcon.__version__}"
    )
