"""The contrast-based probe: how the original and the target answer travel through the layers.

Shi et al. 2024, arXiv:2412.17872, section 4.1 and appendix A. Every state of the residual stream is read as if it were
the last one (Eq. 5), and the probability and the rank (Eq. 6) of an answer's first token are recorded, at the subject's
last token and where the answer is predicted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, product
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retcon.arguments import check_choice, list_of_some, list_of_texts
from retcon.edits import Edit, list_of_edits
from retcon.errors import InvalidSetting, NonFinite
from retcon.lm.batches import MAX_BATCH_TOKENS, in_batches
from retcon.lm.forward import Point, TensorName, logits_at, reading
from retcon.lm.model import LM
from retcon.lm.prompts import Row, Where, encode_edit, pad
from retcon.locate import lens
from retcon.locate.embeddings import EMBEDDING, reading_first_input
from retcon.locate.means import mean_and_half_width
from retcon.locate.sample import why_none_is_left, with_subject
from retcon.locate.wordsets import SETS, TokenSets, WordSets
from retcon.work import silent

PROJECTED: tuple[TensorName, ...] = ("block", "attn", "mlp")
"""Outputs that can be read: of whole blocks, of attention, of MLPs."""
Quantity = Literal["mean_rank", "sum_prob", "mean_prob"]


@dataclass(frozen=True, eq=False)
class Curve:
    """A mean over records, state by state, with a 95 % interval (mean ± 1.96 standard errors)."""

    layers: tuple[int, ...]
    """-1 is the embedding."""
    mean: Float[Tensor, " layers"]
    half_width: Float[Tensor, " layers"]
    n: int
    """Records that it is the mean of: those for which the set is not empty."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """What the probe saw. Tensors are on the CPU, NaN where a record's set is empty."""

    ids: tuple[str, ...]
    """Records, by the id of their edit."""
    positions: tuple[Where, ...]
    points: tuple[Point, ...]
    """States, in the model's order; `Point(-1, "block")` is what enters the first block."""
    norms: tuple[bool, ...]
    """Readings: without the final norm (the paper's), with it (the model's own at the last block), or both."""
    sets: tuple[str, ...]
    """`original` and `target` (one token each), then the word sets."""
    size: Int[Tensor, "records sets"]
    """Distinct tokens of each set."""
    mean_rank: Float[Tensor, "records positions points norms sets"]
    """Mean over the set's tokens; 0 is the most likely token of the vocabulary."""
    sum_prob: Float[Tensor, "records positions points norms sets"]
    """Sum over the set's tokens."""
    known: Bool[Tensor, " records"]
    """Whether the model's own next token is the original answer's first one."""
    assumed: Bool[Tensor, " records"]
    """Whether the model's own next token stood in for an original answer that the record did not give."""
    skipped: Mapping[str, str]
    """Records left out, by id, with the reason."""
    vocabulary: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_layers(self) -> int:
        return 1 + max(p.layer for p in self.points)

    @property
    def mean_prob(self) -> Float[Tensor, "records positions points norms sets"]:
        """Probability per token of the set."""
        return self.sum_prob / self.size[:, None, None, None, :]

    def values(
        self, quantity: Quantity, of: str, position: Where, *, final_norm: bool, tensor: TensorName = "block"
    ) -> tuple[tuple[int, ...], Float[Tensor, "records layers"]]:
        """Return layers, and one set's values there, record by record.

        Raises:
            InvalidSetting: no such quantity, or the probe did not look there.
        """
        check_choice(quantity, Quantity, "quantity")
        for name, wanted, had in (
            ("set", of, self.sets),
            ("position", position, self.positions),
            ("reading final_norm =", final_norm, self.norms),
            ("tensor", tensor, tuple(dict.fromkeys(p.tensor for p in self.points))),
        ):
            if wanted not in had:
                raise InvalidSetting(f"the probe holds no {name} {wanted}; it holds {', '.join(map(str, had))}")
        places = [i for i, p in enumerate(self.points) if p.tensor == tensor]
        table = getattr(self, quantity)
        at = table[:, self.positions.index(position), :, self.norms.index(final_norm), self.sets.index(of)]
        return tuple(self.points[i].layer for i in places), at[:, places]

    def curve(
        self, quantity: Quantity, of: str, position: Where, *, final_norm: bool, tensor: TensorName = "block"
    ) -> Curve:
        """Return one set's mean over records, layer by layer."""
        layers, values = self.values(quantity, of, position, final_norm=final_norm, tensor=tensor)
        values = values[~values.isnan().any(1)]
        return Curve(layers, *mean_and_half_width(values), len(values))

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield everything as a tidy table: one row per record, position, state, reading and set that is not empty.

        The column `site` is the state's tensor.
        """
        ranks, probabilities, sizes = self.mean_rank.tolist(), self.sum_prob.tolist(), self.size.tolist()
        for i, record in enumerate(self.ids):
            places = product(enumerate(self.positions), enumerate(self.points), enumerate(self.norms))
            for (p, position), (s, point), (n, final_norm) in places:
                for k, (of, size) in enumerate(zip(self.sets, sizes[i], strict=True)):
                    if size:
                        yield {
                            "record_id": record,
                            "position": position,
                            "layer": point.layer,
                            "site": point.tensor,
                            "final_norm": final_norm,
                            "set": of,
                            "size": size,
                            "mean_rank": ranks[i][p][s][n][k],
                            "sum_prob": probabilities[i][p][s][n][k],
                            "mean_prob": probabilities[i][p][s][n][k] / size,
                        }

    def means(self) -> list[dict[str, Any]]:
        """Return the curves as a tidy table: one row per position, tensor (`site`), reading, set, quantity, layer."""
        sites = dict.fromkeys(p.tensor for p in self.points)
        quantities: tuple[Quantity, ...] = ("mean_rank", "sum_prob", "mean_prob")
        found = []
        for where, site, norm, of, what in product(self.positions, sites, self.norms, self.sets, quantities):
            curve = self.curve(what, of, where, final_norm=norm, tensor=site)
            about = {"position": where, "site": site, "final_norm": norm, "set": of, "quantity": what, "n": curve.n}
            rows = zip(curve.layers, curve.mean.tolist(), curve.half_width.tolist(), strict=True)
            found += [{**about, "layer": layer, "mean": mean, "half_width": half} for layer, mean, half in rows]
        return found


@dataclass(frozen=True)
class _Seen:
    """What the probe saw of one record."""

    said: int
    """The model's own next token."""
    answers: tuple[int, int]
    """First tokens of the original and the target answer."""
    size: list[int]
    """Distinct tokens of each set."""
    mean_rank: Float[Tensor, "positions points norms sets"]
    sum_prob: Float[Tensor, "positions points norms sets"]


