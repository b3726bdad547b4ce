"""Causal tracing: which states carry a fact to its answer.

Meng et al. 2022, arXiv:2202.05262, section 2. The subject's embeddings are disturbed so that the model no longer finds
the answer; then one state at a time is put back as it was, and the answer's probability tells what that state carries.
Only what such a restoration can change is computed: the blocks above it, from its token on (`retcon.lm.replay`).
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite, RetconWarning
from retcon.lm.model import LM, SiteName
from retcon.lm.prompts import Batch, Row, encode, encode_edit, subject_tokens
from retcon.lm.replay import Packed, Partly, replay
from retcon.lm.trace import Point, Tap, TensorName, run, tapped
from retcon.locate.embeddings import EMBEDDING, changing_embeddings, reading_first_input

MAX_BATCH_TOKENS = 8192
Kind = Literal["block", "mlp", "attn", "severed_mlp", "severed_attn"]
"""What is put back at a token: a block's output; the MLP's or the attention's outputs over a window of layers; a
block's output while the MLPs (or attentions) above it keep what they put out when disturbed."""
GROUPS = ("first subject", "middle subject", "last subject", "first after", "further", "last")
"""Kinds of tokens that effects are averaged by."""


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """How to trace."""

    kinds: tuple[Kind, ...] = ("block", "mlp", "attn")
    """What to put back."""
    window: int = 10
    """w: MLP and attention outputs are put back over layers l - floor(w/2) to l + ceil(w/2) - 1 at once."""
    samples: int = 10
    """S: draws of the noise."""
    noise: float = 3.0
    """Strength as a multiple of the standard deviation of the subjects' embeddings."""
    distribution: Literal["gaussian", "uniform"] = "gaussian"
    """Of the noise; uniform is drawn from [-1, 1] before it is scaled."""
    corruption: Literal["add", "replace"] = "add"
    """Noise on top of the subject's embeddings, or in their place."""
    seed: int = 0
    """The same noise for every cell of a prompt, and for every prompt of the same subject length."""
    max_batch_tokens: int = MAX_BATCH_TOKENS
    """Tokens in a forward pass: as many cells as fit share one."""
    replayed: bool = True
    """Run only what putting a state back can change: the blocks above it, from its token on, and nothing for tokens
    before the subject. False: whole forward passes for every cell, the reference; also used for prompts longer than an
    attention window, and for forms of attention that take no mask."""

    def __post_init__(self) -> None:
        if unknown := [k for k in self.kinds if k not in _KINDS]:
            raise InvalidSetting(f"cannot put back {', '.join(unknown)}; known: {', '.join(_KINDS)}")
        if not self.kinds or self.window < 1 or self.samples < 1 or self.noise < 0:
            raise InvalidSetting("tracing needs a kind, a window and samples of at least 1, and noise of at least 0")


_KINDS = ("block", "mlp", "attn", "severed_mlp", "severed_attn")


def default_window(n_layers: int) -> int:
    """The paper's 10, or three eighths of a shallower model."""
    return min(10, math.ceil(3 * n_layers / 8))


@dataclass(frozen=True)
class Trace:
    """One prompt's effects."""

    id: str
    tokens: tuple[str, ...]
    subject: range
    """Its tokens."""
    answer: str
    """The model's own next token, which must begin the original answer where one is given."""
    high: float
    """The answer's probability on the clean prompt."""
    low: float
    """The same with the subject disturbed, mean over samples."""
    scores: Mapping[Kind, Float[Tensor, "tokens layers"]]
    """The answer's probability with the state at (token, layer) put back, mean over samples."""

    def indirect(self, kind: Kind) -> Float[Tensor, "tokens layers"]:
        """Indirect effect of each state: score - low."""
        return self.scores[kind] - self.low

    def groups(self) -> dict[str, range]:
        """Tokens by kind; a subject of one token is its first and its last, one at the end has none after it."""
        first, end, n = self.subject.start, self.subject.stop, len(self.tokens)
        after = range(end, min(end + 1, n))
        spans = [range(first, first + 1), range(first + 1, end - 1), range(end - 1, end), after, range(end + 1, n - 1)]
        return dict(zip(GROUPS, [*spans, range(n - 1, n)], strict=True))


