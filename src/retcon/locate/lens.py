"""The vocabulary projection of any state of the residual stream: what the model would say if it ended there.

nostalgebraist 2020 ("logit lens"); JEEP's Eq. 5 is the same without the final norm. Projections are made for a few
states at a time, so that the logits of all of them are never in memory together.
"""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.errors import UnsupportedModel
from retcon.lm.blocks import device_of
from retcon.lm.forward import Hook, Point, logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import encode, pad

MAX_LOGITS = 2**24
"""Logits held at a time: 64 MB in float32."""


def logits_of(lm: LM, states: Float[Tensor, "n d_model"], *, final_norm: bool) -> Float[Tensor, "n vocab"]:
    """Return the logits of states, at least float32.

    With the final norm, what the model itself does with its last state (a scale or a soft cap of the logits included),
    so that the last block's output gives the model's own logits. Without it, W x + b and nothing else (JEEP, Eq. 5).
    """
    if not final_norm:
        logits = lm.head(states.to(head_device(lm)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
    norm = lm.model.get_submodule(lm.layout.final_norm)
    of_norm = device_of(norm) if any(True for _ in norm.parameters()) else head_device(lm)  # OLMo's has no weight
    logits = lm.head(norm(states.to(of_norm)).to(head_device(lm)))
    if not _bare(lm):
        logits = logits * (getattr(lm.config, "logit_scale", None) or 1.0)  # Cohere
        logits = logits * (getattr(lm.config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
        scaling = getattr(lm.config, "logits_scaling", None) or 1.0
        logits = logits * scaling if lm.config.model_type == "hyperclovax" else logits / scaling  # Granite divides
        cap = getattr(lm.config, "final_logit_softcapping", None)  # gemma 2, some of gemma 3
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


_BARE: WeakKeyDictionary[LM, bool] = WeakKeyDictionary()
"""What `_bare` found."""


def _bare(lm: LM) -> bool:
    """Return whether a wrapper's own forward gives what its head gives, without the text model's scale or soft cap."""
    if lm.config is lm.model.config:
        return False
    if lm not in _BARE:
        heads: list[Tensor] = []
        with lm.head.register_forward_hook(lambda _, __, output: heads.append(output[0])), torch.no_grad():
            own = logits_at(lm, pad([encode(lm.tokenizer, "The")], lm.device), (torch.tensor([0]),) * 2)
        _BARE[lm] = torch.equal(heads[0].to(own), own)
    return _BARE[lm]


def in_chunks(
    lm: LM, states: Float[Tensor, "n d_model"], *, final_norm: bool, max_logits: int = MAX_LOGITS
) -> Iterator[tuple[slice, Float[Tensor, "some vocab"]]]:
    """Do as `logits_of`, a few states at a time: yields which, and their logits."""
    size = max(1, max_logits // vocabulary(lm))
    for first in range(0, len(states), size):
        part = slice(first, first + size)
        yield part, logits_of(lm, states[part], final_norm=final_norm)


def head_device(lm: LM) -> torch.device:
    """Return where logits are made."""
    return device_of(lm.head)


def vocabulary(lm: LM) -> int:
    """Return how many tokens the head knows."""
    return lm.head.weight.shape[0]  # type: ignore[index, return-value]


def check_reads(lm: LM) -> None:
    """Check that the last block's output, read with the final norm, gives the model's own logits.

    Raises:
        UnsupportedModel: it does not; the family makes its logits in a way that `logits_of` does not know.
    """
    row = encode(lm.tokenizer, "The")
    state: list[Tensor] = []
    at = torch.tensor([0]), torch.tensor([row.prediction])
    with torch.no_grad():
        hooks: dict[Point, Hook] = {Point(lm.n_layers - 1, "block"): lambda value: state.append(value[0, at[1]])}
        own = logits_at(lm, pad([row], lm.device), at, hooks)
        read = logits_of(lm, state[0], final_norm=True).to(own)
    allowed = 0.02 if own.dtype in (torch.float16, torch.bfloat16) else 1e-4
    off = float((read - own).abs().max() / own.abs().max())
    if not off <= allowed:
        raise UnsupportedModel(
            f"{lm.name!r}: the last block's output after final norm and head is {off:.1%} off the model's own logits, "
            "so states cannot be read as next tokens. If the layout is your own, check its final_norm and head; or "
            "read without the final norm."
        )


def rank_of(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n some"]) -> Int[Tensor, "n some"]:
    """rank(t) = #{t' : P(t') > P(t)}, 0 for the most likely token (JEEP, Eq. 6)."""
    own = logits.gather(1, tokens)
    return torch.stack([(logits > own[:, i : i + 1]).sum(1) for i in range(tokens.shape[1])], dim=1)


def ranks(logits: Float[Tensor, "n vocab"]) -> Int[Tensor, "n vocab"]:
    """Return `rank_of` for every token; equal logits share their rank."""
    falling, order = logits.sort(dim=1, descending=True)
    place = torch.arange(logits.shape[1], device=logits.device).expand_as(order)
    new = torch.ones_like(falling, dtype=torch.bool)
    new[:, 1:] = falling[:, 1:] < falling[:, :-1]
    above = torch.where(new, place, 0).cummax(dim=1).values  # where the run of equal logits begins
    return torch.empty_like(order).scatter_(1, order, above)
