"""Which layers to edit: where the ranks of the original and the target answer part.

The contrast-based probe (Shi et al. 2024, arXiv:2412.17872, section 4.1) as a rule. At layer l the contrast is

    Δ_l = [log(1 + rank_orig(l-1)) - log(1 + rank_orig(l))] - [the same for the target],

what the layer does for the original answer beyond what it does for the target. The low group is the window with the
largest sum of Δ at the subject's last token in the lower half, the high group the one with the largest sum at the
prediction position in the upper half, the topmost layers left out, where the distribution is only evened out
(appendix A).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.errors import InvalidSetting
from retcon.lm.prompts import Where
from retcon.locate.contrast import Contrast
from retcon.locate.means import mean_and_half_width
from retcon.plural import plural
from retcon.seed import generator_of


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How evidence becomes layers."""

    final_norm: bool = True
    """Read states with the final norm, as the model reads its last one; False is the paper's reading."""
    low_share: float = 0.2
    """Width of the low group as a share of the depth; the published groups have 6 of 28 and 6 of 32 layers."""
    high_share: float = 0.08
    """Width of the high group; published are 2 of 28 and 3 of 32."""
    least_width: int = 2
    """Neither group is narrower than this."""
    top_share: float = 0.1
    """Topmost layers that the high group keeps out of, at least one."""
    n_resamples: int = 1000
    """Bootstrap samples of the cases for `Choice.stability`."""
    enough_cases: int = 30
    """Fewer than this many cases are weak evidence."""
    enough_known: float = 0.5
    """So is a smaller share of cases whose original answer is what the model says, of those that give one."""
    enough_stability: float = 0.5
    """So is a choice that a smaller share of the resamples makes."""

    def __post_init__(self) -> None:
        for name in ("low_share", "high_share", "top_share"):
            if not 0 < getattr(self, name) <= 0.5:
                raise InvalidSetting(f"{name} must lie above 0 and at most at 0.5, found {getattr(self, name)}")
        if self.least_width < 1 or self.n_resamples < 1:
            raise InvalidSetting("least_width and n_resamples must be at least 1")

    def width(self, share: float, n_layers: int) -> int:
        """Return how many layers a group has."""
        return max(self.least_width, round(share * n_layers))


@dataclass(frozen=True, eq=False)
class Choice:
    """A group of layers, and what speaks for it."""

    layers: tuple[int, ...]
    where: Where
    """Position whose ranks it was chosen by."""
    starts: tuple[int, ...]
    """First layers of all windows that were compared."""
    scores: Float[Tensor, " starts"]
    """Their sums of Δ, mean over cases."""
    shares: Float[Tensor, " starts"]
    """How many of the resamples choose each."""
    low: float
    """95 % bootstrap interval of the chosen window's score."""
    high: float

    @property
    def score(self) -> float:
        """Sum of Δ over the chosen layers."""
        return float(self.scores[self.starts.index(self.layers[0])])

    @property
    def stability(self) -> float:
        """Share of the resamples of the cases that choose the same layers."""
        return float(self.shares[self.starts.index(self.layers[0])])


