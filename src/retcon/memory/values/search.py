"""The fast value search: many edits at once, and of each only the layers and tokens that its vectors can change.

An edit's rows are recorded once (`lm/replay/`). Every step then replays them from the lowest site on, with gradients
to the vectors alone. Edits are sorted by length and cut into chunks; of a chunk, `max_active` edits are active at a
time, and as one ends the next takes its place. Edits do not affect each other: the result is that of `reference.py`.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from retcon.edits import Edit
from retcon.errors import OutOfMemory, RetconWarning
from retcon.lm.batches import is_out_of_memory, release_memory
from retcon.lm.capacity import free_bytes
from retcon.lm.forward import adding, answer_places, input_rows, logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import pad
from retcon.memory.contexts import Contexts
from retcon.memory.values.objective import ValueOf, Values, ValueSearch, ValueSite
from retcon.memory.values.plan import ChunkPlan, SearchPlan, needed_bytes, plan_search
from retcon.memory.values.reference import search_values_reference
from retcon.memory.values.rows import EditRows
from retcon.memory.values.schedule import Chunk, keep_nothing
from retcon.memory.values.store import BegunChunk, ValueCache, ValueStore
from retcon.work import silent


def search_values(
    lm: LM,
    edits: Sequence[Edit],
    sites: Sequence[ValueSite],
    contexts: Contexts,
    search: ValueSearch,
    *,
    progress: Callable[[int], None] = silent,
    plan: SearchPlan | None = None,
    cache: ValueCache | None = None,
) -> Values:
    """Search the values of every edit on the weights as they are now.

    Args:
        progress: called with how many edits are done.
        plan: how to cut the edits up; made from the model and the edits by default.
        cache: where finished chunks are kept on disk.

    Raises:
        NonFinite: a loss came out NaN or infinite; the message names the edit.
        OutOfMemory: a chunk does not fit, and `search.shrink` does not allow a smaller one; or not even one edit fits.
    """
    known = None if cache is None else cache.known
    if known is not None:

        def search_others(rest: Sequence[Edit]) -> Values:
            return _search(lm, rest, sites, contexts, search, progress, plan, cache)

        return Values.of(*known.complete(lm, edits, sites, contexts, search, search_others))
    return _search(lm, edits, sites, contexts, search, progress, plan, cache)


def _search(
    lm: LM,
    edits: Sequence[Edit],
    sites: Sequence[ValueSite],
    contexts: Contexts,
    search: ValueSearch,
    progress: Callable[[int], None],
    plan: SearchPlan | None,
    cache: ValueCache | None,
) -> Values:
    with lm.frozen_eval():
        rows = [EditRows.of(lm, edit, sites, contexts, search) for edit in edits]
        if not edits or lm.layout.earlier == "other" or not replays(lm, rows[0], sites, search):
            return _search_plainly(lm, edits, sites, contexts, search, progress, cache)
        store = None if cache is None else ValueStore.of(cache, lm, edits, sites, contexts, search)
        plan = plan or (store.plan(lambda: plan_search(lm, rows, sites)) if store else plan_search(lm, rows, sites))
        found: dict[int, ValueOf] = {}
        for chunk in plan.chunks:
            if store and (kept := store.load(chunk)) is not None:
                found |= kept
                progress(len(found))

        def report(n: int) -> None:
            progress(len(found) + n)

        work = SearchOfChunk(tuple(sites), search)
        while waiting := [chunk for chunk in plan.chunks if chunk.edits[0] not in found]:
            pieces: list[ChunkPiece] = [
                (chunk.max_active, tuple(rows[i] for i in chunk.edits), store.begun(chunk) if store else None)
                for chunk in waiting
            ]
            for place, done in lm.workers.map(lm, work, pieces, report):
                chunk = waiting[place]
                if done is None:
                    plan = _with_less_memory(plan, chunk, edits, search)
                    if store:
                        store.change_plan(plan)
                    continue
                searched, n_resumed = done
                values = dict(zip(chunk.edits, searched, strict=True))
                if store:
                    store.save(chunk, values)
                    store.cache.resumed += n_resumed
                found |= values
                progress(len(found))
    return Values.of([found[i] for i in range(len(edits))], plan.summary())


def _search_plainly(
    lm: LM,
    edits: Sequence[Edit],
    sites: Sequence[ValueSite],
    contexts: Contexts,
    search: ValueSearch,
    progress: Callable[[int], None],
    cache: ValueCache | None,
) -> Values:
    """Search edit by edit as `reference.py` does, and keep each in the cache once it is found."""
    if cache is None or not edits:
        return search_values_reference(lm, edits, sites, contexts, search, progress=progress)
    store = ValueStore.of(cache, lm, edits, sites, contexts, search, plainly=True)
    found: list[ValueOf] = []
    for i, edit in enumerate(edits):
        alone = ChunkPlan((i,), 1)
        if (kept := store.load(alone)) is None:
            kept = {i: search_values_reference(lm, [edit], sites, contexts, search).each()[0]}
            store.save(alone, kept)
        found.append(kept[i])
        progress(len(found))
    return Values.of(found)


ChunkPiece = tuple[int, tuple[EditRows, ...], BegunChunk | None]
"""How many edits are active at a time, the edits' rows, and where an unfinished search of the chunk is kept."""


