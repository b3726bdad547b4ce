"""What a value search looks for: sites, settings, rows of text, the loss and the stop rule, and the result (ROME Eq. 4,
JEEP Eqs. 8, 11).

Per edit, an offset per site is found by gradient descent with all else frozen, an edit's sites together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retcon.arguments import check_choice
from retcon.delta import EditReport
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.lm.prompts import Row, Where, encode, encode_trained
from retcon.memory.contexts import Contexts


@dataclass(frozen=True)
class ValueSite:
    """A place where a value is searched."""

    point: Point
    """Where offset is added, and whose clean value `init` is read."""
    where: Where
    """At which token."""
    clamp: float
    """gamma: ||offset|| <= clamp * ||init||, enforced after every step."""
    weight_decay: float
    """beta: the loss gets weight_decay * ||offset|| / ||init||^2."""


StopRule = Literal["probability", "loss"]
TargetKind = Literal["clean", "joint"]


@dataclass(frozen=True, kw_only=True)
class ValueSearch:
    """How values are optimised."""

    steps: int = 30
    """Forward passes at most; the last one only evaluates."""
    learning_rate: float = 0.5
    """Adam's; betas (0.9, 0.999), eps 1e-8."""
    kl_factor: float = 0.0625
    """alpha: weight of KL(edited || original) for "<subject> is a", read at the subject's last token."""
    stop: StopRule = "probability"
    """`probability`: mean over contexts of the target's geometric-mean token probability reaches `threshold`; `loss`:
    the total loss falls under it."""
    threshold: float = 0.9
    """Probability to reach, or loss to fall under."""
    settled_factor: float | None = None
    """PMET's schedule: weight of the nll in the next step's loss once every target token is the most likely one in
    every rewriting row (1 again as soon as that ceases). None: always 1."""
    settled_kl: float = 0.01
    """With `settled_factor`: the search also stops once the targets are settled and kl_factor * KL is at most this."""

    shrink: bool = False
    """Go on with fewer edits at a time where memory runs out, which changes the last bits of the values."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidSetting(f"steps must be at least 1, found {self.steps}")
        if self.learning_rate < 0 or self.kl_factor < 0:
            raise InvalidSetting("learning_rate and kl_factor must not be negative")
        check_choice(self.stop, StopRule, "rule for when to stop")


@dataclass(frozen=True)
class ValueOf:
    """What the search found for one edit, per site, on the CPU."""

    init: tuple[Float[Tensor, " d"], ...]
    offset: tuple[Float[Tensor, " d"], ...]
    activation: tuple[Float[Tensor, " d"], ...]
    report: EditReport


@dataclass(frozen=True)
class Values:
    """What the search found for a batch of edits, per site; all (n_edits, d), on the CPU, at least float32."""

    init: tuple[Float[Tensor, "n_edits d"], ...]
    """Clean activation of the bare prompt."""
    offset: tuple[Float[Tensor, "n_edits d"], ...]
    """The vector found."""
    activation: tuple[Float[Tensor, "n_edits d"], ...]
    """Activation of the bare prompt in the last pass: the other sites' offsets in force, the site's own not added."""
    report: tuple[EditReport, ...]
    plan: Mapping[str, Any] = field(default_factory=dict)
    """How the search was cut up, for the record; empty for a plain one."""

    @classmethod
    def of(cls, found: Sequence[ValueOf], plan: Mapping[str, Any] | None = None) -> "Values":
        """Join the values of single edits into one batch."""

        def by_site(per_edit: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            return tuple(torch.stack(vectors) for vectors in zip(*per_edit, strict=True))

        return cls(
            init=by_site([f.init for f in found]),
            offset=by_site([f.offset for f in found]),
            activation=by_site([f.activation for f in found]),
            report=tuple(f.report for f in found),
            plan=plan or {},
        )

    def each(self) -> list[ValueOf]:
        """Return the values of every edit."""

        def of_edit(j: int, per_site: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(x[j] for x in per_site)

        return [
            ValueOf(of_edit(j, self.init), of_edit(j, self.offset), of_edit(j, self.activation), report)
            for j, report in enumerate(self.report)
        ]

    def target(self, site: int, kind: TargetKind = "clean") -> Float[Tensor, "n_edits d"]:
        """Return z: init + offset (`clean`), or the activation that achieved the loss, activation + offset (`joint`).

        Raises:
            InvalidSetting: no such kind.
        """
        check_choice(kind, TargetKind, "kind of target")
        return (self.init if kind == "clean" else self.activation)[site] + self.offset[site]

    def tensors(self) -> dict[str, Float[Tensor, "n_edits d"]]:
        """Return everything by number of the site and part: `0.init`, `0.offset`, `0.activation`, ..."""
        parts = {"init": self.init, "offset": self.offset, "activation": self.activation}
        return {f"{site}.{part}": x for part, tensors in parts.items() for site, x in enumerate(tensors)}


def norm_names(sites: Sequence[ValueSite]) -> list[str]:
    """Return what a report calls the norms of each site: by position, and by tensor where two share one."""
    names: list[str] = []
    for site in sites:
        names.append(site.where if site.where not in names else f"{site.where}_{site.point.tensor}")
    return names


def ended_search(
    edit: Edit,
    sites: Sequence[ValueSite],
    init: tuple[Float[Tensor, " d"], ...],
    offset: tuple[Float[Tensor, " d"], ...],
    activation: tuple[Float[Tensor, " d"], ...],
    *,
    reached: bool,
    probability: float,
    steps: int,
    terms: Mapping[str, float],
) -> ValueOf:
    """Return what was found for an edit, with the loss's terms and the norms in its report.

    Args:
        reached: the stop rule has ended the search.
    """
    detail, clamped = dict(terms), False
    for site, name, clean, added in zip(sites, norm_names(sites), init, offset, strict=True):
        length, size = float(added.norm()), float(clean.norm())
        detail[f"{name}_offset"], detail[f"{name}_init"] = length, size
        clamped = clamped or length >= site.clamp * size * (1 - 1e-4)
    stopped = "reached" if reached else "clamped" if clamped else "steps"
    return ValueOf(init, offset, activation, EditReport(edit.id, probability, steps, stopped, detail))


def rewriting_rows(lm: LM, edit: Edit, contexts: Contexts) -> list[Row]:
    """Return the edit's prompt in every context, bare first, with the new answer after it, as it is trained.

    Raises:
        InvalidEdit: one of them is longer than the model's context.
    """
    rows = [encode_trained(lm.tokenizer, edit, prefix) for prefix in contexts.all]
    for prefix, row in zip(contexts.all, rows, strict=True):
        lm.check_length(prefix + edit.text, row, what=f"edit {edit.id!r}, in context,")
    return rows


def kl_row(lm: LM, edit: Edit) -> Row:
    """Return "<subject> is a", at whose subject the model shall go on predicting what it did."""
    assert edit.subject is not None, "methods that search values refuse edits without a subject"
    return encode(lm.tokenizer, f"{edit.subject} is a", subject_span=(0, len(edit.subject)))


def with_kl(sites: Sequence[ValueSite], search: ValueSearch) -> bool:
    """Return whether there is a KL term: with no site on the subject it is a constant zero."""
    return search.kl_factor > 0 and any(s.where == "subject_last" for s in sites)


# --- loss and stop rule, of many edits at once -----------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """One step's loss and its parts; no edit's depends on another's."""

    total: Float[Tensor, " edits"]
    """nll_factor * nll + kl_factor * kl + weight decay."""
    nll: Float[Tensor, " edits"]
    """Mean over rewriting rows of the mean over answer tokens of -log P."""
    kl: Float[Tensor, " edits"]
    """KL(edited || original) at the subject of "<subject> is a"; 0 without a KL term."""
    probability: Float[Tensor, " edits"]
    """Mean over rewriting rows of the answer's geometric-mean token probability."""
    all_likely: Bool[Tensor, " edits"]
    """Whether every answer token is the most likely one in every rewriting row; False without `settled_factor`."""

    def detach(self) -> "Loss":
        """Return the same numbers without their graph."""
        return replace(self, **{f.name: getattr(self, f.name).detach() for f in fields(self)})

    def over(self, search: ValueSearch) -> Bool[Tensor, " edits"]:
        """Return which edits the stop rule ends."""
        if search.stop == "probability":
            over = self.probability.double() >= search.threshold
        else:
            over = self.total.double() < search.threshold
        if search.settled_factor is not None:
            over = over | (self.all_likely & (search.kl_factor * self.kl.double() <= search.settled_kl))
        return over

    def next_nll_factor(self, search: ValueSearch) -> Float[Tensor, " edits"]:
        """Return the weight of the nll in the next step's loss."""
        one = torch.ones_like(self.nll)
        return one if search.settled_factor is None else torch.where(self.all_likely, search.settled_factor, one)


