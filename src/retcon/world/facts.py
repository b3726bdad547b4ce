"""The facts of the embedded world: relations with several phrasings, triples, and which phrasings were held out."""

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from retcon.edits import MARKER

FACTS = Path(__file__).parent / "facts.json"
HELD_OUT = Path(__file__).parent / "held_out.json"
N_SEEN = 3
"""Phrasings of a fact that the models saw in training; the others are held out."""


@dataclass(frozen=True)
class Relation:
    """A many-to-one relation, such as place of birth."""

    id: str
    """Wikidata property."""
    name: str
    phrasings: tuple[str, ...]
    """Templates with one `{}` for the subject; the object follows after one space, then a full stop."""


@dataclass(frozen=True)
class Fact:
    """One triple."""

    subject: str
    relation: str
    """Id of the relation."""
    object: str


@dataclass(frozen=True)
class TwoHop:
    """A question over two relations: the `second` of whatever is the `first` of the subject."""

    first: str
    second: str
    phrasing: str


@dataclass(frozen=True)
class World:
    """Facts, how each relation can be asked, and which phrasings the models never saw."""

    relations: Mapping[str, Relation]
    facts: tuple[Fact, ...]
    two_hops: tuple[TwoHop, ...]
    held_out: Mapping[tuple[str, str], tuple[int, ...]]
    """(relation id, subject) -> indices of the phrasings left out of training."""

    def seen(self, fact: Fact) -> tuple[str, ...]:
        """Return templates in which the models were told `fact`."""
        hidden = self.held_out[fact.relation, fact.subject]
        return tuple(p for i, p in enumerate(self.relations[fact.relation].phrasings) if i not in hidden)

    def unseen(self, fact: Fact) -> tuple[str, ...]:
        """Return templates in which the models never met the subject of `fact`."""
        phrasings = self.relations[fact.relation].phrasings
        return tuple(phrasings[i] for i in self.held_out[fact.relation, fact.subject])

    def lookup(self, relation: str, subject: str) -> str | None:
        """Return the object of `subject` under `relation`, or None where the world has no such fact."""
        return self._objects.get((relation, subject))

    def objects(self, relation: str) -> tuple[str, ...]:
        """Return the distinct objects of `relation`, sorted."""
        return tuple(sorted({f.object for f in self.facts if f.relation == relation}))

    def sharing(self, fact: Fact) -> tuple[Fact, ...]:
        """Return the neighbours of `fact`: other subjects of its relation with the same object."""
        return tuple(f for f in self._by_object[fact.relation, fact.object] if f.subject != fact.subject)

    @cached_property
    def _objects(self) -> dict[tuple[str, str], str]:
        return {(f.relation, f.subject): f.object for f in self.facts}

    @cached_property
    def _by_object(self) -> dict[tuple[str, str], list[Fact]]:
        groups: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            groups.setdefault((fact.relation, fact.object), []).append(fact)
        return groups


def fill(template: str, subject: str) -> str:
    """Return `template` with the subject in place of its marker."""
    before, after = template.split(MARKER)
    return before + subject + after


@lru_cache(maxsize=1)
def load_world() -> World:
    """Return the world that the package carries."""
    held_out = {
        (relation, subject): tuple(indices)
        for relation, subjects in json.loads(HELD_OUT.read_bytes())["held_out"].items()
        for subject, indices in subjects.items()
    }
    return read_world(FACTS, held_out)


def read_world(
    path: str | os.PathLike[str], held_out: Mapping[tuple[str, str], tuple[int, ...]] | None = None, *, seed: int = 0
) -> World:
    """Read a world from a file of the form of `facts.json`; phrasings are drawn by `seed` if `held_out` is None."""
    record = json.loads(Path(path).read_bytes())
    relations = {r["id"]: Relation(r["id"], r["name"], tuple(r["phrasings"])) for r in record["relations"]}
    facts = tuple(Fact(*triple) for triple in record["facts"])
    if held_out is None:
        held_out = draw_held_out(relations, facts, seed=seed)
    return World(relations, facts, tuple(TwoHop(**hop) for hop in record["two_hops"]), held_out)


def draw_held_out(
    relations: Mapping[str, Relation], facts: Sequence[Fact], *, seed: int
) -> dict[tuple[str, str], tuple[int, ...]]:
    """Draw for each fact the phrasings to hold out: all but `N_SEEN`.

    The ones kept hold a subject at the start of the sentence and one further in, for a name is written with other
    tokens in either place, and a model that never read one of them could not know it.
    """
    drawn = {}
    for fact in facts:
        phrasings = relations[fact.relation].phrasings
        rng = random.Random(f"{seed}/{fact.relation}/{fact.subject}")
        while True:
            seen = rng.sample(range(len(phrasings)), N_SEEN)
            if len({phrasings[i].startswith(MARKER) for i in seen}) == 2:
                break
        drawn[fact.relation, fact.subject] = tuple(i for i in range(len(phrasings)) if i not in seen)
    return drawn
