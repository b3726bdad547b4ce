"""The one way to export: a folder with the model in one format, a card, and a record of what is in it."""

import json
import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from retcon.atomic import replacing_folder
from retcon.delta import Delta, only_deltas
from retcon.edits import edit_record
from retcon.errors import DeltaMismatch, DeltaNotApplied, InvalidSetting, MalformedFile, RetconWarning
from retcon.export.adapter import how_peft_reads, write_adapter
from retcon.export.card import model_card
from retcon.export.factors import Factors, check_has_factors, factors_of
from retcon.export.gguf import TYPES, check_lora, check_model, write_lora, write_model
from retcon.files import as_shared, check_exists
from retcon.lm.fingerprint import StoredTensors, fingerprint
from retcon.lm.generate import save_model
from retcon.lm.gguf import find_gguf
from retcon.lm.load import checkpoint_files, quietly
from retcon.lm.model import LM
from retcon.version import __version__

Format = Literal["hf", "peft", "diff", "gguf-lora", "gguf"]
FORMATS: dict[str, str] = {
    "hf": "merged checkpoint",
    "peft": "LoRA adapter for PEFT and servers that read it",
    "diff": "file of the changed tensors alone",
    "gguf-lora": "LoRA adapter for llama.cpp",
    "gguf": "merged model for llama.cpp",
}
"""What each format gives, in words."""
RECORD = "retcon.json"
"""What is in an export beside the model: which deltas, on which base."""
RECORD_FORMAT = "retcon-applied-1"
_DIGITS = "[0-9]" * 5
_FOLDERS = ("additional_chat_templates",)
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (
    *("model.safetensors", f"model-{_DIGITS}-of-{_DIGITS}.safetensors", _INDEX),
    *("changed.safetensors", "adapter_model.safetensors", "adapter.gguf", *(f"model-{name}.gguf" for name in TYPES)),
    "adapter_config.json",
)
"""Where the weights are in an export of some format."""
_FILES = (
    *(*_WEIGHTS, "config.json", "generation_config.json", "retcon.json", "README.md", "README.base.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.tiktoken", "chat_template.json", "*.jinja", ".gitattributes"),
)
"""What a folder may consist of that `force` replaces, beside the papers and what its index lists. A delta is none of
these, for it cannot be made again from the export."""
_SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)
_PAPERS = re.compile(
    r"(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)([-_.]\S*)?|(?i:(license|licence|notice|copying|\w*use_policy)(\.(md|txt))?)"
)
"""Names of the base's papers, which are copied, and which `force` may replace: nobody's own notes."""
_PARTS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "*.model")
"""Files of the base that a merged checkpoint needs beside those that model and tokenizer write: for images, and a
tokenizer as other programs read it."""


