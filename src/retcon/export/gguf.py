"""GGUF, llama.cpp's format: a LoRA adapter, or a whole model, written and read back with the `gguf` package.

Names come from the package's own table of tensor names. A whole model is written for the families in `MODELS`, with a
byte-level BPE tokenizer; for others, llama.cpp's `convert_hf_to_gguf.py` takes the `hf` export.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from retcon.atomic import replacing
from retcon.errors import DeltaMismatch, MalformedFile, MissingPackage, UnsupportedModel, how_to_install
from retcon.export.factors import Factors
from retcon.lm.model import LM

ARCHITECTURES = {
    "gpt2": "GPT2",
    "gptj": "GPTJ",
    "gpt_neox": "GPTNEOX",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "olmo2": "OLMO2",
    "phi3": "PHI3",
}
"""Names in `gguf.MODEL_ARCH` by `model_type`, for adapters."""
MODELS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Families whose whole models are written."""
TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types of the matrices in a file; vectors are always f32."""
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRETOKENIZERS = {"qwen2": _SPLIT.replace("DIGITS", r"\p{N}"), "llama-bpe": _SPLIT.replace("DIGITS", r"\p{N}{1,3}")}
"""llama.cpp's names of pre-tokenizers by the pattern they split at."""


def require_gguf() -> Any:
    """Return the `gguf` package.

    Raises:
        MissingPackage: it is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingPackage(f"writing GGUF needs the package gguf; the extra brings it: {how_to_install('gguf')}")
    import gguf

    return gguf


# --- adapters ----------------------------------------------------------------------------------------------------


def check_lora(lm: LM, name: str) -> None:
    """Check that a GGUF adapter can hold a change of that matrix.

    Raises:
        UnsupportedModel: the `gguf` package has no name for the family or the matrix.
        DeltaMismatch: it is of embeddings.
        MissingPackage: gguf is not installed.
    """
    _name(lm, name)
    if isinstance(lm.model.get_submodule(name.rpartition(".")[0]), nn.Embedding):  # llama.cpp reads them otherwise
        raise DeltaMismatch(f"{name}: embeddings have no place in a GGUF adapter; export it with format gguf or hf")


def write_lora(lm: LM, factors: Mapping[str, Factors], path: Path) -> None:
    """Write factors as a GGUF LoRA adapter for `llama-cli --lora`, scale 1, in float32; read it back and compare.

    Raises:
        UnsupportedModel: a family or a matrix that the `gguf` package has no name for.
        DeltaMismatch: a change of embeddings.
        MissingPackage: gguf is not installed.
    """
    gguf = require_gguf()
    rank = max(f.rank for f in factors.values())
    tensors = {}
    for name, f in factors.items():
        own = f.padded(rank)
        check_lora(lm, name)
        stored_transposed = name in lm.transposed_parameters()
        b, a = (own.right.T, own.left.T) if stored_transposed else (own.left, own.right)
        b = _rotary_order(lm, name, b)
        place = _name(lm, name)
        tensors[f"{place}.lora_a"] = a.float().contiguous().numpy()
        tensors[f"{place}.lora_b"] = b.float().contiguous().numpy()
    arch = gguf.MODEL_ARCH_NAMES[_arch(lm)]
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        writer.add_type("adapter")
        writer.add_name(f"{lm.label}, edited")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))
        for name, array in tensors.items():
            writer.add_tensor(name, array)
        _finish(writer)
    _compare(path, tensors, exact=True)


# --- models ------------------------------------------------------------------------------------------------------


def check_model(lm: LM) -> None:
    """Check that the model can be written to a GGUF file.

    Raises:
        UnsupportedModel: a family, tokenizer or rotary scaling that is not written; the message names it.
        MissingPackage: gguf is not installed.
    """
    require_gguf()
    config = lm.model.config
    otherwise = "export it in format hf and convert that with llama.cpp's convert_hf_to_gguf.py"
    if config.model_type not in MODELS:
        raise UnsupportedModel(
            f"whole GGUF files are written for {', '.join(MODELS)}, not for {config.model_type}; {otherwise}"
        )
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type != "gpt2" and scaling != "default":
        raise UnsupportedModel(f"rotary scaling {scaling!r} is not written to GGUF here; {otherwise}")
    about = _tokenizer(lm)
    if about["model"]["type"] != "BPE" or _pretokenizer(about["pre_tokenizer"]) is None:
        raise UnsupportedModel(
            f"GGUF is written for byte-level BPE tokenizers that split text as gpt-2, {' or '.join(_PRETOKENIZERS)} "
            f"do, and {lm.label}'s ({about['model']['type']}) is another; {otherwise}"
        )


def _tokenizer(lm: LM) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lm.tokenizer.backend_tokenizer.to_str())
    return found


def write_model(lm: LM, path: Path, *, type_name: str = "f16") -> None:
    """Write the model as it is now to one GGUF file; read it back and compare every tensor.

    Raises:
        UnsupportedModel: a family, tokenizer or rotary scaling that is not written; the message names it.
        MissingPackage: gguf is not installed.
    """
    gguf = require_gguf()
    check_model(lm)
    quantization = getattr(gguf.GGMLQuantizationType, type_name.upper())
    tensors = {}
    for name, tensor in _weights(lm):
        array = tensor.detach().float().cpu().numpy()
        wanted = quantization if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        if array.ndim == 2 and array.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = gguf.GGMLQuantizationType.F16  # rows that the quantised type's blocks do not divide
        tensors[name] = (array, wanted)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[_arch(lm)])
        writer.add_name(f"{lm.label}, edited")
        _add_shape(lm, writer)
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[type_name]))
        _add_tokenizer(lm, writer)
        for name, (array, wanted) in tensors.items():
            data = gguf.quants.quantize(np.ascontiguousarray(array), wanted)
            writer.add_tensor(name, data, raw_dtype=wanted)
        _finish(writer)
    _compare(path, {name: array for name, (array, _) in tensors.items()}, exact=type_name == "f32")


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def _weights(lm: LM) -> Iterator[tuple[str, Tensor]]:
    """Return (GGUF name, matrix as (out, in)) of every parameter, a tied head left out."""
    transposed = set(lm.transposed_parameters())
    for name, tensor in lm.model.named_parameters():
        own = tensor.detach()
        if name in transposed:
            own = own.T
        yield _name(lm, name), _rotary_order(lm, name, own)


def _add_shape(lm: LM, writer: Any) -> None:
    config = lm.model.config
    d_model, d_ff = lm.site(0, "down_proj").shape
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(d_model)
    writer.add_block_count(lm.n_layers)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or d_model // heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10_000.0))))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def _add_tokenizer(lm: LM, writer: Any) -> None:
    """Write a byte-level BPE vocabulary."""
    from gguf import TokenType

    tokenizer, about = lm.tokenizer, _tokenizer(lm)
    tokens: list[str] = [f"[PAD{i}]" for i in range(lm.model.config.vocab_size)]
    types = [TokenType.UNUSED] * len(tokens)
    found = [(i, token, TokenType.NORMAL) for token, i in about["model"]["vocab"].items()]
    for added in about["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        found.append((added["id"], added["content"], kind))
    for i, token, kind in found:
        if i < len(tokens):  # tokens may have been added for which the model has no embedding
            tokens[i], types[i] = token, kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in about["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pretokenizer(about["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for part in ("bos", "eos", "pad"):
        if (number := getattr(tokenizer, f"{part}_token_id", None)) is not None:
            getattr(writer, f"add_{part}_token_id")(number)
    bos = tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and tokenizer("a").input_ids[:1] == [bos])
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def _pretokenizer(about: Mapping[str, Any] | None) -> str | None:
    """Return llama.cpp's name for a way of splitting text, None where it has none."""
    if about is None:
        return None
    if about["type"] == "ByteLevel" and about.get("use_regex", True) and not about.get("add_prefix_space"):
        return "gpt-2"
    if about["type"] == "Sequence":
        patterns = [p["pattern"].get("Regex") for p in about["pretokenizers"] if p["type"] == "Split"]
        return next((name for name, known in _PRETOKENIZERS.items() if patterns == [known]), None)
    return None


