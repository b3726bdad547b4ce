"""Cutting work into forward passes that fit: rows alike in length together, fewer of them where memory runs out."""

import gc
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")

MAX_BATCH_TOKENS = 4096
"""Padded tokens of one forward pass, where nothing else is asked for."""
MIN_BUCKET_TOKENS = 1024
"""Tokens from which a forward pass of their own costs less than padding."""
MAX_PADDING = 1.15
"""A bucket's longest row over its shortest, beyond which a new bucket is begun if this one is worth a pass."""


def buckets(lengths: Sequence[int], max_tokens: int = MAX_BATCH_TOKENS) -> list[list[int]]:
    """Group indices so that neighbours in length share a batch of at most `max_tokens` padded tokens (or one row), with
    little padding; the shortest come first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups: list[list[int]] = []
    for i in order:  # ascending, so the newcomer is the longest of its group
        if groups:
            size = len(groups[-1]) * lengths[i]
            padded = lengths[i] > MAX_PADDING * lengths[groups[-1][0]] and size >= MIN_BUCKET_TOKENS
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
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Do work on rows of these lengths, batch by batch, and return one result per row, in the order of the rows.

    The longest rows come first, so that memory runs out early or not at all; where it does, batches are half as large
    from there on, and the one that failed is done again.

    Args:
        work: from the indices of a batch's rows to their results.
        max_tokens: padded tokens of one batch.
        kinds: rows of different kinds never share a batch.
        on_progress: called after every batch with the rows done and the rows in all.

    Raises:
        torch.OutOfMemoryError, MemoryError: a single row does not fit.
    """
    found: dict[int, Result] = {}
    todo = _longest_first(range(len(lengths)), lengths, max_tokens, kinds)
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
        todo = _longest_first([*group, *(i for g in todo for i in g)], lengths, max_tokens, kinds)
    return [found[i] for i in range(len(lengths))]


def _longest_first(
    which: Sequence[int], lengths: Sequence[int], max_tokens: int, kinds: Sequence[Hashable] | None
) -> deque[list[int]]:
    by_kind: dict[Hashable, list[int]] = {}
    for i in which:
        by_kind.setdefault(kinds[i] if kinds else None, []).append(i)
    groups = [
        [members[k] for k in group]
        for members in by_kind.values()
        for group in reversed(buckets([lengths[i] for i in members], max_tokens))
    ]
    return deque(sorted(groups, key=lambda group: -max(lengths[i] for i in group)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
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
