"""How a value search is cut up: which edits share frozen parts, and how many of them are active at a time.

The plan follows from the model, the edits and the kind of device, never from what memory happens to be free: the cut of
a batch decides the last bits of its values. It is recorded, and a run that continues another takes over its plan. Where
a chunk does not fit, what its steps leave for their backward passes is put out of the way, which changes no bit.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from retcon.lm.capacity import key_width, planned_bytes
from retcon.lm.model import LM
from retcon.memory.values.objective import ValueSite
from retcon.memory.values.rows import EditRows, active_part

TOKENS_AT_ONCE = {"cpu": 768}
"""Live tokens of a step that fill the device; more brings no speed."""
TOKENS_AT_ONCE_ON_AN_ACCELERATOR = 16384
CHUNK_WIDTHS = 8
"""A chunk is at most this many times as long as the number of active edits: long enough that its end costs little,
short enough that what it holds does not grow with the number of edits."""
MAX_EDITS = {"cpu": 32}
"""Edits of a chunk at most, since finished chunks are what a run that was killed finds again."""
MAX_EDITS_ON_AN_ACCELERATOR = 512
SHARE_OF_MEMORY = {"frozen": 0.2, "steps": 0.35}
"""Of what is planned with (`lm.capacity.planned_bytes`)."""


@dataclass(frozen=True)
class ChunkPlan:
    """Edits whose frozen parts are held at once."""

    edits: tuple[int, ...]
    """In the order in which they are activated."""
    max_active: int
    """How many are active at a time."""

    def smaller(self) -> list["ChunkPlan"] | None:
        """Return what to try when this ran out of memory: half as many active, then half the edits; None: nothing."""
        if self.max_active > 1:
            return [replace(self, max_active=self.max_active // 2)]
        if len(self.edits) > 1:
            half = len(self.edits) // 2
            return [replace(self, edits=self.edits[:half]), replace(self, edits=self.edits[half:])]
        return None


@dataclass(frozen=True)
class SearchPlan:
    """Chunks in the order in which they are run."""

    chunks: tuple[ChunkPlan, ...]
    oom_retries: int = 0
    """How often memory ran out and the plan was changed."""

    def split_after_oom(self, chunk: ChunkPlan) -> "SearchPlan | None":
        """Return the plan with something smaller in that chunk's place; None: there is nothing smaller."""
        smaller = chunk.smaller()
        if smaller is None:
            return None
        at = self.chunks.index(chunk)
        return SearchPlan((*self.chunks[:at], *smaller, *self.chunks[at + 1 :]), self.oom_retries + 1)

    def summary(self) -> dict[str, Any]:
        """Return the plan for a run's record."""
        return {"chunks": [[len(c.edits), c.max_active] for c in self.chunks], "oom_retries": self.oom_retries}

    def as_json(self) -> dict[str, Any]:
        """Return the plan for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SearchPlan":
        """Return the plan that `as_json` gave."""
        chunks = tuple(ChunkPlan(tuple(c["edits"]), int(c["max_active"])) for c in data["chunks"])
        return cls(chunks, int(data["oom_retries"]))


def plan_search(
    lm: LM, rows: Sequence[EditRows], sites: Sequence[ValueSite], *, memory: int | None = None
) -> SearchPlan:
    """Sort the edits by length and cut them into chunks that fit.

    Args:
        memory: bytes to plan with.
    """
    memory = planned_bytes(lm) if memory is None else memory
    most = MAX_EDITS.get(lm.device.type, MAX_EDITS_ON_AN_ACCELERATOR)
    cost = CostPerEdit(lm, sites)
    order = sorted(range(len(rows)), key=lambda i: (rows[i].columns, max(rows[i].starts), i))
    at_once = TOKENS_AT_ONCE.get(lm.device.type, TOKENS_AT_ONCE_ON_AN_ACCELERATOR)
    chunks: list[ChunkPlan] = []
    while order:
        n, frozen = 0, 0
        for i in order:
            frozen += cost.frozen_bytes(rows[i])
            longest = min(most, CHUNK_WIDTHS * max(1, at_once // cost.active_tokens(rows[i])))
            if n and (n >= longest or frozen > SHARE_OF_MEMORY["frozen"] * memory):
                break
            n += 1
        taken, order = order[:n], order[n:]
        last = rows[taken[-1]]  # the longest
        room = int(SHARE_OF_MEMORY["steps"] * memory / cost.step_bytes(last))
        max_active = max(1, min(at_once // cost.active_tokens(last), room, n))
        chunks.append(ChunkPlan(tuple(taken), max_active))
    return SearchPlan(tuple(chunks))


def needed_bytes(lm: LM, rows: Sequence[EditRows], sites: Sequence[ValueSite], max_active: int) -> int:
    """Return the bytes that a chunk's search takes at once, estimated."""
    cost = CostPerEdit(lm, sites)
    steps = sorted((cost.step_bytes(row) for row in rows), reverse=True)[:max_active]
    return sum(cost.frozen_bytes(row) for row in rows) + sum(steps)


class CostPerEdit:
    """What one edit takes in a search, estimated from the model's shapes."""

    def __init__(self, lm: LM, sites: Sequence[ValueSite]) -> None:
        first, _ = active_part(lm, sites)
        self.n_active = max(lm.n_layers - first, 1)
        self.itemsize = lm.dtype.itemsize
        self.d_model, self.d_ff = lm.d_model, lm.d_ff
        self.d_kv = key_width(lm)
        self.vocabulary = int(lm.config.vocab_size)

    def active_tokens(self, rows: EditRows) -> int:
        """Return how many tokens every step runs."""
        return len(rows.rewriting) * rows.columns + (rows.kl is not None)

    def frozen_bytes(self, rows: EditRows) -> int:
        """Return the bytes of what is recorded: keys and values before the first active token, states after it."""
        earlier = max(rows.starts) * 2 * self.d_kv * self.n_active
        return self.itemsize * (len(rows.rewriting) + 1) * (earlier + rows.columns * self.d_model)

    def step_bytes(self, rows: EditRows) -> int:
        """Return the bytes that a step takes: activations kept for the backward pass, logits, and the past."""
        activations = self.active_tokens(rows) * self.n_active * (12 * self.d_model + 4 * self.d_ff)
        labels = sum(len(r.target_ids) for r in rows.rewriting) + (rows.kl is not None)
        return self.itemsize * activations + 16 * labels * self.vocabulary + 3 * self.frozen_bytes(rows)
