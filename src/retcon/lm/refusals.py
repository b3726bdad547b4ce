"""What is refused: models that cannot be edited, tokenizers of other models, parameters that must not change."""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from retcon.errors import UnsupportedModel

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse_other_vocabulary(model: Any, tokenizer: Any, name: str | None) -> None:
    """Raise UnsupportedModel where the tokenizer's own vocabulary (tokens added later aside) exceeds the embedding."""
    embedding, backend = model.get_input_embeddings(), getattr(tokenizer, "backend_tokenizer", None)
    if embedding is None or backend is None:
        return
    n_tokens, n_rows = backend.get_vocab_size(with_added_tokens=False), embedding.weight.shape[0]
    if n_tokens > n_rows:
        raise UnsupportedModel(
            f"{name or model.config.model_type}: the tokenizer has {n_tokens:,} tokens, the embedding {n_rows:,} rows; "
            "load the tokenizer that belongs to this model, or call model.resize_token_embeddings(len(tokenizer))"
        )


def refuse_slow(tokenizer: Any) -> None:
    """Raise UnsupportedModel where a tokenizer is a slow one."""
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not say which characters a token covers; "
            "load the fast one (AutoTokenizer.from_pretrained(..., use_fast=True))"
        )


def refuse_wrapped(model: Any) -> None:
    """Raise UnsupportedModel where the model is compiled, carries adapters, is no decoder or demands more than text."""
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel("the model is compiled (torch.compile); wrap the original one: LM(model._orig_mod, ...)")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel("the model was compiled in place (model.compile()); load it again and leave that out")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModel(
            "the model carries PEFT adapters; merge or drop them first: LM(model.merge_and_unload(), ...) or "
            "LM(model.unload(), ...)"
        )
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise UnsupportedModel(f"{type(model).__name__} is no transformers model (it has no config.model_type)")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{model.config.model_type!r} is an encoder-decoder model; retcon edits decoder-only ones"
        )
    parameters = inspect.signature(model.forward).parameters.values()
    demanded = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if more := [name for name in demanded if name != "input_ids"]:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be run on text alone: its forward demands {', '.join(more)}; use a "
            "text model, or one that can do without images"
        )


def refuse_subclasses(model: nn.Module, packed: Collection[str]) -> None:
    """Raise UnsupportedModel where a parameter is no plain tensor (sharded, quantised), and none of those `packed`."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in packed and is_traceable_wrapper_subclass(parameter):
            raise UnsupportedModel(
                f"{name} is a {type(parameter).__name__} of {type(parameter).__module__}, no plain tensor; load the "
                "model in float and on one device"
            )


def why_not_editable(model: nn.Module) -> dict[str, str]:
    """Return the parameters that must not be edited, with the reason."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    overlaps = _overlapping(model)
    reasons = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            reasons[name] = "it has no data on this machine (meta device or offloaded)"
        elif hasattr(parameter, "quant_state") or parameter.dtype not in _FLOATS:
            reasons[name] = f"it is quantised or not floating ({parameter.dtype}); load the model unquantised"
        elif len(names[id(parameter)]) > 1:
            others = [n for n in names[id(parameter)] if n != name]
            reasons[name] = f"it is shared with {', '.join(others)}, which would change too"
        elif name in overlaps:
            reasons[name] = f"it lies in the same memory as {overlaps[name]}, which would change too"
    return reasons


def _overlapping(model: nn.Module) -> dict[str, str]:
    """Return the parameters that share bytes with another parameter object, and the other one's name."""
    spans = []
    for name, p in model.named_parameters():
        if p.is_meta or not p.numel() or is_traceable_wrapper_subclass(p):
            continue
        reach = 1 + sum((n - 1) * abs(stride) for n, stride in zip(p.shape, p.stride(), strict=True))
        spans.append((str(p.device), p.data_ptr(), p.data_ptr() + reach * p.element_size(), name))
    found: dict[str, str] = {}
    furthest: tuple[str, int, str] | None = None
    for device, start, end, name in sorted(spans):
        if furthest is not None and furthest[0] == device and start < furthest[1]:
            found[name] = furthest[2]
            found.setdefault(furthest[2], name)
        if furthest is None or furthest[0] != device or end > furthest[1]:
            furthest = (device, end, name)
    return found
