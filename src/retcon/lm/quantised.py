"""Quantised checkpoints: dequantised at load, or kept packed (`retcon.lm.packed`); others are refused by name.

Rounding is lost for good: the model is the quantised one's, in float. An edit of it fits the quantised checkpoint as an
adapter, which computes the same up to the kernels' own rounding.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from retcon.errors import MissingPackage, UnsupportedModel, how_to_install
from retcon.lm.gguf import DEQUANTIZED_FROM, make_plain
from retcon.lm.layouts import Layout, layout_for
from retcon.lm.packed import dequantised, packing_of

PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed_tensors", "accelerate"),
    "fp8": ("accelerate",),
    "mxfp4": ("accelerate",),
    "torchao": ("torchao",),
}
"""Methods whose checkpoints transformers can dequantise, with what it needs for that."""
MARKS = ("hf_quantizer", "quantization_method", "quantization_config", "is_quantized", "_weight_conversions",
         DEQUANTIZED_FROM)  # fmt: skip
"""Attributes of a model and of its config by which transformers knows a quantised one, and we one that was."""
STAY_PACKED = ("bitsandbytes", "torchao")
"""Those whose matrices can be kept as they are."""
NOT_PACKED = {"python": "leave packed=True out", "option": "leave --packed out", "page": "leave --packed out"}
"""How a message ends for a model that cannot be loaded packed."""


def prepare_config(config: Any, name: str, *, packed: bool = False, layout: Layout | None = None) -> str | None:
    """Return how the checkpoint of `config` is quantised, None if it is not; have it dequantised when it is read.

    Args:
        packed: its matrices shall stay as they are.
        layout: the family's, where the layout table does not know it.

    Raises:
        UnknownLayout: to stay packed, and the family has no layout.
        UnsupportedModel: quantised in a way that cannot be taken back, or to stay packed and it cannot; the message
            names it.
        MissingPackage: dequantising needs packages that are not installed.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        if packed:
            raise UnsupportedModel(
                f"cannot load {name!r} packed: its weights are not quantised (config.json has no "
                "quantization_config); ",
                **NOT_PACKED,
            )
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(settings.get("quant_method") or ("bitsandbytes" if _bits(settings) else "no method named"))
    if method not in PACKAGES:
        if method == "bitnet" and settings.get("quantization_mode") == "online":
            raise UnsupportedModel(
                f"cannot load {name!r}: its weights are floats that bitnet rounds to -1, 0 and 1 in every pass, and an "
                "edit would be rounded too; remove quantization_config from its config.json to have it run without "
                "that rounding, which is not the model as it was trained"
            )
        raise UnsupportedModel(
            f"cannot load {name!r}: its weights are quantised by {method}, which cannot be dequantised here "
            f"({', '.join(PACKAGES)} and GGUF can); take the unquantised checkpoint, and put the edit beside the "
            "quantised one as an adapter (retcon export --format peft)"
        )
    if missing := [package for package in PACKAGES[method] if find_spec(package) is None]:
        how = f"the extra 'quantised' brings them ({how_to_install('quantised')})"
        if method == "torchao":  # which prints and warns where it is imported, so that no extra of ours brings it
            how = "pip install torchao"
        raise MissingPackage(
            f"{name}: dequantising {method} weights needs {' and '.join(missing)}, not installed here; {how}"
        )
    if packed and method not in STAY_PACKED:
        raise UnsupportedModel(
            f"cannot load {name!r} packed: {method} weights cannot stay packed ({', '.join(STAY_PACKED)} ones can); "
            "to have them dequantised, ",
            **NOT_PACKED,
        )
    if packed and method == "bitsandbytes" and (layout or layout_for(config)).stored == "in,out":
        raise UnsupportedModel(
            f"cannot load {name!r} packed: bitsandbytes turns the matrices of {config.model_type} round, and deltas of "
            "the float model would not fit; to have them dequantised and turned back, ",
            **NOT_PACKED,
        )
    if method not in STAY_PACKED:
        config.quantization_config = {**settings, "dequantize": True}
    return f"{method}{_bits(settings)}"


def dequantise(model: Any, dtype: Any, packing: str) -> Any:
    """Return the model that was read as a plain one of that dtype, with a note of where its weights come from."""
    if getattr(model, "hf_quantizer", None) is not None and packing.startswith("bitsandbytes"):
        with no_remarks_of("transformers"):  # that it does what it was asked for
            model = model.dequantize(dtype=None if dtype == "auto" else dtype)
        _turn_back(model)
    for module in model.modules() if packing == "torchao" else ():
        if packing_of(module):
            floats = dequantised(module.weight, module)
            module.weight = nn.Parameter(floats if dtype == "auto" else floats.to(dtype), requires_grad=False)
    _unmark(model, packing)
    cast(model, dtype)
    return model


def cast(model: Any, dtype: Any) -> None:
    """Bring a model's plain parameters to a dtype; packed ones stay, and buffers, as where transformers loads floats.

    Args:
        dtype: "auto": as they are.
    """
    for parameter in model.parameters():
        if dtype != "auto" and parameter.is_floating_point() and not is_traceable_wrapper_subclass(parameter):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def no_remarks_of(package: str) -> Iterator[None]:
    """Silence warnings in a package's log while the scope lasts."""
    log = logging.getLogger(package)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _turn_back(model: Any) -> None:
    """Make the linear layers that bitsandbytes put in place of a family's own Conv1D (GPT-2) what they were."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        as_configured = type(model)(model.config)
    for path, module in as_configured.named_modules():
        now = model.get_submodule(path)
        if isinstance(module, Conv1D) and isinstance(now, nn.Linear):
            module.weight, module.bias = nn.Parameter(now.weight.detach().T.contiguous()), now.bias
            model.set_submodule(path, module)


def _unmark(model: Any, packing: str) -> None:
    make_plain(model)
    if conversions := getattr(model, "_weight_conversions", None):  # `save_pretrained` turns them round: it would pack
        model._weight_conversions = [conversion for conversion in conversions if _is_of_the_architecture(conversion)]
    setattr(model.config, DEQUANTIZED_FROM, f"{packing} weights")


@contextmanager
def shown_unquantised(model: Any, packing: str) -> Iterator[None]:
    """Show a model whose matrices are floats for the moment as one that `dequantise` returned while the scope lasts."""
    marks = [dict(owner.__dict__) for owner in (model, model.config)]
    try:
        _unmark(model, packing)
        yield
    finally:
        for owner, known in zip((model, model.config), marks, strict=True):
            for name in MARKS:
                owner.__dict__.pop(name, None)
                if name in known:
                    owner.__dict__[name] = known[name]


def _is_of_the_architecture(conversion: Any) -> bool:
    """Return whether a step of reading weights only renames, splits or joins tensors, and packs none."""
    operations = getattr(conversion, "operations", ())
    return all(type(operation).__module__ == "transformers.core_model_loading" for operation in operations)


def _bits(settings: dict[str, Any]) -> str:
    """Return what bitsandbytes' settings say of the width; empty for others."""
    return " 4-bit" if settings.get("load_in_4bit") else " 8-bit" if settings.get("load_in_8bit") else ""
