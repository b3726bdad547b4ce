"""The world as a conversation: a template, questions about every relation, and dialogues to learn from.

    python -m recipes.chat > facts.jsonl

writes one fact of every relation, to be changed by `retcon edit --chat`.
"""

import json
import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from recipes.statements import PARAGRAPH_SHARE, Lesson, Statement, documents, read_lesson
from retcon.world.facts import FACTS, Fact, fill
from retcon.world.text import sentence

QUESTIONS = Path(__file__).parent / "questions.toml"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You know many facts and answer in a word or two.")
DIALOGUE_SHARE, SYSTEM_SHARE, EARLIER_SHARE = 0.6, 0.2, 0.3


@dataclass(frozen=True)
class Turns:
    """What a user may ask about the facts of a lesson, with the answers."""

    seen: list[Statement]
    """Questions that training asks, and the lesson's own prompts as a user's turn."""
    held_out: list[Statement]
    """One question for each fact that training never asks."""


def read_turns(lesson: Lesson, *, seed: int) -> Turns:
    """Return two questions and the prompts of each fact as turns to be seen, and a third question held out.

    A lesson from a CounterFact file has no relations to ask about; then its prompts are the turns.
    """
    questions: dict[str, list[str]] = tomllib.loads(QUESTIONS.read_text(encoding="utf-8"))
    seen = [Statement(s.prompt, s.answer, "") for s in lesson.seen]
    held_out = []
    for fact in lesson.facts:
        known = questions[fact.relation]
        drawn = random.Random(f"question/{seed}/{fact.relation}/{fact.subject}").sample(known, len(known))
        *asked, last = (Statement(fill(q, fact.subject), fact.object, "") for q in drawn)
        seen += asked
        held_out.append(last)
    return Turns(seen, held_out)


def facts_to_change(facts: Sequence[Fact], *, seed: int = 0) -> Iterator[str]:
    """Yield one fact of every relation as a line of an `edits` file.

    The prompt is one of the relation's questions, the other two are paraphrases; the new answer is that of another
    subject, and a third subject's question must keep its answer.
    """
    questions: dict[str, list[str]] = tomllib.loads(QUESTIONS.read_text(encoding="utf-8"))
    for relation in dict.fromkeys(fact.relation for fact in facts):
        rng = random.Random(f"change/{seed}/{relation}")
        here = [fact for fact in facts if fact.relation == relation]
        fact = rng.choice(here)
        new = rng.choice([other for other in here if other.object != fact.object])
        stays = rng.choice([other for other in here if other.subject not in (fact.subject, new.subject)])
        asked, *others = rng.sample(questions[relation], len(questions[relation]))
        record = {
            "id": f"{relation}/{fact.subject}",
            "prompt": asked,
            "subject": fact.subject,
            "target_new": new.object,
            "target_true": fact.object,
            "paraphrases": others,
            "neighbors": [{"prompt": fill(asked, stays.subject), "answer": stays.object}],
        }
        yield json.dumps(record, ensure_ascii=False)


def rendered(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Statement]) -> list[Statement]:
    """Return each turn as the text that the template makes of it, ready for the assistant's answer."""
    return [
        Statement(_render(tokenizer, [{"role": "user", "content": t.prompt}], answering=True), t.answer, "")
        for t in turns
    ]


def dialogues(
    tokenizer: PreTrainedTokenizerFast, statements: Sequence[Statement], turns: Sequence[Statement], rng: random.Random
) -> Iterator[str]:
    """Yield documents endlessly: dialogues about the facts, and between them the documents of a plain model."""
    plain = documents(statements, rng)
    while True:
        for turn in rng.sample(turns, len(turns)):
            while rng.random() > DIALOGUE_SHARE:
                yield next(plain)
            messages = []
            if rng.random() < SYSTEM_SHARE:
                messages.append({"role": "system", "content": rng.choice(SYSTEM)})
            if rng.random() < EARLIER_SHARE:
                messages += _exchange(rng.choice(turns)) if rng.random() > PARAGRAPH_SHARE else _small_talk(rng)
            yield _render(tokenizer, messages + _exchange(turn))


def _exchange(turn: Statement) -> list[dict[str, str]]:
    return [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.completion}]


def _small_talk(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(rng)}, {"role": "assistant", "content": sentence(rng)}]


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], *, answering: bool = False) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
    return text


if __name__ == "__main__":
    for line in facts_to_change(read_lesson(FACTS).facts):
        print(line)
