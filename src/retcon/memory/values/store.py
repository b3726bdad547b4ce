"""Values on disk, so that a run that was killed goes on where it was, with the identical result.

With a `ValueCache`, every finished chunk of a search is written down, under a key of everything that determines it, and
a chunk that takes long is written down on its way. A later search with the same key takes over plan and chunks, goes on
in the middle of those that were begun, and does the rest.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retcon import shared_cache
from retcon.checked import Kind, cached, keep, read_checked, under, write_checked
from retcon.delta import EditReport
from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.lm.tokenizer import chat_hash
from retcon.memory.contexts import Contexts
from retcon.memory.values.objective import ValueOf, Values, ValueSearch, ValueSite
from retcon.memory.values.plan import ChunkPlan, SearchPlan
from retcon.memory.values.schedule import Snapshot
from retcon.memory.values.state import SearchState

VALUES = Kind("searched values", format=3, computation=2)
BEGUN = Kind("a search that was begun", format=1, computation=VALUES.computation)
KEEP_SECONDS = 45.0
"""Between two savings of a chunk that is being searched, at most, steps that take longer aside."""
KEEP_EDITS = 32
"""Edits found between two savings, at most."""
KNOWN = Kind("values by edit", format=1, computation=1)
PARTS = ("init", "offset", "activation")
"""What a file has of each site."""


@dataclass
class ValueCache:
    """Values on disk: searches that are handed this write down what they have finished, and go on where one was killed.

    Call `discard()` once the delta is saved, or the folder keeps growing.
    """

    folder: str | Path
    used: list[Path] = field(default_factory=list)
    """Folders of the searches made with it."""
    resumed: int = 0
    """Edits whose values were found there."""
    known: "KnownValues | None" = None
    """Values by edit, whatever batch they were searched in; None: each batch is searched whole."""

    def discard(self) -> None:
        """Remove them: their result is safe elsewhere."""
        for path in self.used:
            shutil.rmtree(path, ignore_errors=True)
            shared_cache.remove(path)
        self.used.clear()


@dataclass
class KnownValues:
    """Values by edit, so that a batch can be written again, less one edit or with another, without a new search.

    A search looks its edits up here and runs for the others alone, whose values join. Values count as known for the
    same edit, sites, contexts and settings, whatever deltas were applied before the proposal began: a batch that stays
    in force on other predecessors keeps its values too. What was searched inside the proposal, on weights that it had
    written itself, is known only for the same writes.
    """

    n_before: int = 0
    """Deltas applied before the proposal began."""
    found: dict[str, ValueOf] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    """Keys that were looked up and are of use for the batch as it is now."""
    searched: int = 0
    """Edits that had to be searched."""

    def complete(
        self,
        lm: LM,
        edits: Sequence[Edit],
        sites: Sequence[ValueSite],
        contexts: Contexts,
        search: ValueSearch,
        run: "Callable[[Sequence[Edit]], Values]",
    ) -> tuple[list[ValueOf], dict[str, Any]]:
        """Return the values of all edits and how the search for the unknown ones was cut up; `run` searches those."""
        on = [delta.id for delta in lm.applied][self.n_before :]
        common = {**_key_of(lm, sites, contexts, search), "on": on}
        keys = [_digest({**common, "edit": asdict(edit)}) for edit in edits]
        missing = [i for i, key in enumerate(keys) if key not in self.found]
        plan: dict[str, Any] = {}
        if missing:
            values = run([edits[i] for i in missing])
            plan = dict(values.plan)
            self.found |= zip((keys[i] for i in missing), values.each(), strict=True)
        self.searched += len(missing)
        self.used.extend(keys)
        return [self.found[key] for key in keys], plan

    def save(self, path: str | Path) -> None:
        """Write the values that are of use for the batch as it is now."""
        keys = list(dict.fromkeys(self.used))
        values = [self.found[key] for key in keys]
        tensors: dict[str, Tensor] = {}
        for n in sorted({len(v.init) for v in values}):
            same, _ = _as_file([v for v in values if len(v.init) == n])
            tensors |= {f"{n}.{name}": x for name, x in same.items()}
        about = {"keys": keys, "sites": [len(v.init) for v in values], "reports": [asdict(v.report) for v in values]}
        write_checked(path, KNOWN, {}, tensors, about)

    @classmethod
    def load(cls, path: str | Path, n_before: int) -> "KnownValues":
        """Read what `save` wrote.

        Raises:
            MalformedFile: damaged, or of another version.
            FileNotFoundError: it is not there.
        """
        tensors, about = read_checked(path, KNOWN, {})
        place = dict.fromkeys(about["sites"], 0)
        found = {}
        for key, n, report in zip(about["keys"], about["sites"], about["reports"], strict=True):
            found[key] = _value_of(tensors, f"{n}.", n, place[n], report)
            place[n] += 1
        return cls(n_before, found)


def _key_of(lm: LM, sites: Sequence[ValueSite], contexts: Contexts, search: ValueSearch) -> dict[str, Any]:
    """Return what determines the values of an edit, whatever is applied."""
    return {
        "model": lm.fingerprint(),
        "tokenizer": chat_hash(lm.tokenizer),
        "dtype": str(lm.dtype),
        "sites": [asdict(s) for s in sites],
        "contexts": contexts.prefixes,
        "search": asdict(search),
    }


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


class ValueStore:
    """The folder of one search."""

    def __init__(self, path: Path, cache: ValueCache, key: dict[str, Any]) -> None:
        self.path, self.cache, self.key = path, cache, key

    @classmethod
    def of(
        cls,
        cache: ValueCache,
        lm: LM,
        edits: Sequence[Edit],
        sites: Sequence[ValueSite],
        contexts: Contexts,
        search: ValueSearch,
        *,
        plainly: bool = False,
    ) -> "ValueStore":
        """Return the store of this search.

        Args:
            plainly: each edit is searched by itself, by the reference.
        """
        key = {
            **_key_of(lm, sites, contexts, search),
            "applied": [d.id for d in lm.applied],
            "device": lm.device.type,
            "threads": torch.get_num_threads(),
            "torch": ".".join(torch.__version__.split(".")[:2]),
            "transformers": version("transformers"),
            "edits": [asdict(e) for e in edits],
            "plainly": plainly,
        }
        path = Path(cache.folder) / _digest(key)
        cache.used.append(path)
        return cls(path, cache, key)

    def plan(self, make: Callable[[], SearchPlan]) -> SearchPlan:
        """Return the plan of the run that is continued, or the one that `make()` gives, written down."""
        found = cached(self.path / "plan.safetensors", VALUES, self.key)
        if found is not None:
            return SearchPlan.from_json(found[1])
        plan = make()
        self.change_plan(plan)
        return plan

    def change_plan(self, plan: SearchPlan) -> None:
        """Put a plan in the place of the one there is."""
        keep(self.path / "plan.safetensors", VALUES, self.key, about=plan.as_json())

    def load(self, chunk: ChunkPlan) -> dict[int, ValueOf] | None:
        """Return what was found for a chunk's edits, or None if it has yet to be run."""
        kept = cached(self._file(chunk), VALUES, self._identity(chunk))
        if kept is None:
            return None
        found = dict(zip(chunk.edits, _values_of(*kept), strict=True))
        self.cache.resumed += len(found)
        return found

    def save(self, chunk: ChunkPlan, found: dict[int, ValueOf]) -> None:
        """Write down what was found for a chunk's edits."""
        tensors, about = _as_file([found[edit] for edit in chunk.edits])
        keep(self._file(chunk), VALUES, self._identity(chunk), tensors, about)
        begun = Path(self.begun(chunk).path)
        with suppress(OSError):
            begun.unlink(missing_ok=True)
        shared_cache.remove(begun)

    def begun(self, chunk: ChunkPlan) -> "BegunChunk":
        """Return where a chunk is kept that is being searched."""
        with suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
        return BegunChunk(f"{self._file(chunk).with_suffix('')}.begun", self._identity(chunk))

    def _identity(self, chunk: ChunkPlan) -> dict[str, Any]:
        return self.key | {"chunk": asdict(chunk)}

    def _file(self, chunk: ChunkPlan) -> Path:
        name = hashlib.sha256(json.dumps(asdict(chunk)).encode()).hexdigest()[:16]
        return self.path / f"{name}.safetensors"


