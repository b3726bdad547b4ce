"""How to trace, and what is found."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.arguments import check_choice
from retcon.errors import InvalidSetting
from retcon.lm.batches import MAX_BATCH_TOKENS
from retcon.locate.means import mean_and_half_width

Distribution = Literal["gaussian", "uniform"]
Corruption = Literal["add", "replace"]
RestoredKind = Literal["block", "mlp", "attn", "severed_mlp", "severed_attn"]
"""What is restored at a token: a block's output; the MLP's or the attention's outputs over a window of layers; a
block's output while the MLPs (or attentions) above it keep what they put out when corrupted."""
GROUPS = ("first subject", "middle subject", "last subject", "first after", "further", "last")
"""Kinds of tokens that effects are averaged by."""


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """How to trace."""

    kinds: tuple[RestoredKind, ...] = ("block", "mlp", "attn")
    """What to restore."""
    window: int = 10
    """w: MLP and attention outputs are restored over layers l - floor(w/2) to l + ceil(w/2) - 1 at once."""
    samples: int = 10
    """S: draws of the noise."""
    noise: float = 3.0
    """Strength as a multiple of the standard deviation of the subjects' embeddings."""
    distribution: Distribution = "gaussian"
    """Of the noise; uniform is drawn from [-1, 1] before it is scaled."""
    corruption: Corruption = "add"
    """Noise on top of the subject's embeddings, or in their place."""
    seed: int = 0
    """The same noise for every cell of a prompt, and for every prompt of the same subject length."""
    max_batch_tokens: int = 2 * MAX_BATCH_TOKENS
    """Tokens in a forward pass: as many cells as fit share one."""
    replayed: bool = True
    """Run only what restoring a state can change: the blocks above it, from its token on, and nothing for tokens
    before the subject. False: whole forward passes for every cell, the reference; also used for prompts longer than an
    attention window, for forms of attention that take no mask, and for hybrids and routed mixtures."""

    def __post_init__(self) -> None:
        check_choice(self.distribution, Distribution, "distribution of the noise")
        check_choice(self.corruption, Corruption, "corruption")
        if unknown := [k for k in self.kinds if k not in KINDS]:
            raise InvalidSetting(f"cannot restore {', '.join(unknown)}; known: {', '.join(KINDS)}")
        if not self.kinds or self.window < 1 or self.samples < 1:
            raise InvalidSetting("tracing needs a kind, and a window and samples of at least 1")
        if not 0 <= self.noise < math.inf:
            raise InvalidSetting(f"noise must be at least 0 and finite, found {self.noise:g}")


KINDS: tuple[RestoredKind, ...] = get_args(RestoredKind)


def default_window(n_layers: int) -> int:
    """Return the paper's 10, or three eighths of a shallower model."""
    return min(10, math.ceil(3 * n_layers / 8))


@dataclass(frozen=True, eq=False)
class Trace:
    """One prompt's effects."""

    id: str
    tokens: tuple[str, ...]
    subject: range
    """Its tokens."""
    answer: str
    """The model's own next token, which must begin the original answer where one is given."""
    assumed: bool
    """Whether none is given, so that this token stands in for it."""
    high: float
    """The answer's probability on the clean prompt."""
    low: float
    """The same with the subject corrupted, mean over samples."""
    scores: Mapping[RestoredKind, Float[Tensor, "tokens layers"]]
    """The answer's probability with the state at (token, layer) restored, mean over samples."""

    def indirect(self, kind: RestoredKind) -> Float[Tensor, "tokens layers"]:
        """Return the indirect effect of each state: score - low."""
        return self.scores[kind] - self.low

    def groups(self) -> dict[str, range]:
        """Return tokens by kind; a subject of one token is its first and its last, one at the end has none after it."""
        first, end, n = self.subject.start, self.subject.stop, len(self.tokens)
        after = range(end, min(end + 1, n))
        spans = [range(first, first + 1), range(first + 1, end - 1), range(end - 1, end), after, range(end + 1, n - 1)]
        return dict(zip(GROUPS, [*spans, range(n - 1, n)], strict=True))


@dataclass(frozen=True, eq=False)
class Effects:
    """Average indirect effects by kind of token and layer, each a mean over prompts with a 95 % interval."""

    mean: Float[Tensor, "groups layers"]
    half_width: Float[Tensor, "groups layers"]
    n: tuple[int, ...]
    """Prompts that have tokens of the kind."""


@dataclass(frozen=True, eq=False)
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

    @property
    def n_assumed(self) -> int:
        """Traces in which the model's own next token stands in for an original answer."""
        return sum(t.assumed for t in self.traces)

    def total(self) -> tuple[float, float]:
        """Return the mean total effect (high - low) and half the width of its 95 % interval."""
        effects = torch.tensor([[t.high - t.low] for t in self.traces], dtype=torch.float64)
        return tuple(float(x) for x in mean_and_half_width(effects))  # type: ignore[return-value]

    def average(self, kind: RestoredKind) -> Effects:
        """Average over a prompt's tokens of a kind first, over prompts then."""
        means, halves, counts = [], [], []
        for group in GROUPS:
            rows = [t.indirect(kind)[list(at)].mean(0) for t in self.traces if (at := t.groups()[group])]
            n_layers = self.traces[0].scores[kind].shape[1]
            mean, half = mean_and_half_width(
                torch.stack(rows) if rows else torch.empty(0, n_layers, dtype=torch.float64)
            )
            means.append(mean)
            halves.append(half)
            counts.append(len(rows))
        return Effects(torch.stack(means), torch.stack(halves), tuple(counts))
