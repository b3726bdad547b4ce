"""A plain transcription of the locate-then-edit recipe: one row at a time, module paths spelled out, no library code.

It follows the papers' algorithms line by line on a GPT-J or LLaMA model of transformers and is slow on purpose. Parity
tests hold the library to it.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PATHS = {
    "gptj": dict(block="transformer.h.{}", mlp="mlp.fc_out", attn="attn.out_proj"),
    "llama": dict(block="model.layers.{}", mlp="mlp.down_proj", attn="self_attn.o_proj"),
}


@dataclass
class PlainRow:
    """One prompt row: prompt ids, target ids, subject position."""

    prompt: list[int]
    target: list[int]
    subject: int

    def at(self, where: str) -> int:
        return self.subject if where == "subject_last" else len(self.prompt) - 1


@dataclass
class Place:
    """Where a delta is added."""

    layer: int
    tensor: str
    where: str
    clamp: float
    decay: float


def module(model: Any, layer: int, tensor: str) -> Any:
    paths = PATHS[model.config.model_type]
    block = paths["block"].format(layer)
    return model.get_submodule(block if tensor == "block" else f"{block}.{paths[tensor]}")


def forward(model: Any, ids: list[int], adds: list[tuple[int, str, int, Tensor]] = (), reads: Any = ()) -> Any:
    """Logits (seq, vocab) of one row, and the tensors read: (layer, tensor or 'key'/'attn_key') -> (seq, width)."""
    seen: dict[tuple[int, str], Tensor] = {}
    with ExitStack() as stack:
        for layer, name in reads:

            def read_in(_: Any, args: Any, *, key: Any = (layer, name)) -> None:
                seen[key] = args[0][0].detach()

            def read_out(_: Any, __: Any, out: Any, *, key: Any = (layer, name)) -> None:
                seen[key] = (out[0] if isinstance(out, tuple) else out)[0].detach()

            if name in ("key", "attn_key"):
                target = module(model, layer, "mlp" if name == "key" else "attn")
                stack.callback(target.register_forward_pre_hook(read_in).remove)
            else:
                stack.callback(module(model, layer, name).register_forward_hook(read_out).remove)
        for layer, name, position, vector in adds:

            def add(_: Any, __: Any, out: Any, *, p: int = position, v: Tensor = vector) -> Any:
                first = out[0] if isinstance(out, tuple) else out
                onehot = torch.zeros(first.shape[1], 1, dtype=first.dtype)
                onehot[p] = 1
                first = first + onehot * v
                return (first, *out[1:]) if isinstance(out, tuple) else first

            stack.callback(module(model, layer, name).register_forward_hook(add).remove)
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits, seen


def optimise(
    model: Any, rows: list[PlainRow], kl_row: PlainRow | None, places: list[Place], *,
    steps: int, lr: float, kl_factor: float, threshold: float, stop: str = "probability",
    settled_factor: float | None = None, settled_kl: float = 0.0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """init, delta and live value per place (z = init + delta)."""
    bare = rows[0]
    _, seen = forward(model, bare.prompt + bare.target[:-1], reads=[(p.layer, p.tensor) for p in places])
    init = [seen[p.layer, p.tensor][bare.at(p.where)] for p in places]
    delta = [torch.zeros_like(i).requires_grad_() for i in init]
    optimizer = torch.optim.Adam(delta, lr=lr)
    reference = None
    live = init
    phi = 1.0
    for it in range(steps):
        nlls, first_choice = [], True
        for row in rows:
            adds = [(p.layer, p.tensor, row.at(p.where), d) for p, d in zip(places, delta, strict=True)]
            # what stands at each place before its own delta, lower deltas in force
            if row is bare:
                live = []
                for i, p in enumerate(places):
                    others = [a for j, a in enumerate(adds) if j != i]
                    with torch.no_grad():
                        _, seen = forward(model, row.prompt + row.target[:-1], others, [(p.layer, p.tensor)])
                    live.append(seen[p.layer, p.tensor][row.at(p.where)])
            logits, _ = forward(model, row.prompt + row.target[:-1], adds)
            log_p = logits.log_softmax(-1)
            first = len(row.prompt) - 1
            first_choice &= all(int(log_p[first + t].argmax()) == y for t, y in enumerate(row.target))
            nlls.append(-torch.stack([log_p[first + t, y] for t, y in enumerate(row.target)]).mean())
        nll = torch.stack(nlls)
        loss = phi * nll.mean()
        kl = torch.zeros(())
        if kl_row is not None:
            adds = [
                (p.layer, p.tensor, kl_row.subject, d)
                for p, d in zip(places, delta, strict=True) if p.where == "subject_last"
            ]  # fmt: skip
            log_p = forward(model, kl_row.prompt, adds)[0][kl_row.subject].log_softmax(-1)
            reference = log_p.detach() if reference is None else reference
            kl = (log_p.exp() * (log_p - reference)).sum()
            loss = loss + kl_factor * kl
        for p, d, i in zip(places, delta, init, strict=True):
            loss = loss + p.decay * d.norm() / i.norm() ** 2
        done = (-nll).exp().mean() >= threshold if stop == "probability" else loss < threshold
        if settled_factor is not None:
            phi = settled_factor if first_choice else 1.0
            done = done or (first_choice and kl_factor * kl <= settled_kl)
        if done or it == steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, d, i in zip(places, delta, init, strict=True):
                if d.norm() > p.clamp * i.norm():
                    d *= p.clamp * i.norm() / d.norm()
    model.zero_grad()
    return init, [d.detach() for d in delta], live


def edit_group(
    model: Any, rows: list[list[PlainRow]], layers: tuple[int, ...], targets: Tensor, where: str, measured: str,
    divisor: Callable[[int], float], weight: float, moments: dict[int, Tensor], matrix: str = "mlp",
    solve: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> dict[int, Tensor]:  # fmt: skip
    """The layer loop, by default with MEMIT's direct solver; writes into the model and returns what it wrote (d x m).

    `solve(K, R, C)` gives another method's update.
    """
    written = {}
    for i, layer in enumerate(layers):
        keys, current = [], []
        for edit_rows in rows:
            key_name = "key" if matrix == "mlp" else "attn_key"
            found = []
            for row in edit_rows:
                _, seen = forward(model, row.prompt, reads=[(layer, key_name), (layers[-1], measured)])
                found.append(seen[layer, key_name][row.at(where)])
                if row is edit_rows[0]:
                    current.append(seen[layers[-1], measured][row.at(where)])
            prefixed = found[1:]
            keys.append(0.5 * found[0] + 0.5 * torch.stack(prefixed).mean(0) if prefixed else found[0])
        k = torch.stack(keys, dim=1)
        r = (targets - torch.stack(current)).T / divisor(len(layers) - i)
        if solve is None:
            update = r @ torch.linalg.solve(weight * moments[layer] + k @ k.T, k).T
        else:
            update = solve(k, r, moments[layer])
        with torch.no_grad():
            module(model, layer, matrix).weight += update
        written[layer] = update
    return written
