"""Settings for a model and facts of one's own, searched: successive halving over samples of the facts.

One half of the cases is searched on, the other is only reported on. Candidates vary what the search of values depends
on (layers, clamps, learning rate, steps, decay) and how they are written (weights of the second moment). They are tried
on a few cases; the best third goes on to three times as many, and so on. Candidates that differ in the write alone
share their values, so each is written with several weights, which costs little.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from retcon.edits import Case, Edit, list_of_cases
from retcon.errors import InvalidSetting, RetconError
from retcon.seed import check_seed
from retcon.work import Done, silent, whole_edits

if TYPE_CHECKING:
    from retcon.evaluation import Evaluation
    from retcon.evaluation.paired import Difference
    from retcon.evaluation.summary import Summary
    from retcon.lm.model import LM
    from retcon.memory.moments import Moments
    from retcon.methods.common.contract import Method

ETA = 3
"""Candidates kept from one round to the next: one of so many; samples grow as much."""
SMALLEST = 5
"""Cases of the first round at least."""
LEAST_CASES = 4
"""Cases that tuning needs: two for each half."""

FACTORS: Mapping[str, tuple[float, ...]] = {
    **dict.fromkeys(("clamp", "low_clamp", "high_clamp"), (0.5, 2.0, 4.0)),
    "learning_rate": (0.2, 0.5, 2.0, 5.0),
    "steps": (2.0,),
    "epochs": (0.5, 2.0),
    "stop_loss": (0.1, 10.0),
    "budget": (0.1, 0.3),
    "box": (0.2, 5.0, 20.0, 100.0),
    "threshold": (0.5, 1.5),
    "add": (0.1, 0.3, 3.0),
    "subtract": (0.0, 3.0),
    "max_units": (0.05, 0.25),
    "alpha": (0.25, 4.0),
    "n_positive": (0.3, 3.0),
    **dict.fromkeys(("weight_decay", "low_weight_decay", "high_weight_decay", "attn_weight_decay"), (0.1,)),
    "kl_factor": (0.25, 4.0),
}
"""Settings that a search of values, or a training, depends on, and what each may be multiplied by."""
WRITE = ("moment_weight", "low_moment_weight", "high_moment_weight", "ridge")
"""Settings that only the write depends on; they are varied together, by one factor."""
WRITE_FACTORS = (1.0, 0.2, 5.0)
CHANGE = 0.4
"""Probability with which a candidate changes a setting."""


@dataclass(frozen=True)
class Trial:
    """One set of settings, tried on some of the cases."""

    changes: dict[str, Any]
    """Settings that differ from the first candidate's."""
    n_cases: int
    score: float
    """Harmonic mean of ES, GS and LS, or of those that the cases can measure; 0 where the method failed."""
    seconds: float
    problem: str = ""
    """Why it failed."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found, and what it is worth on the half that was not searched on."""

    name: str
    """The method's, as it was asked for."""
    method: "Method"
    """The best candidate; the first where the best cannot edit the reported half."""
    start: "Method"
    """The first candidate."""
    start_preset: str | None
    """The preset that it comes from; None: the rule for models without one."""
    trials: tuple[Trial, ...]
    n_searched: int
    n_reported: int
    summary: "Summary"
    """Of the best candidate, on the reported half."""
    start_summary: "Summary | None"
    """Of the first candidate, on the reported half; None where it failed."""
    differences: "tuple[Difference, ...]"
    """Best minus first candidate on the reported half, with paired intervals."""
    seconds: float

    @property
    def changes(self) -> dict[str, Any]:
        """Settings that differ from the first candidate's."""
        return changed_settings(self.method, self.start)

    @property
    def difference(self) -> "Difference | None":
        """Of the mean that was searched by (`objective`); None where nothing is known of both on the same case."""
        return self.differences[-1] if self.differences else None

    @property
    def worse(self) -> bool:
        """Whether that mean is lower than the first candidate's on the reported half, the interval included."""
        return self.difference is not None and self.difference.clear and self.difference.value < 0


