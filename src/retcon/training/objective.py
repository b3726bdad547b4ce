"""The edit loss: how unlikely a model finds the wanted answers, teacher-forced, per edit.

The input is a prompt and all tokens of its answer but the last; the loss looks at the positions that predict answer
tokens and nowhere else. Log-probabilities are float32 or wider, whatever the model's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.edits import Case, Edit, Query
from retcon.errors import InvalidEdit, UnsupportedModel
from retcon.lm.batches import MAX_BATCH_TOKENS, buckets
from retcon.lm.forward import answer_log_probs, answer_places, gold, next_log_probs
from retcon.lm.model import LM
from retcon.lm.prompts import Row, encode_edit, encode_trained

Answer = Literal["target_new", "target_true"]
"""Which of an edit's answers: the one to write, or the one the model gives now."""


def answer_rows(lm: LM, edits: Sequence[Edit], answer: Answer = "target_new", *, prefix: str = "") -> list[Row]:
    """Tokenise each edit's prompt and answer together, as they are located and measured.

    Args:
        prefix: text before every prompt, ending in its separator.

    Raises:
        InvalidEdit: `target_true` is asked for and an edit has none, or a row is longer than the model's context.
    """
    rows = []
    for edit in edits:
        text = getattr(edit, answer)
        if text is None:
            raise InvalidEdit(
                f"edit {edit.id!r} ({edit.subject!r}) has no {answer}, which these settings need; give the fact "
                "one, or ask for another answer: ",
                python="answer='target_new' (KNE, attribution) or original='own' (CTP)",
                option="--answer new (probe), --set answer=target_new (KNE) or --set original=own (CTP)",
                page="answer = target_new (KNE) or original = own (CTP)",
            )
        row = encode_edit(lm.tokenizer, edit, prefix, answer=text)
        lm.check_length(prefix + edit.text, row, what=f"edit {edit.id!r}:")
        rows.append(row)
    return rows


def trained_rows(lm: LM, edits: Sequence[Edit], *, prefix: str = "", end: bool = False) -> list[Row]:
    """Tokenise each edit's prompt and new answer as they are trained: with the end of the turn if the chat says so.

    Args:
        prefix: text before every prompt, ending in its separator.
        end: with the tokenizer's end-of-text token outside a chat, too.

    Raises:
        InvalidEdit: a row is longer than the model's context.
        UnsupportedModel: `end` is asked for and the tokenizer has no such token.
    """
    if end and lm.tokenizer.eos_token_id is None:
        raise UnsupportedModel(f"{lm.name!r}: its tokenizer has no end-of-text token to train; set target_eos=False")
    rows = [encode_trained(lm.tokenizer, edit, prefix, end=end) for edit in edits]
    for edit, row in zip(edits, rows, strict=True):
        lm.check_length(prefix + edit.text, row, what=f"edit {edit.id!r}:")
    return rows


def rephrasings(case: Case, edit: Edit) -> list[Query]:
    """Return the queries of a case that ask for an edit's new answer in other words.

    Of several edits in a case each has those that ask for its answer alone.
    """
    asked = [query for query in case.queries if query.axis.startswith(("paraphrase", "rephrase"))]
    answers = [other.target_new for other in case.edits]
    if len(answers) == 1:
        return asked
    return [q for q in asked if (q.target or "").strip() == edit.target_new and answers.count(edit.target_new) == 1]


def answer_nll(lm: LM, rows: Sequence[Row], labels: Sequence[Sequence[int]] | None = None) -> Float[Tensor, " n_rows"]:
    """Return L_e of each row, the mean negative log-likelihood per answer token; `labels` replaces the tokens."""
    found = gold(answer_log_probs(lm, rows), rows, labels)
    at = answer_places(rows)[0].to(found.device)
    counts = torch.tensor([len(row.target_ids) for row in rows], device=found.device)
    return found.new_zeros(len(rows)).index_add(0, at, -found) / counts


def token_chunks(rows: Sequence[Row], items: Sequence[int], max_tokens: int = MAX_BATCH_TOKENS) -> list[list[int]]:
    """Group `items` with neighbours in length, at most `max_tokens` padded tokens each."""
    return [[items[i] for i in group] for group in buckets([len(rows[i].ids) for i in items], max_tokens)]


