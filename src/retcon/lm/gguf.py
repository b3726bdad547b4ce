"""GGUF files: llama.cpp's format, often quantised. Read through transformers, dequantised to plain weights."""

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from retcon.errors import MissingPackage, UnsupportedModel, how_to_install
from retcon.lm.layouts import Layout, layout_for

SUFFIX = ".gguf"
DAMAGED = (struct.error, LookupError, OverflowError, TypeError)
"""What transformers' reader raises on a file that is cut off or otherwise damaged, beside ValueError."""
DEQUANTIZED_FROM = "dequantized_from"
"""Config field that names the quantised file whose weights a model has; `save_pretrained` keeps it."""


def find_gguf(place: str) -> Path | None:
    """Return the GGUF file that `place` names, or the only one in a folder without safetensors; None for another kind.

    Raises:
        UnsupportedModel: no such file, several in the folder, or one part of a split file.
    """
    path = Path(place)
    if path.suffix == SUFFIX:
        if not path.is_file():
            raise UnsupportedModel(f"cannot load {place!r}: there is no such file")
        found = path
    else:
        files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() and not list(path.glob("*.safetensors")) else []
        if not files:
            return None
        if len(files) > 1:
            names = ", ".join(f.name for f in files)
            raise UnsupportedModel(f"cannot load {place!r}: it contains several GGUF files ({names}); name one of them")
        (found,) = files
    if re.search(r"-of-(?!0*1\.)\d+\.gguf$", found.name):
        raise UnsupportedModel(
            f"cannot load {place!r}: {found.name} is one part of a split file; join the parts first "
            "(llama-gguf-split --merge)"
        )
    return found


def gguf_options(file: Path, options: Mapping[str, Any], layout: Layout | None) -> dict[str, Any]:
    """Return what `from_pretrained(file.parent, ...)` needs to read `file` with its weights dequantised.

    The architecture is checked here, before any weight is read.

    Raises:
        MissingPackage: gguf or accelerate is not installed.
        UnknownLayout: the architecture has no layout, and none was given.
        UnsupportedModel: the architecture is out of the library's reach.
    """
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise MissingPackage(
            f"{file.name}: reading GGUF needs {' and '.join(missing)}, not installed here; "
            f"the extra 'gguf' brings both ({how_to_install('gguf')})"
        )
    import transformers

    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, **options)
    if layout is None:
        layout_for(config)
    if packing := getattr(transformers, "GgufConfig", None):  # since 5.2x weights may stay packed; before, never
        return {"quantization_config": packing(dequantize=True)}
    return {}


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Make the conversion of a GGUF file respect transformers' switch for progress bars, which it overlooks."""
    from transformers import modeling_gguf_pytorch_utils as conversion
    from transformers.utils import logging

    bar = getattr(conversion, "tqdm", None)
    conversion.tqdm = logging.tqdm
    try:
        yield
    finally:
        conversion.tqdm = bar


def forget_packing(model: Any, file: Path) -> None:
    """Make a model read from `file` a plain one, which can be edited and saved, and note where its weights are from."""
    make_plain(model)
    if kinds := _quantized_kinds(file):
        setattr(model.config, DEQUANTIZED_FROM, f"{file.name} ({', '.join(kinds)})")


def make_plain(model: Any) -> None:
    """Take off transformers' marks of a quantised model, whose weights are floats now; with them it cannot be saved."""
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


def _quantized_kinds(file: Path) -> list[str]:
    """Return the quantised tensor types in `file` ("Q4_1", ...), sorted; none in a file of plain floats."""
    from gguf import GGUFReader

    return sorted({t.tensor_type.name for t in GGUFReader(file).tensors} - {"F64", "F32", "F16", "BF16"})
