"""What a model's own code computes in many small steps, by one fused operation instead.

The same to rounding: inside, the fused ones compute in float32 too. On a card most of a step is otherwise spent on what
is not a matrix product, since each small step reads and writes all activations.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention

from retcon.lm.model import LM
from retcon.lm.scopes import method_as

OWN_CODE_ON = {"cpu"}
"""Kinds of device on which replays run the model's own code: deltas made there keep their bits."""
STEP_BY_STEP = {"gptj": "attn"}
"""Families whose block computes attention in steps of its own (to float32, product, division, mask, softmax, product),
and the name of the block's module that does."""


@contextmanager
def fused(lm: LM, first: int) -> Iterator[None]:
    """Inside, blocks from `first` on compute by one operation each: attention, where they have steps of their own for
    it (`scaled_dot_product_attention`), GPT-2's GELU, and LLaMA's normalisation."""
    with ExitStack() as stack:
        for layer in range(first, lm.n_layers):
            for module, name, method in _methods(lm, lm.block(layer)):
                stack.enter_context(method_as(module, name, method))
        yield


def _methods(lm: LM, block: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    """Yield modules of a block, the name of a method of theirs, and the one to take its place."""
    if attention := STEP_BY_STEP.get(lm.config.model_type):
        module = block.get_submodule(attention)
        yield module, "_attn", _attending(module)
    steps_of_gelu, steps_of_norm = _known()
    for module in block.modules():
        if hasattr(module, "_hf_hook"):  # accelerate has given it a method of its own
            continue
        steps = _steps(type(module))
        if steps == steps_of_gelu:
            yield module, "forward", functools.partial(gelu, approximate="tanh")
        elif steps == steps_of_norm:
            yield module, "forward", _normalising(module)


@functools.cache
def _known() -> tuple[Any, Any]:
    """Return the steps of GPT-2's GELU and of LLaMA's normalisation; over a hundred families have a copy of the latter
    under a name of their own."""
    from transformers.activations import NewGELUActivation
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return _steps(NewGELUActivation), _steps(LlamaRMSNorm)


def _steps(kind: type[nn.Module]) -> Any:
    """Return what a class's `forward` does, so that two that do the same are equal; None where it is not Python's."""
    code = getattr(kind.forward, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_consts)


def _normalising(module: nn.Module) -> Callable[[Tensor], Tensor]:
    own, weight, eps = module.forward, module.get_parameter("weight"), float(module.variance_epsilon)  # type: ignore[arg-type]

    def normalise(hidden_states: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        if hidden_states.dtype != weight.dtype:
            found: Tensor = own(hidden_states)
            return found
        return rms_norm(hidden_states, weight.shape, weight, eps)

    return normalise


def _attending(module: nn.Module) -> Callable[..., tuple[Tensor, None]]:
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

    return attend
