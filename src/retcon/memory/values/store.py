"""Values on disk, so that a run that was killed goes on where it was, with the identical result.

Inside a `keeping_values(folder)` scope every finished chunk of a search is written down, under a key of everything that
determines it. A later search with the same key takes over plan and chunks and does the rest.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from retcon.delta import EditReport
from retcon.edits import Edit
from retcon.files import write_atomically
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.values.chunk import ValueOf
from retcon.memory.values.objective import ValueSearch, ValueSite
from retcon.memory.values.plan import ChunkPlan, Plan

FORMAT = "retcon-values-1"


@dataclass
class Kept:
    """What a `keeping_values` scope has on disk."""

    folder: Path
    used: list[Path] = field(default_factory=list)
    """Folders of the searches made in the scope."""
    resumed: int = 0
    """Edits whose values were found there."""

    def discard(self) -> None:
        """Remove them: their result is safe elsewhere."""
        for path in self.used:
            shutil.rmtree(path, ignore_errors=True)
        self.used.clear()


_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


@contextmanager
def keeping_values(folder: str | Path) -> Iterator[Kept]:
    """Value searches in this scope write down what they have finished, and take up what an earlier run left.

    Call `discard()` on what it gives once the delta is saved, or the folder keeps growing.
    """
    kept = Kept(Path(folder))
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


class ValueStore:
    """The folder of one search."""

    def __init__(self, path: Path, kept: Kept) -> None:
        self.path, self.kept = path, kept

    @classmethod
    def of(
        cls,
        lm: LM,
        edits: Sequence[Edit],
        sites: Sequence[ValueSite],
        contexts: Contexts,
        search: ValueSearch,
    ) -> "ValueStore | None":
        """The store of this search, or None outside `keeping_values`."""
        kept = _kept.get()
        if kept is None:
            return None
        key = {
            "format": FORMAT,
            "model": lm.fingerprint(),
            "live": [d.id for d in lm.applied],
            "device": lm.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "edits": [asdict(e) for e in edits],
            "sites": [asdict(s) for s in sites],
            "contexts": contexts.prefixes,
            "search": asdict(search),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        path = kept.folder / digest
        path.mkdir(parents=True, exist_ok=True)
        kept.used.append(path)
        return cls(path, kept)

    def plan(self, make: Callable[[], Plan]) -> Plan:
        """The plan of the run that is continued, or the one that `make()` gives, written down."""
        try:
            return Plan.from_json(json.loads((self.path / "plan.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            plan = make()
            self.change_plan(plan)
            return plan

    def change_plan(self, plan: Plan) -> None:
        """Put a plan in the place of the one there is."""
        write_atomically(self.path / "plan.json", json.dumps(plan.as_json()).encode())

    def load(self, chunk: ChunkPlan) -> dict[int, ValueOf] | None:
        """What was found for a chunk's edits, or None if it has yet to be run."""
        try:
            with safe_open(self._file(chunk), framework="pt") as file:
                record = file.metadata() or {}
                reports, n_sites = json.loads(record["reports"]), int(record["sites"])
                parts = {
                    name: [file.get_tensor(f"{name}.{s}") for s in range(n_sites)] for name in ("init", "delta", "live")
                }
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        found = {}
        for j, (edit, report) in enumerate(zip(chunk.edits, reports, strict=True)):
            init, delta, live = (tuple(x[j] for x in parts[name]) for name in ("init", "delta", "live"))
            found[edit] = ValueOf(init, delta, live, EditReport(**report))
        self.kept.resumed += len(found)
        return found

    def save(self, chunk: ChunkPlan, found: dict[int, ValueOf]) -> None:
        """Write down what was found for a chunk's edits."""
        values = [found[edit] for edit in chunk.edits]
        n_sites = len(values[0].init)
        tensors = {
            f"{name}.{s}": torch.stack([getattr(v, name)[s] for v in values])
            for name in ("init", "delta", "live")
            for s in range(n_sites)
        }
        reports = json.dumps([asdict(v.report) for v in values])
        write_atomically(self._file(chunk), save(tensors, metadata={"reports": reports, "sites": str(n_sites)}))

    def _file(self, chunk: ChunkPlan) -> Path:
        name = hashlib.sha256(json.dumps(asdict(chunk)).encode()).hexdigest()[:16]
        return self.path / f"{name}.safetensors"