# --- names and order ---------------------------------------------------------------------------------------------


def _arch(lm: LM) -> Any:
    gguf = require_gguf()
    kind = lm.model.config.model_type
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(f"the gguf package has no names for {kind}; it has for {', '.join(ARCHITECTURES)}")
    return getattr(gguf.MODEL_ARCH, ARCHITECTURES[kind])


def _name(lm: LM, parameter: str) -> str:
    gguf = require_gguf()
    names = gguf.get_tensor_name_map(_arch(lm), lm.n_layers)
    found = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UnsupportedModel(f"the gguf package has no name for {parameter} of {lm.model.config.model_type}")
    return found


def _rotary_order(lm: LM, name: str, matrix: Tensor) -> Tensor:
    """Rows of llama's query and key matrices in llama.cpp's order, which rotates neighbours where HF rotates halves."""
    if _arch(lm).name != "LLAMA" or not any(part in name for part in ("q_proj", "k_proj")):
        return matrix
    config = lm.model.config
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return matrix.reshape(heads, 2, -1, *matrix.shape[1:]).swapaxes(1, 2).reshape(matrix.shape)


# --- files -------------------------------------------------------------------------------------------------------


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _compare(path: Path, wanted: Mapping[str, np.ndarray], *, exact: bool) -> None:
    """Read a file back and hold it to what was written.

    Raises:
        MalformedFile: a tensor is missing or differs by more than its type rounds.
    """
    gguf = require_gguf()
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    if found.keys() != wanted.keys():
        raise MalformedFile(f"{path}: holds other tensors than were written ({set(found) ^ set(wanted)})")
    for name, tensor in found.items():
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted[name].shape)
        allowed = 0.0 if exact else _ROUNDING.get(tensor.tensor_type.name, 0.0)
        scale = np.abs(wanted[name]).max(initial=0.0)
        if np.abs(array - wanted[name]).max(initial=0.0) > allowed * scale:
            raise MalformedFile(f"{path}: {name} was read back differing by more than {tensor.tensor_type.name} rounds")


_ROUNDING = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}
"""Largest error of a type over the largest magnitude of a tensor."""