def contrast_probe(
    lm: LM,
    edits: Iterable[Edit],
    *,
    positions: Sequence[Where] = ("subject_last", "prediction"),
    tensors: Sequence[TensorName] = ("block",),
    norms: Sequence[bool] = (False, True),
    word_sets: WordSets | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: Callable[[int, int], None] = silent,
) -> Contrast:
    """Record probability and rank of both answers of every edit in every state, on the weights as they are now.

    An answer is its first token after the prompt. The original one is `target_true`; where an edit gives none, the
    model's own next token stands in for it, and the record says so. An edit whose two answers begin with the same token
    has nothing to contrast and is left out, as is one whose subject does not occur in its prompt.

    Args:
        tensors: `block` (and the embedding with it), and perhaps `attn` and `mlp`, before any post-norm.
        norms: readings to make; both by default.
        word_sets: sets of words to follow as well (appendix A).
        progress: called with (edits done, edits).

    Raises:
        InvalidSetting: an unknown position or tensor, none of them, no edits, or none that can be probed.
        UnsupportedModel: with the final norm, the last block's output does not give the model's own logits.
        NonFinite: a state or a probability is NaN or infinite.
    """
    positions = list_of_some(cast("tuple[Where, ...]", list_of_texts(positions, "positions")), "positions")
    tensors, norms = list_of_some(tensors, "tensors"), list_of_some(norms, "norms")
    for where in positions:
        check_choice(where, Where, "position")
    if odd := [t for t in tensors if t not in PROJECTED]:
        raise InvalidSetting(f"cannot read {', '.join(odd)} as next tokens; known: {', '.join(PROJECTED)}")
    edits = list_of_edits(edits)
    kept, skipped = with_subject(edits)
    points, names = _points(lm, tensors), SETS if word_sets else ()
    rows = [encode_edit(lm.tokenizer, edit) for edit in kept]
    as_tokens = TokenSets(word_sets, lm.tokenizer, lens.vocabulary(lm)) if word_sets else None
    with lm.frozen_eval(), torch.no_grad():
        if True in norms:
            lens.check_reads(lm)

        def probe(group: list[int]) -> list[_Seen]:
            states, logits = _states(lm, [rows[i] for i in group], positions, points)
            said = logits.argmax(1).tolist()
            answers = [_answers(lm, kept[i], token) for i, token in zip(group, said, strict=True)]
            sets = [as_tokens.of(kept[i], a[0]) if as_tokens else [] for i, a in zip(group, answers, strict=True)]
            device = lens.head_device(lm)
            stacked = torch.stack([states[point].to(device) for point in points], 2)
            read = [_read(lm, stacked, torch.tensor(answers), sets, final_norm) for final_norm in norms]
            ranks, probs = (torch.stack(readings, 3) for readings in zip(*read, strict=True))
            return [
                _Seen(
                    said=said[i],
                    answers=answers[i],
                    size=[1, 1, *map(len, sets[i])],
                    mean_rank=ranks[i],
                    sum_prob=probs[i],
                )
                for i in range(len(group))
            ]

        def report(done: int, _: int) -> None:
            progress(len(skipped) + done, len(edits))

        found = in_batches([len(row.ids) for row in rows], probe, max_tokens=max_batch_tokens, on_progress=report)
    alike = [seen.answers[0] == seen.answers[1] for seen in found]
    skipped |= {e.id: "both answers begin with the same token" for e in compress(kept, alike)}
    pairs = [(e, seen) for e, seen, same in zip(kept, found, alike, strict=True) if not same]
    if not pairs:
        raise InvalidSetting(f"nothing to probe: {why_none_is_left(skipped)}")
    return Contrast(
        ids=tuple(e.id for e, _ in pairs),
        positions=tuple(positions),
        points=points,
        norms=tuple(norms),
        sets=("original", "target", *names),
        size=torch.tensor([seen.size for _, seen in pairs]),
        mean_rank=torch.stack([seen.mean_rank for _, seen in pairs]),
        sum_prob=torch.stack([seen.sum_prob for _, seen in pairs]),
        known=torch.tensor([seen.said == seen.answers[0] for _, seen in pairs]),
        assumed=torch.tensor([e.target_true is None for e, _ in pairs]),
        skipped=skipped,
        vocabulary=lens.vocabulary(lm),
    )