def changed_settings(method: "Method", before: "Method") -> dict[str, Any]:
    """Return the settings that are not those of the same method before."""
    return {name: value for name, value in method.settings.items() if before.settings[name] != value}


@dataclass(frozen=True, kw_only=True)
class EditAndMeasure:
    """Edits of some cases, each with its measurement, by methods that share their values: work for another process."""

    cases: Sequence[Case]
    moments: "Moments | None"
    pre: "Evaluation"
    seed: int
    folder: str | None = None
    """Where searched values are kept, on the machine that asks."""

    def __call__(
        self, lm: "LM", piece: Sequence["Method"], progress: Done
    ) -> "Iterator[tuple[Evaluation | RetconError, float]]":
        """Yield the evaluation of each method, or why it failed, and the seconds that it took."""
        with ExitStack() as stack:
            folder = self.folder
            if folder is not None and not Path(folder).is_dir():  # another machine
                folder = stack.enter_context(TemporaryDirectory())
            for method in piece:
                started = time.monotonic()
                found: Evaluation | RetconError
                try:
                    found = edit_and_measure(lm, method, self.cases, self.moments, self.pre, self.seed, folder)
                except RetconError as error:
                    found = error
                yield found, time.monotonic() - started


@dataclass(kw_only=True)
class _Search:
    """What all trials share."""

    lm: "LM"
    moments: "Moments | None"
    cases: Sequence[Case]
    pre: "Evaluation"
    seed: int
    until: float
    max_trials: int
    on_trial: Callable[[Trial], None]
    folder: str
    start: "Method"
    trials: list[Trial] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return len(self.trials) >= self.max_trials or (bool(self.trials) and time.monotonic() >= self.until)

    def rank(
        self, candidates: Sequence[Sequence["Method"]], n: int, *, beyond_budget: bool = False
    ) -> list[tuple[float, "Method"]]:
        """Try candidates on the first n cases, each written in several ways, and return the best way of each with its
        score, as far as time and trials reach."""
        new = self.new_results(candidates, n, None if beyond_budget else self.max_trials - len(self.trials))
        ranked: list[tuple[float, Method]] = []
        for candidate in candidates:
            best: tuple[float, Method] | None = None
            for method in candidate:
                if self.over and not beyond_budget:
                    break
                changes = changed_settings(method, self.start)
                trial = next((t for t in self.trials if t.n_cases == n and t.changes == changes), None)
                if trial is None:
                    self.add(trial := self.trial(method, n, *next(new)))
                if best is None or trial.score > best[0]:
                    best = trial.score, method
            if best is None:
                break
            ranked.append(best)
        return ranked

    def new_results(
        self, candidates: Sequence[Sequence["Method"]], n: int, most: int | None
    ) -> "Iterator[tuple[Evaluation | RetconError, float]]":
        """Yield the results of those trials that are not known, in order, and no more than so many.

        A candidate is a piece of work for the model's workers.
        """
        known = [trial.changes for trial in self.trials if trial.n_cases == n]
        until = None if most is None else len(known) + most
        pieces: list[list[Method]] = []
        for candidate in candidates:
            piece: list[Method] = []
            for method in candidate:
                changes = changed_settings(method, self.start)
                if changes not in known and (until is None or len(known) < until):
                    known.append(changes)
                    piece.append(method)
            if piece:
                pieces.append(piece)
        work = EditAndMeasure(
            cases=self.cases[:n], moments=self.moments, pre=self.pre, seed=self.seed, folder=self.folder
        )
        return whole_edits(self.lm, work, pieces)

    def trial(self, method: "Method", n: int, found: "Evaluation | RetconError", seconds: float) -> Trial:
        """Return what a method's result is as a trial on n cases."""
        changes = changed_settings(method, self.start)
        if isinstance(found, RetconError):
            return Trial(changes, n, 0.0, seconds, str(found))
        return Trial(changes, n, objective(found.summary()), seconds)

    def report(
        self, methods: Sequence["Method"], cases: Sequence[Case], pre: "Evaluation"
    ) -> "list[Evaluation | RetconError]":
        """Measure methods on cases that chose nothing; one that fails is one of the trials."""
        work = EditAndMeasure(cases=cases, moments=self.moments, pre=pre, seed=self.seed)
        results = list(whole_edits(self.lm, work, [[method] for method in methods]))
        for method, (found, seconds) in zip(methods, results, strict=True):
            if isinstance(found, RetconError):
                self.add(self.trial(method, len(cases), found, seconds))
        return [found for found, _ in results]

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.on_trial(trial)


