"""Routed experts as transformers stores and runs them: one tensor per projection, (experts, ., .), tokens flattened.

Their output is sum_e g_e (W_e k_e + b_e) over the experts that a token is routed to, g_e the router's weight. So they
are one linear map of the keys g_e k_e, and writing to several of them at once is one linear problem.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn


def expert_key(
    module: nn.Module,
    expert: int,
    states: Float[Tensor, "tokens d_model"],
    index: Int[Tensor, "tokens top_k"],
    weights: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens d_ff"]:
    """Return g_e k_e: what enters the expert's down-projection times the router's weight, 0 where it is not asked.

    Args:
        states: what enters the experts.
        index: which experts each token is routed to.
        weights: the router's weights of these.
    """
    experts: Any = module
    chosen = index == expert
    tokens = chosen.any(-1).nonzero()[:, 0]
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    inner = states[tokens] @ (first[expert] if experts.is_transposed else first[expert].T)
    if experts.has_bias:
        inner = inner + (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias)[expert]
    key = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    weight = (weights * chosen).sum(-1)[tokens].to(key.dtype)
    return key.new_zeros(len(states), key.shape[1]).index_copy_(0, tokens, key * weight[:, None])


def routing_similarity(
    before: Int[Tensor, "tokens top_k"], after: Int[Tensor, "tokens top_k"]
) -> Float[Tensor, " tokens"]:
    """Return |S and S'| / |S or S'| of the experts that each token is routed to before and after a change."""
    shared = (before[:, :, None] == after[:, None, :]).any(-1).sum(-1)
    return shared / (before.shape[1] + after.shape[1] - shared)
