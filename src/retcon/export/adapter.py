"""PEFT LoRA adapters: two files that `AutoPeftModelForCausalLM.from_pretrained` and most servers load."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from retcon.atomic import write_atomically
from retcon.errors import DeltaMismatch
from retcon.export.factors import Factors
from retcon.lm.blocks import is_conv1d
from retcon.lm.load import causal_class_reads
from retcon.lm.model import LM


def write_adapter(
    lm: LM, factors: Mapping[str, Factors], directory: Path, *, base_name: str, revision: str | None = None
) -> list[Path]:
    """Write factors as a LoRA adapter whose scale is 1 for every module.

    Args:
        factors: by parameter name; where all ranks agree, the config has no patterns, which some servers cannot read.
        base_name: what `base_model_name_or_path` says: a hub id or a path.
        revision: of that hub id.

    Raises:
        DeltaMismatch: a matrix that is no module's weight.
    """
    ranks = {name.removesuffix(".weight"): f.rank for name, f in factors.items()}
    tensors: dict[str, Tensor] = {}
    for name, f in factors.items():
        named, is_transposed = how_peft_reads(lm, name)
        pair = (f.left.T, f.right.T) if is_transposed else (f.right, f.left)
        for part, tensor in zip(named, pair, strict=True):
            tensors[f"base_model.model.{name.removesuffix('.weight')}.{part}"] = tensor.contiguous().clone()
    rank = max(ranks.values())
    pattern = {} if len(set(ranks.values())) == 1 else {f"^{re.escape(m)}": r for m, r in ranks.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal_class_reads(lm.model) else None,
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": bool(factors.keys() & set(lm.transposed_parameters())),
        "bias": "none",
        "inference_mode": True,
    }
    files = [directory / "adapter_model.safetensors", directory / "adapter_config.json"]
    write_atomically(files[0], save(tensors, metadata={"format": "pt"}))
    write_atomically(files[1], (json.dumps(config, indent=2) + "\n").encode())
    return files


def how_peft_reads(lm: LM, name: str) -> tuple[tuple[str, str], bool]:
    """Return the names of a parameter's factors A and B in an adapter; whether they are those of its transpose.

    Raises:
        DeltaMismatch: it is no module's weight, which is all that PEFT adapts.
    """
    path, _, part = name.rpartition(".")
    module = lm.model.get_submodule(path)
    if part != "weight":
        raise DeltaMismatch(
            f"{name}: PEFT adapts weights of modules, and this is no weight; export it with format hf or diff"
        )
    if isinstance(module, nn.Embedding):
        return ("lora_embedding_A", "lora_embedding_B"), True
    return ("lora_A.weight", "lora_B.weight"), is_conv1d(module)
