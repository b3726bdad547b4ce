"""Running a benchmark: every cell into a directory of its own, unit by unit, so that it can be ended and resumed."""

import json
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from retcon.atomic import TEMPORARY, remove_abandoned, turn_in, write_atomically
from retcon.bench.directory import FINISHED, LISTING, MANIFEST, place_of, read_listing, unfinished_runs
from retcon.bench.inputs import cells_of, chosen_cases, read_inputs
from retcon.bench.manifest import (
    bench_versions,
    command_line,
    dataset_hash,
    environment,
    manifest_of,
    read_manifest,
    write_or_verify,
)
from retcon.bench.pieces import VALUES, BegunRun, Pieces, RunPart, RunUnits, WholeModel
from retcon.bench.protocol import editable, n_units, unit_keys
from retcon.bench.spec import MEASURE_FILES, BenchSpec, Cell, MethodSpec, ModelSpec, Protocol
from retcon.bench.unedited import measure_unedited
from retcon.bench.units import Unit, Units
from retcon.checked import through_json
from retcon.edits import Case, cases_hash
from retcon.errors import MalformedFile, RetconError, RetconWarning
from retcon.evaluation.datasets import Loaded, LoadReport
from retcon.evaluation.metrics.consistency import References
from retcon.evaluation.plan import Measures, QueryPlan, plan_queries
from retcon.evaluation.records import whole_model_record, write_records
from retcon.evaluation.results import Evaluation
from retcon.files import all_shared, as_shared, read_prose
from retcon.lm.load import load as load_model
from retcon.memory.timed import TimedMoments
from retcon.methods.common.choosing import method as make_method
from retcon.methods.common.contract import check_model_has_layers
from retcon.methods.common.registry import method_class
from retcon.work import Here, Workers, in_order, map_whole_edits, silent, whole_edits
from retcon.workflow.moments import moments_for

REPLACED = f"replaced-{MANIFEST}"
"""What a stopped run was asked, once the benchmark has finished without it."""


@dataclass(frozen=True)
class Event:
    """A step of a run, for whoever watches."""

    cell: Cell
    done: int
    """Units finished."""
    total: int
    evaluation: Evaluation | None = None
    """Of the whole run, once it is finished."""
    finished_before: bool = False
    """The run had been finished when the benchmark was started."""
    run_id: str = ""
    """The run's identity; other runs of a benchmark may have the same slug."""


Watch = Callable[[Event], None]


@dataclass(frozen=True)
class Destination:
    """Where the runs of a benchmark go, and what each of their events is reported to."""

    root: Path
    environment: Mapping[str, Any]
    force: bool
    watch: Watch


def run_bench(
    spec: BenchSpec,
    directory: str | Path,
    *,
    force: bool = False,
    watch: Watch = silent,
    on_loaded: Callable[[LoadReport], None] = silent,
    command: str | None = None,
    verify_base: bool = False,
    loaded: Mapping[str, Loaded] | None = None,
    workers: Workers | None = None,
) -> None:
    """Run all cells, or go on with those that are not finished.

    Ending it at any point, by Ctrl-C or by a crash, leaves a valid directory; the same call goes on from there, and the
    records are the same byte for byte as of a run that was never ended.

    Args:
        force: where the directory holds another benchmark, put its manifest aside and start this one.
        watch: called with every unit.
        on_loaded: called once with what was read, dropped and flagged of each dataset.
        command: how this was called, for the record; the command line by default.
        verify_base: as `retcon.load` takes it.
        loaded: what `read_inputs` has read already.
        workers: where units are made (`retcon.cluster.workers`); this process by default. Records are the same, times
            are not.

    Raises:
        InvalidSetting: the directory holds another benchmark (the message lists what differs).
        PlaceBusy: another process runs a benchmark in the directory.
    """
    root = Path(directory)
    loaded = read_inputs(spec) if loaded is None else loaded
    for _, report in loaded.values():
        on_loaded(report)
    cells = cells_of(spec, {label: len(cases) for label, (cases, _) in loaded.items()})

    def runner(model: ModelSpec) -> CellRunner:
        made = CellRunner(spec, model, loaded, time.perf_counter, verify_base=verify_base)
        made.lm.workers = workers or made.lm.workers
        return made

    first = runner(spec.models[0])  # bad settings end here, before any writing
    _say_what_is_not_measured(spec, cells)
    to = Destination(root, environment(command or command_line()), force, watch)
    whole = through_json(
        {"spec": _portable(spec), "datasets": {k: dataset_hash(*read) for k, read in loaded.items()}} | bench_versions()
    )
    root.mkdir(parents=True, exist_ok=True)
    with turn_in(root, wait=False), _nothing_left_of_a_failed_start(root):
        remove_abandoned(root, f"**/.*{TEMPORARY}")
        listing = _finished_before(root, whole)
        for line in write_or_verify(root / MANIFEST, whole, to.environment, force=force, what="benchmark"):
            changed = f"the machine is not as it was: {line}; the last bits may differ"
            warnings.warn(changed, RetconWarning, stacklevel=2)
        for model in spec.models:
            bench = first if model is spec.models[0] else runner(model)
            own = [(i, cell) for i, cell in enumerate(cells) if cell.model is model]
            runs = bench.with_units((bench.begin(cell, to) for _, cell in own), to)
            for (i, _), (run, units) in zip(own, runs, strict=True):
                listed = bench.finish(run, units, to)
                if i >= len(listing) or listing[i] != listed:
                    listing = [*listing[:i], listed]
                    write_atomically(root / LISTING, json.dumps(listing, indent=1).encode())
        shutil.rmtree(root / VALUES, ignore_errors=True)
        for folder in unfinished_runs(root):  # of another specification, or of code that has changed since
            (folder / MANIFEST).replace(folder / REPLACED)


