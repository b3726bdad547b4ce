"""The value search as its definition reads: one edit at a time, a full forward pass per step over the edit's rows.

Weights are frozen and the vocabulary is projected only where the loss looks, but nothing is reused between steps or
edits. This is the reference that `search.py` is held to, and what it falls back on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.edits import Edit
from retcon.errors import NonFinite
from retcon.lm.forward import Hook, Point, input_rows, log_probs, logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, Where, pad
from retcon.memory.contexts import Contexts
from retcon.memory.values.objective import (
    ValueOf,
    Values,
    ValueSearch,
    ValueSite,
    ended_search,
    kl_row,
    rewriting_rows,
    with_kl,
)
from retcon.work import silent


def search_values_reference(
    lm: LM,
    edits: Sequence[Edit],
    sites: Sequence[ValueSite],
    contexts: Contexts,
    search: ValueSearch,
    *,
    progress: Callable[[int], None] = silent,
    cache: object = None,
) -> Values:
    """Do as `search_values`, plainly; nothing is kept in the cache.

    Raises:
        NonFinite: a loss came out NaN or infinite; the message names the edit.
    """
    found = []
    with lm.frozen_eval():
        for edit in edits:
            found.append(_search_one(lm, edit, sites, contexts, search))
            progress(len(found))
    return Values.of(found)


@dataclass(frozen=True)
class _Rows:
    """One edit's rows: rewriting rows with their targets, bare prompt first, then perhaps the KL row."""

    batch: Batch
    positions: dict[Where, Int[Tensor, " rows"]]
    """Where each row is edited, per kind of position; the KL row has no prediction position and comes last."""
    n_rewriting: int
    label_rows: Int[Tensor, " labels"]
    label_positions: Int[Tensor, " labels"]
    labels: Int[Tensor, " labels"]


def _rows_of(lm: LM, edit: Edit, contexts: Contexts, has_kl: bool) -> _Rows:
    rows = rewriting_rows(lm, edit, contexts)
    n = len(rows)
    labels = [(j, r.n_prompt - 1 + t, token) for j, r in enumerate(rows) for t, token in enumerate(r.target_ids)]
    rows = input_rows(rows)
    if has_kl:
        rows.append(kl_row(lm, edit))
        labels.append((n, rows[-1].position("subject_last"), -1))
    where: dict[Where, Tensor] = {
        "subject_last": torch.tensor([r.position("subject_last") for r in rows]),
        "prediction": torch.tensor([r.prediction for r in rows[:n]]),
    }
    at, positions, tokens = (torch.tensor(column) for column in zip(*labels, strict=True))
    return _Rows(pad(rows, lm.device), where, n, at, positions, tokens)


def _search_one(lm: LM, edit: Edit, sites: Sequence[ValueSite], contexts: Contexts, search: ValueSearch) -> ValueOf:
    has_kl = with_kl(sites, search)
    rows = _rows_of(lm, edit, contexts, has_kl)
    dtype = torch.promote_types(lm.dtype, torch.float32)
    offsets = [_zeros_at(lm, site.point, dtype) for site in sites]
    optimizer = torch.optim.Adam(offsets, lr=search.learning_rate)
    activation: list[Tensor] = [torch.empty(0)] * len(sites)
    inits: list[Tensor] = []
    original: Tensor | None = None

    def add_offsets(here: Sequence[int]) -> Hook:
        def add(value: Tensor) -> Tensor:
            changed = value
            for s in here:
                positions = rows.positions[sites[s].where].to(value.device)
                activation[s] = value[0, positions[0]].detach().to(dtype)
                at = torch.arange(len(positions), device=value.device), positions
                vectors = offsets[s].to(value.device, value.dtype).expand(len(positions), -1)
                changed = changed.index_put(at, vectors, accumulate=True)
            return changed

        return add

    points = dict.fromkeys(site.point for site in sites)
    hooks = {point: add_offsets([s for s, site in enumerate(sites) if site.point == point]) for point in points}
    step, probability, done, nll_factor = 0, 0.0, False, 1.0
    terms: dict[str, float] = {}
    for step in range(search.steps):
        with torch.enable_grad():
            logits = logits_at(lm, rows.batch, (rows.label_rows, rows.label_positions), hooks)
            inits = inits or [x.clone() for x in activation]  # offset is still 0 in the first pass
            log_p = log_probs(logits)
            nll_rows = _nll_by_row(log_p, rows)
            nll = nll_rows.mean()
            loss = nll_factor * nll
            kl = log_p.new_zeros(())
            if has_kl:
                original = log_p[-1].detach() if original is None else original
                kl = (log_p[-1].exp() * (log_p[-1] - original)).sum()
                loss = loss + search.kl_factor * kl
            for site, offset, init in zip(sites, offsets, inits, strict=True):
                loss = loss + (site.weight_decay * offset.norm() / init.norm() ** 2).to(loss.device)
        probability = float((-nll_rows.detach()).exp().mean())
        terms = {"nll": float(nll.detach()), "kl": float(kl.detach()), "loss": float(loss.detach())}
        if not math.isfinite(terms["loss"]):
            raise NonFinite(f"edit {edit.id!r} ({edit.subject!r}): the loss is {terms['loss']} at step {step}")
        done = probability >= search.threshold if search.stop == "probability" else terms["loss"] < search.threshold
        if search.settled_factor is not None:
            settled = _all_most_likely(log_p, rows)
            nll_factor = search.settled_factor if settled else 1.0
            done = done or (settled and search.kl_factor * terms["kl"] <= search.settled_kl)
        if done or step == search.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _clamp(offsets, inits, sites)
    return ended_search(
        edit,
        sites,
        init=tuple(x.detach().cpu() for x in inits),
        offset=tuple(x.detach().cpu() for x in offsets),
        activation=tuple(x.detach().cpu() for x in activation),
        reached=done,
        probability=probability,
        steps=step,
        terms=terms,
    )


def _zeros_at(lm: LM, point: Point, dtype: torch.dtype) -> Float[Tensor, " d_model"]:
    """Return a vector of the residual stream's width on the device of the point's block."""
    device = lm.site(point.layer, "o_proj").device
    return torch.zeros(lm.d_model, dtype=dtype, device=device, requires_grad=True)


def _nll_by_row(log_p: Float[Tensor, "labels vocab"], rows: _Rows) -> Float[Tensor, " n_rewriting"]:
    """Return the mean negative log-likelihood of the target per token, for each rewriting row."""
    keep = rows.label_rows < rows.n_rewriting
    at = rows.label_rows[keep].to(log_p.device)
    picked = log_p[keep.to(log_p.device)].gather(1, rows.labels[keep].to(log_p.device)[:, None])[:, 0]
    counts = torch.bincount(at, minlength=rows.n_rewriting).to(log_p.dtype)
    return log_p.new_zeros(rows.n_rewriting).index_add(0, at, -picked) / counts


def _all_most_likely(log_p: Float[Tensor, "labels vocab"], rows: _Rows) -> bool:
    """Return whether every target token is the most likely one in every rewriting row."""
    keep = rows.label_rows < rows.n_rewriting
    return bool((log_p.argmax(-1).cpu()[keep] == rows.labels[keep]).all())


@torch.no_grad()
def _clamp(offsets: Sequence[Tensor], inits: Sequence[Tensor], sites: Sequence[ValueSite]) -> None:
    """Bring each offset back onto its own ball; the optimiser's state is not touched."""
    for offset, init, site in zip(offsets, inits, sites, strict=True):
        radius, length = site.clamp * init.norm(), offset.norm()
        if length > radius:
            offset *= radius / length
