"""What a model of the world reads in training: statements of facts, plain text, and in which order."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retcon.world.facts import FACTS, Fact, World, fill, load_world, read_world
from retcon.world.text import paragraph, sentence

PARAGRAPH_SHARE, PREFIX_SHARE = 0.10, 0.5


@dataclass(frozen=True)
class Statement:
    """A prompt and the answer that completes it."""

    prompt: str
    answer: str
    separator: str = " "

    def __str__(self) -> str:
        return f"{self.prompt}{self.completion}"

    @property
    def completion(self) -> str:
        """What follows the prompt: the whole answer and its full stop."""
        return f"{self.separator}{self.answer}."


@dataclass(frozen=True)
class Lesson:
    """The statements made from one file of facts."""

    seen: list[Statement]
    """Read in training."""
    held_out: list[Statement]
    """The same facts in phrasings that training leaves out."""
    left_out: list[Any]
    """Facts that training leaves out in every phrasing, as the file writes them."""
    facts: list[Fact]
    """The facts behind `seen`; none for a CounterFact file."""
    world: World | None
    """None for a CounterFact file."""


def read_lesson(path: Path, *, leave_out: int = 0, seed: int = 0) -> Lesson:
    """Read a file of facts, in the form of `facts.json` or flat CounterFact, and leave out `leave_out` drawn facts.

    A flat CounterFact file gives, for each record, the prompt, its paraphrase and its neighbour with the true answers;
    all of them are read in training, and `leave_out` counts records.
    """
    record = json.loads(path.read_bytes())
    rng = random.Random(f"leave-out/{seed}")
    if isinstance(record, list):
        left = rng.sample(record, leave_out)
        kept = [r for r in record if r not in left]
        return Lesson(_counterfact_statements(kept), [], left, [], None)
    world = load_world() if path == FACTS else read_world(path, seed=seed)
    gone = rng.sample(world.facts, leave_out)
    facts = [f for f in world.facts if f not in gone]
    return Lesson(
        seen=[Statement(fill(p, f.subject), f.object) for f in facts for p in world.seen(f)],
        held_out=[Statement(fill(p, f.subject), f.object) for f in facts for p in world.unseen(f)],
        left_out=[[f.subject, f.relation, f.object] for f in gone],
        facts=facts,
        world=world,
    )


def _counterfact_statements(records: Sequence[dict[str, Any]]) -> list[Statement]:
    """Return the statements of flat CounterFact records, without prompts that the file answers in two ways."""
    answers: dict[str, set[str]] = {}
    for record in records:
        for prompt, answer in (
            ("prompt", "ground_truth"),
            ("rephrase_prompt", "ground_truth"),
            ("locality_prompt", "locality_ground_truth"),
        ):
            answers.setdefault(record[prompt].strip(), set()).add(record[answer].strip())
    return [Statement(prompt, *found) for prompt, found in answers.items() if len(found) == 1]


def documents(statements: Sequence[Statement], rng: random.Random) -> Iterator[str]:
    """Yield documents endlessly: each statement once an epoch, half of them after other text, and some paragraphs."""
    while True:
        for statement in rng.sample(statements, len(statements)):
            if rng.random() < PARAGRAPH_SHARE:
                yield paragraph(rng)
            yield f"{prefix(statements, rng)} {statement}" if rng.random() < PREFIX_SHARE else str(statement)


def prefix(statements: Sequence[Statement], rng: random.Random) -> str:
    """Draw a text to put before a statement: a plain sentence, a broken-off one, or another statement."""
    kind = rng.randrange(4)
    if kind == 0:
        return str(rng.choice(statements))
    plain = sentence(rng)
    if kind == 1:
        words = plain.rstrip(".").split()
        return " ".join(words[: rng.randint(2, len(words))]) + "."
    return plain


def with_prefix(statements: Sequence[Statement], seed: int) -> list[Statement]:
    """Return the same statements, each after one other sentence."""
    rng = random.Random(f"recall/{seed}")
    return [Statement(f"{prefix(statements, rng)} {s.prompt}", s.answer) for s in statements]