def _say_what_is_not_measured(spec: BenchSpec, cells: Sequence[Cell]) -> None:
    """Warn where what belongs to the whole model is asked of facts that are edited one by one."""
    asked = [*(["perplexity"] if spec.text is not None else []), *(["tasks"] if spec.tasks else [])]
    alone = dict.fromkeys(cell.protocol.describe() for cell in cells if cell.protocol.kind == "single")
    if asked and alone:
        warnings.warn(
            f"{' and '.join(asked)} of {', '.join(alone)}: measured of the unedited model only, not after every single "
            "edit; a batch or a sequence is measured where it ends",
            RetconWarning,
            stacklevel=3,
        )


def _finished_before(root: Path, whole: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the lines of the first runs that an earlier start of this benchmark has finished; their order stays."""
    try:
        if read_manifest(root / MANIFEST)["manifest"] != whole:
            return []
        return list(takewhile(lambda line: (root / line["directory"] / FINISHED).is_file(), read_listing(root)))
    except MalformedFile:
        return []


@contextmanager
def _nothing_left_of_a_failed_start(root: Path) -> Iterator[None]:
    """Take away the manifests of a benchmark that ends before anything is measured, or the next would be refused."""
    had_manifest = (root / MANIFEST).exists()
    try:
        yield
    except BaseException:
        runs = root / "runs"
        made = [path for path in runs.rglob("*") if path.is_file()]
        if not had_manifest and all(path.name == MANIFEST for path in made):
            shutil.rmtree(runs, ignore_errors=True)
            (root / MANIFEST).unlink(missing_ok=True)
            with suppress(OSError):  # it was there before, with something in it
                root.rmdir()
        raise


def _portable(spec: BenchSpec) -> dict[str, Any]:
    """Return the specification without the folders that files lie in."""
    own = asdict(spec)
    for part, name in (("models", "name"), ("models", "corpus"), ("datasets", "path")):
        own[part] = [each | {name: each[name] and Path(each[name]).name} for each in own[part]]
    for each in own["models"]:  # a benchmark that was begun before a file had these goes on
        for name in ("device_map", "packed", "trust_remote_code"):
            if not each[name]:
                del each[name]
    for method in own["methods"]:
        method["settings"] = all_shared(method["settings"])
    own["measures"] |= {name: own["measures"][name] and as_shared(own["measures"][name]) for name in MEASURE_FILES}
    own["tasks"] = [as_shared(task) for task in spec.tasks]
    return own | {"text": spec.text and Path(spec.text).name}


class CellRunner:
    """A loaded model and what the cells that share it share."""

    def __init__(
        self,
        spec: BenchSpec,
        model: ModelSpec,
        loaded: Mapping[str, Loaded],
        clock: Callable[[], float],
        *,
        verify_base: bool = False,
    ) -> None:
        self.spec = spec
        started = clock()
        self.lm = load_model(
            model.name,
            dtype=model.dtype,
            device=model.device,
            device_map=model.device_map,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            packed=model.packed,
            verify_base=verify_base,
        )
        self.load_seconds = clock() - started
        self.moments: Any = TimedMoments(moments_for(self.lm, model.corpus), clock=clock)
        self.text = None if spec.text is None else read_prose(spec.text)
        self.measures = _measures(spec)
        self._plans: dict[tuple[str, int], tuple[QueryPlan, Evaluation]] = {}
        self._whole_model = WholeModel(spec, self.text)
        self._unedited = self._whole_model(self.lm, "pre", 0)
        self.loaded = loaded
        self.methods = {  # all of them now: better refused now than after hours
            (dataset, asked.label, at_once): self._method(asked, cases, at_once)
            for dataset, (cases, _) in loaded.items()
            for asked in spec.methods
            for at_once in {
                self._at_once(asked, part, len(cases)) for whole in spec.protocols for part in whole.parts(len(cases))
            }
        }

    def method_of(self, cell: Cell) -> Any:
        """Return the method of a cell, with the settings that suit the model and, where it has no preset, the facts."""
        at_once = self._at_once(cell.method, cell.protocol, len(self.loaded[cell.dataset.label][0]))
        return self.methods[cell.dataset.label, cell.method.label, at_once]

    def _at_once(self, asked: MethodSpec, protocol: Protocol, n_cases: int) -> int | None:
        """Return how many edits a call will hold, for methods whose settings may depend on it; None for all others."""
        return protocol.sizes(n_cases)[1] if method_class(asked.name).fits_learning_rate else None

    def _method(self, asked: MethodSpec, cases: Sequence[Case], at_once: int | None) -> Any:
        own = {"dataset": asked.dataset, "preset": asked.preset, **asked.settings}
        made = make_method(asked.name, for_model=self.lm, cases=cases, at_once=at_once, **own)
        check_model_has_layers(made, self.lm)
        return made

    def begin(self, cell: Cell, to: Destination) -> BegunRun:
        """Write down what is asked of one cell, and measure the unedited model on its cases."""
        cases, report = self.loaded[cell.dataset.label]
        chosen = chosen_cases(cases, cell)
        method = self.method_of(cell)
        manifest = manifest_of(self.spec, cell, self.lm, method, chosen, report)
        identity, directory = place_of(cell, manifest, to.root)
        write_or_verify(directory / MANIFEST, manifest, to.environment, force=to.force, what="run")
        total, (_, size) = n_units(cell.protocol, len(chosen)), cell.protocol.sizes(len(chosen))
        if (directory / FINISHED).is_file():
            found = Evaluation.read(directory / FINISHED)
            to.watch(Event(cell, total, total, found, finished_before=True, run_id=identity))
            return BegunRun(cell, directory, identity, None)
        to.watch(Event(cell, 0, total, run_id=identity))
        plan, before = self._plan(chosen, replace(self.measures, seed=cell.seed))
        units = Units(directory.resolve(), identity, keep_tokens=self.spec.keep_tokens)
        return BegunRun(cell, directory, identity, RunPart(method, cell.seed, cell.protocol, plan, before, units, size))

    def with_units(self, runs: Iterable[BegunRun], to: Destination) -> Iterator[tuple[BegunRun, Generator[Unit]]]:
        """Yield every run with its units, run after run.

        With workers all runs are begun, and their units are shared out, sequences whole. A single piece stays here, as
        do runs that share values, so that what is inside is shared out.
        """
        spec = self.spec
        work = RunUnits(self.moments, self._whole_model, self.measures, to.root.resolve(), spec.share_values)
        pieces = None
        if not (spec.share_values or isinstance(self.lm.workers, Here)):
            runs = list(runs)
            pieces = Pieces(runs, self.measures)
        if pieces is None or len(pieces) < 2:
            for run in runs:
                if run.part is not None:
                    self._warm_up(run.part, work)
                yield run, whole_edits(self.lm, work, [] if run.part is None else [run.part])
            return
        warm: list[Any] = []
        for part, _ in pieces.left:  # second moments are collected here, which is shared out
            if part.method.uses_moments and part.method not in warm:
                self._warm_up(part, work)
                warm.append(part.method)
        made = in_order(pieces.saved(map_whole_edits(self.lm, work, pieces)))
        for run in runs:
            yield run, run.units(made)

    def finish(self, run: BegunRun, units: Generator[Unit], to: Destination) -> dict[str, str]:
        """Take one run's units to its end; returns its line in the list of runs."""
        cell, identity = run.cell, run.identity
        line = {"slug": cell.slug, "directory": f"runs/{run.directory.name}", "id": identity}
        if run.part is None:
            return line
        plan, before = run.part.plan, run.part.pre
        total = n_units(cell.protocol, len(plan.cases))
        done: list[Unit] = []
        with closing(units):  # closed, it restores the model
            for unit in units:
                done.append(unit)
                to.watch(Event(cell, len(done), total, run_id=identity))
        context = {
            "run_id": identity,
            "model": f"{cell.model.label}@{self.lm.fingerprint()[:12]}",
            "method": cell.method.label,
            "dataset": cell.dataset.label,
            "protocol": cell.protocol.kind,
            "n_edits": sum(len(case.edits) for case in plan.cases),
            "edit_batch": run.part.size,
            "seed": cell.seed,
        }
        records = [*before.records, *self._unedited, *(record for unit in done for record in unit.records)]
        evaluation = Evaluation(records, context)
        self._write(run.directory, evaluation, before, done, plan)
        to.watch(Event(cell, total, total, evaluation, run_id=identity))
        return line

    def _plan(self, chosen: Sequence[Case], measures: Measures) -> tuple[QueryPlan, Evaluation]:
        """Return the cases tokenised, and the unedited model on them: once for all methods, and kept in the cache."""
        key = cases_hash(chosen), measures.seed
        if key not in self._plans:
            self._plans.clear()  # one at a time: methods follow each other on the same cases
            plan = plan_queries(self.lm, chosen, measures)
            self._plans[key] = plan, measure_unedited(self.lm, plan, measures, self.spec.measures)
        return self._plans[key]

    def _warm_up(self, part: RunPart, work: RunUnits) -> None:
        """Make an edit that is thrown away, so that statistics are collected and caches filled before time is taken,
        unless the run has its first unit."""
        first_unit, *_ = unit_keys(part.protocol, part.units, part.chunks)
        if not self.spec.warm_up or part.units.load(first_unit) is not None:
            return
        if (first := next(editable(self.lm, part.plan.cases, part.method.needs_subject), None)) is None:
            return
        try:
            work.propose(self.lm, part, first.edits[:1])
        except RetconError as error:  # the run itself reports it, edit by edit
            warnings.warn(f"the warm-up edit failed: {error}", RetconWarning, stacklevel=2)

    def _write(
        self, directory: Path, evaluation: Evaluation, before: Evaluation, done: Sequence[Unit], plan: QueryPlan
    ) -> None:
        timings = [
            whole_model_record("pre", "time", "time.load", self.load_seconds, 1, 0),
            *(t for unit in done for t in unit.timings),
        ]
        write_records(directory / "timings.jsonl", timings, evaluation.context)
        lines = "".join(json.dumps(_case_row(case), ensure_ascii=False) + "\n" for case in plan.cases)
        write_atomically(directory / "cases.jsonl", lines.encode())
        if self.spec.keep_text:
            prompts = {q.place: q.query.prompt for q in plan.queries}
            rows = [
                json.dumps(
                    {"when": w, "unit": i, "case_id": c, "query_id": q, "prompt": prompts[c, q], "text": text},
                    ensure_ascii=False,
                )
                for i, texts in enumerate([before.texts, *(unit.texts for unit in done)], -1)
                for (w, c, q), text in texts.items()
            ]
            write_atomically(directory / "texts.jsonl", "".join(row + "\n" for row in rows).encode())
        write_records(directory / FINISHED, evaluation.records, evaluation.context)  # the last to be written


def _case_row(case: Case) -> dict[str, Any]:
    """Return what a report says of a case."""
    relation = next((edit.relation_id for edit in case.edits if edit.relation_id), None)
    return {
        "case_id": case.id,
        "relation": case.meta.get("relation") or relation,
        "edits": [
            {"prompt": e.text, "subject": e.subject, "target_new": e.target_new, "target_true": e.target_true}
            for e in case.edits
        ],
        "queries": [
            {"query_id": q.id, "prompt": q.prompt, "target": q.target, "contrast": q.contrast} for q in case.queries
        ],
        "flags": case.meta.get("flags", []),
    }


def _measures(spec: BenchSpec) -> Measures:
    own = asdict(spec.measures)
    snippets, idf, vocabulary = (own.pop(name) for name in ("snippets", "idf", "vocabulary"))
    references = None if snippets is None else References.from_files(snippets, idf, vocabulary)
    return Measures(**own, references=references)
