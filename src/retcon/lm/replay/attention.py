"""Attention of models whose own code computes it step by step, by one fused operation instead."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from retcon.lm.model import LM
from retcon.lm.scopes import method_as

STEP_BY_STEP = {"gptj": "attn"}
"""Families whose block computes attention in steps of its own (to float32, product, division, mask, softmax, product),
and the name of the block's module that does."""


@contextmanager
def fused(lm: LM, first: int) -> Iterator[None]:
    """Inside, blocks from `first` on that compute attention in steps of their own do it by
    `scaled_dot_product_attention`.

    The same to rounding: products are summed in float32 either way. On a card most of a GPT-J's step is otherwise spent
    on what is not a matrix product.
    """
    name = STEP_BY_STEP.get(lm.config.model_type)
    with ExitStack() as stack:
        if name is not None:
            for layer in range(first, lm.n_layers):
                stack.enter_context(_attending(lm.block(layer).get_submodule(name)))
        yield


def _attending(module: nn.Module) -> AbstractContextManager[None]:
    scale = 1 / float(module.scale_attn)  # type: ignore[arg-type]

    def attend(
        query: Float[Tensor, "rows heads columns d_head"],
        key: Float[Tensor, "rows heads tokens d_head"],
        value: Float[Tensor, "rows heads tokens d_head"],
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        dtype = value.dtype
        mask = None if attention_mask is None else attention_mask.to(dtype)
        found = scaled_dot_product_attention(query.to(dtype), key.to(dtype), value, attn_mask=mask, scale=scale)
        return found, None

    return method_as(module, "_attn", attend)