def _points(lm: LM, tensors: Sequence[TensorName]) -> tuple[Point, ...]:
    order: tuple[TensorName, ...] = ("attn", "mlp", "block")
    inside = [t for t in order if t in tensors]
    start = [EMBEDDING] if "block" in tensors else []
    return tuple(start + [Point(layer, tensor) for layer in range(lm.n_layers) for tensor in inside])


def _answers(lm: LM, edit: Edit, said: int) -> tuple[int, int]:
    """Return the first tokens of the original and the target answer after the prompt."""

    def first(answer: str) -> int:
        return encode_edit(lm.tokenizer, edit, answer=answer).target_ids[0]

    return (first(edit.target_true) if edit.target_true else said), first(edit.target_new)


def _states(
    lm: LM, rows: Sequence[Row], positions: Sequence[Where], points: Sequence[Point]
) -> tuple[dict[Point, Float[Tensor, "rows positions d_model"]], Float[Tensor, "rows vocab"]]:
    """Return every state at every position, and the model's own logits at the prediction position, from one pass."""
    each = torch.arange(len(rows))
    at = torch.tensor([[row.position(where) for where in positions] for row in rows])
    found: dict[Point, Tensor] = {}

    def pick(value: Tensor) -> Tensor:
        return value[each[:, None].to(value.device), at.to(value.device)]

    hooks = {p: reading(found, p, pick) for p in points if p != EMBEDDING}
    with reading_first_input(lm, reading(found, EMBEDDING, pick)):
        last = torch.tensor([row.prediction for row in rows])
        logits = logits_at(lm, pad(rows, lm.device), (each, last), hooks)
    return found, logits


def _read(
    lm: LM,
    states: Float[Tensor, "rows positions points d_model"],
    answers: Int[Tensor, "rows 2"],
    sets: Sequence[Sequence[Int[Tensor, " _"]]],
    final_norm: bool,
) -> tuple[Float[Tensor, "rows positions points sets"], Float[Tensor, "rows positions points sets"]]:
    """Return mean rank and summed probability of the two answers and of each row's word sets; NaN for an empty set.

    What is found comes to the CPU once, for all states together.
    """
    words, held = _padded(sets)
    row = torch.arange(len(states)).repeat_interleave(states[0, ..., 0].numel()).to(states.device)
    answers, words, held = (tensor.to(states.device) for tensor in (answers, words, held))
    found = []
    for part, logits in lens.in_chunks(lm, states.flatten(0, 2), final_norm=final_norm):
        at = row[part]
        prob = logits.softmax(1)
        rank, summed = lens.rank_of(logits, answers[at]).double(), prob.gather(1, answers[at]).double()
        if sets[0]:
            their_rank = lens.ranks(logits).gather(1, words[at].flatten(1)).view_as(words[at]).double()
            their_prob = prob.gather(1, words[at].flatten(1)).view_as(words[at]).double()
            size = held[at].sum(2)
            rank = torch.cat([rank, their_rank.where(held[at], 0.0).sum(2) / size], 1)
            of_sets = their_prob.where(held[at], 0.0).sum(2)
            summed = torch.cat([summed, of_sets.where(size > 0, torch.nan)], 1)
        found.append(torch.stack([rank, summed]))
    ranks, probs = torch.cat(found, 1).cpu().unflatten(1, states.shape[:3])
    if not torch.isfinite(probs[..., :2]).all():
        raise NonFinite("a probability is NaN or infinite; load the model in a wider dtype")
    return ranks, probs


def _padded(
    sets: Sequence[Sequence[Int[Tensor, " _"]]],
) -> tuple[Int[Tensor, "rows sets most"], Bool[Tensor, "rows sets most"]]:
    """Return the tokens of every row's sets, filled up with zeros, and which of them are of the set."""
    most = max((len(tokens) for of_row in sets for tokens in of_row), default=0)
    words = torch.zeros(len(sets), len(sets[0]), most, dtype=torch.long)
    held = torch.zeros_like(words, dtype=torch.bool)
    for i, of_row in enumerate(sets):
        for k, tokens in enumerate(of_row):
            words[i, k, : len(tokens)] = tokens
            held[i, k, : len(tokens)] = True
    return words, held
