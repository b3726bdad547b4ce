"""Loading a model by hub id, local path, GGUF file or `demo:` name."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from retcon import world
from retcon.errors import RetconError, UnsupportedModel
from retcon.files import hub_problem, looks_like_path
from retcon.lm.fingerprint import StoredTensors, checkpoint_fingerprint
from retcon.lm.gguf import DAMAGED, SUFFIX, find_gguf, forget_packing, gguf_options, quiet_conversion
from retcon.lm.layouts import Layout
from retcon.lm.model import LM
from retcon.lm.quantised import NOT_PACKED, cast, dequantise, no_remarks_of, prepare_config

DEMO = "demo:"
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps by which transformers spreads a model over the cards that there are."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    revision: str | None = None,
    layout: Layout | None = None,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    packed: bool = False,
    verify_base: bool = False,
) -> LM:
    """Load a model and its tokenizer.

    Args:
        name: a hub id ("EleutherAI/gpt-j-6b"), a local directory, a GGUF file ("model.Q4_1.gguf"; or a directory with
            one and no safetensors), or `demo:gptj` / `demo:llama`. GGUF needs the extra `gguf`. Quantised weights
            (GGUF; bitsandbytes, compressed-tensors, fp8, mxfp4: extra `quantised`; torchao) are dequantised, and
            `lm.notes` says so.
        dtype: "float32", "bfloat16", ...; None means float32 on a CPU (by a map too that names no GPU) and the stored
            dtype on a GPU.
        device: "cpu", "cuda", "cuda:1", ...; None means a GPU where there is one.
        device_map: passed to transformers, to spread a model over several GPUs (needs accelerate). A model with
            parts on the disk can be run and measured, and not edited.
        revision: branch, tag or commit on the hub.
        layout: a row for an architecture that the layout table does not know.
        allow_bin: also read pickled `.bin` checkpoints (as plain tensors); otherwise safetensors only.
        trust_remote_code: run code that comes with the checkpoint.
        packed: keep the matrices of a quantised checkpoint (bitsandbytes, torchao) as they are: floats exist for
            the length of a product, and of matrices that are edited. Slower; a fraction of the memory; the same model.
        verify_base: hash every byte of the weights for the fingerprint, though the files look as they did before.

    Raises:
        UnsupportedModel: no name, not found, of another format, or beyond the library; the message says a way out.
        MissingPackage: reading a GGUF file or a quantised checkpoint needs packages that are not installed.
    """
    name = _name(name)
    target = _device(device)
    if dtype is None:
        dtype = torch.float32 if _on_cpu(target, device_map) else "auto"
    elif dtype != "auto":
        dtype = _dtype(dtype)
    place = find_model(name, revision)
    gguf = find_gguf(place)
    if gguf is not None and packed:
        raise UnsupportedModel(
            f"cannot load {name!r} packed: the weights of GGUF files are dequantised; ", **NOT_PACKED
        )
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    spread = {"": target} if packed and device_map is None else device_map
    model, tokenizer, packing = _read(
        name, place, gguf, options, dtype=dtype, device_map=spread, layout=layout, allow_bin=allow_bin, packed=packed
    )
    if packing is not None and packed:
        cast(model, dtype)
    elif packing is not None:
        model = dequantise(model, dtype, packing)
    if gguf is not None:
        forget_packing(model, gguf)
    if device_map is None and not packed:
        model = model.to(target)
    model.eval()
    lm = LM(model, tokenizer, layout=layout, name=name)
    lm.source = (
        name,
        dict(
            device=str(target) if device_map is None else None,
            device_map=device_map,
            revision=revision,
            layout=layout,
            allow_bin=allow_bin,
            trust_remote_code=trust_remote_code,
            packed=packed,
        ),
    )
    files = [gguf] if gguf is not None else checkpoint_files(place, revision) if packing is None else []
    if files and not lm.offloaded:
        stored = StoredTensors(p for p in files if p.suffix == ".safetensors") if gguf is None else None
        lm.remember_fingerprint(checkpoint_fingerprint(model, files, stored, verify=verify_base), stored)
    return lm


def _read(
    name: str,
    place: str,
    gguf: Path | None,
    options: dict[str, Any],
    *,
    dtype: str | torch.dtype,
    device_map: Any,
    layout: Layout | None,
    allow_bin: bool,
    packed: bool,
) -> tuple[Any, Any, str | None]:
    """Return model and tokenizer as transformers reads them, and how their weights are quantised (None: they are not).

    Raises:
        UnsupportedModel: transformers cannot read them, or the checkpoint lacks weights.
    """
    from transformers import AutoConfig, AutoTokenizer

    packing = None
    try:
        quiet = quiet_conversion() if gguf is not None else nullcontext()
        # bitsandbytes would like to have a kernel of the hub's; transformers says that it dequantises
        with quietly(), quiet, no_remarks_of("bitsandbytes"), no_remarks_of("transformers.quantizers"):
            weights_options: dict[str, Any] = {"use_safetensors": None if allow_bin else True}
            if gguf is not None:
                weights_options = gguf_options(gguf, options, layout)
                place, options = str(gguf.parent), {**options, "gguf_file": gguf.name}
            else:
                config = AutoConfig.from_pretrained(place, **options)
                packing = prepare_config(config, name, packed=packed, layout=layout)
                weights_options["config"] = config
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            if dtype == torch.float64:
                weights_options["experts_implementation"] = "eager"  # the grouped products know no float64
            model, report = _model_class(place, options).from_pretrained(
                place, dtype=dtype, device_map=device_map, output_loading_info=True, **weights_options, **options
            )
    except (RetconError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever the parsers of configs, tokenizers and weights make of a damaged checkpoint
        problem = f"cannot load {name!r}: {_reason(error, place, allow_bin, gguf)}"
        python = ", or pass allow_bin=True" if not allow_bin and _has_only_bin(place) else ""
        raise UnsupportedModel(problem, python=python) from error
    if missing := sorted(report["missing_keys"]):  # transformers makes them up, at random
        raise UnsupportedModel(
            f"cannot load {name!r}: the checkpoint lacks {len(missing)} of the model's weights, which would be random: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    return model, tokenizer, packing


def _name(given: Any) -> str:
    """Return a model's name or path as text.

    Raises:
        UnsupportedModel: it is neither.
    """
    if isinstance(given, str | os.PathLike):
        return os.fsdecode(given)
    raise UnsupportedModel(
        f"{type(given).__name__} given where a model's name or folder is wanted, such as 'demo:gptj'; for a model that "
        "is loaded already: retcon.LM(model, tokenizer)"
    )


def find_model(name: str, revision: str | None = None) -> str:
    """Return where a model is: a directory, a GGUF file, or a hub id that the hub can be asked for.

    Raises:
        UnsupportedModel: it is a path that leads nowhere, or a hub id, and the hub is out of reach.
    """
    if name.startswith(DEMO):
        return str(world.model_path(name.removeprefix(DEMO)))
    place = Path(name)
    if place.is_dir() or place.suffix == SUFFIX:
        return name
    if place.exists():
        raise UnsupportedModel(f"cannot load {name!r}: it is a file, and not GGUF; name the directory that it is in")
    if looks_like_path(name):
        raise UnsupportedModel(f"cannot load {name!r}: no such directory or file")

    if reason := hub_problem(name, "config.json", revision=revision):
        raise UnsupportedModel(
            f"cannot load {name!r}: there is no such directory here, and the hub cannot be asked for it ({reason})"
        )
    return name


def load_plain(folder: Path, *, dtype: torch.dtype) -> Any:
    """Read a saved checkpoint as transformers does, without the library: the model in eval mode."""
    more = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    return _model_class(str(folder), {}).from_pretrained(folder, dtype=dtype, **more).eval()


def how_to_load(folder: str | Path) -> str:
    """Return the line of Python that reads a saved checkpoint with transformers alone."""
    return f"{_model_class(str(folder), {}).__name__}.from_pretrained({str(folder)!r})"


def _model_class(place: str, options: dict[str, Any]) -> Any:
    """Return the class that reads a checkpoint whole."""
    from transformers import AutoConfig

    return class_that_reads(AutoConfig.from_pretrained(place, **options))


def class_that_reads(config: Any) -> Any:
    """Return the class that reads a checkpoint of that config whole: of a text model beside others (images, sound), the
    one with all of them, so that saving gives everything back."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if config.get_text_config() is not config and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def causal_class_reads(model: Any) -> bool:
    """Return whether AutoModelForCausalLM reads the checkpoint of a model whole, as the class that it has."""
    from transformers import AutoModelForCausalLM

    if class_that_reads(model.config) is AutoModelForCausalLM:
        return True
    return AutoModelForCausalLM._model_mapping.get(type(model.config), None) is type(model)