@dataclass(frozen=True)
class Effects:
    """Average indirect effects by kind of token and layer, each a mean over prompts with a 95 % interval."""

    mean: Float[Tensor, "groups layers"]
    half_width: Float[Tensor, "groups layers"]
    n: tuple[int, ...]
    """Prompts that have tokens of the kind."""


@dataclass(frozen=True)
class Traces:
    """Traces of several prompts."""

    traces: tuple[Trace, ...]
    skipped: Mapping[str, str]
    """Prompts left out, by the id of their edit, with the reason."""
    deviation: float
    """Standard deviation of the subjects' embeddings, the unit of the noise."""
    settings: Tracing

    def __len__(self) -> int:
        return len(self.traces)

    def total(self) -> tuple[float, float]:
        """Mean total effect (high - low) and half the width of its 95 % interval."""
        effects = torch.tensor([[t.high - t.low] for t in self.traces], dtype=torch.float64)
        return tuple(float(x) for x in _mean(effects))  # type: ignore[return-value]

    def average(self, kind: Kind) -> Effects:
        """Mean over a prompt's tokens of a kind first, over prompts then."""
        means, halves, counts = [], [], []
        for group in GROUPS:
            rows = [t.indirect(kind)[list(at)].mean(0) for t in self.traces if (at := t.groups()[group])]
            n_layers = self.traces[0].scores[kind].shape[1]
            mean, half = _mean(torch.stack(rows) if rows else torch.empty(0, n_layers, dtype=torch.float64))
            means.append(mean)
            halves.append(half)
            counts.append(len(rows))
        return Effects(torch.stack(means), torch.stack(halves), tuple(counts))


def _mean(rows: Float[Tensor, "n width"]) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
    spread = rows.std(0) if len(rows) > 1 else torch.full_like(rows.sum(0), torch.nan)
    return rows.mean(0), 1.96 * spread / max(len(rows), 1) ** 0.5


