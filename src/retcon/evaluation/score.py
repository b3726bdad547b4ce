"""Teacher-forced scoring: how likely a model finds given targets after given prompts.

All teacher-forced metrics are functions of what `score_rows` returns (`retcon.evaluation.metrics`). Rows are padded on
the right, one forward pass per batch, and the head is applied only where a target token is predicted. What prompts have
in common, as a chat's system prompt, is run once where that is most of their tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.lm.batches import MAX_BATCH_TOKENS, shared_in_batches
from retcon.lm.decoding import WORTH, remembers
from retcon.lm.forward import Inputs, logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, Row, n_common, pad
from retcon.lm.replay import after_common_beginnings

MAX_FAMILY = 32
"""Inputs of a family at most."""


@dataclass(frozen=True)
class TokenScore:
    """What the model made of one target, token by token, each given the gold tokens before it.

    Tuples have one entry per target token (at least one).
    """

    logp: tuple[float, ...]
    """Natural log-probability of the gold token, from float32 logits."""
    pred: tuple[int, ...]
    """The model's own choice (argmax id, the first of equals)."""
    target: tuple[int, ...]
    """The gold ids."""
    boundary_merge: bool = False
    """Prompt and target had to be tokenised apart (see `Row.boundary_merge`)."""

    @cached_property
    def nll_sum(self) -> float:
        """Negative log-probability of the whole target, in nats, summed in float64."""
        return 0.0 - math.fsum(self.logp)  # 0 without a sign for a certain answer

    @property
    def nll_mean(self) -> float:
        """`nll_sum` per token: minus the log of the geometric mean token probability."""
        return self.nll_sum / len(self.logp)

    @property
    def tok_acc(self) -> float:
        """Share of target tokens that are the model's own choice."""
        return sum(p == t for p, t in zip(self.pred, self.target, strict=True)) / len(self.target)

    @property
    def all_correct(self) -> bool:
        """Every target token is the model's own choice: greedy decoding would give the target."""
        return self.pred == self.target

    @property
    def first_correct(self) -> bool:
        """The first target token is; it alone is free of the gold prefix."""
        return self.pred[0] == self.target[0]

    @property
    def finite(self) -> bool:
        """No NaN or infinity among the log-probabilities."""
        return all(map(math.isfinite, self.logp))


def score(
    lm: LM, items: Sequence[tuple[str, str]], *, max_batch_tokens: int = MAX_BATCH_TOKENS, separator: str | None = None
) -> list[TokenScore]:
    """Score every (prompt, target), in the order given; one by one or batched gives the same up to rounding.

    Args:
        max_batch_tokens: padded tokens per forward pass; halved when memory runs out.
        separator: what is written between prompt and target; None: `retcon.edits.separator_between` the two.

    Raises:
        InvalidEdit: a prompt or target is empty or gives no token.
        torch.OutOfMemoryError: a single row does not fit.
    """
    with lm.scope():  # what is attached may act on the prompts, which are read in the turn in which they are run
        rows = [lm.encode(prompt, target, separator=separator) for prompt, target in items]
        return score_rows(lm, rows, max_batch_tokens=max_batch_tokens)