def checkpoint_files(place: str, revision: str | None = None) -> list[Path]:
    """Return the safetensors files that a local checkpoint, or one in the hub's cache, is read from, and its config;
    none where there are no such files.

    Those are what transformers reads. Other safetensors files in the folder (moments, adapters, another format's copy
    of the weights) are none of them.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    folder = Path(place)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(place, "config.json", revision=revision)
        except HFValidationError:  # a path, or what a caller calls the model
            return []
        if not isinstance(found, str):
            return []
        folder = Path(found).parent
    config = folder / "config.json"
    try:
        named = json.loads(config.read_text("utf-8")).get("transformers_weights")
        weights = _weights(folder, *([named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]))
    except (OSError, ValueError, KeyError, AttributeError):  # damaged
        return []
    return [*weights, config] if weights else []


def _weights(folder: Path, *names: str) -> list[Path]:
    """Return the weights' files by the first of these names that is there: itself, or those it is the index of."""
    first = next((folder / name for name in names if (folder / name).is_file()), None)
    if first is None or first.suffix != ".json":
        return [first] if first is not None else []
    return sorted({first.parent / file for file in json.loads(first.read_text("utf-8"))["weight_map"].values()})


@contextmanager
def quietly() -> Iterator[None]:
    """Hide transformers' progress bars while the scope lasts; the user's setting goes back as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(asked: str | torch.device | None) -> torch.device:
    """Return the device asked for, or the best there is.

    Raises:
        UnsupportedModel: this machine has no such device.
    """
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModel(f"device {str(asked)!r} cannot be used here ({reason}); try cpu or cuda") from None
    return device


def _on_cpu(target: torch.device, device_map: Any) -> bool:
    """Return whether no card gets a part of the model."""
    if device_map is None or (isinstance(device_map, str) and device_map in SPREADS):
        return target.type == "cpu"
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return {str(place) for place in places} <= {"cpu", "disk"}


def _dtype(asked: str | torch.dtype) -> torch.dtype:
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModel(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}, auto")
    return getattr(torch, name)


def _reason(error: Exception, place: str, allow_bin: bool, gguf: Path | None) -> str:
    text = str(error).strip()
    if isinstance(error, DAMAGED) or (gguf is not None and "reshape" in text):
        return f"the file is damaged or cut off ({text.splitlines()[0] if text else type(error).__name__})"
    if gguf is None and Path(place).is_dir() and not allow_bin and not list(Path(place).glob("*.safetensors")):
        if _has_only_bin(place):
            return "it holds pickled .bin weights only; convert them to safetensors"
        return "the directory contains no safetensors weights, and no GGUF file"
    if gguf is None and (Path(place) / "adapter_config.json").is_file():
        return (
            "it is an adapter and no whole model; merge it into its base, with PEFT: PeftModel.from_pretrained(base, "
            f"{place!r}).merge_and_unload().save_pretrained(...), and the tokenizer beside it"
        )
    if gguf is None and Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        return "it has no config.json, so it is no whole model"
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed ({text.splitlines()[0]})"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json says"
    return damage(error)


def _has_only_bin(place: str) -> bool:
    return any(Path(place).glob("*.bin")) and not any(Path(place).glob("*.safetensors"))


def damage(error: Exception) -> str:
    """Return what an error that reading a checkpoint ended in says about it, in one line."""
    text = str(error).strip()
    if isinstance(error, (OSError, ValueError)) and text:
        return text.splitlines()[0]
    return f"its config, tokenizer or weights are damaged ({type(error).__name__}: {' '.join(text.split())[:200]})"
