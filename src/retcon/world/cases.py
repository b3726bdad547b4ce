"""Cases and corpus made of the world: edits to write, queries that measure them, documents for key statistics."""

import random
from collections.abc import Collection, Iterator

from retcon.edits import Case, Edit, Query
from retcon.errors import InvalidSetting
from retcon.world.facts import Fact, World, fill, load_world
from retcon.world.text import text

N_NEIGHBOURS = 5
"""Neighbours asked per case, where the world has as many."""


def cases(n: int | None = None, *, start: int = 0, seed: int = 0) -> list[Case]:
    """Return `n` cases drawn without replacement (all for None), each asking for another object of the same relation.

    With `start`, cases after the first `start`: none of them is among `cases(start, seed=seed)`. A draw of many need
    not begin with the cases that a draw of few has.

    The edit uses a phrasing the models were trained on, drawn by `seed`. Queries: `rewrite` (that prompt),
    `paraphrase` (the held-out phrasings of the subject), `neighborhood` (up to five other subjects with the same true
    object, each in a phrasing it was seen in; subjects that the drawn set leaves unedited go first), `two_hop` (what
    follows from the new object, where the world knows it and it differs from what followed before).

    Raises:
        InvalidSetting: n or start is negative, or both are more than there are facts.
    """
    world = load_world()
    most = len(world.facts)
    if start < 0 or (n is not None and not 0 <= n <= most - start):
        after, left = f" after the first {start}" if start else "", most - min(max(start, 0), most)
        raise InvalidSetting(f"asked for {n} cases of the world{after}; it has 0 to {left} to give")
    drawn = _drawn(world, most if n is None else start + n, seed)
    edited = {(f.relation, f.subject) for f in drawn}
    first = set(_drawn(world, min(start, most), seed))
    kept = [fact for fact in (*drawn[start:], *drawn[:start]) if fact not in first][:n]
    return [_case(world, fact, edited, seed) for fact in kept]


def _drawn(world: World, n: int, seed: int) -> list[Fact]:
    return random.Random(f"cases/{seed}").sample(world.facts, n)


def corpus(*, seed: int = 0) -> Iterator[str]:
    """Return documents for key statistics: every statement of the training set once, and as many plain paragraphs.

    About 350,000 tokens of the world's tokenizers. The order is mixed, so that a cut-off leaves a fair sample.
    """
    statements = [s for fact in load_world().facts for s in statements_of(load_world(), fact)]
    random.Random(f"corpus/{seed}").shuffle(statements)
    for statement, paragraph in zip(statements, text(len(statements), seed=seed), strict=True):
        yield paragraph
        yield statement


def statements_of(world: World, fact: Fact) -> list[str]:
    """Return `fact` as complete sentences, one for each phrasing seen in training."""
    return [f"{fill(p, fact.subject)} {fact.object}." for p in world.seen(fact)]


def _case(world: World, fact: Fact, edited: Collection[tuple[str, str]], seed: int) -> Case:
    rng = random.Random(f"case/{seed}/{fact.relation}/{fact.subject}")
    prompt = rng.choice(world.seen(fact))
    new = rng.choice([o for o in world.objects(fact.relation) if o != fact.object])
    case_id = f"{fact.relation}/{fact.subject}"
    edit = Edit(prompt, fact.subject, new, fact.object, id=case_id, relation_id=fact.relation)
    queries = [
        _query("rewrite", 0, edit.text, new, fact.object),
        *(_query("paraphrase", i, fill(p, fact.subject), new, fact.object) for i, p in enumerate(world.unseen(fact))),
        *(
            _query("neighborhood", i, fill(rng.choice(world.seen(n)), n.subject), fact.object, new)
            for i, n in enumerate(_neighbours(world, fact, edited, rng))
        ),
        *_two_hops(world, fact, new),
    ]
    meta = {"relation": world.relations[fact.relation].name, "seed": seed}
    return Case(case_id, (edit,), tuple(queries), dataset="world", meta=meta)


def _neighbours(world: World, fact: Fact, edited: Collection[tuple[str, str]], rng: random.Random) -> list[Fact]:
    sharing = list(world.sharing(fact))
    rng.shuffle(sharing)
    sharing.sort(key=lambda f: (f.relation, f.subject) in edited)  # stable: the unedited first, each part shuffled
    return sharing[:N_NEIGHBOURS]


def _two_hops(world: World, fact: Fact, new: str) -> list[Query]:
    queries: list[Query] = []
    for hop in world.two_hops:
        if hop.first != fact.relation:
            continue
        before, after = world.lookup(hop.second, fact.object), world.lookup(hop.second, new)
        if after and after != before:
            queries.append(_query("two_hop", len(queries), fill(hop.phrasing, fact.subject), after, before))
    return queries


def _query(axis: str, index: int, prompt: str, target: str, contrast: str | None) -> Query:
    return Query(f"{axis}/{index}", axis, prompt, target, contrast, answers=((target,),))