def score_rows(
    lm: LM,
    rows: Sequence[Row],
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[TokenScore]:
    """Score rows already tokenised, each with at least one target token.

    Args:
        on_progress: called after every batch with what is done and what there is to do, in inputs, or in families of
            inputs that begin alike.
    """
    inputs, carrier = fewest_inputs([row.ids[:-1] for row in rows])  # the last token predicts nothing we want
    carried: list[list[int]] = [[] for _ in inputs]
    for i, longest_row in enumerate(carrier):
        carried[longest_row].append(i)

    limits = [min(rows[k].prediction for k in members) for members in carried] if remembers(lm) else [0] * len(inputs)
    families = alike(inputs, limits, max_batch_tokens)
    items = [
        Family(start, tuple((inputs[i], tuple(rows[k] for k in carried[i])) for i in members))
        for start, members in families
    ]
    lengths = [sum(len(inputs[i]) for i in members) for _, members in families]
    with lm.frozen_eval():
        found = shared_in_batches(
            lm, ScoreBatch(max_batch_tokens), items, lengths, max_tokens=max_batch_tokens, on_progress=on_progress
        )
    results: dict[int, TokenScore] = {}
    for (_, members), of_family in zip(families, found, strict=True):
        for i, scores in zip(members, of_family, strict=True):
            results |= zip(carried[i], scores, strict=True)
    return [results[i] for i in range(len(rows))]


Input = tuple[tuple[int, ...], tuple[Row, ...]]
"""Tokens, and the rows whose own input is a prefix of them."""


@dataclass(frozen=True)
class Family:
    """Inputs that begin alike."""

    start: int
    """How many tokens they have in common, which are run once."""
    inputs: tuple[Input, ...]


@dataclass(frozen=True)
class ScoreBatch:
    """The scoring of a batch of families, as work that can be sent elsewhere."""

    max_tokens: int = MAX_BATCH_TOKENS

    def __call__(self, lm: LM, items: Sequence[Family]) -> list[list[list[TokenScore]]]:
        """Return, per family and input, the scores of its rows."""
        inputs = [one for family in items for one in family.inputs]
        with lm.frozen_eval(), torch.inference_mode():
            scores = iter(self._scores(lm, items, inputs))
            return [[next(scores) for _ in family.inputs] for family in items]

    def _scores(self, lm: LM, families: Sequence[Family], inputs: Sequence[Input]) -> list[list[TokenScore]]:
        starts = [family.start for family in families for _ in family.inputs]
        if not any(starts):
            return _score_batch(lm, inputs, pad([Row(ids, len(ids)) for ids, _ in inputs], lm.device), starts)
        group = [i if family.start else -1 for i, family in enumerate(families) for _ in family.inputs]
        found: dict[int, list[TokenScore]] = {}
        for which, batch in after_common_beginnings(lm, [ids for ids, _ in inputs], starts, group, self.max_tokens):
            some, begins = [inputs[i] for i in which], [starts[i] for i in which]
            found |= zip(which, _score_batch(lm, some, batch, begins), strict=True)
        return [found[i] for i in range(len(inputs))]


def _score_batch(
    lm: LM, inputs: Sequence[Input], batch: Batch | Inputs, starts: Sequence[int]
) -> list[list[TokenScore]]:
    """Return, per input, the scores of its rows, from one pass over its tokens from the start on."""
    places: dict[tuple[int, int], int] = {}  # (row of the batch, column) -> row of the logits
    wanted: list[int] = []
    gold: list[int] = []
    for r, ((_, rows), start) in enumerate(zip(inputs, starts, strict=True)):
        for row in rows:
            for column, token in enumerate(row.target_ids, start=row.prediction - start):
                wanted.append(places.setdefault((r, column), len(places)))
                gold.append(token)

    at = torch.tensor(list(places), device=lm.device)  # (n, 2)
    found = LogitReader(logits_at(lm, batch, (at[:, 0], at[:, 1]))).at(list(zip(wanted, gold, strict=True)))
    logp, pred = zip(*found, strict=True)

    results, begin = [], 0
    for _, rows in inputs:
        scores = []
        for row in rows:
            part = slice(begin, begin := begin + len(row.target_ids))
            scores.append(TokenScore(tuple(logp[part]), tuple(pred[part]), row.target_ids, row.boundary_merge))
        results.append(scores)
    return results


class LogitReader:
    """Log-probabilities and choices read from logits."""

    def __init__(self, logits: Float[Tensor, "n vocab"]) -> None:
        self.logits = logits
        parts = [(c.float().logsumexp(-1), c.argmax(-1)) for c in logits.split(256)]  # bounds the float32 copy
        self.log_z, self.best = (torch.cat(column) for column in zip(*parts, strict=True))

    def at(self, places: Sequence[tuple[int, int]]) -> list[tuple[float, int]]:
        """Return, for every (row, token), the token's log-probability and the row's likeliest token."""
        if not places:
            return []
        row, token = torch.tensor(places, device=self.logits.device).T
        logp = self.logits[row, token].float() - self.log_z[row]
        return list(zip(logp.tolist(), self.best[row].tolist(), strict=True))


def fewest_inputs(inputs: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return the fewest rows of which every given one is a prefix, and which of them carries each.

    Attention is causal, so a prefix of a row is computed with the row: a prompt asked with two one-token targets is run
    once. In descending order an extension comes just before its prefixes.
    """
    longest_rows: list[tuple[int, ...]] = []
    carrier = {}
    for ids in sorted(set(inputs), reverse=True):
        if not longest_rows or longest_rows[-1][: len(ids)] != ids:
            longest_rows.append(ids)
        carrier[ids] = len(longest_rows) - 1
    return longest_rows, [carrier[ids] for ids in inputs]


def alike(inputs: Sequence[tuple[int, ...]], limits: Sequence[int], max_tokens: int) -> list[tuple[int, range]]:
    """Cut inputs, sorted by their tokens, into families that begin alike, so that the fewest tokens are run.

    Args:
        limits: of each input, how many of its first tokens may be run apart: all before the first that predicts.
        max_tokens: of a family, counted as if none were in common.

    Returns:
        Each family's number of common tokens, and its inputs; families of one where too little would be saved.
    """
    common = [0] + [n_common(pair) for pair in pairwise(inputs)]  # with the input before
    best = [(0, 0, 0)]  # of the inputs up to each: the most that can be saved; where its last family begins, and shares
    for end in range(1, len(inputs) + 1):
        found = best[end - 1][0], end - 1, 0
        start, tokens = limits[end - 1], len(inputs[end - 1])
        for begin in range(end - 2, max(end - MAX_FAMILY, 0) - 1, -1):
            start, tokens = min(start, common[begin + 1], limits[begin]), tokens + len(inputs[begin])
            if not start or tokens > max_tokens:
                break
            found = max(found, (best[begin][0] + start * (end - begin - 1), begin, start))
        best.append(found)
    if best[-1][0] < WORTH * sum(map(len, inputs)):
        return [(0, range(i, i + 1)) for i in range(len(inputs))]
    families: list[tuple[int, range]] = []
    end = len(inputs)
    while end:
        _, begin, start = best[end]
        families.append((start, range(begin, end)))
        end = begin
    return families[::-1]
