"""What a benchmark is asked to run, from a TOML file or from code."""

import difflib
import itertools
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from retcon.arguments import check_choice
from retcon.edits import ConflictRule
from retcon.errors import InvalidSetting, MalformedFile
from retcon.evaluation.datasets import Answers, CaseTarget, OnError, Order, Prompting, PromptStyle
from retcon.evaluation.metrics.fluency import Fluency
from retcon.methods.common.settings import fitted, fitted_value, types_of
from retcon.seed import check_seed

ProtocolKind = Literal["single", "batch", "sequential", "batch_sequential", "curve"]
CURVE = tuple(round(math.exp(math.log(10_000) * i / 16)) for i in range(17))
"""MEMIT's numbers of edits (Figure 5): 1, 2, 3, 6, 10, 18, 32, 56, 100, ..., 10,000."""
MIN_RECORDS_PER_POINT = 1000
"""Cases of every point of a curve, so that small batches are averaged over as many cases as large ones."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of running."""

    kind: ProtocolKind = "batch"
    n: int | None = None
    """Cases in all, and edits of a curve's last point at most; None takes every case there is."""
    batch: int | None = None
    """Cases edited in one call; None: all in one for `batch`, 1 for `batch_sequential`."""
    checkpoints: tuple[int, ...] = ()
    """Numbers of cases after which a sequence looks at all those edited so far; each ends a batch."""
    ns: tuple[int, ...] = CURVE
    """Points of a curve: cases edited in one call. Those that there are too few cases for are left out."""
    records_per_point: int | None = None
    """Cases of each of them, and its own number where that is more; None: 1,000."""

    def __post_init__(self) -> None:
        check_choice(self.kind, ProtocolKind, "protocol")
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind"}
        for name, value in fitted("protocol", types_of(Protocol), numbers).items():
            object.__setattr__(self, name, value)
        for name in ("n", "batch", "records_per_point"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidSetting(f"{name} must be at least 1, found {value}")
        for name in ("checkpoints", "ns"):
            if any(n < 1 for n in getattr(self, name)):
                raise InvalidSetting(f"{name} are numbers of edits, from 1 on; found {list(getattr(self, name))}")
        if self.checkpoints and self.kind not in ("sequential", "batch_sequential"):
            raise InvalidSetting(f"{self.kind} restores after every call, so it has no checkpoints")
        if self.kind in ("single", "sequential") and self.batch not in (None, 1):
            raise InvalidSetting(f"{self.kind} edits one case at a time, found batch={self.batch}")
        if self.kind == "curve":
            if self.batch is not None:
                raise InvalidSetting(f"a curve's batches are its points (ns), found batch={self.batch}")
            if not self.ns:
                raise InvalidSetting("a curve needs a point; ns is empty")
        elif self.ns != CURVE:
            raise InvalidSetting(f"ns are the points of a curve, found with kind={self.kind!r}")
        elif self.records_per_point is not None:
            raise InvalidSetting(f"records_per_point is a curve's, found with kind={self.kind!r}")
        if self.n is not None:
            self._check_checkpoints(self.n)

    def _check_checkpoints(self, n: int) -> None:
        for checkpoint in self.checkpoints:
            if checkpoint > n:
                raise InvalidSetting(f"checkpoint {checkpoint:,} is beyond the {n:,} cases that are edited")
            if checkpoint % (self.batch or 1) and checkpoint != n:
                raise InvalidSetting(
                    f"checkpoint {checkpoint:,} is inside a batch of {self.batch}; take multiples of {self.batch}"
                )

    @property
    def restores(self) -> bool:
        """Whether the base comes back before the next call."""
        return self.kind in ("single", "batch")

    def parts(self, n_cases: int) -> list["Protocol"]:
        """Return what is run: a curve is one `batch` protocol per point that there are cases for."""
        if self.kind != "curve":
            return [self]
        most, _ = self.sizes(n_cases)
        parts = [
            Protocol(kind="batch", n=min(most, max(n, self.records_per_point or MIN_RECORDS_PER_POINT)), batch=n)
            for n in self.ns
            if n <= most
        ]
        if not parts:
            raise InvalidSetting(f"a curve from {min(self.ns):,} edits on has no point in {most:,} cases")
        return parts

    def sizes(self, n_cases: int) -> tuple[int, int]:
        """Return (cases, cases a call) for a dataset of that many.

        Raises:
            InvalidSetting: more cases are asked for than there are, or a checkpoint does not fall on a batch's end.
        """
        n = n_cases if self.n is None else self.n
        if n > n_cases:
            raise InvalidSetting(f"the protocol asks for {n:,} cases, the dataset has {n_cases:,}")
        self._check_checkpoints(n)
        size = n if self.kind == "batch" else 1
        return n, min(self.batch or size, n) or 1

    def settled(self, n_cases: int) -> "Protocol":
        """Return the same on a dataset of that many cases with nothing left to it: equal ones give equal runs.

        Raises:
            InvalidSetting: as `sizes`.
        """
        n, size = self.sizes(n_cases)
        between = tuple(sorted({c for c in self.checkpoints if c < n}))  # at the end all cases are looked at anyway
        return Protocol(kind=self.kind, n=n, batch=size, checkpoints=between)

    def describe(self) -> str:
        """Return a name such as `batch(1000)` or `sequential(500)`."""
        n = "all" if self.n is None else str(self.n)
        if self.kind in ("batch_sequential", "batch") and self.batch not in (None, self.n):
            return f"{self.kind}({n}, {self.batch})"
        return f"{self.kind}({n})"


def _paths_as_text(spec: Any) -> None:
    """Turn each field that is a path into text, which a manifest can hold."""
    for f in fields(spec):
        if isinstance(value := getattr(spec, f.name), os.PathLike):
            object.__setattr__(spec, f.name, os.fsdecode(value))


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model to edit."""

    name: str
    """demo:gptj, demo:llama, a directory, or a hub id."""
    label: str = ""
    """What reports call it; the last part of its name where none is given."""
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    """How the model is spread, in place of `device`: "auto", or a device for each module."""
    packed: bool = False
    """Keep the matrices of a quantised checkpoint as they are."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""
    corpus: str | None = None
    """Text for second moments, a file or a dataset of the hub; the model's default where none is given."""

    def __post_init__(self) -> None:
        _paths_as_text(self)
        if self.device is not None and self.device_map is not None:
            raise InvalidSetting(f"model {self.name}: device and device_map both say where it goes; give one of them")
        if not self.label:
            object.__setattr__(self, "label", self.name.rstrip("/").rpartition("/")[2].replace(":", "-"))


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method to run."""

    name: str
    """One of `retcon methods`."""
    label: str = ""
    """What reports call it."""
    preset: str | None = None
    """By its full name; the model's own where none is given."""
    dataset: str | None = None
    """Which of the model's presets."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Over the preset's."""
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Lists of values of settings: the method stands for one with each value, or each combination."""

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)
        for name, values in self.vary.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise InvalidSetting(f"{self.label}: vary.{name} takes a list of values, found {values!r}")

    def each(self) -> list["MethodSpec"]:
        """Return the methods that it stands for, labelled by what differs."""
        made = []
        for values in itertools.product(*self.vary.values()):
            chosen = dict(zip(self.vary, values, strict=True))
            label = " ".join([self.label, *(f"{name}={value}" for name, value in chosen.items())])
            made.append(replace(self, label=label, settings={**self.settings, **chosen}, vary={}))
        return made


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Cases to measure on; see `retcon.evaluation.read_cases`."""

    path: str
    """A file, `hub:...`, or `world`."""
    label: str = ""
    """What reports call it."""
    format: str | None = None
    start: int = 0
    limit: int | None = None
    conflicts: ConflictRule = "drop"
    on_error: OnError = "stop"
    case_target: CaseTarget = "new"
    prompt_style: PromptStyle = "loc.nq_q"
    answers: Answers = "all"
    prompting: Prompting = "standard"
    order: Order = "file"
    """`file` takes the first cases, `shuffle` draws them by the run's seed."""

    def __post_init__(self) -> None:
        _paths_as_text(self)
        if not self.label:
            object.__setattr__(self, "label", Path(self.path.removeprefix("hub:")).stem)


@dataclass(frozen=True, kw_only=True)
class MeasureSpec:
    """What is measured; the fields of `retcon.evaluation.Measures` that a file can hold."""

    generate: bool = True
    preset: str = "qa"
    max_new_tokens: int | None = None
    stops: tuple[str, ...] | None = None
    fluency: tuple[Fluency, ...] | None = None
    locality_text: bool = False
    easyedit: bool = False
    divergence: bool = False
    neighborhood_prefix: Literal["none", "edit"] = "none"
    max_batch_tokens: int = 4096
    separator: str | None = None
    snippets: str | None = None
    """CounterFact's `attribute_snippets.json`, for consistency."""
    idf: str | None = None
    """CounterFact's `idf.npy`, beside `vocabulary`; fitted on the snippets where none is given."""
    vocabulary: str | None = None
    """CounterFact's `tfidf_vocab.json`."""
    metrics: tuple[str, ...] = ()
    """Metrics of your own (`retcon.evaluation.Measures`)."""

    def __post_init__(self) -> None:
        _paths_as_text(self)
        for name in ("idf", "vocabulary"):
            if getattr(self, name) is not None and self.snippets is None:
                raise InvalidSetting(f"{name} is only read beside snippets, against which consistency is measured")


MEASURE_FILES = ("snippets", "idf", "vocabulary")
"""Fields of a `MeasureSpec` that name files."""


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """A matrix of runs."""

    name: str = "bench"
    models: tuple[ModelSpec, ...]
    methods: tuple[MethodSpec, ...]
    datasets: tuple[DatasetSpec, ...]
    protocols: tuple[Protocol, ...] = (Protocol(),)
    seeds: tuple[int, ...] = (0,)
    measures: MeasureSpec = MeasureSpec()
    text: str | None = None
    """Held-out text for perplexity."""
    text_tokens: int | None = 20_000
    """Tokens of it read at most."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness."""
    task_limit: int | None = None
    """Items per leaf task."""
    warm_up: bool = True
    """Make one edit beforehand, which no time counts."""
    share_values: bool = False
    """Methods that search the same values on the same edits (MEMIT, RECT, PRUNE, AlphaEdit as a rule) search them once;
    runs that take them over have no time."""
    keep_text: bool = True
    """Keep what the models wrote."""
    keep_tokens: bool = False
    """Keep log-probabilities and choices token by token, from which all teacher-forced numbers can be made again."""

    def __post_init__(self) -> None:
        _paths_as_text(self)
        for name in ("models", "methods", "datasets", "protocols", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise InvalidSetting(f"{name} is empty; a benchmark needs at least one of each")
        object.__setattr__(self, "methods", tuple(one for method in self.methods for one in method.each()))
        for name in ("models", "methods", "datasets"):
            labels = [each.label for each in getattr(self, name)]
            if twice := next((label for label in labels if labels.count(label) > 1), None):
                raise InvalidSetting(f"two {name} are called {twice!r}; give one of them a label of its own")
        object.__setattr__(self, "seeds", tuple(map(check_seed, self.seeds)))
        if len(set(self.seeds)) < len(self.seeds):
            raise InvalidSetting(f"a seed occurs twice in {list(self.seeds)}")

    def with_places(
        self,
        *,
        model: str | None = None,
        dataset: str | None = None,
        corpus: str | None = None,
        text: str | None = None,
    ) -> "BenchSpec":
        """Return the same on other files: for a specification whose paths are another machine's. Labels stay.

        Of several models or datasets, the one with that label or place.

        Raises:
            InvalidSetting: none of several models or datasets is called so.
        """
        made = self
        if model is not None:
            made = replace(made, models=_at(model, made.models, "model", "name"))
        if dataset is not None:
            made = replace(made, datasets=_at(dataset, made.datasets, "dataset", "path"))
        if corpus is not None:
            made = replace(made, models=tuple(replace(m, corpus=corpus) for m in made.models))
        return made if text is None else replace(made, text=text)


@dataclass(frozen=True)
class Cell:
    """One run: one model, method, dataset, protocol and seed."""

    model: ModelSpec
    method: MethodSpec
    dataset: DatasetSpec
    protocol: Protocol
    seed: int

    @property
    def slug(self) -> str:
        """A name for people and folders."""
        parts = (self.model.label, self.method.label, self.dataset.label, self.protocol.describe(), f"seed{self.seed}")
        return "_".join("".join(c if c.isalnum() or c in "-." else "-" for c in part).strip("-") for part in parts)


def spec_from_file(path: str | os.PathLike[str]) -> BenchSpec:
    """Read a specification.

    Raises:
        MalformedFile: not readable, or no TOML.
        InvalidSetting: an unknown field, or a value of another type; the message names file and field.
    """
    try:
        table = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise MalformedFile(f"{path}: not a readable TOML file ({error})") from None
    return _made(BenchSpec, table, str(path))


def _at(place: str, items: tuple[Any, ...], what: str, where: str) -> tuple[Any, ...]:
    """Return the only item at another place; of several, those with that label or place.

    A label that was made of the place is made anew; one of its own stays.
    """
    if len(items) == 1:
        only = items[0]
        made = type(only)(**{where: getattr(only, where)}).label
        return (replace(only, **{where: place, "label": "" if only.label == made else only.label}),)
    if found := tuple(item for item in items if place in (item.label, getattr(item, where))):
        return found
    there = ", ".join(item.label for item in items)
    raise InvalidSetting(f"--{what} {place}: the file has {len(items)} {what}s; choose one of them: {there}")


def _made(kind: Any, table: Mapping[str, Any], where: str) -> Any:
    """Make a dataclass of a table, its own tables and lists of tables included."""
    hints, known = get_type_hints(kind), [f.name for f in fields(kind)]
    values = {}
    for name, value in table.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidSetting(f"{where}: unknown field {name!r}{hint} (known: {', '.join(known)})")
        values[name] = _fitted(value, hints[name], f"{where}, {name}")
    for f in fields(kind):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise InvalidSetting(f"{where}: field {f.name!r} is missing")
    try:
        return kind(**values)
    except InvalidSetting as error:
        raise InvalidSetting(f"{where}: {error}") from None


def _fitted(value: Any, hint: Any, where: str) -> Any:
    """Return a value as its field wants it: tables of their own are made here, all else is as with settings."""
    if is_dataclass(hint):
        return _made(hint, fitted_value(value, Mapping[str, Any], where), where)
    if get_origin(hint) is tuple and is_dataclass(of := get_args(hint)[0]):
        if not isinstance(value, list):
            name = where.rpartition(", ")[2]
            raise InvalidSetting(f"{where} must be a list of tables, each begun by [[{name}]], found {value!r}")
        return tuple(_fitted(item, of, f"{where}[{i}]") for i, item in enumerate(value))
    return fitted_value(value, hint, where)
