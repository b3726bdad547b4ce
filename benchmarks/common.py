"""What the benchmark scripts share: cases, moments, and a line about the machine."""

import argparse
import itertools
import math
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn

import retcon
from retcon import world
from retcon.attachment import Attachment, EditReport
from retcon.bench.manifest import processor
from retcon.edits import Case, Edit
from retcon.errors import RetconWarning
from retcon.evaluation import Evaluation, evaluate, read_cases
from retcon.evaluation.records import Record
from retcon.evaluation.summary import CaseMean, Summary
from retcon.lm.model import LM
from retcon.memory.defaults import default_moments
from retcon.memory.moments import Corpus, CorpusMoments
from retcon.methods.common.contract import Method
from retcon.methods.common.proposal import answers
from retcon.methods.common.sequence import in_steps
from retcon.methods.jeep import Jeep
from retcon.plural import plural
from retcon.version import versions

T = TypeVar("T")
METRICS = ("Score", "ES", "GS", "LS")
"""What most tables of these scripts show."""


def command_line(
    doc: str | None, *, cases: bool = False, corpus: bool = False, dataset: bool = False, quiet: bool = False
) -> argparse.ArgumentParser:
    """Return the parser of a script whose docstring is its help, with the options that the `add_` functions add.

    Args:
        quiet: no warnings of retcon from here on; what comes of their causes is what is measured.
    """
    if quiet:
        warnings.simplefilter("ignore", RetconWarning)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for wanted, add in ((cases, add_cases), (corpus, add_corpus), (dataset, add_dataset)):
        if wanted:
            add(parser)
    return parser


