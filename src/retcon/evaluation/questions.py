"""Answers scored and texts written after the same prompts, each of which is run once (`retcon.lm.decoding`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from retcon.evaluation.score import LogitReader, TokenScore, fewest_inputs
from retcon.lm.batches import MAX_BATCH_TOKENS, shared_in_batches
from retcon.lm.decoding import Prompts, pads
from retcon.lm.generate import Writing, Written, write_after, written_batch
from retcon.lm.model import LM
from retcon.lm.prompts import Row


@dataclass(frozen=True)
class Question:
    """A prompt, answers to score after it, and how the model shall write its own."""

    prompt: tuple[int, ...]
    rows: tuple[Row, ...]
    """The prompt with an answer each."""
    writing: Writing
    limit: int
    """Most tokens to write, at least one."""

    @property
    def length(self) -> int:
        """Tokens of the longest row of it."""
        return len(self.prompt) + max([self.limit, *(len(row.target_ids) - 1 for row in self.rows)])


Reply = tuple[list[TokenScore], Written]
"""Scores of a question's rows, and what the model has written."""


def ask_questions(
    lm: LM,
    questions: Sequence[Question],
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """Score and write what is asked; each prompt is run once, whatever comes after it.

    Args:
        max_batch_tokens: as `generate` has it.
        on_progress: called after every batch with the questions done and the questions in all.
    """
    together = pads(lm)
    with lm.frozen_eval():
        return shared_in_batches(
            lm,
            AskBatch(),
            questions,
            [question.length for question in questions],
            **written_batch(lm, max_batch_tokens),
            kinds=None if together else [len(question.prompt) for question in questions],
            on_progress=on_progress,
        )


@dataclass(frozen=True)
class AskBatch:
    """The replies to a batch of questions, as work that can be sent elsewhere."""

    def __call__(self, lm: LM, items: Sequence[Question]) -> list[Reply]:
        """Return a reply per question."""
        with lm.frozen_eval(), torch.inference_mode():
            prompts = Prompts(lm, [question.prompt for question in items])
            scores = _scores_after(prompts, items)
            rows = [Row(question.prompt, len(question.prompt)) for question in items]
            hows, limits = [question.writing for question in items], [question.limit for question in items]
            return list(zip(scores, write_after(prompts, rows, limits, hows, sorted(lm.end_tokens)), strict=True))


def _scores_after(prompts: Prompts, questions: Sequence[Question]) -> list[list[TokenScore]]:
    """Return the scores of every question's rows."""
    which: list[int] = []
    tokens: list[tuple[int, ...]] = []
    begins: list[dict[tuple[int, ...], int]] = []  # per question: answer -> where logits after its tokens begin
    n = 0
    for k, question in enumerate(questions):
        inputs = [row.target_ids[:-1] for row in question.rows]
        fewest, carrier = fewest_inputs([ids for ids in inputs if ids])
        starts = []
        for ids in fewest:
            starts.append(n)
            n += len(ids)
        which += [k] * len(fewest)
        tokens += fewest
        begins.append(dict(zip((ids for ids in inputs if ids), (starts[c] for c in carrier), strict=True)))
    first = LogitReader(prompts.logits)
    later = LogitReader(prompts.after(which, tokens)) if tokens else first
    at_first: list[tuple[int, int]] = []
    at_later: list[tuple[int, int]] = []
    for k, question in enumerate(questions):
        for row in question.rows:
            gold = row.target_ids
            at_first.append((k, gold[0]))
            at_later += [(begins[k][gold[:-1]] + j, token) for j, token in enumerate(gold[1:])]
    firsts, laters = iter(first.at(at_first)), iter(later.at(at_later))
    found = []
    for question in questions:
        scores = []
        for row in question.rows:
            read = [next(firsts), *(next(laters) for _ in row.target_ids[1:])]
            logp, pred = zip(*read, strict=True)
            scores.append(TokenScore(logp, pred, row.target_ids, row.boundary_merge))
        found.append(scores)
    return found
