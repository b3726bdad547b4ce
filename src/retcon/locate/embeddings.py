"""The bottom of the residual stream: reading what enters the first block, and changing what the embedding puts out."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from retcon.lm.forward import Point
from retcon.lm.model import LM

EMBEDDING = Point(-1, "block")
"""What enters the first block: token embeddings, position embeddings added where the model has them."""


def reading_first_input(lm: LM, read: Callable[[Tensor], None]) -> RemovableHandle:
    """Hand what enters the first block, (batch, seq, d_model), to `read` while the scope lasts."""

    return lm.block(0).register_forward_pre_hook(
        lambda _, args, kwargs: read(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )


def changing_embeddings(lm: LM, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Put `change` of the token embeddings, (batch, seq, width), in their place while the scope lasts."""
    embedding = lm.model.get_submodule(lm.layout.embedding)
    return embedding.register_forward_hook(lambda _, __, output: change(output))