@dataclass(frozen=True, eq=False)
class Advice:
    """Layers to edit, with the evidence."""

    low: Choice
    """JEEP's low group; also the layers for the MEMIT family, which edits at the same position."""
    high: Choice
    """JEEP's high group."""
    contrast: dict[Where, Float[Tensor, " layers"]]
    """Δ of every layer, mean over cases."""
    half_width: dict[Where, Float[Tensor, " layers"]]
    """Of its 95 % interval."""
    n_cases: int
    n_known: int
    """Cases whose original answer is the model's own next token."""
    n_assumed: int
    """Those of them that give none, so that this token stands in for it."""
    weak: tuple[str, ...]
    """Why the evidence is weak; empty where it is not."""
    rule: Rule

    def settings(self, fields: Sequence[str]) -> dict[str, Any]:
        """Return the advice as settings of a method, chosen by the names of its fields.

        `low` and `high` are JEEP's; `layers` is what the MEMIT family edits, and `layer` the middle of that.

        Raises:
            InvalidSetting: the method has no such field.
        """
        known = {
            "low": self.low.layers,
            "high": self.high.layers,
            "layers": self.low.layers,
            "layer": self.low.layers[len(self.low.layers) // 2],
        }
        found = {name: value for name, value in known.items() if name in fields}
        if not found:
            raise InvalidSetting(
                f"nothing to advise: the method's settings name no layers (it has {', '.join(fields)})"
            )
        return found


def advise(contrast: Contrast, rule: Rule | None = None, *, seed: int = 0) -> Advice:
    """Choose the layers to edit, from what the probe saw at both positions in block outputs.

    Raises:
        InvalidSetting: the model has fewer than three layers, or the probe did not look where the rule does.
    """
    rule = rule or Rule()
    depth = contrast.n_layers
    top = max(1, round(rule.top_share * depth))
    lower, upper = range(depth // 2), range(depth // 2, depth - top)
    if not (lower and upper):
        raise InvalidSetting(f"{depth} layers leave no room for a low and a high group; give the layers yourself")
    generator = generator_of(seed)
    drawn = torch.randint(len(contrast), (rule.n_resamples, len(contrast)), generator=generator)
    both: tuple[Where, Where] = ("subject_last", "prediction")
    delta = {where: layer_contrast(contrast, where, final_norm=rule.final_norm) for where in both}
    low = _choose(delta["subject_last"], "subject_last", lower, rule.width(rule.low_share, depth), drawn)
    high = _choose(delta["prediction"], "prediction", upper, rule.width(rule.high_share, depth), drawn)
    n_known, n_assumed = int(contrast.known.sum()), int(contrast.assumed.sum())
    return Advice(
        low=low,
        high=high,
        contrast={where: d.mean(0) for where, d in delta.items()},
        half_width={where: mean_and_half_width(d)[1] for where, d in delta.items()},
        n_cases=len(contrast),
        n_known=n_known,
        n_assumed=n_assumed,
        weak=tuple(_weaknesses(rule, len(contrast), n_known, n_assumed, low, high)),
        rule=rule,
    )


def span(layers: Sequence[int]) -> str:
    """Return layers in short: the first and the last where none between them lacks."""
    if len(layers) > 1 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers)) or "none"


def layer_contrast(contrast: Contrast, where: Where, *, final_norm: bool) -> Float[Tensor, "records layers"]:
    """Return Δ of every layer from 0 on, record by record."""
    gain = []
    for of in ("original", "target"):
        _, rank = contrast.values("mean_rank", of, where, final_norm=final_norm)
        gain.append(-torch.log1p(rank).diff(dim=1))
    return gain[0] - gain[1]


def _choose(delta: Float[Tensor, "records layers"], where: Where, among: range, width: int, drawn: Tensor) -> Choice:
    """Return the window of `width` layers (or all there are) with the largest mean sum, and how resamples choose."""
    width = min(width, len(among))
    starts = range(among.start, among.stop - width + 1)
    sums = torch.stack([delta[:, s : s + width].sum(1) for s in starts], dim=1)  # (records, starts)
    scores = sums.mean(0)
    best = int(scores.argmax())
    resampled = torch.stack([sums[rows].mean(0) for rows in drawn])  # (resamples, starts)
    shares = torch.bincount(resampled.argmax(1), minlength=len(starts)) / len(drawn)
    low, high = resampled[:, best].quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    layers = tuple(range(starts[best], starts[best] + width))
    return Choice(layers, where, tuple(starts), scores, shares, low, high)


def _weaknesses(rule: Rule, n_cases: int, n_known: int, n_assumed: int, low: Choice, high: Choice) -> list[str]:
    found = []
    if n_cases < rule.enough_cases:
        found.append(f"only {plural(n_cases, 'case')}, {rule.enough_cases} or more are wanted")
    known, given = n_known - n_assumed, n_cases - n_assumed
    if known < rule.enough_known * given:
        which = f"the {given} cases that give one" if n_assumed else plural(n_cases, "case")
        found.append(f"the model says the original answer in {known} of {which} only")
    for name, choice in (("low", low), ("high", high)):
        if len(choice.starts) == 1:
            found.append(f"{name} group: the model is so shallow that there was nothing to choose from")
        if choice.low <= 0:
            found.append(
                f"{name} group: the answers do not part there (score {choice.score:.2f}, 95 % from {choice.low:.2f})"
            )
        elif choice.stability < rule.enough_stability:
            found.append(f"{name} group: only {choice.stability:.1%} of the resamples choose the same layers")
    return found