@dataclass(frozen=True)
class AnswerLoss:
    """The edit loss of a fixed set of rows, for any of them at a time."""

    lm: LM
    rows: Sequence[Row]
    labels: Sequence[Sequence[int]] | None = None
    """What each row shall say in place of its own answer tokens."""

    def __call__(self, items: Sequence[int]) -> Float[Tensor, " n"]:
        """Return L_e of these rows, with the surrounding gradient mode."""
        labels = None if self.labels is None else [self.labels[i] for i in items]
        return answer_nll(self.lm, [self.rows[i] for i in items], labels)

    def chunks(self, items: Sequence[int]) -> list[list[int]]:
        """Return `items` in groups that fit in memory."""
        return token_chunks(self.rows, items)


@dataclass(frozen=True)
class PromptLastLoss:
    """What ROME's and MEMIT's fine-tuning baselines minimise: all answer tokens asked of one next-token distribution.

    L_e = -(1/s) sum_j log p(y_j | x), at the prompt's last token. Its minimum for s distinct tokens is log s.
    """

    lm: LM
    rows: Sequence[Row]

    def __call__(self, items: Sequence[int]) -> Float[Tensor, " n"]:
        """Return L_e of these rows, with the surrounding gradient mode."""
        rows = [self.rows[i] for i in items]
        log_p = next_log_probs(self.lm, [Row(row.prompt_ids, row.n_prompt) for row in rows])
        tokens = [torch.tensor(row.target_ids, device=log_p.device) for row in rows]
        return torch.stack([-log_p[i, y].mean() for i, y in enumerate(tokens)])

    def chunks(self, items: Sequence[int]) -> list[list[int]]:
        """Return `items` in groups that fit in memory."""
        return token_chunks(self.rows, items)


@dataclass(frozen=True)
class MeanLoss:
    """The mean of several losses of each edit, such as one for each prefix before its prompt."""

    losses: Sequence[AnswerLoss]

    @property
    def rows(self) -> Sequence[Row]:
        """The rows of the first one."""
        return self.losses[0].rows

    def __call__(self, items: Sequence[int]) -> Float[Tensor, " n"]:
        """Return the mean loss of each of these edits, with the surrounding gradient mode."""
        return torch.stack([loss(items) for loss in self.losses]).mean(0)

    def chunks(self, items: Sequence[int]) -> list[list[int]]:
        """Return `items` in groups that fit in memory, all their rows at once."""
        longest = max(self.losses, key=lambda loss: max(len(row.ids) for row in loss.rows))
        return token_chunks(longest.rows, items, max(1, MAX_BATCH_TOKENS // len(self.losses)))


@dataclass(frozen=True)
class GroupLoss:
    """The mean loss over each edit's group of rows, such as its paraphrases; groups may differ in size."""

    lm: LM
    groups: Sequence[Sequence[Row]]

    @property
    def rows(self) -> Sequence[Row]:
        """The first row of each group."""
        return [group[0] for group in self.groups]

    def __call__(self, items: Sequence[int]) -> Float[Tensor, " n"]:
        """Return the mean loss of each of these edits' groups, with the surrounding gradient mode."""
        each = answer_nll(self.lm, [row for i in items for row in self.groups[i]])
        return torch.stack([part.mean() for part in each.split([len(self.groups[i]) for i in items])])

    def chunks(self, items: Sequence[int]) -> list[list[int]]:
        """Return `items` in groups that fit in memory, all their rows at once."""
        longest = max(len(group) for group in self.groups)
        return token_chunks(self.rows, items, max(1, MAX_BATCH_TOKENS // longest))


@torch.no_grad()
def own_answer_tokens(lm: LM, rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """Return what the model itself would say at each answer position, the answer's earlier tokens given."""
    said: list[tuple[int, ...]] = [()] * len(rows)
    for chunk in token_chunks(rows, range(len(rows))):
        here = [rows[i] for i in chunk]
        found = answer_log_probs(lm, here).argmax(-1).tolist()
        for i, row in zip(chunk, here, strict=True):
            said[i] = tuple(found[: len(row.target_ids)])
            del found[: len(row.target_ids)]
    return said
