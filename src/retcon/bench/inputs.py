"""What a benchmark reads, checked before a model is loaded and before torch is imported."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from retcon.bench.spec import BenchSpec, Cell, DatasetSpec, Protocol
from retcon.edits import Case
from retcon.errors import InvalidSetting, RetconError
from retcon.evaluation.datasets import Loaded, read_cases
from retcon.files import check_exists, read_prose
from retcon.memory.corpus import check_corpus
from retcon.methods.common.presets import check_early
from retcon.seed import derive_seed


def read_inputs(spec: BenchSpec) -> dict[str, Loaded]:
    """Return the cases of every dataset by its label, with all checked that needs no model.

    Raises:
        RetconError: an unknown method or preset, a setting that cannot be, a dataset or another file that cannot be
            read or holds no case, a protocol that asks for more cases than there are, or for the run of another; the
            message names the entry.
    """
    for method in spec.methods:
        try:
            check_early(method.name, method.settings, method.preset, method.dataset)
        except RetconError as error:
            raise type(error)(f"method {method.label!r}: {error}") from None
    measured = spec.measures
    for corpus in (m.corpus for m in spec.models if m.corpus is not None):
        check_corpus(corpus)
    for path in (spec.text, measured.snippets, measured.idf, measured.vocabulary):
        if path is not None:
            check_exists(path)
    if spec.text is not None:
        read_prose(spec.text)
    loaded = {dataset.label: load_cases(dataset) for dataset in spec.datasets}
    for label, (cases, report) in loaded.items():
        if not cases:
            raise InvalidSetting(f"dataset {label!r}: no case can be used: {report}")
        try:
            parts = [part for protocol in spec.protocols for part in protocol.parts(len(cases))]
            _check_distinct(parts, len(cases))
        except InvalidSetting as error:
            raise InvalidSetting(f"dataset {label!r}: {error}") from None
    return loaded


def _check_distinct(protocols: Sequence[Protocol], n_cases: int) -> None:
    """Raise InvalidSetting where two protocols, or a curve's point and another, are one run on so many cases."""
    seen: dict[Protocol, Protocol] = {}
    for protocol in protocols:
        other = seen.setdefault(protocol.settled(n_cases), protocol)
        if other is not protocol:
            raise InvalidSetting(
                f"two protocols are one run, {other.describe()} and {protocol.describe()}; leave one of them out"
            )


def load_cases(dataset: DatasetSpec) -> Loaded:
    """Return the dataset's cases, its own settings given."""
    own = {name: value for name, value in asdict(dataset).items() if name not in ("path", "label", "order")}
    return read_cases(dataset.path, **own)


def cells_of(spec: BenchSpec, cases: Mapping[str, int]) -> list[Cell]:
    """Return all runs, model by model; `cases` is the number of cases by dataset label (curves become their points)."""
    return [
        Cell(model, method, dataset, protocol, seed)
        for model in spec.models
        for dataset in spec.datasets
        for whole in spec.protocols
        for protocol in whole.parts(cases[dataset.label])
        for seed in spec.seeds
        for method in spec.methods
    ]


def chosen_cases(cases: Sequence[Case], cell: Cell) -> list[Case]:
    """Return the cases of a run: the first ones, or those that the seed draws; curves are nested, for the order is one.

    Raises:
        InvalidSetting: fewer cases than the protocol asks for.
    """
    n, _ = cell.protocol.sizes(len(cases))
    order = list(cases)
    if cell.dataset.order == "shuffle":
        random.Random(derive_seed(cell.seed, "order")).shuffle(order)
    return order[:n]
