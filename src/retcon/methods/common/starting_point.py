"""Settings for a model without a preset, in two parts: what follows from its shape, and clamps fitted to the edits.

Shape first: layers by relative depth, and weights of the second moment in proportion to the key width
(`fallback_settings` of each method). Then what no shape predicts. Clamps are doubled, all by one factor, on a few of
the edits until at least half of these reach their target, and no further, since a wide clamp costs locality. Learning
rates of masked tuning likewise, but on as many edits as will be written together: the more there are, the less of each
step is any one's. The layer that fine-tuning trains is where a step on a fact stays with it (`locate/transfer.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from retcon.edits import Case, Edit, list_of
from retcon.lm.model import LM
from retcon.locate.advice import span
from retcon.locate.transfer import Transfer, transfer
from retcon.memory.defaults import default_contexts
from retcon.memory.values import search_values
from retcon.methods.common.contract import Method, ModelShape, State
from retcon.methods.common.fine_tuning import FineTuning
from retcon.methods.common.locate_then_edit import SearchSettings
from retcon.methods.common.tuning import TuningSettings

N_TRIED = 8
"""Edits that clamps are fitted on; `every_kth` says which."""
ENOUGH = 0.5
"""Share of them that has to reach its target."""
MAX_FACTOR = 32.0
"""Clamps are doubled up to this factor: embedded models want 6 to 16 times what models of 6B parameters want."""
N_ASKED = 16
"""Edits whose gradients a layer is chosen by."""
N_TRIED_TOGETHER = 64
"""Edits of one batch that a learning rate is fitted on, at most."""
MAX_RATE_FACTOR = 64.0
"""Learning rates are doubled up to this factor."""
NO_WIDER = "wider clamps did not help"
"""What a note says where doubling them stopped short of half of the edits."""
REACHED = 0.9
"""Mean target probability in the search that counts as reached, also where the search goes on for a small loss."""


@dataclass(frozen=True)
class FittedClamps:
    """How far the clamps of a method were doubled, and what that was decided by."""

    factor: float
    n_reached: int
    """Of the edits tried, those that reached their target with it."""
    n_tried: int
    clamps: dict[str, Any]
    """The settings' values with the factor."""

    def __str__(self) -> str:
        shown = ", ".join(f"{name} = {value:g}" for name, value in self.clamps.items())
        tried = f"{self.n_reached} of {self.n_tried} edits tried reach their target"
        rest = "" if self.n_reached >= ENOUGH * self.n_tried else f"; {NO_WIDER}"
        return f"{shown}: {self.factor:g} times the default, with which {tried}{rest}"


@dataclass(frozen=True)
class FittedStep:
    """The learning rate of a method that trains weights, and what it was decided by."""

    learning_rate: float
    n_reached: int
    """Of the edits tried, those whose loss fell below `stop_loss` with it."""
    n_tried: int

    def __str__(self) -> str:
        tried = f"{self.n_reached} of {self.n_tried} edits tried reach their loss with it"
        return f"learning_rate = {self.learning_rate:g}: doubled until half of the edits do; {tried}"


@dataclass(frozen=True)
class FittedLayer:
    """The layer that a method trains, and what it was decided by."""

    layer: int
    of: Transfer

    def __str__(self) -> str:
        ratio = float(self.of.ratio[self.of.layers.index(self.layer)])
        return (
            f"layers = {self.layer}: a step there does {ratio:.2g} times as much for its fact after other text as to "
            "other facts, the most of all layers"
        )


def shape_notes(method: type[Method], shape: ModelShape, guess: dict[str, Any]) -> list[str]:
    """Say what was taken from a model's shape and why, a line per reason."""
    weights = {name: value for name, value in guess.items() if name.endswith("moment_weight")}
    layers = {name: value for name, value in guess.items() if isinstance(value, tuple) or name == "layer"}
    rest = {name: value for name, value in guess.items() if name not in weights and name not in layers}
    notes = []
    if layers:
        shown = ", ".join(
            f"{name} = {span(value if isinstance(value, tuple) else (value,))}" for name, value in layers.items()
        )
        notes.append(f"{shown}: by relative depth, {shape.n_layers} layers")
    if weights:
        shown = ", ".join(f"{name} = {value:g} ({value / shape.d_ff:.2g} m)" for name, value in weights.items())
        notes.append(f"{shown}: in proportion to the key width, m = {shape.d_ff:,}")
    if rest:
        notes.append(", ".join(f"{name} = {value}" for name, value in rest.items()) + ": for models without a preset")
    return notes


def edits_of(cases: Iterable[Edit | Case]) -> list[Edit]:
    """Return the edits of `cases`, each of which is a case or an edit.

    Raises:
        InvalidEdit: one in place of several, or something that is neither.
    """
    return [edit for case in list_of(cases, Edit, Case) for edit in (case.edits if isinstance(case, Case) else (case,))]


def clamp_settings(method: type[Method]) -> list[str]:
    """Return the names of the clamps of a method that searches values; none of another."""
    if not issubclass(method, SearchSettings):
        return []
    return [f.name for f in fields(method) if f.name == "clamp" or f.name.endswith("_clamp")]


