"""PEFT LoRA adapters: two files that `AutoPeftModelForCausalLM.from_pretrained` and most servers load."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from retcon.export.factors import Factors
from retcon.files import write_atomically


def write_adapter(
    factors: Mapping[str, Factors], directory: Path, *, base_name: str, transposed: frozenset[str] = frozenset()
) -> list[Path]:
    """Write factors as a LoRA adapter whose scale is 1 for every module.

    Args:
        factors: by parameter name; where all ranks agree, the config has no patterns, which some servers cannot read.
        base_name: what `base_model_name_or_path` says: a hub id or a path.
        transposed: parameters stored (in, out), as GPT-2's; PEFT wants their factors the other way round.
    """
    ranks = {name.removesuffix(".weight"): f.rank for name, f in factors.items()}
    tensors: dict[str, Tensor] = {}
    for name, f in factors.items():
        b, a = (f.right.T, f.left.T) if name in transposed else (f.left, f.right)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = a.contiguous().clone()
        tensors[f"{module}.lora_B.weight"] = b.contiguous().clone()
    rank = max(ranks.values())
    pattern = {} if len(set(ranks.values())) == 1 else {f"^{re.escape(m)}": r for m, r in ranks.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": bool(transposed & factors.keys()),
        "bias": "none",
        "inference_mode": True,
    }
    files = [directory / "adapter_model.safetensors", directory / "adapter_config.json"]
    write_atomically(files[0], save(tensors, metadata={"format": "pt"}))
    write_atomically(files[1], (json.dumps(config, indent=2) + "\n").encode())
    return files