@dataclass(frozen=True)
class Labels:
    """The answer tokens that a batch's rewriting rows predict, row by row, the same number of rows for every edit."""

    tokens: Int[Tensor, " labels"]
    rows: Int[Tensor, " labels"]
    """Which rewriting row each is of; the number of rows for those that count nowhere."""
    per_row: Int[Tensor, " rows"]

    def sums(self, values: Float[Tensor, " labels"]) -> Float[Tensor, " rows"]:
        """Return the sum over each row's labels."""
        return values.new_zeros(len(self.per_row) + 1).index_add(0, self.rows, values)[:-1]


def loss_of(
    log_p: Float[Tensor, "labels vocab"],
    kl: Float[Tensor, " edits"] | None,
    labels: Labels,
    offsets: Sequence[Float[Tensor, "edits d"]],
    inits: Sequence[Float[Tensor, "edits d"]],
    sites: Sequence[ValueSite],
    search: ValueSearch,
    nll_factor: Float[Tensor, " edits"],
) -> Loss:
    """Return the loss of a batch of edits.

    Args:
        log_p: log-probabilities at the labels.
        kl: `kl_divergence` at the KL rows; None without a KL term.
    """
    n_edits = len(nll_factor)
    picked = log_p.gather(1, labels.tokens[:, None])[:, 0]
    nll_rows = (labels.sums(-picked) / labels.per_row).view(n_edits, -1)
    nll = nll_rows.mean(1)
    total = nll * nll_factor
    if kl is not None:
        total = total + search.kl_factor * kl
    for site, offset, init in zip(sites, offsets, inits, strict=True):
        decay = site.weight_decay * offset.norm(dim=1) / init.norm(dim=1) ** 2
        total = total + decay.to(total.device)
    if search.settled_factor is None:
        all_likely = torch.zeros_like(nll, dtype=torch.bool)
    else:
        wrong = (log_p.detach().argmax(-1) != labels.tokens).to(log_p.dtype)
        all_likely = labels.sums(wrong).view(n_edits, -1).sum(1) == 0
    return Loss(
        total=total,
        nll=nll,
        kl=torch.zeros_like(nll) if kl is None else kl,
        probability=(-nll_rows.detach()).exp().mean(1),
        all_likely=all_likely,
    )


def kl_divergence(
    log_p: Float[Tensor, "edits vocab"], original: Float[Tensor, "edits vocab"]
) -> Float[Tensor, " edits"]:
    """Return KL(edited || original) of log-probabilities."""
    return (log_p.exp() * (log_p - original)).sum(1)