def fit_learning_rate(
    lm: LM, method: TuningSettings, edits: Sequence[Edit], *, at_once: int | None = None, seed: int = 0
) -> FittedStep:
    """Double the learning rate until at least half of the edits tried reach their loss, and no further.

    How far a step goes depends on how many weights are trained, how large they are and how many edits share them: one
    rate moves nothing in one model and breaks another, and too large a rate costs locality. Where many are written
    together, it begins with the rate that a few of them need: these are tried in a moment, and never needed more in
    what was tried. In mini-batches each edit has steps of its own, and a few are all that is tried.

    Args:
        method: of masked tuning (`TuningSettings`); its learning rate is the smallest that is tried.
        edits: those of `tried_batches` are written and nothing of that is kept.
        at_once: edits that will be written together; None: all.
    """
    together = at_once or len(edits)
    if (method.schedule(together).batch_size or together) < together:
        at_once = N_TRIED
    batches = tried_batches(edits, at_once)
    n_tried = sum(map(len, batches))
    rate, highest = method.learning_rate, MAX_RATE_FACTOR * method.learning_rate
    if any(len(batch) > N_TRIED for batch in batches):
        rate = fit_learning_rate(lm, method, every_kth(edits, N_TRIED), seed=seed).learning_rate
    states: list[State | None] = [None] * len(batches)
    best = FittedStep(rate, 0, n_tried)
    while n_tried:
        here = replace(method, learning_rate=rate)
        deltas = [here.propose(lm, batch, state=of, seed=seed) for batch, of in zip(batches, states, strict=True)]
        n_reached = sum(r.stopped == "reached" for delta in deltas for r in delta.report)
        falls = n_reached < best.n_reached  # so large a step spoils what smaller ones reach
        if n_reached > best.n_reached or rate == best.learning_rate:
            best = FittedStep(rate, n_reached, n_tried)
        if n_reached >= ENOUGH * n_tried or falls or rate >= highest:
            break
        method, states, rate = method.for_next_try(), [delta.state for delta in deltas], 2 * rate
    return best


def fit_layer(lm: LM, method: FineTuning, edits: Sequence[Edit], *, at_once: int | None = None) -> FittedLayer | None:
    """Return the layer at which a first step on a fact stays with the fact; None where no other fact says.

    No depth suits all models: what was found by search is a sixth of SmolLM2's and three quarters of a small GPT-J's.
    The first layer is left out where edits are written together: it sees a token by itself, and facts that share one
    share its change.

    Args:
        edits: of which `N_ASKED` are asked; the others' prompts are those that shall not change.
        at_once: edits that will be written together; None: all.
    """
    kinds = [kind for kind in method.modules if kind != "block"] or ["down_proj"]
    first = int((at_once or len(edits)) > 1)
    by_layer = [lm.sites(layer, kinds[0]) for layer in range(lm.n_layers)]
    sites = [of[0] for of in by_layer[first:] if len(of) == 1]
    if len(sites) < 2:
        return None
    located = [edit for edit in edits if edit.subject is None or edit.subject_span is not None]
    found = transfer(lm, every_kth(located, N_ASKED), located, default_contexts(lm, 0), sites)
    return None if found is None else FittedLayer(found.best(), found)


def tried_batches(edits: Sequence[Edit], at_once: int | None) -> list[list[Edit]]:
    """Return batches of every kth edit (`every_kth`), of the size that will be written and `N_TRIED_TOGETHER` at most.

    As many as `N_TRIED` edits need: a method that writes one fact at a time is tried on eight of them.
    """
    size = min(at_once or len(edits), len(edits), N_TRIED_TOGETHER)
    if not size:
        return []
    n_batches = min(-(-N_TRIED // size), len(edits) // size)
    tried = every_kth(edits, n_batches * size)
    return [tried[first : first + size] for first in range(0, len(tried), size)]


def every_kth(edits: Sequence[Edit], n: int) -> list[Edit]:
    """Return every kth edit from the first on, `n` at most; with k = 1 the first n, as of fewer than 2 n."""
    return list(edits[:: max(1, len(edits) // n)])[:n]


def fit_clamps(lm: LM, method: SearchSettings, edits: Sequence[Edit], names: Sequence[str]) -> FittedClamps:
    """Double the clamps `names` of a method until at least half of a few of the edits reach their target.

    Only values that are written are searched: what PMET's attention contributes to a search is lost in the write.
    Stops earlier where fewer edits end on their clamp than would be needed: then steps or layers hold them back.

    Args:
        edits: at most `N_TRIED` of them are searched, on the weights as they are.
    """
    tried = every_kth([edit for edit in edits if edit.subject_span is not None], N_TRIED)
    contexts = method.sampled_contexts(lm, 0)
    best: FittedClamps | None = None
    factor = 1.0
    while tried:
        clamps = {name: factor * method.settings[name] for name in names}
        here = replace(method.searching_what_is_written(), **clamps)
        report = search_values(lm, tried, here.value_sites(lm), contexts, here.value_search()).report
        n_reached = sum(r.stopped == "reached" or r.search_probability >= REACHED for r in report)
        if best is None or n_reached > best.n_reached:
            best = FittedClamps(factor, n_reached, len(tried), clamps)
        n_clamped = sum(r.stopped == "clamped" for r in report)
        if n_reached >= ENOUGH * len(tried) or n_reached + n_clamped < ENOUGH * len(tried) or factor >= MAX_FACTOR:
            break
        factor *= 2
    return best or FittedClamps(1.0, 0, 0, {name: method.settings[name] for name in names})