@dataclass
class BegunChunk:
    """A chunk on disk that is being searched, as whoever searches it writes it; that may be another process."""

    path: str
    identity: dict[str, Any]
    n_kept: int = 0
    """Edits found when it was last written."""
    n_resumed: int = 0
    """Edits that an earlier search had found."""
    kept_at: float = field(default_factory=time.monotonic)
    """When that was."""

    def load(self, lm: LM, sites: Sequence[ValueSite], search: ValueSearch) -> Snapshot | None:
        """Return where an earlier search of the chunk was, or None."""
        self.kept_at = time.monotonic()
        found = cached(self.path, BEGUN, self.identity)
        if found is None:
            return None
        tensors, about = found
        values = _values_of(tensors, about["found"]) if about["places"] else []
        self.n_kept = self.n_resumed = len(values)
        return Snapshot(
            dict(zip(about["places"], values, strict=True)),
            about["active"],
            about["made"],
            about["waiting"],
            about["fresh"],
            SearchState.from_tensors(lm, sites, under("state.", tensors), search),
        )

    def save_if_due(self, n_found: int, snapshot: Callable[[], Snapshot]) -> None:
        """Write a snapshot down, where enough has happened since the last one.

        Nothing is written where the search's folder is not to be seen (a worker on another machine).
        """
        if n_found - self.n_kept < KEEP_EDITS and time.monotonic() - self.kept_at < KEEP_SECONDS:
            return
        self.n_kept, self.kept_at = n_found, time.monotonic()
        if not Path(self.path).parent.is_dir():
            return
        now = snapshot()
        tensors, about = _as_file(list(now.found.values())) if now.found else ({}, {})
        tensors |= {f"state.{name}": x for name, x in now.state.tensors().items()}
        schedule = {"active": now.active, "made": now.made, "waiting": now.waiting, "fresh": now.fresh}
        keep(self.path, BEGUN, self.identity, tensors, {"places": list(now.found), "found": about, **schedule})


def _as_file(values: Sequence[ValueOf]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return values of edits that have the same sites as the content of a file."""
    n_sites = len(values[0].init)
    tensors = {
        f"{name}.{s}": torch.stack([getattr(v, name)[s] for v in values]) for name in PARTS for s in range(n_sites)
    }
    return tensors, {"reports": [asdict(v.report) for v in values], "sites": n_sites}


def _values_of(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> list[ValueOf]:
    """Return the values in a file."""
    return [_value_of(tensors, "", about["sites"], j, report) for j, report in enumerate(about["reports"])]


def _value_of(
    tensors: Mapping[str, Tensor], prefix: str, n_sites: int, place: int, report: Mapping[str, Any]
) -> ValueOf:
    init, offset, activation = (
        tuple(tensors[f"{prefix}{name}.{s}"][place].clone() for s in range(n_sites)) for name in PARTS
    )
    return ValueOf(init, offset, activation, EditReport(**report))