def add_cases(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is edited: model, cases, first case, seed."""
    parser.add_argument("--model", default="demo:gptj")
    parser.add_argument("--data", help="CounterFact file; the embedded world's cases if left out")
    parser.add_argument("--start", type=int, default=0, help="first case")
    parser.add_argument("--seed", type=int, default=0)


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """Add the option of the text for second moments."""
    parser.add_argument("--corpus", help="text for second moments; the model's default if left out")


def add_editors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--editor", nargs="*", default=[], metavar="METHOD=FILE", help="trained editors, by `retcon fit`"
    )


def named(pairs: Sequence[str], label: str, setting: str) -> dict[str, Any]:
    """Return the setting that is named for a row, if one is."""
    given = dict(pair.split("=", 1) for pair in pairs)
    return {setting: given[label]} if label in given else {}


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses among a model's presets."""
    parser.add_argument("--dataset", metavar="NAME", help="take the preset for this kind of data, such as world-first")


def dtype_on(device: str) -> str:
    """Return the dtype that models with random weights have on a device."""
    return "float32" if device == "cpu" else "bfloat16"


def print_row(*cells: object) -> None:
    """Print a line of a Markdown table; what is None was not measured."""
    shown = ("-" if cell is None else str(cell) for cell in cells)
    print("|" + "".join(f" {cell} |" if cell else " |" for cell in shown), flush=True)


def percents(
    summary: Summary, when: Literal["pre", "post"] = "post", keys: Iterable[str | tuple[str, str]] = METRICS
) -> dict[str, str | None]:
    """Return metrics as they are printed; None where one was not measured."""
    found = {key if isinstance(key, str) else " ".join(key): getattr(summary[key], when) for key in keys}
    return {name: mean and mean.percent() for name, mean in found.items()}


@dataclass(frozen=True)
class Outcome:
    """Edits, measured."""

    evaluation: Evaluation
    report: tuple[EditReport, ...]
    delta: Attachment
    """The last one, where each case was edited by itself."""
    seconds: float
    """Of all proposals."""

    @property
    def first(self) -> int:
        """Edits whose new answer the edited model says first."""
        return sum(bool(report.greedy_match) for report in self.report)


def edited_and_measured(
    lm: LM,
    method: Method,
    cases: Sequence[Case],
    *,
    alone: bool = False,
    on_top: bool = False,
    pre: Evaluation | None = None,
    clock: Callable[[], float] = time.perf_counter,
    each: Callable[[Sequence[Edit], Attachment], None] = lambda edits, delta: None,
    **given: Any,
) -> Outcome:
    """Edit the cases, all at once or each by itself, and measure them.

    Args:
        on_top: leave every delta applied for the next ones, and measure all cases after the last; then revert.
        pre: measured before; measured again where it is left out.
        clock: `time.process_time` where other processes shall matter little.
        each: called with every delta and its edits.
        given: further arguments of `in_steps`.
    """
    records: list[Record] = []
    report: list[EditReport] = []
    seconds = 0.0
    for group in [[case] for case in cases] if alone else [cases]:
        edits = [edit for case in group for edit in case.edits]
        started = clock()
        delta = in_steps(method, lm, edits, **given)
        seconds += clock() - started
        report += delta.report
        each(edits, delta)
        if on_top:
            lm.apply(delta)
        else:
            records += evaluate(lm, group, delta=delta, pre=pre, generate=False).records
    if on_top:
        records = evaluate(lm, cases, pre=pre, generate=False).records
        lm.revert_all()
    return Outcome(Evaluation(records, pre.context if pre else {}), tuple(report), delta, seconds)


def cases_of(data: str | None, start: int, n: int, seed: int) -> list[Case]:
    """Return cases of a CounterFact file in file order, or of the embedded world, drawn by seed."""
    if data is None:
        return world.cases(n, start=start, seed=seed)
    cases, report = read_cases(data, start=start, limit=n)
    print(report)
    return cases


def moments_of(lm: LM, corpus: str | None) -> CorpusMoments:
    """Return moments from a text file, or the model's default."""
    return CorpusMoments(Corpus.from_file(corpus)) if corpus else default_moments(lm)


def jeep_of(lm: LM, dataset: str | None = None, **settings: Any) -> Jeep:
    """Return JEEP with the model's preset; any field can be overridden by keyword."""
    method = retcon.method("jeep", for_model=lm, dataset=dataset, **settings)
    assert isinstance(method, Jeep)
    return method


def estimated(estimate: CaseMean | None) -> CaseMean:
    """Return the estimate of a metric that every evaluation of these scripts measures."""
    assert estimate is not None
    return estimate


def timed(
    call: Callable[[], T], *, clock: Callable[[], float] = time.perf_counter, device: torch.device | None = None
) -> tuple[T, float]:
    """Return what a call returns and the seconds it took, the work of a device included."""
    wait(device)
    started = clock()
    found = call()
    wait(device)
    return found, clock() - started


def wait(device: torch.device | None) -> None:
    """Wait for a card to catch up."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_per_token(block: nn.Module) -> int:
    """Return the FLOPs of one token in a block's matrices; attention scores are left out."""
    matrices = [m for m in block.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    return 2 * sum(m.get_parameter("weight").numel() for m in matrices)


def ranks(values: Sequence[float]) -> list[float]:
    """Return the place of each value among all, from 0; values that are equal share the mean of theirs."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def spearman(one: Sequence[float], two: Sequence[float], *, shuffles: int, seed: int = 0) -> tuple[float, float]:
    """Return the rank correlation and its two-sided p, the share of orders that correlate at least as strongly.

    The orders are all there are; where that is more than twice `shuffles`, as many drawn ones and the one found.
    """
    x, y = ranks(one), ranks(two)
    found = statistics.correlation(x, y)
    rng = random.Random(seed)
    few = math.factorial(len(y)) <= 2 * shuffles
    orders = itertools.permutations(y) if few else (y, *(rng.sample(y, len(y)) for _ in range(shuffles)))
    as_strong = [abs(statistics.correlation(x, order)) >= abs(found) - 1e-12 for order in orders]
    return found, sum(as_strong) / len(as_strong)


def machine() -> str:
    """Return one line for the record: processor, threads, versions."""
    found = versions()
    return (
        f"{processor()}, {os.cpu_count()} cores, {plural(torch.get_num_threads(), 'thread')} used; Python "
        f"{platform.python_version()}, torch {found['torch']}, transformers {found['transformers']}, "
        f"retcon {found['retcon']}"
    )


def preferred(lm: LM, data: str | None, start: int, n: int, seed: int, *, said: bool = False) -> list[Case]:
    """Return n cases whose true answer the model finds more probable than the new one, passing over the first ones.

    Args:
        said: only those where the true answer is also what the model says first.
    """
    everything = world.cases(start + n, seed=seed) if data is None else read_cases(data, conflicts="drop")[0]
    found: list[Case] = []
    for first in range(0, len(everything), 250):
        some = [case for case in everything[first : first + 250] if case.edits[0].target_true]
        edits = [case.edits[0] for case in some]
        new = answers(lm, edits)
        old = answers(lm, [replace(e, target_new=str(e.target_true), target_true=None) for e in edits])
        found += [
            case for case, (a, _), (b, is_said) in zip(some, new, old, strict=True) if b > a and (is_said or not said)
        ]
        if len(found) >= start + n:
            break
    return found[start : start + n]
