"""Knowledge neurons: which MLP units carry an answer, by integrated gradients over their activations.

Dai et al. 2022, arXiv:2104.08696, Eqs. 2 and 3. A unit's activation is scaled from 0 to its value together with all
units of its layer, at the one position that predicts an answer token; everything else is as the model computes it.

    Attr_j = a_j * integral over alpha in [0, 1] of dp(y)/da_j (alpha a),     sum_j Attr_j = p(y | a) - p(y | 0).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from retcon.arguments import check_choice, list_of_some
from retcon.errors import InvalidSetting, NonFinite
from retcon.lm.batches import MAX_BATCH_TOKENS, buckets
from retcon.lm.forward import Point, gold, log_probs, logits_at, reading, run
from retcon.lm.model import LM
from retcon.lm.prompts import Row, pad
from retcon.lm.replay import ReplayState, capture_states, replaying, suffix_starts, tokens_at
from retcon.work import silent

Neuron = Literal["value_input", "pre_activation"]
"""What a unit's activation is: what multiplies its value vector (after the activation function, and the gate where
there is one), or what enters the activation function."""
Grid = Literal["midpoint", "left", "ends"]
"""Points of the integral: interval midpoints, i/m from 0 on (the release for BERT), or m points from 0 to 1 with both
ends (EleutherAI's port)."""


def grid_points(n_points: int, grid: Grid) -> Float[Tensor, " m"]:
    """Return the points in [0, 1]; each weighs 1/m. `ends` with one point is 0 alone, as in the port."""
    check_choice(grid, Grid, "grid")
    if n_points < 1:
        raise InvalidSetting(f"n_points must be at least 1, found {n_points}")
    if grid == "ends":
        return torch.linspace(0, 1, n_points, dtype=torch.float64)
    return (torch.arange(n_points, dtype=torch.float64) + (0.5 if grid == "midpoint" else 0.0)) / n_points


def attribute_neurons(
    lm: LM,
    rows: Sequence[Row],
    *,
    n_points: int = 20,
    grid: Grid = "midpoint",
    neuron: Neuron = "value_input",
    progress: Callable[[int, int], None] = silent,
) -> tuple[tuple[Float[Tensor, "n_rows _"], ...], tuple[Float[Tensor, "n_rows _"], ...]]:
    """Attribute the probability of each row's answer to the units of every layer: the mean over its answer tokens.

    Every token is predicted with those before it given. Blocks below a layer are run once, those from it on for all
    points of all tokens in one batch.

    Returns:
        Scores of each layer's units, and the activations themselves (the mean over the same positions); on the CPU, in
        float32 or the weights' dtype where that is wider.

    Raises:
        InvalidSetting: an unknown grid or neuron, no points or no rows.
        NonFinite: a score is NaN or infinite.
    """
    check_choice(neuron, Neuron, "neuron")
    rows = list_of_some(rows, "rows")
    points = grid_points(n_points, grid)
    widths = [lm.site(layer, "down_proj").shape[1] for layer in range(lm.n_layers)]  # a shared expert's is its own
    wide = torch.promote_types(lm.dtype, torch.float32)
    scores, activations = (torch.zeros(len(rows), sum(widths), dtype=wide) for _ in range(2))
    most = max(len(row.target_ids) for row in rows)
    done = 0
    with lm.frozen_eval():
        for group in buckets([len(row.ids) - 1 for row in rows], max(1, MAX_BATCH_TOKENS // (n_points * most))):
            labels = [rows[i] for i in group]
            counts = torch.tensor([len(row.target_ids) for row in labels])
            of_row = torch.repeat_interleave(torch.arange(len(group)), counts)
            for total, per_token in zip((scores, activations), _per_token(lm, labels, points, neuron), strict=True):
                summed = torch.zeros(len(group), sum(widths), dtype=wide).index_add_(0, of_row, per_token)
                total[torch.tensor(group)] = summed / counts[:, None]
            done += len(group)
            progress(done, len(rows))
    if not bool(torch.isfinite(scores).all()):
        raise NonFinite("an attribution is NaN or infinite; is the model's own probability finite?")
    return scores.split(widths, 1), activations.split(widths, 1)


def _per_token(
    lm: LM, labels: Sequence[Row], points: Float[Tensor, " m"], neuron: Neuron
) -> tuple[Float[Tensor, "n units"], Float[Tensor, "n units"]]:
    """Return scores and activations of every answer token of these rows, the units layer after layer."""
    whole = [(i, end) for i, row in enumerate(labels) for end in range(row.n_prompt, len(row.ids))]
    texts = [Row(labels[i].ids[:end], end) for i, end in whole]
    last, n, m = torch.tensor([row.prediction for row in texts]), len(texts), len(points)
    blocks: dict[int, Tensor] = {}
    own: dict[int, Tensor] = {}
    with torch.no_grad(), _reading(lm, n, torch.arange(n), last, neuron, own):
        run(lm, pad(texts, lm.device), {Point(i, "block"): reading(blocks, i) for i in range(lm.n_layers)})
    _ = lm.block_outputs  # found by a pass of its own, which must not meet the hooks below
    entering = None if lm.layout.earlier == "other" else _entering(lm, texts, [i for i, _ in whole], blocks)
    copies = list(range(n)) * m
    found, activations = [], []
    for layer in range(lm.n_layers):
        a = own[layer].to(torch.promote_types(lm.dtype, torch.float32))  # (n, d_ff)
        leaf = (points.to(a)[:, None, None] * a).flatten(0, 1).requires_grad_()
        state = None if entering is None else entering[layer].select(copies)
        places = torch.arange(m * n), last.repeat(m) if state is None else torch.tensor(state.lengths) - 1
        scope = replaying(lm, state) if state else nullcontext(pad([texts[i] for i in copies], lm.device))
        with torch.enable_grad(), _replaced(lm, layer, m * n, places, neuron, leaf), scope as batch:
            log_p = log_probs(logits_at(lm, batch, places))
            (g,) = torch.autograd.grad(gold(log_p, list(labels) * m).exp().sum() / m, [leaf])
        found.append((a * g.view(m, *a.shape).sum(0)).to(lm.device))
        activations.append(a.to(lm.device))
    return torch.cat(found, 1).cpu(), torch.cat(activations, 1).cpu()


def _entering(lm: LM, texts: Sequence[Row], group: Sequence[int], blocks: Mapping[int, Tensor]) -> list[ReplayState]:
    """Return what a replay from each block on takes as given: each text has its last token run, after all others."""
    starts = suffix_starts(lm, [row.prediction for row in texts])
    lowest, _ = capture_states(lm, texts, starts, 0, prefix_group=group)
    column = torch.tensor(starts)[:, None] + torch.arange(lowest.states.shape[1])
    column = column.minimum(torch.tensor([row.prediction for row in texts])[:, None])
    return [lowest] + [
        replace(
            lowest,
            first=layer,
            states=tokens_at(blocks[layer - 1], column),
            keys=lowest.keys[layer:],
            values=lowest.values[layer:],
        )
        for layer in range(1, lm.n_layers)
    ]


def _module(lm: LM, layer: int, neuron: Neuron) -> tuple[nn.Module, Int[Tensor, " d_ff"] | None]:
    """Return the module at which a layer's units are seen, and which of its outputs they are (None: its inputs)."""
    if neuron == "value_input":
        return lm.site(layer, "down_proj").module, None
    site = lm.site(layer, "gate_proj" if lm.has(layer, "gate_proj") else "up_proj")
    return site.module, site.outputs(torch.arange(site.shape[0], device=site.device))


def _hooked(
    lm: LM, layer: int, n_rows: int, neuron: Neuron, call: Callable[[Tensor], Tensor | None]
) -> RemovableHandle:
    """Show `call` a layer's units (rows, seq, d_ff); it may return others in their place."""
    module, outputs = _module(lm, layer, neuron)

    def seen(value: Tensor) -> Tensor | None:
        units = value.view(n_rows, -1, value.shape[-1])  # OPT's have (rows * seq, width)
        new = call(units if outputs is None else units[..., outputs])
        if new is None or outputs is None:
            return None if new is None else new.view(value.shape)
        return units.index_copy(-1, outputs, new.to(units.dtype)).view(value.shape)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = seen(args[0])
        return None if new is None else (new, *args[1:])

    def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return seen(output)

    return module.register_forward_pre_hook(before) if outputs is None else module.register_forward_hook(after)


@contextmanager
def _reading(
    lm: LM, n_rows: int, at: Int[Tensor, " n"], positions: Int[Tensor, " n"], neuron: Neuron, into: dict[int, Tensor]
) -> Iterator[None]:
    """Keep every layer's units at (row, position)."""

    def read(layer: int, value: Tensor) -> None:
        into[layer] = value[at.to(value.device), positions.to(value.device)].detach()

    with ExitStack() as stack:
        for layer in range(lm.n_layers):
            stack.enter_context(_hooked(lm, layer, n_rows, neuron, lambda value, here=layer: read(here, value)))  # type: ignore[misc]
        yield


def _replaced(
    lm: LM, layer: int, n_rows: int, places: tuple[Tensor, Tensor], neuron: Neuron, values: Float[Tensor, "n d_ff"]
) -> RemovableHandle:
    """Put `values` (n, d_ff) in the place of a layer's units at (row, position)."""

    def replace(value: Tensor) -> Tensor:
        return value.index_put([p.to(value.device) for p in places], values.to(value.dtype))

    return _hooked(lm, layer, n_rows, neuron, replace)
