"""What a value search looks for: sites, settings, rows of text, and the result (ROME Eq. 4, JEEP Eqs. 8, 11).

Per edit, one vector offset per site is found by gradient descent with everything else frozen; all sites of an edit are
optimised together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from retcon.delta import EditReport
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.lm.prompts import Row, Where, encode, encode_edit
from retcon.memory.contexts import Contexts


@dataclass(frozen=True)
class ValueSite:
    """A place where a value is sought."""

    point: Point
    """Where offset is added, and whose clean value `init` is read."""
    where: Where
    """At which token."""
    clamp: float
    """gamma: ||offset|| <= clamp * ||init||, enforced after every step."""
    weight_decay: float
    """beta: the loss gets weight_decay * ||offset|| / ||init||^2."""


@dataclass(frozen=True, kw_only=True)
class ValueSearch:
    """How values are optimised."""

    steps: int = 30
    """Forward passes at most; the last one only evaluates."""
    learning_rate: float = 0.5
    """Adam's; betas (0.9, 0.999), eps 1e-8."""
    kl_factor: float = 0.0625
    """alpha: weight of KL(edited || original) for "<subject> is a", read at the subject's last token."""
    stop: Literal["probability", "loss"] = "probability"
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

    def target(self, site: int, kind: Literal["clean", "joint"] = "clean") -> Float[Tensor, "n_edits d"]:
        """z: init + offset (`clean`), or the activation that achieved the loss, activation + offset (`joint`)."""
        return (self.init if kind == "clean" else self.activation)[site] + self.offset[site]

    def tensors(self) -> dict[str, Float[Tensor, "n_edits d"]]:
        """Everything by number of the site and part: `0.init`, `0.offset`, `0.activation`, ..."""
        parts = {"init": self.init, "offset": self.offset, "activation": self.activation}
        return {f"{site}.{part}": x for part, tensors in parts.items() for site, x in enumerate(tensors)}


def norm_names(sites: Sequence[ValueSite]) -> list[str]:
    """What a report calls the norms of each site: by token position, and by tensor too where two sites share that."""
    names: list[str] = []
    for site in sites:
        names.append(site.where if site.where not in names else f"{site.where}_{site.point.tensor}")
    return names


def rewriting_rows(lm: LM, edit: Edit, contexts: Contexts) -> list[Row]:
    """The edit's prompt in every context, bare first, with the new answer behind it."""
    return [encode_edit(lm.tokenizer, edit, prefix, answer=edit.target_new) for prefix in contexts.all]


def kl_row(lm: LM, edit: Edit) -> Row:
    """ "<subject> is a", at whose subject the model shall go on predicting what it did."""
    assert edit.subject is not None, "methods that search values refuse edits without a subject"
    return encode(lm.tokenizer, f"{edit.subject} is a", subject_span=(0, len(edit.subject)))


def with_kl(sites: Sequence[ValueSite], search: ValueSearch) -> bool:
    """Whether there is a KL term: with no site on the subject offset never reaches it, and it is a constant zero."""
    return search.kl_factor > 0 and any(s.where == "subject_last" for s in sites)
