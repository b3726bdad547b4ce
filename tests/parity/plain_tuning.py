"""KNE and CTP written down a second time, straight from their texts: whole weights, whole gradients, torch's own Adam.

Slow, and for models of the GPT-J and LLaMA layouts only. The weights are changed in place and put back by the caller.
"""

from typing import Any

import torch
from torch import Tensor


def ids_of(lm: Any, edit: Any) -> tuple[list[int], int]:
    """Prompt and answer tokens, and how many are the prompt's."""
    row = lm.encode(edit.text, edit.target_new)
    return list(row.ids), row.n_prompt


def token_log_probs(lm: Any, edit: Any, labels: list[int] | None = None) -> Tensor:
    """Log-probability of each answer token (or of each label) given what precedes it."""
    ids, n_prompt = ids_of(lm, edit)
    log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)[n_prompt - 1 : len(ids) - 1]
    return log_p.gather(1, torch.tensor(ids[n_prompt:] if labels is None else labels)[:, None])[:, 0]


# --- KNE ---------------------------------------------------------------------------------------------------------


def kne(lm: Any, edits: list[Any], s: Any) -> dict[str, Tensor]:
    """Eqs. 4 to 11: rows of the down-projections, layer path, right rule, conditional probability, mean over facts."""
    weights = [lm.site(layer, "down_proj").module.weight for layer in range(lm.n_layers)]
    attr = []
    for w in weights:
        trained, total = w.detach().clone(), torch.zeros_like(w)
        for edit in edits:
            for i in range(1, s.n_points + 1):
                w.data = trained * (i / s.n_points)
                w.requires_grad_(True)
                token_log_probs(lm, edit).exp().sum().backward()
                total += w.grad / s.n_points
                w.grad = None
                w.requires_grad_(False)
        w.data = trained
        attr.append((trained * total).sum(1) / len(edits))
    scores = torch.cat(attr).float()
    n = max(1, round(s.p * len(scores)))
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:n]] = True
    masks = chosen.view(len(weights), -1)

    base = [w.detach().clone() for w in weights]
    blocks = [
        torch.zeros(int(m.sum()), w.shape[1], dtype=w.dtype).requires_grad_() for m, w in zip(masks, base, strict=True)
    ]
    optimizer = torch.optim.Adam(blocks, lr=s.learning_rate)

    def put() -> None:
        for w, w0, b, m in zip(weights, base, blocks, masks, strict=True):
            w.data = w0.clone()
            if len(b):
                w.data[m] += s.alpha / len(b) ** 0.5 * b.detach()

    for _ in range(s.epochs):
        put()
        for w in weights:
            w.requires_grad_(True)
            w.grad = None
        losses = [-token_log_probs(lm, e).mean() for e in edits]
        kept = [loss for loss in losses if float(loss.detach()) >= s.stop_loss]
        if not kept:
            break
        (sum(kept) / len(edits)).backward()
        for w, b, m in zip(weights, blocks, masks, strict=True):
            b.grad = s.alpha / max(1, len(b)) ** 0.5 * w.grad[m]
            w.requires_grad_(False)
        optimizer.step()
    put()
    return {
        lm.site(layer, "down_proj").name: w.detach() - w0
        for layer, (w, w0) in enumerate(zip(weights, base, strict=True))
    }


# --- CTP ---------------------------------------------------------------------------------------------------------


def ctp_release(lm: Any, edits: list[Any], s: Any, orders: list[list[int]]) -> dict[str, Tensor]:
    """The released loop: one Adam over W1, b1, W2, b2 of all layers, masks on gradients, lambda on the second loss.

    `orders` are the edits' places in each epoch, so that both implementations see the same mini-batches.
    """
    slots = [
        (lm.site(layer, kind), kind == "down_proj") for layer in range(lm.n_layers) for kind in ("up_proj", "down_proj")
    ]
    named: dict[str, Tensor] = {}
    for site, _ in slots:
        named[site.name] = site.module.weight
        if site.module.bias is not None:
            named[site.bias_name] = site.module.bias
    for parameter in named.values():
        parameter.requires_grad_(True)
    base = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = torch.optim.Adam(list(named.values()), lr=s.learning_rate)
    with torch.no_grad():
        old = []
        for edit in edits:
            ids, n_prompt = ids_of(lm, edit)
            old.append(lm.model(torch.tensor([ids])).logits[0, n_prompt - 1 : len(ids) - 1].argmax(-1).tolist())

    def loss(batch: list[int], labels: list[list[int]] | None = None) -> Tensor:
        """The mean over all answer tokens of the batch."""
        return -torch.cat([token_log_probs(lm, edits[i], None if labels is None else labels[i]) for i in batch]).mean()

    def masked(nodes: list[list[int]]) -> None:
        for (site, is_value), kept in zip(slots, nodes, strict=True):
            mask = torch.zeros(site.module.weight.shape[1 if is_value else 0], dtype=torch.bool)
            mask[kept] = True
            if is_value:  # b2 stays whole
                site.module.weight.grad[:, ~mask] = 0
            else:
                site.module.weight.grad[~mask] = 0
                if site.module.bias is not None:
                    site.module.bias.grad[~mask] = 0

    positive: list[list[int]] = []
    negative: list[list[int]] = []
    for epoch in range(s.epochs):
        if epoch == 0 or (s.reassess and epoch % s.reassess == 0):
            optimizer.zero_grad()
            for first in range(0, len(edits), s.batch_size):
                loss(list(range(len(edits)))[first : first + s.batch_size]).backward()
            positive, negative = [], []
            for site, is_value in slots:
                g = site.module.weight.grad if is_value else site.module.weight.grad.T  # D x M
                z = (g - g.mean(1, keepdim=True)) / g.std(1, keepdim=True)
                order = z.abs().mean(0).argsort(descending=True, stable=True)
                positive.append(order[: s.n_positive].tolist())
                negative.append(z.abs().mean(0).argsort(stable=True)[: s.n_negative].tolist())
        for first in range(0, len(edits), s.batch_size):
            batch = orders[epoch][first : first + s.batch_size]
            optimizer.zero_grad()
            loss(batch).backward()
            masked(positive)
            optimizer.step()
            optimizer.zero_grad()
            (s.contrast_weight * loss(batch, old)).backward()
            masked(negative)
            optimizer.step()
    for parameter in named.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return {name: parameter.detach() - base[name] for name, parameter in named.items()}