@dataclass(frozen=True)
class SearchOfChunk:
    """The search of one chunk, as work that can be sent elsewhere."""

    sites: tuple[ValueSite, ...]
    search: ValueSearch

    def __call__(self, lm: LM, piece: ChunkPiece, progress: Callable[[int], None]) -> tuple[list[ValueOf], int] | None:
        """Return what was found for each edit, and for how many of them by an earlier search; None: memory ran out."""
        max_active, rows, begun = piece
        start = None if begun is None else begun.load(lm, self.sites, self.search)
        on_ended = keep_nothing if begun is None else begun.save_if_due
        short = needed_bytes(lm, rows, self.sites, max_active) > free_bytes(lm.device)
        for offload in (True,) if short else (False, True):
            if offload:
                _say_offloading(max_active)
            try:
                with lm.frozen_eval():
                    chunk = Chunk(lm, rows, self.sites, self.search, offload)
                    for _ in chunk.run(max_active, start=start, on_ended=on_ended):
                        progress(len(chunk.found))
                    n_resumed = 0 if begun is None else begun.n_resumed
                    return [chunk.found[j] for j in range(len(rows))], n_resumed
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            release_memory()
        return None


def _say_offloading(max_active: int) -> None:
    warnings.warn(
        f"memory is short for {max_active} edits at a time: what a step leaves for its backward pass is kept outside, "
        "which takes longer and changes no bit",
        RetconWarning,
        stacklevel=4,
    )


def _with_less_memory(plan: SearchPlan, chunk: ChunkPlan, edits: Sequence[Edit], search: ValueSearch) -> SearchPlan:
    """Return the plan to go on with after a chunk ran out of memory.

    Raises:
        OutOfMemory: it was one edit alone, or `search.shrink` allows no other plan.
    """
    release_memory()
    smaller = plan.split_after_oom(chunk)
    if smaller is None:
        raise OutOfMemory(_alone(edits[chunk.edits[0]]))
    if not search.shrink:
        raise OutOfMemory(
            f"memory ran out with {chunk.max_active} edits active of a chunk of {len(chunk.edits)}. Free some memory "
            "and run again (finished edits are found again), or allow a smaller cut with shrink=True "
            "(--shrink); the delta then differs in its last bits from the one that another run would give"
        )
    warnings.warn(
        f"memory ran out with {chunk.max_active} edits active of {len(chunk.edits)}; going on with a smaller cut, as "
        "shrink allows: this delta is another one, in its last bits, than a run with enough memory gives (its record "
        "says so)",
        RetconWarning,
        stacklevel=4,
    )
    return smaller


def _alone(edit: Edit) -> str:
    return (
        f"edit {edit.id!r} ({edit.subject!r}) does not fit into memory even alone; load the model in bfloat16, use "
        "fewer contexts, or a device with more memory"
    )


REPLAYS: WeakKeyDictionary[LM, dict[Hashable, bool]] = WeakKeyDictionary()
"""Whether a replay gave what a plain forward pass gives, for every model, its weights and dtype, and sites tried."""


def replays(lm: LM, rows: EditRows, sites: Sequence[ValueSite], search: ValueSearch) -> bool:
    """Return whether a replay of this edit's rows gives the logits of a plain forward pass; tried once per model and
    sites, and again where something else has changed the model's weights or dtype.

    The same random vectors are added in both, half as long as the activations they are added to.
    """
    hooked = (attached.id for attached in lm.applied if attached.hooks())  # they may act otherwise in a replay
    key = (lm.fingerprint(), lm.dtype, *(s.point for s in sites), *hooked)
    tried = REPLAYS.setdefault(lm, {})
    if key not in tried:
        problem = _replay_problem(lm, rows, sites, search)
        tried[key] = problem is None
        if problem is not None:
            warnings.warn(
                f"{lm.name!r} cannot be replayed from {min(s.point for s in sites)} on ({problem}); values are "
                "searched the plain way, several times slower",
                RetconWarning,
                stacklevel=3,
            )
    return tried[key]


TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Root mean square of the difference over the logits' standard deviation; a wrong mask or position gives about 1.
That of float64 is wide, since some architectures compute their attention in float32."""


def _replay_problem(lm: LM, rows: EditRows, sites: Sequence[ValueSite], search: ValueSearch) -> str | None:
    """Return why these rows cannot be replayed; None where they can."""
    if len({s.point for s in sites}) < len(sites):
        return "two sites share a point"
    try:
        chunk = Chunk(lm, [rows], sites, search)
        now = chunk.activate([0])
        generator = torch.Generator().manual_seed(0)
        vectors = [
            torch.nn.functional.normalize(torch.randn(x.shape, generator=generator)).to(x) for x in now.state.activation
        ]
        with torch.no_grad():
            chunk.logits(now, [torch.zeros_like(x) for x in now.state.offset])
            vectors = [0.5 * x.norm() * unit for x, unit in zip(now.state.activation, vectors, strict=True)]
            replayed = chunk.logits(now, vectors)[0]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        if is_out_of_memory(error):  # says nothing about replays, and what is done must not depend on it
            raise OutOfMemory(_alone(rows.edit)) from None
        return f"{type(error).__name__}: {error}"
    texts = rows.rewriting
    everyone = torch.arange(len(texts))
    hooks = {
        site.point: adding(
            everyone, torch.tensor([r.position(site.where) for r in texts]), vector.expand(len(texts), -1)
        )
        for site, vector in zip(sites, vectors, strict=True)
    }
    with torch.no_grad():
        plain = logits_at(lm, pad(input_rows(texts), lm.device), answer_places(texts), hooks)
    plain, replayed = plain.double(), replayed.double()
    if not plain.isfinite().all():
        return None  # nothing to compare; the search will say which edit it is
    off = float((plain - replayed).pow(2).mean().sqrt() / plain.std())
    return None if off <= TOLERANCE[lm.dtype] else f"its logits differ from those of a plain forward pass by {off:.1%}"
