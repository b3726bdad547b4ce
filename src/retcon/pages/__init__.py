"""Self-contained pages to read and to send on: Jinja2 templates that escape every text, and one table of facts.

`bench`, `check` and `verify` bring what they found as `FactTable`s; how they look, sort and filter is said here once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from retcon.escaping import printable

if TYPE_CHECKING:
    from jinja2 import Environment

PromptKind = Literal["own", "paraphrase", "follows", "neighbour"]
"""The fact's own prompt (for a fact that must stay, too); its paraphrases; what follows from it; other questions."""
KINDS: tuple[PromptKind, ...] = ("own", "paraphrase", "follows", "neighbour")
PASSES_BY_CHOICE = (
    "A prompt passes where the whole answer is the model's own greedy choice; of neighbours, where the model chooses "
    "as the unedited one does."
)
"""How `check` and `verify` judge a prompt."""


@dataclass(frozen=True)
class Answered:
    """One prompt of a fact, and what the model answers there."""

    kind: PromptKind
    prompt: str
    wanted: str
    before: str
    """The unedited model's answer; empty where it is not known."""
    after: str
    passed: bool
    broke: bool = False
    """It was right earlier: before the edits, or when its fact was written."""
    note: str = ""
    """More to know, such as the entry that broke it."""


@dataclass(frozen=True)
class FactOutcome:
    """What one method, delta or state made of one fact."""

    answers: tuple[Answered, ...]

    def of(self, kind: PromptKind) -> tuple[Answered, ...]:
        """Return the answers to prompts of one kind."""
        return tuple(a for a in self.answers if a.kind == kind)

    @property
    def own(self) -> Answered | None:
        """The answer to the fact's own prompt: the first that failed, else the first."""
        own = self.of("own")
        return next((a for a in own if not a.passed), own[0] if own else None)

    @property
    def untaken(self) -> bool:
        """An own prompt does not give the answer, and did not stop giving it either."""
        return any(not a.passed and not a.broke for a in self.of("own"))

    @property
    def broke(self) -> bool:
        """Something that was right is wrong now."""
        return any(a.broke for a in self.answers)

    @property
    def weight(self) -> float:
        """How bad it is: a failed own prompt weighs most."""
        return sum({"own": 10.0, "paraphrase": 2.0}.get(a.kind, 1.0) for a in self.answers if not a.passed)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of any of its answers, each once."""
        return tuple(dict.fromkeys(a.note for a in self.answers if a.note))

    @property
    def signature(self) -> str:
        """Equal where the same prompts passed."""
        return "".join("01"[a.passed] for a in self.answers)


@dataclass(frozen=True)
class Fact:
    """One row."""

    id: str
    prompt: str
    before: str
    wanted: str
    outcomes: tuple[FactOutcome | None, ...]
    """By side; None where a side was not asked for this fact."""

    @property
    def weight(self) -> float:
        """How bad it is over all sides."""
        return sum(o.weight for o in self.outcomes if o is not None)


@dataclass(frozen=True)
class FactTable:
    """Facts with their prompts, answers before and after, paraphrases and neighbours; several sides to compare."""

    title: str
    sides: tuple[str, ...]
    """What is compared: methods, deltas, states. One is not named in the table."""
    facts: tuple[Fact, ...]
    n_left_out: int = 0
    """Facts that are not in the table, so that the page stays readable."""
    passes: str = ""
    """When a prompt passes, in a sentence."""

    @property
    def kinds(self) -> tuple[PromptKind, ...]:
        """The kinds of prompts that any fact has."""
        has = {a.kind for f in self.facts for o in f.outcomes if o is not None for a in o.answers}
        return tuple(kind for kind in KINDS if kind in has)

    def count(self, what: Literal["broke", "untaken"]) -> int:
        """Return of how many facts it is true on any side."""
        return sum(any(o is not None and getattr(o, what) for o in fact.outcomes) for fact in self.facts)


def worst_first(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """Return the facts by what went wrong, most first; equals keep their order."""
    return tuple(sorted(facts, key=lambda fact: -fact.weight))


def render(template: str, **values: Any) -> str:
    """Return a page. Every text in `values` is escaped; what is markup already comes as `markupsafe.Markup`.

    Args:
        template: a file of `templates/`.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("retcon.pages"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
