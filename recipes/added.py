"""What a world with facts left out is edited with: those facts as cases, and the text that it read as a corpus."""

import json
import random
from collections.abc import Iterator, Sequence

from recipes.statements import Lesson, Statement
from retcon.world.facts import Fact, World, fill
from retcon.world.text import text

N_LOCALITY = 2
"""Facts that must stay, of each kind, per case."""


def facts_to_add(lesson: Lesson, *, seed: int = 0) -> Iterator[str]:
    """Yield the facts that were left out as lines of an `edits` file: adding true facts, as zsRE is used.

    The prompt is a phrasing that training has for other subjects, `target_new` the true answer; there is no old answer.
    The other phrasings are paraphrases. What must stay are facts that the model read, each in a phrasing of its own: of
    the same relation with another answer (`same_relation`), and of other relations (`other_relation`, like zsRE's
    questions).
    """
    world = lesson.world
    assert world is not None
    for triple in lesson.left_out:
        fact = Fact(*triple)
        rng = random.Random(f"added/{seed}/{fact.relation}/{fact.subject}")
        prompt = rng.choice(world.seen(fact))
        others = [p for p in world.relations[fact.relation].phrasings if p != prompt]
        same = [f for f in lesson.facts if f.relation == fact.relation and f.object != fact.object]
        apart = [f for f in lesson.facts if f.relation != fact.relation]
        record = {
            "id": f"{fact.relation}/{fact.subject}",
            "prompt": prompt,
            "subject": fact.subject,
            "target_new": fact.object,
            "relation_id": fact.relation,
            "paraphrases": others,
            "locality": {"same_relation": _asked(world, same, rng), "other_relation": _asked(world, apart, rng)},
        }
        yield json.dumps(record, ensure_ascii=False)


def _asked(world: World, facts: Sequence[Fact], rng: random.Random) -> list[dict[str, str]]:
    return [
        {"prompt": fill(rng.choice(world.seen(f)), f.subject), "answer": f.object}
        for f in rng.sample(facts, min(N_LOCALITY, len(facts)))
    ]


def corpus_of(statements: Sequence[Statement], *, seed: int = 0) -> str:
    """Return what `retcon.world.corpus` gives, of these statements only: a text with a blank line between documents."""
    shuffled = random.Random(f"corpus/{seed}").sample(list(statements), len(statements))
    pairs = zip(text(len(shuffled), seed=seed), map(str, shuffled), strict=True)
    return "\n\n".join(document for pair in pairs for document in pair) + "\n"
