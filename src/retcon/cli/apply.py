"""`retcon apply`: an edited model as a checkpoint that any transformers user can load."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from retcon.cli.shell import (
    Device,
    DType,
    Json,
    Model,
    console,
    count,
    emit,
    load_deltas,
    load_model,
    size,
    spinner,
)
from retcon.errors import InvalidSetting

if TYPE_CHECKING:
    from retcon.delta import Delta
    from retcon.lm.model import LM

RECORD = "retcon.json"
"""What is in a checkpoint beside the model: which deltas, on which base."""
FORMAT = "retcon-applied-1"


def apply(
    model: Model,
    delta: Annotated[
        list[Path], typer.Argument(metavar="DELTA...", help="Deltas, in order of application.", show_default=False)
    ],
    save: Annotated[Path, typer.Option(metavar="DIR", help="Where the checkpoint goes.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint that is in DIR.")] = False,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Apply deltas made for other weights than these.")
    ] = False,
    device: Device = None,
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Apply deltas to a model and save the result: safetensors weights and tokenizer, for AutoModelForCausalLM.

    Weights are saved in the dtype in which the model is stored, whatever the deltas were computed in.

    The model itself is left alone. DIR appears complete or not at all. It records which deltas are in it.
    """
    _check_place(save, model, force)
    deltas = load_deltas(delta)
    lm = load_model(model, device=device, dtype=dtype or "auto")
    with spinner("applying"):
        for each in deltas:
            lm.apply(each, other_base=other_base)
    record = _record(lm, deltas, delta)
    from retcon.lm.load import quietly

    with spinner(f"saving {save}"), quietly(), _replacing(save) as fresh:
        lm.model.save_pretrained(fresh)
        lm.tokenizer.save_pretrained(fresh)
        (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    n_bytes = sum(f.stat().st_size for f in save.rglob("*") if f.is_file())
    if as_json:
        emit({"saved": str(save), "bytes": n_bytes, **record})
        return
    out = console()
    for each in record["deltas"]:
        out.print(
            f"applied  {escape(each['file'])}  [dim]{each['id']}: {each['method']}, {count(each['n_edits'], 'edit')}[/]"
        )
    out.print(f"saved    {escape(str(save))}  [dim]{size(n_bytes)}, {record['base']['dtype']}[/]")
    out.print(f"[dim]load it with AutoModelForCausalLM.from_pretrained({escape(repr(str(save)))})[/]")


def _record(lm: "LM", deltas: Sequence["Delta"], files: Sequence[Path]) -> dict[str, Any]:
    import retcon

    return {
        "format": FORMAT,
        "retcon": retcon.__version__,
        "base": {"model": lm.label, "fingerprint": lm.fingerprint(), "dtype": str(lm.dtype).removeprefix("torch.")},
        "deltas": [
            {
                "id": d.id,
                "file": f.name,
                "method": d.provenance.get("method"),
                "n_edits": len(d.report),
                "base": d.base,
                "parents": list(d.parents),
            }
            for d, f in zip(deltas, files, strict=True)
        ],
    }


def _check_place(place: Path, model: str, force: bool) -> None:
    """Refuse to put a checkpoint where it would take something away that cannot be made again."""
    if place.exists() and not place.is_dir():
        raise InvalidSetting(f"{place} is a file; give a directory to save to")
    if Path(model).is_dir() and place.resolve() == Path(model).resolve():
        raise InvalidSetting(f"{place} is the model itself; save somewhere else, or the edit could not be undone")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not force:
        raise InvalidSetting(f"{place} exists and is not empty; give another directory, or --force to replace it")
    if not (place / "config.json").is_file():
        raise InvalidSetting(f"{place} holds no checkpoint (no config.json), so --force does not replace it")


@contextmanager
def _replacing(place: Path) -> Iterator[Path]:
    """A fresh directory beside `place` that takes its place at the end; whatever fails, what stood there stays."""
    place = place.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    fresh, old = (place.with_name(f".{place.name}.{mark}.{part}") for part in ("new", "old"))
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors leaves the weights to their owner alone
                _sync(file)
        if place.exists():
            place.rename(old)
        try:
            fresh.rename(place)
        except BaseException:
            if old.exists():
                old.rename(place)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
