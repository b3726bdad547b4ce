"""Cutting work into forward passes that fit: rows alike in length together, fewer of them where memory runs out.

`in_batches` runs them in this process; `shared_in_batches` where `lm.workers` are, in the same batches, so that the
results are the same to the bit.
"""

import gc
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

import torch

from retcon.work import Here, silent

if TYPE_CHECKING:
    from retcon.lm.model import LM

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

MAX_BATCH_TOKENS = 4096
"""Padded tokens of one forward pass, where nothing else is asked for."""
MIN_BUCKET_TOKENS = 1024
"""Tokens from which a forward pass of their own costs less than padding."""
MAX_PADDING = 1.15
"""A bucket's longest row over its shortest, beyond which a new bucket is begun if this one is worth a pass."""
MAX_SHARDS = 32
"""Pieces at most that shared work is cut into, so that workers are seldom idle and little is sent about."""


def buckets(
    lengths: Sequence[int],
    max_tokens: int = MAX_BATCH_TOKENS,
    which: Sequence[int] | None = None,
    *,
    least: int = MIN_BUCKET_TOKENS,
) -> list[list[int]]:
    """Group indices so that neighbours in length share a batch of at most `max_tokens` padded tokens (or one row), with
    little padding; the shortest come first.

    Args:
        which: these indices alone; all by default.
        least: padded tokens from which a batch takes no row that is much longer than its shortest.
    """
    order = sorted(range(len(lengths)) if which is None else which, key=lambda i: (lengths[i], i))
    groups: list[list[int]] = []
    for i in order:  # ascending, so the newcomer is the longest of its group
        if groups:
            size = len(groups[-1]) * lengths[i]
            padded = lengths[i] > MAX_PADDING * lengths[groups[-1][0]] and size >= least
        if groups and size + lengths[i] <= max_tokens and not padded:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def in_batches(
    lengths: Sequence[int],
    work: Callable[[list[int]], Sequence[Result]],
    *,
    max_tokens: int = MAX_BATCH_TOKENS,
    kinds: Sequence[Hashable] | None = None,
    least: int = MIN_BUCKET_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Do work on rows of these lengths, batch by batch, and return one result per row, in the order of the rows.

    The longest rows come first, so that memory runs out early or not at all; where it does, batches are half as large
    from there on, and the one that failed is done again.

    Args:
        work: from the indices of a batch's rows to their results.
        max_tokens: padded tokens of one batch.
        kinds: rows of different kinds never share a batch.
        least: as `buckets` has it.
        on_progress: called after every batch with the rows done and the rows in all.

    Raises:
        torch.OutOfMemoryError, MemoryError: a single row does not fit.
    """
    todo = _longest_first(range(len(lengths)), lengths, max_tokens, kinds, least)
    found = _in_batches(todo, lengths, work, max_tokens, kinds, least, on_progress)
    return [found[i] for i in range(len(lengths))]


def _in_batches(
    todo: deque[list[int]],
    lengths: Sequence[int],
    work: Callable[[list[int]], Sequence[Result]],
    max_tokens: int,
    kinds: Sequence[Hashable] | None,
    least: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[int, Result]:
    """Do as `in_batches`, from these batches on."""
    found: dict[int, Result] = {}
    while todo:
        group = todo.popleft()
        longest = max(lengths[i] for i in group)
        try:
            results = work(group)
        except (RuntimeError, MemoryError) as error:
            max_tokens = halved(error, len(group) * longest, longest)
        else:
            found |= zip(group, results, strict=True)
            if on_progress is not None:
                on_progress(len(found), len(lengths))
            continue
        release_memory()  # the failed batch's tensors are gone only now
        todo = _longest_first([*group, *(i for g in todo for i in g)], lengths, max_tokens, kinds, least)
    return found


@runtime_checkable
class BatchWork(Protocol[Item_contra, Result_co]):
    """What is done with a batch of items: an object that can be sent to another process."""

    def __call__(self, lm: "LM", items: Sequence[Item_contra]) -> Sequence[Result_co]:
        """Return one result per item, the model left as it was."""


def shared_in_batches(
    lm: "LM",
    work: BatchWork[Item, Result],
    items: Sequence[Item],
    lengths: Sequence[int],
    *,
    max_tokens: int = MAX_BATCH_TOKENS,
    kinds: Sequence[Hashable] | None = None,
    least: int = MIN_BUCKET_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Do work on items of these lengths as `in_batches`, by the workers of the model; a single batch is done here."""
    batches = _longest_first(range(len(lengths)), lengths, max_tokens, kinds, least)
    if isinstance(lm.workers, Here) or len(batches) < 2:

        def work_here(group: list[int]) -> Sequence[Result]:
            return work(lm, [items[i] for i in group])

        return in_batches(lengths, work_here, max_tokens=max_tokens, kinds=kinds, least=least, on_progress=on_progress)
    n_shards = min(len(batches), MAX_SHARDS)
    shards = [[batches[j] for j in range(k, len(batches), n_shards)] for k in range(n_shards)]  # each like the others
    pieces = [
        [[(items[i], lengths[i], kinds[i] if kinds else None) for i in batch] for batch in shard] for shard in shards
    ]
    found: dict[int, Result] = {}
    for k, results in lm.workers.map(lm, _OfShard(work, max_tokens, least), pieces, silent):
        found |= zip((i for batch in shards[k] for i in batch), results, strict=True)
        if on_progress is not None:
            on_progress(len(found), len(items))
    return [found[i] for i in range(len(items))]


@dataclass(frozen=True)
class _OfShard(Generic[Item, Result]):
    """Work on some of the batches, for a worker."""

    work: BatchWork[Item, Result]
    max_tokens: int
    least: int

    def __call__(
        self, lm: "LM", piece: Sequence[Sequence[tuple[Item, int, Hashable]]], progress: Callable[[int], None]
    ) -> list[Result]:
        """Return a result per item, in their order."""
        flat = [member for batch in piece for member in batch]
        places = iter(range(len(flat)))
        todo = deque([next(places) for _ in batch] for batch in piece)

        def work(group: list[int]) -> Sequence[Result]:
            return self.work(lm, [flat[i][0] for i in group])

        found = _in_batches(
            todo, [n for _, n, _ in flat], work, self.max_tokens, [kind for *_, kind in flat], self.least
        )
        return [found[i] for i in range(len(flat))]


def _longest_first(
    which: Sequence[int], lengths: Sequence[int], max_tokens: int, kinds: Sequence[Hashable] | None, least: int
) -> deque[list[int]]:
    by_kind: dict[Hashable, list[int]] = {}
    for i in which:
        by_kind.setdefault(kinds[i] if kinds else None, []).append(i)
    groups = [
        [members[k] for k in group]
        for members in by_kind.values()
        for group in reversed(buckets([lengths[i] for i in members], max_tokens, least=least))
    ]
    return deque(sorted(groups, key=lambda group: -max(lengths[i] for i in group)))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator for the CPU


def halved(error: BaseException, n_tokens: int, least: int) -> int:
    """Return half of the tokens of a batch that did not fit, `least` at the least.

    Raises:
        BaseException: `error` again, where it is another one or the batch had no more than `least`.
    """
    if not is_out_of_memory(error) or n_tokens <= least:
        raise error
    return max(n_tokens // 2, least)


def release_memory() -> None:
    """Give freed memory back to the device, after running out of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
