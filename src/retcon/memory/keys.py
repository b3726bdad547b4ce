"""Keys: what the model feeds into an edited matrix when it reads a fact, averaged over contexts."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.arguments import check_choice
from retcon.edits import Edit
from retcon.lm.batches import MAX_BATCH_TOKENS, buckets
from retcon.lm.capacity import planned_bytes
from retcon.lm.forward import Point, activations
from retcon.lm.layerwise import LayerwiseReader, Reading
from retcon.lm.model import LM
from retcon.lm.prompts import Row, Where, encode_edit, pad
from retcon.memory.contexts import Contexts

KeyAverage = Literal["two_level", "uniform"]
"""`two_level` (all published numbers): half the bare prompt, half the mean of prefixed ones; `uniform`: plain mean."""

SHARE_OF_MEMORY = 0.25
"""What the states kept between readings may take."""


def weights_of(n_prefixes: int, average: KeyAverage) -> list[float]:
    """Return the weight of each context in the mean key, the bare prompt first; they sum to 1."""
    if n_prefixes == 0:
        return [1.0]
    check_choice(average, KeyAverage, "average of keys")
    if average == "uniform":
        return [1 / (n_prefixes + 1)] * (n_prefixes + 1)
    return [0.5] + [0.5 / n_prefixes] * n_prefixes


def first_alike(rows: Sequence[Row], where: Where, n_contexts: int) -> list[int]:
    """Return, for each edit, the first one whose rows, one per context, have its own tokens up to `where`.

    Their keys are one key. Read in other batches, they would differ in their last bits, and a write that stores every
    key exactly would blow that difference up.
    """
    upto = [row.ids[: row.position(where) + 1] for row in rows]
    of_edit = [tuple(upto[i : i + n_contexts]) for i in range(0, len(upto), n_contexts)]
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    return [first.setdefault(tokens, i) for i, tokens in enumerate(of_edit)]


class KeyReader:
    """Mean keys and current values of a batch of edits, layer after layer while the layers are written.

    Gives what `mean_keys` does, and runs only what a write can have changed since the last reading.

    Args:
        last: the last token position that is asked for; no token after it is run.
    """

    def __init__(
        self,
        lm: LM,
        edits: Sequence[Edit],
        contexts: Contexts,
        *,
        average: KeyAverage = "two_level",
        last: Where = "prediction",
    ) -> None:
        texts = contexts.all
        self.given, self.average = (lm, edits, contexts), average
        self.rows = [encode_edit(lm.tokenizer, e, prefix).until(last) for e in edits for prefix in texts]
        self.edit_of = [i for i in range(len(edits)) for _ in texts]
        self.weights = weights_of(len(contexts.prefixes), average) * len(edits)
        self.bare = [float(j == 0) for _ in edits for j in range(len(texts))]
        prefix_group = list(range(len(texts))) * len(edits)
        keep_bytes = SHARE_OF_MEMORY * planned_bytes(lm)
        bare = [b > 0 for b in self.bare]  # current values are read there, above the layer of the keys
        self.reader = LayerwiseReader(lm, self.rows, prefix_group, keep_bytes=keep_bytes, deep=bare)

    def read(
        self, point: Point, where: Where, value: Point
    ) -> tuple[Float[Tensor, "n_edits d_in"], Float[Tensor, "n_edits d_model"]]:
        """Return each edit's mean key at `point`, and the activation at `value` on the bare prompt, on the weights as
        they are now; on the CPU, in at least float32. Nothing below the point's layer may be changed before the next
        reading, or that starts at the tokens.
        """
        lm, edits, contexts = self.given
        if lm.layout.earlier == "other":
            return mean_keys(lm, edits, contexts, point, where, value=value, average=self.average)
        tokens = [r.position(where) for r in self.rows]
        found = self.reader.read(
            {point: Reading(tokens, self.edit_of, self.weights), value: Reading(tokens, self.edit_of, self.bare)},
            keep=point.layer,
        )
        return found[point][self._first_alike(where)], found[value]

    def read_experts(
        self, layer: int, where: Where, value: Point
    ) -> tuple[Float[Tensor, "n_experts n_edits d_ff"], Float[Tensor, "n_edits d_model"]]:
        """Do as `read` for every routed expert of a block: each edit's mean of g_e k_e over its contexts."""
        lm = self.given[0]
        tokens = [r.position(where) for r in self.rows]
        points = [Point(layer, "key", site.expert) for site in lm.expert_sites(layer)]
        readings = {point: Reading(tokens, self.edit_of, self.weights) for point in points}
        found = self.reader.read({**readings, value: Reading(tokens, self.edit_of, self.bare)}, keep=layer)
        return torch.stack([found[point] for point in points])[:, self._first_alike(where)], found[value]

    def _first_alike(self, where: Where) -> list[int]:
        return first_alike(self.rows, where, len(self.given[2].all))


@overload
def mean_keys(
    lm: LM,
    edits: Sequence[Edit],
    contexts: Contexts,
    point: Point,
    where: Where,
    *,
    value: Point,
    average: KeyAverage = ...,
    max_batch_tokens: int = ...,
) -> tuple[Float[Tensor, "n_edits d_in"], Float[Tensor, "n_edits d_model"]]: ...


@overload
def mean_keys(
    lm: LM,
    edits: Sequence[Edit],
    contexts: Contexts,
    point: Point,
    where: Where,
    *,
    value: Point | None = None,
    average: KeyAverage = ...,
    max_batch_tokens: int = ...,
) -> tuple[Float[Tensor, "n_edits d_in"], Float[Tensor, "n_edits d_model"] | None]: ...


def mean_keys(
    lm: LM,
    edits: Sequence[Edit],
    contexts: Contexts,
    point: Point,
    where: Where,
    *,
    value: Point | None = None,
    average: KeyAverage = "two_level",
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> tuple[Float[Tensor, "n_edits d_in"], Float[Tensor, "n_edits d_model"] | None]:
    """Return each edit's mean key at `point`, and the activation at `value` on the bare prompt, by full passes: the
    reference for `KeyReader`, and the way for a single reading.
    """
    weight = weights_of(len(contexts.prefixes), average)
    rows = [(i, j, encode_edit(lm.tokenizer, e, c)) for i, e in enumerate(edits) for j, c in enumerate(contexts.all)]
    dtype = torch.promote_types(lm.dtype, torch.float32)
    keys: Tensor | None = None
    values: Tensor | None = None
    points = [point] if value is None or value == point else [point, value]
    with lm.frozen_eval():
        for group in buckets([len(r.ids) for _, _, r in rows], max_batch_tokens):
            chosen = [rows[k] for k in group]
            positions = torch.tensor([r.position(where) for _, _, r in chosen])
            found = activations(lm, pad([r for _, _, r in chosen], lm.device), dict.fromkeys(points, positions))
            key = found[point].to("cpu", dtype)
            if keys is None:
                keys = torch.zeros(len(edits), key.shape[1], dtype=dtype)
            of = torch.tensor([i for i, _, _ in chosen])
            keys.index_add_(0, of, key * torch.tensor([weight[j] for _, j, _ in chosen], dtype=dtype)[:, None])
            if value is not None:
                bare = torch.tensor([j == 0 for _, j, _ in chosen])
                seen = found[value].to("cpu", dtype)
                if values is None:
                    values = torch.zeros(len(edits), seen.shape[1], dtype=dtype)
                values[of[bare]] = seen[bare]
    assert keys is not None
    return keys[first_alike([row for _, _, row in rows], where, len(contexts.all))], values