def tune(
    lm: "LM",
    name: str,
    cases: Iterable[Case],
    *,
    moments: "Moments | None" = None,
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    budget: float = 3600.0,
    max_trials: int = 50,
    seed: int = 0,
    on_trial: Callable[[Trial], None] = silent,
) -> Tuned:
    """Search a method's settings on one half of `cases`, and report on the other.

    The first candidate is what `retcon.method(name, for_model=lm, preset=preset, cases=...)` gives for the searched
    half; what is reported is the best of the last round, the first candidate among them.

    Args:
        preset: the full name of the first candidate's, or "none" for the rule; None: the model's, or else the rule.
        given: settings that stay as they are.
        budget: seconds for the search. When they end, the round stops after the trial that is running (with workers:
            the candidate that is waited for). A candidate tried in that round replaces the best so far only if both
            were tried in it. The winner must then beat the first candidate on all searched cases. That comparison and
            the report take extra time.
        max_trials: sets of settings to try at most, all rounds counted.
        seed: of the candidates, and everything drawn in editing.
        on_trial: called after every trial.

    Raises:
        RetconError: neither the best nor the first candidate can edit the reported half.
        InvalidSetting: too few cases, a method that wraps another, that is trained before it edits, or one without a
            setting that is searched.
    """
    from retcon.evaluation import evaluate
    from retcon.evaluation.paired import differences
    from retcon.memory.defaults import default_moments
    from retcon.methods.common.choosing import choose
    from retcon.methods.common.contract import Trainable
    from retcon.methods.common.wrappers import Filter

    order, seed = list_of_cases(cases), check_seed(seed)
    if len(order) < LEAST_CASES:
        raise InvalidSetting(f"tuning takes at least {LEAST_CASES} cases, better a hundred; found {len(order)}")
    given = dict(given or {})
    random.Random(0).shuffle(order)  # whatever the seed: the first candidate may have been tuned on these cases
    searched, reported = order[: len(order) // 2], order[len(order) // 2 :]
    chosen = choose(name, for_model=lm, preset=preset, cases=searched, **given)
    start = chosen.method
    if isinstance(start, Filter):
        raise InvalidSetting(
            f"{name} filters what another method writes; tune that method ({start.base_method}), whose preset {name} "
            "then takes too"
        )
    if isinstance(start, Trainable):
        raise InvalidSetting(
            f"{name} edits by the settings that its editor was trained with, so that there is nothing to search; train "
            "editors with several (retcon fit) and compare what each of them writes"
        )
    fixed = frozenset(given)
    if not (_weights(start, fixed) or candidates(lm, start, fixed, 1, random.Random(seed))):
        raise InvalidSetting(
            f"{name} has nothing left to search: of {', '.join([*FACTORS, *WRITE])} and layers it has none that is not "
            "given"
        )
    if moments is None and start.uses_moments:
        moments = default_moments(lm)
    began = time.monotonic()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a trial that nobody waits for may write to it
        search = _Search(
            lm=lm,
            moments=moments,
            cases=searched,
            pre=evaluate(lm, searched, generate=False),
            seed=seed,
            until=began + budget,
            max_trials=max_trials,
            on_trial=on_trial,
            folder=folder,
            start=start,
        )
        best = _halving(search, fixed, random.Random(seed))
    took = time.monotonic() - began
    pre = evaluate(lm, reported, generate=False)
    measured = search.report([best] if best == start else [best, start], reported, pre)
    ours, before = measured[0], measured[-1]
    if isinstance(ours, RetconError):
        best, ours = start, before
    if isinstance(ours, RetconError):
        raise ours
    apart: list[Difference] = []
    if not isinstance(before, RetconError):
        after = [[r for r in each.records if r.when == "final"] for each in (ours, before)]
        apart = differences(*after, of_what_there_is=True, seed=seed)
    return Tuned(
        name=name,
        method=best,
        start=start,
        start_preset=chosen.preset.name if chosen.preset else None,
        trials=tuple(search.trials),
        n_searched=len(searched),
        n_reported=len(reported),
        summary=ours.summary(),
        start_summary=None if isinstance(before, RetconError) else before.summary(),
        differences=tuple(apart),
        seconds=took,
    )


def _halving(search: _Search, given: frozenset[str], draw: random.Random) -> "Method":
    """Return the best settings of the last round, or of as much of it as there was time for."""
    sizes = rounds(len(search.cases))
    weights = _weights(search.start, given)
    n_first = first_round(search.max_trials // (len(WRITE_FACTORS) if weights else 1), len(sizes))
    running = [search.start, *candidates(search.lm, search.start, given, n_first - 1, draw)]
    best = search.start
    for size in sizes:
        ranked = search.rank([_written(method, weights) for method in running], size)
        if best not in running[: len(ranked)]:  # cut short before the best so far was tried on so many cases
            break
        cut = len(ranked) < len(running)
        ranked.sort(key=lambda found: -found[0])  # stable: the first candidate precedes what is no better
        best = ranked[0][1]
        if cut:
            break
        running = [method for _, method in ranked[: math.ceil(len(running) / ETA)]]
        if search.start not in running:  # what is chosen beats the rule on the same cases, or is the rule
            running.insert(0, search.start)
    if best == search.start:
        return best
    # settings that lead on a few cases may be far from what all of them at once need
    ours, before = search.rank([[best], [search.start]], len(search.cases), beyond_budget=True)
    return best if ours[0] > before[0] else search.start


def _weights(start: "Method", given: frozenset[str]) -> list[str]:
    """Return the settings of the write that are searched."""
    return [name for name in WRITE if start.settings.get(name) and name not in given]


def first_round(n_trials: int, n_rounds: int) -> int:
    """Return how many candidates so many trials suffice for, all rounds counted, with the rule in each; at least 2."""

    def needed(n: int) -> int:
        total = 0
        for _ in range(n_rounds):
            total, n = total + n, math.ceil(n / ETA) + 1
        return total

    return max([2, *(n for n in range(3, n_trials + 1) if needed(n) <= n_trials)])


def _written(method: "Method", weights: Sequence[str]) -> list["Method"]:
    """Return a candidate with several weights of the second moment, for which its values are searched once."""
    factors = WRITE_FACTORS if weights else (1.0,)
    return [
        _changed(method, {name: _rounded(factor * method.settings[name]) for name in weights}) for factor in factors
    ]


def rounds(n_cases: int) -> list[int]:
    """Return the sizes of the samples, ascending by `ETA` to all cases."""
    sizes = [n_cases]
    while sizes[0] / ETA >= SMALLEST:
        sizes.insert(0, round(sizes[0] / ETA))
    return sizes


def candidates(lm: "LM", start: "Method", given: frozenset[str], n: int, draw: random.Random) -> list["Method"]:
    """Return n settings that differ from `start` and from each other, as far as there are so many."""
    from retcon.methods.common.contract import LAYER_SETTINGS

    found: list[Method] = []
    own = start.settings
    for _ in range(20 * n):
        if len(found) == n:
            break
        changes: dict[str, Any] = {}
        for name, factors in FACTORS.items():
            value = own.get(name)
            if value and name not in given and draw.random() < CHANGE:
                changed = value * draw.choice(factors)
                if name == "threshold" and own.get("stop") != "loss":  # a share, or a probability
                    changed = min(changed, (1 + value) / 2)
                changes[name] = max(1, round(changed)) if isinstance(value, int) else _rounded(changed)
        for name in LAYER_SETTINGS:
            value = own.get(name)
            if value not in (None, ()) and name not in given and draw.random() < CHANGE:  # (): all, or a rule's
                changes[name] = _moved(value, lm.n_layers, draw)
        stop_is_free = "stop" in own and "stop" not in given and not ("threshold" in given and own["threshold"])
        if stop_is_free and draw.random() < CHANGE:
            changes["stop"] = "loss" if own["stop"] == "probability" else "probability"
            changes["threshold"] = None  # a loss is no probability: the other one's default
        try:
            made = _changed(start, changes)
        except InvalidSetting:  # settings that do not go together
            continue
        if made != start and made not in found:
            found.append(made)
    return found


def _moved(value: int | tuple[int, ...], n_layers: int, draw: random.Random) -> int | tuple[int, ...]:
    """Return layers moved up or down by up to a tenth of the depth, a group also one wider or narrower.

    One layer is as often drawn from the whole model: which depth suits one matrix differs between models.
    """
    if not isinstance(value, int) and len(value) == 1:
        return (_moved(value[0], n_layers, draw),)  # type: ignore[return-value]
    reach = max(1, round(n_layers / 10))
    by = draw.choice([step for step in range(-reach, reach + 1) if step])
    if isinstance(value, int):
        return draw.randrange(n_layers) if draw.random() < 0.5 else min(max(value + by, 0), n_layers - 1)
    first = max(value[0] + by, 0)
    last = min(max(value[-1] + by + draw.choice((-1, 0, 1)), first), n_layers - 1)
    return tuple(range(min(first, last), last + 1))


def _changed(method: "Method", changes: Mapping[str, Any]) -> "Method":
    return replace(method, **changes)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def edit_and_measure(
    lm: "LM",
    method: "Method",
    cases: Sequence[Case],
    moments: "Moments | None",
    pre: "Evaluation",
    seed: int,
    values: str | None = None,
) -> "Evaluation":
    """Edit `cases` with a method, one by one where it takes one fact, and measure them; the model is left as it was."""
    from retcon.evaluation import evaluate
    from retcon.memory.values import ValueCache
    from retcon.methods.common.sequence import in_steps

    edits: list[Edit] = [edit for case in cases for edit in case.edits]
    cache = ValueCache(values) if values is not None and method.supports_batches else None
    delta = in_steps(method, lm, edits, moments=moments, values=cache, seed=seed)
    return evaluate(lm, cases, delta=delta, pre=pre, generate=False, seed=seed)


def objective(summary: "Summary") -> float:
    """Return the harmonic mean of ES, GS and LS as far as they were measured, 0 to 1."""
    posts = [line.post for name in ("ES", "GS", "LS") if (line := summary.get(name))]
    found = [post.value for post in posts if post is not None and post.value is not None]
    return len(found) / sum(1 / value for value in found) if found and min(found) > 0 else 0.0


def save_preset(lm: "LM", tuned: Tuned, source: str, dataset: str, folder: Path | None = None) -> Path:
    """Write what was found into the user's folder of presets, where `retcon.method(name, for_model=lm)` finds it first.

    Args:
        source: where the settings come from, for people.
        dataset: the kind of data, a word; a preset for the same model and dataset is replaced.
    """
    from retcon.methods.common.presets import signature, write_preset

    return write_preset(tuned.name, signature(lm), dataset, source, tuned.method.settings, folder)
