"""Where the modules that a layout names are in a model."""

from typing import Any, get_args

import torch
from torch import nn

from retcon.errors import UnsupportedModel
from retcon.lm.layouts import Fused, Layout
from retcon.lm.site import SiteName


def decoder_path(model: Any) -> str:
    """Return where the text model is: `model`, or a longer path in a wrapper."""
    if model.config.get_text_config() is model.config or not hasattr(model, "get_decoder"):
        return "model"
    decoder = model.get_decoder()
    if isinstance(inner := getattr(decoder, "model", None), nn.Module):
        decoder = inner  # the wrapper holds a whole causal model, head included (Llama 4)
    return next((name for name, module in model.named_modules() if module is decoder and name), "model")


def kind_of(block: nn.Module, layout: Layout) -> Layout:
    """Return the first kind of block whose modules a block has; where none fits, the first, which then says why not."""
    for kind in layout.kinds:
        entries = [getattr(kind, name) for name in (*get_args(SiteName), "experts", "mlp_post_norm")]
        paths = [entry.module if isinstance(entry, Fused) else entry for entry in entries if entry is not None]
        if all(_has(block, path) for path in paths):
            return kind
    return layout


def _has(block: nn.Module, path: str) -> bool:
    try:
        return block.get_submodule(path) is not None
    except AttributeError:
        return False


def find_module(model: Any, path: str, what: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModel(
            f"the layout places {what} at {path!r}, but the model has no such module; check the layout's paths"
        ) from None


def count_blocks(model: Any, layout: Layout) -> int:
    path = layout.block.removesuffix(".{}")
    try:
        return len(model.get_submodule(path))
    except (AttributeError, TypeError):
        raise UnsupportedModel(f"the layout places the blocks at {path!r}, but the model has no such list") from None


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def device_of(module: Any) -> torch.device:
    """Return where a module with weights runs: where they are, or where accelerate brings those that are offloaded."""
    device: torch.device = next(module.parameters()).device
    if device.type == "meta" and hasattr(module, "_hf_hook"):
        return torch.device(module._hf_hook.execution_device)
    return device