def causal_trace(
    lm: LM,
    edits: Sequence[Edit],
    settings: Tracing | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Traces:
    """Trace the fact of every edit (its prompt; `target_true` where given) on the weights as they are now.

    A prompt is left out where its subject does not occur in it, or where the model's next token is not the first one of
    the answer given.

    Raises:
        InvalidSetting: no prompt is left.
        NonFinite: a probability is NaN or infinite.
    """
    settings = settings or Tracing()
    skipped = {e.id: "the subject does not occur in the prompt" for e in edits if e.subject_span is None}
    kept = [e for e in edits if e.subject_span is not None]
    traces: list[Trace] = []
    tried = False
    with lm.borrowed(), torch.no_grad():
        deviation = embedding_deviation(lm, [e.subject for e in kept])
        for done, edit in enumerate(kept, 1):
            prompt = _prepare(lm, edit, settings, deviation)
            if prompt is None:
                skipped[edit.id] = "the model does not say the original answer"
            else:
                if (way := _way(lm, prompt, settings)).replayed and not tried:
                    tried = True
                    if not _replay_agrees(lm, prompt, settings):
                        way = settings = replace(settings, replayed=False)
                traces.append(_trace(lm, edit, prompt, way))
            progress(len(edits) - len(kept) + done, len(edits))
    if not traces:
        reasons = list(skipped.values())
        why = "; ".join(f"{reasons.count(r)} left out, {r}" for r in dict.fromkeys(reasons))
        raise InvalidSetting(f"nothing to trace: {why or 'no edits were given'}")
    return Traces(tuple(traces), skipped, deviation, settings)


def embedding_deviation(lm: LM, subjects: Sequence[str]) -> float:
    """Standard deviation of all entries of the subjects' token embeddings, each subject tokenised alone."""
    embedding = lm.model.get_submodule(lm.layout.embedding)
    ids = [i for subject in dict.fromkeys(subjects) for i in encode(lm.tokenizer, subject).ids]
    if not ids:
        return 0.0
    with torch.no_grad():
        return float(embedding(torch.tensor([ids], device=lm.device)).double().std())


# --- one prompt --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prompt:
    """A prompt, its clean run and its disturbed ones; tensors stand where the model's blocks stand."""

    row: Row
    subject: range
    answer: int
    high: float
    low: float
    noise: Float[Tensor, "samples subject width"]
    clean: dict[Point, Float[Tensor, "tokens d_model"]]
    disturbed: dict[Point, Float[Tensor, "samples tokens d_model"]]
    keys: list[Float[Tensor, "samples heads tokens d_head"]]
    """Of the disturbed runs, per block."""
    values: list[Float[Tensor, "samples heads tokens d_head"]]
    projected: list[list[Float[Tensor, "samples tokens width"]]]
    """What the attention projections put out in the disturbed runs, per block, in the order of `_projections`."""


def _prepare(lm: LM, edit: Edit, settings: Tracing, deviation: float) -> _Prompt | None:
    """One pass over the clean prompt and its disturbed copies; None where the model does not know the answer."""
    from transformers.cache_utils import Cache, DynamicLayer

    row, subject = encode_edit(lm.tokenizer, edit), subject_tokens(lm.tokenizer, edit)
    rows = torch.arange(settings.samples + 1)
    last = torch.full_like(rows, row.prediction)
    batch = Batch(torch.tensor([row.ids] * len(rows), device=lm.device), torch.ones(len(rows), len(row.ids)).bool())
    noise = _noise(lm, len(subject), settings, deviation)
    found: dict[Point, Tensor] = {}

    def reader(point: Point) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            found[point] = value.detach()

        return read

    tensors: tuple[TensorName, ...] = ("block", "mlp", "attn")
    taps: dict[Point, Tap] = {
        p: reader(p) for layer in range(lm.n_layers) for t in tensors if _wanted(lm, p := Point(layer, t), settings)
    }
    projected: list[list[Tensor]] = [[] for _ in range(lm.n_layers)]
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    inputs = dict(input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), past_key_values=cache, use_cache=True)
    disturb = _disturbing(rows - 1, subject, noise, settings)
    with ExitStack() as stack:
        stack.enter_context(changing_embeddings(lm, disturb))
        stack.enter_context(reading_first_input(lm, reader(EMBEDDING)))
        for layer, into in enumerate(projected if settings.replayed else []):
            for module in _projections(lm, layer):
                hook = module.register_forward_hook(lambda _, __, output, into=into: into.append(output[1:].detach()))
                stack.callback(hook.remove)
        logits = tapped(lm, (len(rows), len(row.ids)), inputs, taps, (rows, last))
    assert logits is not None
    answer = int(logits[0].argmax())
    prob = _probability(logits, answer, edit)
    if edit.target_true and encode(lm.tokenizer, edit.text, edit.target_true).target_ids[0] != answer:
        return None
    return _Prompt(
        row=row,
        subject=subject,
        answer=answer,
        high=float(prob[0]),
        low=float(prob[1:].mean()),
        noise=noise,
        clean={p: value[0] for p, value in found.items()},
        disturbed={p: value[1:] for p, value in found.items()},
        keys=[layer.keys[1:] for layer in cache.layers] if settings.replayed else [],
        values=[layer.values[1:] for layer in cache.layers] if settings.replayed else [],
        projected=projected,
    )


def _wanted(lm: LM, point: Point, settings: Tracing) -> bool:
    beside = settings.replayed and lm.layout.parallel and point.tensor == "mlp"
    return beside or point.tensor == "block" or any(point.tensor in kind for kind in settings.kinds)


def _projections(lm: LM, layer: int) -> list[nn.Module]:
    """The modules that make a block's queries, attention keys and values; one where the family fuses them."""
    kinds: tuple[SiteName, ...] = ("q_proj", "k_proj", "v_proj")
    return list(dict.fromkeys(lm.site(layer, kind).module for kind in kinds))


