"""Training a model from nothing on statements, and measuring what it recalls."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recipes.statements import Statement

ROW_TOKENS, ROWS_PER_STEP = 96, 24
PEAK_RATE, FINAL_SHARE, WARM_UP_SHARE, WEIGHT_DECAY = 2e-3, 0.02, 0.03, 0.1
BALANCE_RATE = 1e-3
"""How far a router's bias for an expert moves after a step, towards an even load (Wang et al., arXiv:2408.15664)."""
ANSWER_MARGIN = 2
"""Tokens generated beyond the answer, so that an answer that goes on is seen to be wrong."""


@dataclass(frozen=True)
class Recall:
    """How many of the prompts are answered in full, ended by a full stop, in greedy generation."""

    right: int
    asked: int

    def __str__(self) -> str:
        return f"{self.right} of {self.asked} ({100 * self.right / max(self.asked, 1):.1f} %)"


def rows(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], end: int) -> Iterator[list[int]]:
    """Yield rows of ROW_TOKENS ids; each starts at the start of a document, which its predecessor may have cut.

    Args:
        end: id of the token that ends a document.
    """
    row: list[int] = []
    for document in documents:
        ids = [*tokenizer(document)["input_ids"], end][:ROW_TOKENS]
        row += ids
        if len(row) >= ROW_TOKENS:
            yield row[:ROW_TOKENS]
            row = ids if len(row) > ROW_TOKENS else []


def train(model: PreTrainedModel, stream: Iterator[list[int]], *, n_tokens: int) -> None:
    """Train on `n_tokens` of `stream` by AdamW with warm-up and cosine decay, in bfloat16 autocast.

    Where routers have a bias for each expert, it is moved after each step so that experts are asked about equally
    often. Progress is printed every 50 steps.
    """
    n_steps = math.ceil(n_tokens / (ROW_TOKENS * ROWS_PER_STEP))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, n_steps))
    model.train()
    balance = Balance(model)
    started = time.monotonic()
    for step in range(1, n_steps + 1):
        batch = torch.tensor([next(stream) for _ in range(ROWS_PER_STEP)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        balance.step()
        if step % 50 == 0 or step == n_steps:
            spent = time.monotonic() - started
            left = spent / step * (n_steps - step) / 60
            print(f"step {step}/{n_steps}  loss {loss.item():.3f} nats  {left:.1f} min left", flush=True)
    balance.close()
    model.eval()


class Balance:
    """The biases of a model's routers, which take no gradient, and how often each expert was asked since the last step.

    A model without such routers has nothing to balance.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.routers: list[Any] = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
        self.asked: list[Tensor] = [torch.zeros_like(r.e_score_correction_bias) for r in self.routers]
        self._hooks = [
            router.register_forward_hook(partial(self._count, place)) for place, router in enumerate(self.routers)
        ]

    def _count(self, place: int, router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen = output[-1].flatten()
        self.asked[place] += torch.bincount(chosen, minlength=len(self.asked[place]))

    @torch.no_grad()
    def step(self) -> None:
        """Move each bias up where its expert was asked less than the average, down where more; begin to count anew."""
        for router, asked in zip(self.routers, self.asked, strict=True):
            router.e_score_correction_bias += BALANCE_RATE * torch.sign(asked.mean() - asked)
            asked.zero_()

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()


def rate_share(step: int, n_steps: int) -> float:
    """Return the learning rate as a share of its peak: linear up, then half a cosine down to FINAL_SHARE."""
    warm_up = max(1, round(WARM_UP_SHARE * n_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, n_steps - warm_up)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.inference_mode()
def measure_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, statements: Sequence[Statement], batch_size: int = 64
) -> Recall:
    """Generate greedily from each prompt; right when the text goes on with the answer and its full stop.

    Prompts of equal length share a batch, so nothing is padded.
    """
    by_length: dict[int, list[tuple[list[int], Statement]]] = {}
    for statement in statements:
        ids = tokenizer(statement.prompt)["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, statement))
    right = 0
    for group in by_length.values():
        for i in range(0, len(group), batch_size):
            part = group[i : i + batch_size]
            ids = torch.tensor([ids for ids, _ in part])
            expected = [s.completion for _, s in part]
            longest = max(len(tokenizer(e, add_special_tokens=False)["input_ids"]) for e in expected)
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=longest + ANSWER_MARGIN,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
            right += sum(found.startswith(e) for found, e in zip(texts, expected, strict=True))
    return Recall(right, len(statements))
