"""Causal tracing: which states carry a fact to its answer.

Meng et al. 2022, arXiv:2202.05262, section 2. The subject's embeddings are disturbed so that the model no longer finds
the answer; then one state at a time is put back as it was, and the answer's probability tells what that state carries.
Only what such a restoration can change is computed: the blocks above it, from its token on (`retcon.lm.replay`).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite, RetconWarning
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, Row, encode, encode_edit, subject_tokens
from retcon.lm.replay import Frozen, record, replay
from retcon.lm.trace import Point, Tap, TensorName, run, tapped
from retcon.locate.embeddings import EMBEDDING, changing_embeddings, reading_first_input

MAX_BATCH_TOKENS = 8192
WORTH_A_PASS = 32
"""Tokens of padding that a replay may have for each token position it takes in, rather than being split in two."""
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
    before the subject. False: whole forward passes for every cell, the reference."""

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
    with lm.borrowed(), torch.no_grad():
        deviation = embedding_deviation(lm, [e.subject for e in kept])
        for done, edit in enumerate(kept, 1):
            prompt = _prepare(lm, edit, settings, deviation)
            if prompt is None:
                skipped[edit.id] = "the model does not say the original answer"
            else:
                if settings.replayed and not traces and not _replay_agrees(lm, prompt, settings):
                    settings = replace(settings, replayed=False)
                traces.append(_trace(lm, edit, prompt, settings))
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
    frozen: Frozen | None
    """A replay's unchanging parts, to be filled."""


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
        p: reader(p) for layer in range(lm.n_layers) for t in tensors if _wanted(p := Point(layer, t), settings)
    }
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    inputs = dict(input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), past_key_values=cache, use_cache=True)
    disturb = _disturbing(rows - 1, subject, noise, settings)
    with changing_embeddings(lm, disturb), reading_first_input(lm, reader(EMBEDDING)):
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
        frozen=record(lm, [row], [0], lm.n_layers)[0] if settings.replayed else None,
    )


def _wanted(point: Point, settings: Tracing) -> bool:
    return point.tensor == "block" or any(point.tensor in kind for kind in settings.kinds)


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
    scores = {k: torch.full((n, lm.n_layers), prompt.low, dtype=torch.float64) for k in settings.kinds}
    for group in _groups(cells, n, settings):
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
        """The lowest block that puts out anything else than in the disturbed run."""
        lowest = min(self.clean)
        return lowest.layer + (lowest.tensor == "block")


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


def _groups(cells: Sequence[_Cell], n_tokens: int, settings: Tracing) -> list[list[_Cell]]:
    """Cells that share a pass: as many as fit, and in a replay only those of one first block and of like length."""

    def key(cell: _Cell) -> tuple[int, int]:
        return (cell.first, cell.token) if settings.replayed else (0, 0)

    groups: list[list[_Cell]] = []
    for (first, token), alike in groupby(sorted(cells, key=key), key):
        added = list(alike)
        longest = n_tokens - (groups[-1][0].token if groups and settings.replayed else 0)
        padding = (longest - (n_tokens - token)) * len(added) * settings.samples
        if not groups or key(groups[-1][0])[0] != first or padding > WORTH_A_PASS:
            groups.append([])
            longest = n_tokens - token
        for cell in added:
            if groups[-1] and (len(groups[-1]) + 1) * settings.samples * longest > settings.max_batch_tokens:
                groups.append([])
                longest = n_tokens - token
            groups[-1].append(cell)
    return groups


def _logits(lm: LM, prompt: _Prompt, cells: Sequence[_Cell], settings: Tracing) -> Float[Tensor, "rows vocab"]:
    """Logits behind the prompt for every cell and sample, cell by cell."""
    at = torch.tensor([cell.token for cell in cells]).repeat_interleave(settings.samples)
    samples = torch.arange(settings.samples).repeat(len(cells))
    if settings.replayed:
        return _replayed(lm, prompt, cells, at, samples)
    ids = torch.tensor([prompt.row.ids] * len(at), device=lm.device)
    last = torch.full_like(at, prompt.row.prediction)
    with changing_embeddings(lm, _disturbing(samples, prompt.subject, prompt.noise, settings)):
        taps = _taps(prompt, cells, at, samples, columns=at)
        logits = run(lm, Batch(ids, torch.ones_like(ids).bool()), taps, (torch.arange(len(at)), last))
    assert logits is not None
    return logits


def _replayed(
    lm: LM, prompt: _Prompt, cells: Sequence[_Cell], at: Int[Tensor, " rows"], samples: Int[Tensor, " rows"]
) -> Float[Tensor, "rows vocab"]:
    """The same by the blocks from the cells' first one on, and by the tokens from each row's own on."""
    assert prompt.frozen is not None
    (first,) = {cell.first for cell in cells}
    n, prefix = len(prompt.row.ids), int(at.max())
    tokens = (at[:, None] + torch.arange(n - int(at.min()))).clamp(max=n - 1)
    earlier = (at[:, None] + torch.arange(-prefix, 0)).clamp(min=0)

    def part(x: Tensor, of: Tensor) -> Tensor:
        """Tokens of each row out of (samples, tokens, ...)."""
        return x[samples[:, None].to(x.device), of.to(x.device)]

    def cached(layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(part(x.transpose(1, 2), earlier).transpose(1, 2) for x in layers[first:])

    frozen = replace(
        prompt.frozen,
        first=first,
        states=part(prompt.disturbed[Point(first - 1, "block")], tokens),
        keys=cached(prompt.keys),
        values=cached(prompt.values),
        starts=tuple(at.tolist()),
        lengths=tuple((n - at).tolist()),
    )
    taps = _taps(prompt, cells, at, samples, columns=torch.zeros_like(at))
    logits = replay(lm, frozen, taps, (torch.arange(len(at)), n - 1 - at))
    assert logits is not None
    return logits


def _taps(
    prompt: _Prompt,
    cells: Sequence[_Cell],
    at: Int[Tensor, " rows"],
    samples: Int[Tensor, " rows"],
    columns: Int[Tensor, " rows"],
) -> dict[Point, Tap]:
    """Taps that put, in every row of a cell, the cell's values of token `at` into the row's column."""
    rows_of = torch.arange(len(at)).view(len(cells), -1)

    def putting(point: Point) -> Tap:
        clean = rows_of[[point in cell.clean for cell in cells]].flatten()
        disturbed = rows_of[[point in cell.disturbed for cell in cells]].flatten()
        rows = torch.cat([clean, disturbed])

        def put(value: Tensor) -> Tensor:
            device = value.device
            new = [prompt.clean[point][at[clean].to(device)]] if len(clean) else []
            if len(disturbed):
                new.append(prompt.disturbed[point][samples[disturbed].to(device), at[disturbed].to(device)])
            return value.index_put((rows.to(device), columns[rows].to(device)), torch.cat(new).to(value))

        return put

    return {point: putting(point) for point in {p for cell in cells for p in (*cell.clean, *cell.disturbed)}}


def _replay_agrees(lm: LM, prompt: _Prompt, settings: Tracing) -> bool:
    """Whether both ways give the same, on the middle layer of a prompt; where not, a warning says so."""
    tokens = range(prompt.subject.start, len(prompt.row.ids))
    for kind in settings.kinds:
        cells = [_cell(lm, kind, lm.n_layers // 2, token, settings) for token in tokens]
        fast, plain = (
            _logits(lm, prompt, cells, replace(settings, replayed=way)).float().softmax(-1) for way in (True, False)
        )
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