def _noise(lm: LM, n: int, settings: Tracing, deviation: float) -> Float[Tensor, "samples n width"]:
    generator = torch.Generator().manual_seed(settings.seed)
    weight = lm.model.get_submodule(lm.layout.embedding).weight
    shape = (settings.samples, n, weight.shape[1])
    if settings.distribution == "gaussian":
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
    else:
        drawn = 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
    return (settings.noise * deviation * drawn).to(weight)


def _disturbing(
    samples: Int[Tensor, " rows"], subject: range, noise: Float[Tensor, "samples subject width"], settings: Tracing
) -> Callable[[Tensor], Tensor]:
    """A change of embeddings: row i gets the noise of sample samples[i]; -1 leaves the row clean."""
    noisy = (samples >= 0).nonzero()[:, 0]

    def disturb(embeddings: Tensor) -> Tensor:
        out = embeddings.clone()
        rows = noisy.to(out.device)
        drawn = noise[samples[noisy].to(noise.device)].to(out)
        span = slice(subject.start, subject.stop)
        out[rows, span] = drawn if settings.corruption == "replace" else out[rows, span] + drawn
        return out

    return disturb


def _probability(logits: Float[Tensor, "n vocab"], answer: int, edit: Edit) -> Float[Tensor, " n"]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    prob = (logits[:, answer] - logits.logsumexp(-1)).exp().double().cpu()
    if not torch.isfinite(prob).all():
        raise NonFinite(f"edit {edit.id!r} ({edit.subject!r}): a probability is NaN or infinite; load a wider dtype")
    return prob


def _trace(lm: LM, edit: Edit, prompt: _Prompt, settings: Tracing) -> Trace:
    n = len(prompt.row.ids)
    tokens = range(prompt.subject.start if settings.replayed else 0, n)  # what stands before was never disturbed
    cells = [_cell(lm, k, layer, t, settings) for k in settings.kinds for layer in range(lm.n_layers) for t in tokens]
    if settings.replayed:
        cells = [seen for cell in cells if (seen := _seen(lm, cell, n - 1)).clean]
    scores = {k: torch.full((n, lm.n_layers), prompt.low, dtype=torch.float64) for k in settings.kinds}
    for group in _groups(prompt, cells, settings):
        prob = _probability(_logits(lm, prompt, group, settings), prompt.answer, edit)
        for cell, score in zip(group, prob.view(len(group), settings.samples).mean(1).tolist(), strict=True):
            scores[cell.kind][cell.token, cell.layer] = score
    tokenizer = lm.tokenizer
    return Trace(
        id=edit.id,
        tokens=tuple(tokenizer.decode([i]) for i in prompt.row.ids),
        subject=prompt.subject,
        answer=tokenizer.decode([prompt.answer]),
        high=prompt.high,
        low=prompt.low,
        scores=scores,
    )


@dataclass(frozen=True)
class _Cell:
    """One state to put back."""

    kind: Kind
    layer: int
    token: int
    clean: tuple[Point, ...]
    """What stands at the token as in the clean run."""
    disturbed: tuple[Point, ...]
    """What stands there as in the disturbed run of the row's sample."""

    @property
    def first(self) -> int:
        """The block above the lowest that puts out anything else than in the disturbed run."""
        return min(self.clean).layer + 1


def _cell(lm: LM, kind: Kind, layer: int, token: int, settings: Tracing) -> _Cell:
    if kind == "mlp" or kind == "attn":
        low, high = layer - settings.window // 2, layer + math.ceil(settings.window / 2)
        inside = range(max(0, low), min(lm.n_layers, high))
        return _Cell(kind, layer, token, tuple(Point(i, kind) for i in inside), ())
    kept: tuple[Point, ...] = ()
    if kind != "block":
        tensor: TensorName = "mlp" if kind == "severed_mlp" else "attn"
        kept = tuple(Point(i, tensor) for i in range(layer + 1, lm.n_layers))
    return _Cell(kind, layer, token, (Point(layer, "block"),), kept)


