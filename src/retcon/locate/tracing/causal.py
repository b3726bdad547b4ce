"""Causal tracing of many prompts, cell by cell."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from inspect import signature
from itertools import chain, groupby

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.edits import Edit, list_of_edits
from retcon.errors import InvalidSetting, RetconWarning
from retcon.lm.forward import logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, encode_edit
from retcon.locate.embeddings import changing_embeddings
from retcon.locate.sample import why_none_is_left, with_subject
from retcon.locate.tracing.cells import Cell, cell_of, restoring_hooks, trimmed
from retcon.locate.tracing.packing import replayed_logits
from retcon.locate.tracing.prompt import (
    PROJECTIONS,
    Prompt,
    corrupting,
    embedding_deviation,
    probability,
    refuse_non_finite,
    run_clean_and_corrupted,
)
from retcon.locate.tracing.traces import Trace, Traces, Tracing
from retcon.work import silent


def causal_trace(
    lm: LM, edits: Iterable[Edit], settings: Tracing | None = None, *, progress: Callable[[int, int], None] = silent
) -> Traces:
    """Trace the fact of every edit (its prompt; `target_true` where given) on the weights as they are now.

    A prompt is left out where its subject is not in it, or where the model's next token begins another answer.

    Raises:
        InvalidSetting: no prompt is left.
        NonFinite: a probability is NaN or infinite.
    """
    settings, edits = settings or Tracing(), list_of_edits(edits)
    kept, skipped = with_subject(edits)
    traces: list[Trace] = []
    tried = False
    with lm.frozen_eval(), torch.no_grad():
        deviation = embedding_deviation(lm, [e.subject for e in kept if e.subject is not None])
        for done, edit in enumerate(kept, 1):
            way = replace(settings, replayed=settings.replayed and _can_replay(lm, edit))
            prompt = run_clean_and_corrupted(lm, edit, way, deviation)
            if prompt is None:
                skipped[edit.id] = "the model does not say the original answer"
            else:
                if way.replayed and not tried:
                    tried = True
                    if not _replay_agrees(lm, prompt, settings):
                        way = settings = replace(settings, replayed=False)
                traces.append(trace_prompt(lm, edit, prompt, way))
            progress(len(edits) - len(kept) + done, len(edits))
    if not traces:
        raise InvalidSetting(f"nothing to trace: {why_none_is_left(skipped)}")
    return Traces(tuple(traces), skipped, deviation, settings)


def trace_prompt(lm: LM, edit: Edit, prompt: Prompt, settings: Tracing) -> Trace:
    """Return all cells of a prompt."""
    n = len(prompt.row.ids)
    tokens = range(prompt.subject.start if settings.replayed else 0, n)  # earlier tokens were never corrupted
    cells = [cell_of(lm, k, layer, t, settings) for k in settings.kinds for layer in range(lm.n_layers) for t in tokens]
    if settings.replayed:
        cells = [seen for cell in cells if (seen := trimmed(lm, cell, n - 1)).clean]
    scores = {k: torch.full((n, lm.n_layers), prompt.low, dtype=torch.float64) for k in settings.kinds}
    groups = _groups(prompt, cells, settings)
    prob = [probability(_logits(lm, prompt, group, settings), prompt.answer) for group in groups]
    found = refuse_non_finite(torch.cat(prob), edit).view(-1, settings.samples).mean(1).tolist() if prob else []
    for cell, score in zip(chain.from_iterable(groups), found, strict=True):
        scores[cell.kind][cell.token, cell.layer] = score
    tokenizer = lm.tokenizer
    return Trace(
        id=edit.id,
        tokens=tuple(tokenizer.decode([i]) for i in prompt.row.ids),
        subject=prompt.subject,
        answer=tokenizer.decode([prompt.answer]),
        assumed=edit.target_true is None,
        high=prompt.high,
        low=prompt.low,
        scores=scores,
    )


def _groups(prompt: Prompt, cells: Sequence[Cell], settings: Tracing) -> list[list[Cell]]:
    """Return the cells that are done at once: as many as fit; in a replay only those of one first block."""
    n_tokens, most = len(prompt.row.ids), settings.max_batch_tokens // settings.samples
    if not settings.replayed:
        each = max(1, most // n_tokens)
        return [list(cells[i : i + each]) for i in range(0, len(cells), each)]
    groups: list[list[Cell]] = []
    for _, prefix_group in groupby(sorted(cells, key=lambda cell: cell.first), lambda cell: cell.first):
        groups.append([])
        tokens = 0
        for cell in prefix_group:
            tokens += n_tokens - cell.token
            if groups[-1] and tokens > most:
                groups.append([])
                tokens = n_tokens - cell.token
            groups[-1].append(cell)
    return groups


def _logits(lm: LM, prompt: Prompt, cells: Sequence[Cell], settings: Tracing) -> Float[Tensor, "rows vocab"]:
    """Return the logits after the prompt for every cell and sample, cell by cell."""
    if settings.replayed:
        return replayed_logits(lm, prompt, cells)
    rows = torch.arange(len(cells) * settings.samples).view(len(cells), -1)
    samples = torch.arange(settings.samples).repeat(len(cells))
    ids = torch.tensor([prompt.row.ids] * len(samples), device=lm.device)
    last = torch.full_like(samples, prompt.row.prediction)
    with changing_embeddings(lm, corrupting(samples, prompt.subject, prompt.noise, settings)):
        hooks = restoring_hooks(prompt, cells, rows, torch.tensor([[cell.token] for cell in cells]), range(lm.n_layers))
        return logits_at(lm, Batch(ids, torch.ones_like(ids).bool()), (rows.flatten(), last), hooks)


def _can_replay(lm: LM, edit: Edit) -> bool:
    """Return whether a prompt's cells can share rows of a replay; else whole passes restore them."""
    if lm.layout.earlier != "attention":  # blocks read earlier tokens in other ways, too
        return False
    if getattr(lm.config, "_attn_implementation", None) not in ("eager", "sdpa"):  # the others take no mask
        return False
    if getattr(lm.config, "alibi", False) or "local" in getattr(lm.config, "attention_layers", ()):
        return False  # places are counted along the row, and cells side by side would not have their own
    if "position_ids" not in signature(type(lm.model).forward).parameters:  # nor can they be given theirs
        return False
    window = getattr(lm.config, "sliding_window", None)
    if window is not None and len(encode_edit(lm.tokenizer, edit).ids) > window:
        return False
    # CodeGen fuses its projections in an order of its own; an MLP may be one of routed experts
    return all(lm.has(layer, kind) for layer in range(lm.n_layers) for kind in (*PROJECTIONS, "down_proj"))


def _replay_agrees(lm: LM, prompt: Prompt, settings: Tracing) -> bool:
    """Return whether both ways agree at three tokens of the middle layer, for two samples; if not, warn."""
    prompt, settings = prompt.first_samples(2), replace(settings, samples=min(2, settings.samples))
    last = len(prompt.row.ids) - 1
    tokens = sorted({prompt.subject.start, prompt.subject.stop - 1, last})
    for kind in settings.kinds:
        cells = [cell_of(lm, kind, lm.n_layers // 2, token, settings) for token in tokens]
        cells = [cell for cell in cells if trimmed(lm, cell, last).clean]
        plain = _logits(lm, prompt, cells, replace(settings, replayed=False)).float().softmax(-1)
        fast = _logits(lm, prompt, [trimmed(lm, cell, last) for cell in cells], settings).float().softmax(-1)
        allowed = 0.02 if lm.dtype in (torch.float16, torch.bfloat16) else 1e-4
        off = float((plain - fast).abs().max())
        if not off <= allowed:
            warnings.warn(
                f"{lm.name!r}: running only the layers above a restored {kind} is {off:.2g} off whole forward passes; "
                "whole passes are used, which takes longer",
                RetconWarning,
                stacklevel=3,
            )
            return False
    return True