@dataclass(frozen=True)
class Exported:
    """What was written where."""

    format: str
    place: Path
    n_bytes: int
    record: Mapping[str, Any]
    """The content of `retcon.json`."""
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of adapters, per parameter: `rank` written, `exact_rank`, and `error`, the share of the change that is lost."""


def export(
    lm: LM,
    out: str | Path,
    *,
    format: Format = "hf",
    rank: int | Literal["max"] | None = None,
    base_name: str | None = None,
    gguf_type: str = "f16",
    max_shard_size: str = "5GB",
    scores: Mapping[str, float] | None = None,
    files: Sequence[str] = (),
    force: bool = False,
) -> Exported:
    """Write the model as it shows (`lm.showing`) to a folder, which appears complete or not at all; it is left alone.

    Args:
        out: the folder.
        format: `hf` (merged checkpoint, in the model's dtype), `peft`, `diff`, `gguf-lora`, `gguf`.
        rank: of adapters: at most that, by truncated SVD, and the same for all matrices; "max": the largest needed,
            for all (what servers with one rank want). None: each matrix its own, exact.
        base_name: how the adapter and the card name the base; a hub id for sharing; where it was loaded from.
        gguf_type: of the matrices of a whole GGUF file: f32, f16, bf16, q8_0.
        max_shard_size: of a merged checkpoint's files.
        scores: measured figures for the card, by name, from 0 to 100.
        files: names of the deltas' files for the record.
        force: replace an earlier export that is in `out`.

    Raises:
        InvalidSetting: an unknown format, type or size, a rank where there is none, or a place that is taken.
        DeltaNotApplied: no delta shows, and the format holds nothing but changes.
        DeltaMismatch: a change that an adapter cannot hold.
        UnsupportedModel: GGUF, and the family or its tokenizer is not written.
    """
    check_form(format, rank=rank, gguf_type=gguf_type, max_shard_size=max_shard_size)
    place = Path(out)

    def check() -> None:
        check_place(place, base_folder(lm), force)

    check()
    deltas = only_deltas(lm.showing, f"format {format}")
    check_content(lm, deltas, format)
    named = base_name or base_place(lm)
    revision = base_revision(lm) if named == base_place(lm) else None  # another name has revisions of its own
    record = record_of(lm, deltas, files)
    is_adapter, is_whole = format in ("peft", "gguf-lora"), format in ("hf", "gguf")
    factors = with_one_rank(factors_of(lm, deltas, rank=rank), rank) if is_adapter else {}
    held = factors if is_adapter else any(d.changes for d in deltas)
    if not held and not is_whole:
        raise DeltaNotApplied(f"no delta that shows changes anything, so format {format} would hold nothing")
    losses = {n: {"rank": f.rank, "exact_rank": f.exact_rank, "error": f.error} for n, f in factors.items()}
    floats = lm.as_floats() if is_whole else nullcontext()
    with replacing_folder(place, check=check) as fresh:
        with quietly(), floats:
            notes = lm.notes
            if format == "hf":
                save_model(lm, fresh, max_shard_size=max_shard_size)
                lm.tokenizer.save_pretrained(fresh)
            elif format == "gguf":
                write_model(lm, fresh / f"model-{gguf_type}.gguf", type_name=gguf_type)
            elif format == "peft":
                write_adapter(lm, factors, fresh, base_name=named, revision=revision)
            elif format == "gguf-lora":
                write_lora(lm, factors, fresh / "adapter.gguf")
            else:
                write_changed(lm, deltas, fresh / "changed.safetensors")
        has_base_card = _keep_files(lm, fresh, _PARTS if format == "hf" else ())
        card = model_card(
            lm,
            deltas,
            kind=FORMATS[format],
            base_name=named,
            called=base_name or lm.label,
            revision=base_revision(lm),
            scores=scores,
            losses=losses,
            notes=notes,
            has_base_card=has_base_card,
        )
        (fresh / "README.md").write_text(card, encoding="utf-8")
        (fresh / RECORD).write_text(json.dumps(record | {"export": format}, indent=2) + "\n", encoding="utf-8")
    n_bytes = sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
    return Exported(format, place, n_bytes, record, losses)


def push(place: str | Path, repository: str, *, private: bool = True, message: str = "Export by retcon") -> str:
    """Upload an export to the hub, with huggingface_hub and the login it knows of; return the commit's address.

    Weights, their index and adapters that the repository has and the export has not are removed in the same commit:
    else an earlier export's would be loaded.

    Raises:
        InvalidSetting: no repository name, or the hub refuses or is out of reach.
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        found = api.upload_folder(
            repo_id=repository, folder_path=str(place), commit_message=message, delete_patterns=list(_WEIGHTS)
        )
    except Exception as error:  # a refusal, or whatever the connection failed of
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidSetting(f"the hub did not take {repository}: {reason}. The export is at {place}") from None
    return str(found)


# --- parts -------------------------------------------------------------------------------------------------------


def check_content(lm: LM, deltas: Sequence[Delta], format: str) -> None:
    """Refuse what a format cannot hold, before the work.

    Raises:
        DeltaMismatch: a change that an adapter cannot hold.
        UnsupportedModel: GGUF, and the family, its tokenizer or a matrix is not written.
        MissingPackage: GGUF, and gguf is not installed.
    """
    if format == "gguf":
        check_model(lm)
    for name in {name for d in deltas for name in d.changes}:
        if format in ("peft", "gguf-lora"):
            check_has_factors(name, lm.shape_of(name))
        if format == "peft":
            how_peft_reads(lm, name)
        elif format == "gguf-lora":
            check_lora(lm, name)


def with_one_rank(factors: Mapping[str, Factors], rank: int | str | None) -> dict[str, Factors]:
    """Return the factors padded to one rank where one was asked for."""
    if rank is None:
        return dict(factors)
    largest = max((f.rank for f in factors.values()), default=0)
    return {name: f.padded(largest) for name, f in factors.items()}


def write_changed(lm: LM, deltas: Sequence[Delta], path: Path) -> None:
    """Write the edited values of every changed parameter, whole, in the model's dtype."""
    names = sorted({name for d in deltas for name in d.changes})
    tensors = {name: lm.parameter(name).detach().cpu().contiguous() for name in names}
    save_file(tensors, path, metadata={"format": "pt", "base": lm.fingerprint()})


def load_changed(model: Any, path: str | Path) -> None:
    """Put the tensors of a `diff` export into a transformers model that was loaded from the same base. Another base is
    warned of, and a dtype that rounds the tensors.

    Raises:
        MalformedFile: no such file, or it cannot be read.
        DeltaMismatch: a tensor that the model does not have, or has in another shape; nothing is changed then.
    """
    check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            base = (file.metadata() or {}).get("base")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise MalformedFile(f"{path}: not a readable safetensors file ({error})") from None
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise DeltaMismatch(
                f"{path}: the model has no parameter {name!r}; load the base that the export was made on"
            )
        if own[name].shape != tensor.shape:
            raise DeltaMismatch(
                f"{path}: {name} is {tuple(tensor.shape)}, in the model {tuple(own[name].shape)}; load the base that "
                "the export was made on"
            )
    files = [f for f in checkpoint_files(str(model.config._name_or_path)) if f.suffix == ".safetensors"]
    if base != fingerprint(model, StoredTensors(files) if files else None):
        warnings.warn(
            f"{path} was made on other weights than the model has; what it does not change is the model's",
            RetconWarning,
            stacklevel=2,
        )
    if rounded := [n for n, t in tensors.items() if torch.promote_types(own[n].dtype, t.dtype) != own[n].dtype]:
        kept, given = own[rounded[0]].dtype, tensors[rounded[0]].dtype
        warnings.warn(
            f"{path} holds {given}, which the model's {kept} rounds: the edit is not the one that was exported; load "
            f"the model in {given}",
            RetconWarning,
            stacklevel=2,
        )
    model.load_state_dict(tensors, strict=False)


def record_of(lm: LM, deltas: Sequence[Delta], files: Sequence[str] = ()) -> dict[str, Any]:
    """Return which deltas are in an export, on which base, and which facts they write."""
    names = list(files) if len(files) == len(deltas) else [f"{d.id}.safetensors" for d in deltas]
    return {
        "format": RECORD_FORMAT,
        "retcon": __version__,
        "base": {
            "model": lm.label,
            "revision": base_revision(lm),
            "fingerprint": lm.fingerprint(),
            "dtype": str(lm.dtype).removeprefix("torch."),
        },
        "deltas": [
            {
                "id": d.id,
                "file": name,
                "method": d.provenance.get("method"),
                "n_edits": len(d.report),
                "base": d.base,
                "parents": list(d.parents),
                "edits": [edit_record(e) for e in d.edits],
            }
            for d, name in zip(deltas, names, strict=True)
        ],
    }


def base_folder(lm: LM) -> Path | None:
    """Return where the base's files are on this machine, None where that is not known."""
    name = getattr(lm.model.config, "_name_or_path", "")
    if name and Path(name).is_dir():  # whatever its weights are kept in
        return Path(name)
    files = checkpoint_files(name, base_revision(lm)) if name else []
    return files[-1].parent if files else None


def base_revision(lm: LM) -> str | None:
    """Return the revision of the hub that the base was loaded at, None where none was asked for."""
    return lm.source[1]["revision"] if lm.source is not None else None


def base_place(lm: LM) -> str:
    """Return how people find the base: a hub id and a relative path as they are; of an absolute path, which is of this
    machine alone, the last part. Of GGUF it is the file."""
    name = str(getattr(lm.model.config, "_name_or_path", "") or lm.label)
    return as_shared(str(base_gguf(lm) or name))


def base_gguf(lm: LM) -> Path | None:
    """Return the GGUF file that the base was loaded from, None where it was another kind of checkpoint."""
    return find_gguf(lm.source[0]) if lm.source is not None and Path(lm.source[0]).exists() else None


def check_form(format: str, *, rank: int | str | None, gguf_type: str, max_shard_size: str) -> None:
    """Refuse what no export can be, before there is a model.

    Raises:
        InvalidSetting: an unknown format, type or size, or a rank that is none, or where there is none.
    """
    if format not in get_args(Format):
        raise InvalidSetting(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if rank is not None and format not in ("peft", "gguf-lora"):
        raise InvalidSetting(f"a rank was given, which adapters have and format {format} has not; leave it out")
    if rank not in (None, "max") and (isinstance(rank, bool) or not isinstance(rank, Integral)):
        raise InvalidSetting(f"rank must be a whole number or 'max', found {rank!r}")
    if gguf_type not in TYPES:
        raise InvalidSetting(f"unknown GGUF type {gguf_type!r}; known: {', '.join(TYPES)}")
    if not _SIZE.fullmatch(max_shard_size):
        raise InvalidSetting(
            f"shards of at most {max_shard_size!r}: expected a number and KB, MB, GB or TB, such as 5GB"
        )


def check_repository(name: str) -> None:
    """Refuse what cannot be a repository of the hub.

    Raises:
        InvalidSetting: it is not owner/name, or has a character that names there do not have.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InvalidSetting(f"{name!r} is no repository of the hub: {str(error).splitlines()[0]}") from None
    if name.count("/") != 1:
        raise InvalidSetting(f"{name!r} is no repository of the hub; expected owner/name")


def check_place(place: Path, model: Path | None, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse to put an export where it would take something away that cannot be made again.

    Args:
        inputs: files and folders that the export is made from.

    Raises:
        InvalidSetting: a file, the base itself, the current directory or one above it, or a folder that is not empty
            (with `force`: that is no export, or that holds an input).
    """
    if place.exists() and not place.is_dir():
        raise InvalidSetting(f"{place} is a file; give a directory to save to")
    if model is not None and place.resolve() == model.resolve():
        raise InvalidSetting(f"{place} is the model itself; save somewhere else, or the edit could not be undone")
    if Path.cwd().is_relative_to(place.resolve()):
        raise InvalidSetting(
            f"{place} is the directory that you are in, which would be replaced; work from another one"
        )
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not force:
        raise InvalidSetting(
            f"{place} exists and is not empty; give another directory",
            python=", or force=True to replace it",
            option=", or --force to replace it",
        )
    if not (place / "config.json").is_file() and not (place / RECORD).is_file():
        raise InvalidSetting(
            f"{place} holds no checkpoint (no config.json), so it is not replaced; give another directory"
        )
    for each in inputs:
        if _lies_in(each, place):
            raise InvalidSetting(
                f"{each} is an input of this command, and replacing {place} would remove it; save somewhere else"
            )
    listed = _listed(place)
    foreign = next((p for p in sorted(place.rglob("*")) if not _of_a_checkpoint(p.relative_to(place), p, listed)), None)
    if foreign is not None:
        raise InvalidSetting(
            f"{place} holds {foreign.relative_to(place)}, which is no file of a checkpoint, so it is not "
            "replaced; move that file, or give another directory"
        )


def _lies_in(path: Path, folder: Path) -> bool:
    """Return whether a file or the link that leads to it is in a folder or below it."""
    if not path.exists():
        return False
    return any(folder.resolve() in (p, *p.parents) for p in (path.resolve(), path.parent.resolve() / path.name))


def _listed(place: Path) -> frozenset[str]:
    """Return the files that the index of a checkpoint lists, nothing where there is none."""
    try:
        return frozenset(map(str, json.loads((place / _INDEX).read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return frozenset()


def _of_a_checkpoint(name: Path, path: Path, listed: Collection[str]) -> bool:
    """Return whether a file of a checkpoint's folder is one that checkpoints, adapters and our exports consist of."""
    if path.is_dir() and not path.is_symlink():
        return name.parts[0] in _FOLDERS
    known = name.name in listed or bool(_PAPERS.fullmatch(name.name)) or _fits(name.name, (*_FILES, *_PARTS))
    return path.is_file() and known and (len(name.parts) == 1 or name.parts[0] in _FOLDERS)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _keep_files(lm: LM, fresh: Path, parts: Sequence[str]) -> bool:
    """Copy the base's licence, those files of it that `parts` fit and that are not written anew, and its card under
    another name; return whether there was a card."""
    base = base_folder(lm)
    if base is None or not (base / "config.json").is_file():  # what lies beside a GGUF file may be about other things
        return False
    for file in base.iterdir():
        wanted = _PAPERS.fullmatch(file.name) or _fits(file.name, parts)
        if wanted and file.is_file() and not (fresh / file.name).exists():
            shutil.copyfile(file, fresh / file.name)
    card = base / "README.md"
    if card.is_file():
        shutil.copyfile(card, fresh / "README.base.md")
    return card.is_file()