def _seen(lm: LM, cell: _Cell, last: int) -> _Cell:
    """The cell without what nothing reads: outputs of the topmost block anywhere but at the last token."""
    if cell.token == last:
        return cell
    clean, disturbed = (
        tuple(p for p in points if p.layer < lm.n_layers - 1) for points in (cell.clean, cell.disturbed)
    )
    return replace(cell, clean=clean, disturbed=disturbed)


def _groups(prompt: _Prompt, cells: Sequence[_Cell], settings: Tracing) -> list[list[_Cell]]:
    """Cells that are done at once: as many as fit; in a replay only those of one first block."""
    n_tokens, most = len(prompt.row.ids), settings.max_batch_tokens // settings.samples
    if not settings.replayed:
        each = max(1, most // n_tokens)
        return [list(cells[i : i + each]) for i in range(0, len(cells), each)]
    groups: list[list[_Cell]] = []
    for _, alike in groupby(sorted(cells, key=lambda cell: cell.first), lambda cell: cell.first):
        groups.append([])
        tokens = 0
        for cell in alike:
            tokens += n_tokens - cell.token
            if groups[-1] and tokens > most:
                groups.append([])
                tokens = n_tokens - cell.token
            groups[-1].append(cell)
    return groups


def _logits(lm: LM, prompt: _Prompt, cells: Sequence[_Cell], settings: Tracing) -> Float[Tensor, "rows vocab"]:
    """Logits behind the prompt for every cell and sample, cell by cell."""
    if settings.replayed:
        return _replayed(lm, prompt, cells)
    rows = torch.arange(len(cells) * settings.samples).view(len(cells), -1)
    samples = torch.arange(settings.samples).repeat(len(cells))
    ids = torch.tensor([prompt.row.ids] * len(samples), device=lm.device)
    last = torch.full_like(samples, prompt.row.prediction)
    with changing_embeddings(lm, _disturbing(samples, prompt.subject, prompt.noise, settings)):
        taps = _taps(prompt, cells, rows, torch.tensor([[cell.token] for cell in cells]), range(lm.n_layers))
        logits = run(lm, Batch(ids, torch.ones_like(ids).bool()), taps, (rows.flatten(), last))
    assert logits is not None
    return logits


def _taps(
    prompt: _Prompt,
    cells: Sequence[_Cell],
    rows: Int[Tensor, "cells samples"],
    columns: Int[Tensor, "cells 1"],
    layers: range,
) -> dict[Point, Tap]:
    """Taps in these layers that put the values of each cell into its rows, all at the column where its token stands."""
    tokens = torch.tensor([cell.token for cell in cells])

    def putting(point: Point) -> Tap:
        clean = [i for i, cell in enumerate(cells) if point in cell.clean]
        disturbed = [i for i, cell in enumerate(cells) if point in cell.disturbed]
        into = rows[clean + disturbed], columns[clean + disturbed]

        def put(value: Tensor) -> Tensor:
            new = prompt.clean[point][tokens[clean].to(value.device)]
            new = new[:, None].expand(-1, rows.shape[1], -1)
            if disturbed:
                kept = prompt.disturbed[point][:, tokens[disturbed].to(value.device)]
                new = torch.cat([new, kept.transpose(0, 1)])
            return value.index_put(tuple(i.to(value.device) for i in into), new.to(value))

        return put

    points = {p for cell in cells for p in (*cell.clean, *cell.disturbed)}
    return {point: putting(point) for point in points if point.layer in layers}


# --- only what a restoration can change --------------------------------------------------------------------------
# Nothing below the block where it is made, and nothing before its token. In that block only the token itself changes,
# for attention there reads the other tokens' inputs; in the blocks above, every token from it on; in the topmost one,
# only the last token is read. So cells climb in three strides, side by side in rows of one length.


@dataclass(frozen=True)
class _Strips:
    """Rows in which cells stand side by side, each with its tokens up to some last one; each row once per sample."""

    starts: Int[Tensor, " cells"]
    """The cells' own tokens; what stands before them is as in the disturbed run."""
    samples: int
    row: Int[Tensor, " cells"]
    """In which row each cell stands."""
    column: Int[Tensor, " cells"]
    """Where in it."""
    cell: Int[Tensor, "rows columns"]
    """Whose place it is; -1 for nobody's."""
    token: Int[Tensor, "rows columns"]

    @classmethod
    def of(cls, cells: Sequence[_Cell], samples: int, last: int | None = None) -> "_Strips":
        """Each cell's tokens from its own to `last`, or its own alone, in rows of about one length."""
        starts = torch.tensor([cell.token for cell in cells])
        lengths = [1 if last is None else last + 1 - cell.token for cell in cells]
        rows = _rows_of(lengths)
        n_columns = max(sum(lengths[i] for i in row) for row in rows)
        cell = torch.full((len(rows), n_columns), -1)
        token, at, column = torch.zeros_like(cell), torch.zeros_like(starts), torch.zeros_like(starts)
        for r, row in enumerate(rows):
            free = 0
            for i in row:
                at[i], column[i] = r, free
                cell[r, free : free + lengths[i]] = i
                token[r, free : free + lengths[i]] = torch.arange(cells[i].token, cells[i].token + lengths[i])
                free += lengths[i]
        return cls(starts, samples, at, column, cell, token)

    @property
    def rows(self) -> Int[Tensor, "cells samples"]:
        """Each cell's row in every sample."""
        return self.row[:, None] * self.samples + torch.arange(self.samples)

    @property
    def own(self) -> tuple[Int[Tensor, "cells samples"], Int[Tensor, "cells 1"]]:
        """Rows and columns of the cells' own tokens."""
        return self.rows, self.column[:, None]

    @property
    def rank(self) -> Int[Tensor, " cells"]:
        """How many cells stand before each in its row."""
        return ((self.row[:, None] == self.row) & (self.column < self.column[:, None])).sum(1)

    @property
    def earlier(self) -> Bool[Tensor, "cells earlier"]:
        """Tokens that each cell sees in the disturbed run."""
        return torch.arange(int(self.starts.max())) < self.starts[:, None]

    def spread(self, values: Float[Tensor, "samples tokens width"]) -> Float[Tensor, "all_rows columns width"]:
        """Every token's values at its places."""
        return values[:, self.token].transpose(0, 1).flatten(0, 1)

    def packed(self, prompt: _Prompt, layers: range, states: Float[Tensor, "all_rows columns d_model"]) -> Packed:
        """A replay of these layers on them: each token sees its cell's tokens up to itself, and those before."""
        inside = (self.cell[:, :, None] == self.cell[:, None]) & (self.token[:, None] <= self.token[:, :, None])
        seen = torch.cat([self.earlier[self.cell], inside], 2)
        keys, values = (
            tuple(part[layer][:, :, : seen.shape[2] - seen.shape[1]].repeat(len(seen), 1, 1, 1) for layer in layers)
            for part in (prompt.keys, prompt.values)
        )
        return Packed(layers.start, states, keys, values, self.token, seen)


def _rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """Which stand in a row together: the longest first, each in the first row that has room. Rows are as long as the
    longest or by one longer (1 to n fill those for even n), whichever leaves less over."""
    found: list[tuple[int, list[list[int]]]] = []
    for most in (max(lengths), max(lengths) + 1):
        rows: list[list[int]] = []
        room: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(most)
            rows[row].append(i)
            room[row] -= lengths[i]
        found.append((len(rows) * (most - min(room)), rows))
    return min(found, key=lambda f: f[0])[1]


def _replayed(lm: LM, prompt: _Prompt, cells: Sequence[_Cell]) -> Float[Tensor, "logits vocab"]:
    """The same for cells of one first block."""
    last, top, samples = len(prompt.row.ids) - 1, lm.n_layers - 1, len(prompt.noise)
    changed = _changed(lm, prompt, cells)
    if cells[0].first > top:
        rows, columns = torch.arange(samples).expand(len(cells), -1), torch.arange(len(cells))[:, None]
        tokens, itself = torch.full((1, len(cells)), last), torch.eye(len(cells)).bool()
        given = Packed(top + 1, changed, (), (), tokens, itself[None])
    else:
        strips = _Strips.of(cells, samples, last)
        states, keys, values = _climbed(lm, prompt, cells, strips, changed)
        rows, columns = strips.rows, strips.rank[:, None]
        n_rows, n_columns = len(strips.cell), int(strips.rank.max()) + 1
        ends = states.new_zeros(len(states), n_columns, states.shape[2])
        ends[rows, columns] = states[rows, (strips.column + last - strips.starts)[:, None]]
        own = (strips.cell[strips.row] == torch.arange(len(cells))[:, None]) & (strips.token[strips.row] < last)
        seen = torch.zeros(n_rows, n_columns, keys.shape[2]).bool()
        seen[strips.row, strips.rank] = torch.cat([strips.earlier, own], 1)
        seen = torch.cat([seen, torch.eye(n_columns).bool().expand(n_rows, -1, -1)], 2)
        given = Packed(top, ends, (keys,), (values,), torch.full((n_rows, n_columns), last), seen)
    taps = _taps(prompt, cells, rows, columns, range(given.first, top + 1))
    logits = replay(lm, given, taps, (rows.flatten(), columns.expand_as(rows).flatten()))
    assert logits is not None
    return logits


def _changed(lm: LM, prompt: _Prompt, cells: Sequence[_Cell]) -> Float[Tensor, "samples cells d_model"]:
    """What leaves the block where the cell makes its lowest change, at the cell's token."""
    layer, samples = cells[0].first - 1, len(prompt.noise)
    put = Point(layer, "block")
    out = prompt.clean[put][[cell.token for cell in cells]].repeat(samples, 1, 1)
    inside = [i for i, cell in enumerate(cells) if put not in cell.clean]
    added = [i for i in inside if _is_summand(lm, min(cells[i].clean))]
    for i in added:
        point, token = min(cells[i].clean), cells[i].token
        out[:, i] = prompt.disturbed[put][:, token] + (prompt.clean[point][token] - prompt.disturbed[point][:, token])
    if run := [i for i in inside if i not in added]:
        some = [cells[i] for i in run]
        strips = _Strips.of(some, samples)
        entering = strips.spread(prompt.disturbed[Point(layer - 1, "block")])
        found: list[Tensor] = []
        taps = _taps(prompt, some, *strips.own, range(layer, layer + 1))
        replay(lm, strips.packed(prompt, range(layer, layer + 1), entering), {**taps, put: found.append})
        out[:, run] = found[0][strips.own].transpose(0, 1)
    return out


def _is_summand(lm: LM, point: Point) -> bool:
    """Whether the block's output is this one's output and something that does not depend on it."""
    return lm.layout.mlp_post_norm is None and (point.tensor == "mlp" or lm.layout.parallel)


def _climbed(
    lm: LM, prompt: _Prompt, cells: Sequence[_Cell], strips: _Strips, changed: Float[Tensor, "samples cells d_model"]
) -> tuple[
    Float[Tensor, "all_rows columns d_model"],
    Float[Tensor, "all_rows heads earlier d_head"],
    Float[Tensor, "all_rows heads earlier d_head"],
]:
    """The states below the topmost block, and that block's attention keys and values of all the strips see and are."""
    first, top = cells[0].first, lm.n_layers - 1
    entering = strips.spread(prompt.disturbed[Point(first - 1, "block")])
    entering[strips.own] = changed.transpose(0, 1)
    given = strips.packed(prompt, range(first, top + 1), entering)
    cache = given.cache(lm)
    cache.layers[top].ends = True
    found: list[Tensor] = []
    taps = _taps(prompt, cells, *strips.own, range(first, top))
    taps = {point: tap for point, tap in taps.items() if point.tensor != "mlp"}  # known before
    taps |= {Point(top - 1, "block"): found.append, Point(top, "attn_key"): lambda _: None}  # the pass ends between
    replay(lm, given, taps, cache=cache, partly=_unknown(lm, prompt, cells, strips, range(first, top)))
    return found[0], *cache.layers[top].all_of_it()


def _unknown(lm: LM, prompt: _Prompt, cells: Sequence[_Cell], strips: _Strips, layers: range) -> Iterator[Partly]:
    """Modules of which something is known: MLP outputs that cells put back or keep; and in the lowest block, where only
    the cells' own tokens come in changed, the others' projections, and their MLP where it stands beside attention."""
    rows, columns = strips.own
    own = torch.zeros(len(strips.cell) * strips.samples, strips.cell.shape[1]).bool()
    own[rows, columns] = True
    lowest, top = _projections(lm, layers.start), layers.stop
    for module, disturbed in zip(lowest, prompt.projected[layers.start], strict=True):
        yield Partly(own, [module], module, strips.spread(disturbed))
    if layers and len(asked := _projections(lm, top)) == 3:  # in the topmost block nobody asks yet
        yield Partly(torch.zeros_like(own), asked[:1], asked[0], strips.spread(prompt.projected[top][0]))
    for layer in layers:
        point = Point(layer, "mlp")
        put = [i for i, cell in enumerate(cells) if point in cell.clean]
        kept = [i for i, cell in enumerate(cells) if point in cell.disturbed]
        live = own.clone() if layer == layers.start and lm.layout.parallel else torch.ones_like(own)
        live[rows[put + kept], columns[put + kept]] = False
        if not live.all():
            output = strips.spread(prompt.disturbed[point])
            output[rows[put], columns[put]] = prompt.clean[point][[cells[i].token for i in put], None]
            yield Partly(live, _mlp_entries(lm, layer), lm.site(layer, "down_proj").module, output)


def _mlp_entries(lm: LM, layer: int) -> list[nn.Module]:
    kinds: tuple[SiteName, ...] = ("up_proj", "gate_proj") if lm.layout.gate_proj else ("up_proj",)
    return list(dict.fromkeys(lm.site(layer, kind).module for kind in kinds))


def _way(lm: LM, prompt: _Prompt, settings: Tracing) -> Tracing:
    """Whole passes for prompts longer than an attention window, and for forms of attention that take no mask."""
    window = getattr(lm.model.config, "sliding_window", None)
    within = window is None or len(prompt.row.ids) <= window
    masked = getattr(lm.model.config, "_attn_implementation", None) in ("eager", "sdpa")
    return replace(settings, replayed=settings.replayed and within and masked)


def _replay_agrees(lm: LM, prompt: _Prompt, settings: Tracing) -> bool:
    """Whether both ways give the same at three tokens of the middle layer; where not, a warning says so."""
    last = len(prompt.row.ids) - 1
    tokens = sorted({prompt.subject.start, prompt.subject.stop - 1, last})
    for kind in settings.kinds:
        cells = [_cell(lm, kind, lm.n_layers // 2, token, settings) for token in tokens]
        cells = [cell for cell in cells if _seen(lm, cell, last).clean]
        plain = _logits(lm, prompt, cells, replace(settings, replayed=False)).float().softmax(-1)
        fast = _logits(lm, prompt, [_seen(lm, cell, last) for cell in cells], settings).float().softmax(-1)
        allowed = 0.02 if lm.dtype in (torch.float16, torch.bfloat16) else 1e-4
        off = float((plain - fast).abs().max())
        if not off <= allowed:
            warnings.warn(
                f"{lm.name!r}: running only the layers above a restored {kind} is {off:.2g} off whole forward passes; "
                "whole passes are used, which takes longer",
                RetconWarning,
                stacklevel=3,
            )
            return False
    return True
