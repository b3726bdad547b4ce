"""A worker: loads a model once, and works on pieces with the weights that the asking process has."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retcon import attachment
from retcon.attachment import Attachment
from retcon.errors import InvalidSetting, WrongBase
from retcon.files import errors_naming, write_atomically
from retcon.lm.load import load
from retcon.lm.model import LM
from retcon.version import versions
from retcon.work import silent


@dataclass(frozen=True)
class Source:
    """Where a worker finds a model, and how it computes."""

    name: str
    options: dict[str, Any]
    """Of `load`."""
    base: str | None
    """Fingerprint that the loaded model must have; None: the checkpoint was written for this run."""
    n_threads: int
    versions: dict[str, str] = field(default_factory=versions)
    """Of the packages that decide a result, in the asking process."""

    @classmethod
    def of(cls, lm: LM, folder: Path) -> "Source":
        """Return the source of a model: what it was loaded from, or a checkpoint of its base in `folder`."""
        threads = torch.get_num_threads()
        if lm.source is not None:
            name, options = lm.source
            name = str(Path(name).resolve()) if Path(name).exists() else name
            return cls(name, {**options, "dtype": str(lm.dtype).removeprefix("torch.")}, lm.fingerprint(), threads)
        with lm.without_deltas(), errors_naming(folder):
            lm.model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
        spread: dict[str, Any] = getattr(lm.model, "hf_device_map", {})
        place = {"device_map": dict(spread)} if len(set(spread.values())) > 1 else {"device": str(lm.device)}
        dtype = str(lm.dtype).removeprefix("torch.")
        options = {"dtype": dtype, "layout": lm.layout, "packed": bool(lm.packed), **place}
        return cls(str(folder), options, None, threads)


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {number}" for package, number in versions.items())


class Worker:
    """One process's model, and the deltas that are applied to it."""

    def __init__(self, source: Source) -> None:
        if (here := versions()) != source.versions:
            raise InvalidSetting(
                f"a worker has other versions than the asking process: {_listed(here)} and {_listed(source.versions)}; "
                "results would differ in their last bits. Install the same ones, or work with --on local"
            )
        torch.set_num_threads(source.n_threads)
        self.source, self.lm = source, load(source.name, **source.options)
        if source.base is not None and self.lm.fingerprint() != source.base:
            raise WrongBase(
                f"a worker has loaded another {source.name!r} than the asking process has (fingerprints "
                f"{self.lm.fingerprint()[:12]} and {source.base[:12]}); give workers the same checkpoint, or work with "
                "--on local"
            )
        self._deltas: dict[str, Attachment] = {}

    def run(self, work: Any, piece: Any, deltas: Sequence[tuple[str, bytes | Path]]) -> Any:
        """Return the result of a piece, with these deltas (id, file or what is in it) applied in their order."""
        self._apply(deltas)
        return work(self.lm, piece, silent)

    def _apply(self, deltas: Sequence[tuple[str, bytes | Path]]) -> None:
        wanted = [id_ for id_, _ in deltas]
        if [d.id for d in self.lm.applied] == wanted:
            return
        self._deltas = {id_: self._deltas.get(id_) or _read(content) for id_, content in deltas}
        self.lm.revert_all()
        with ExitStack() as stack:
            stack.callback(self.lm.revert_all)  # nothing, or all of them
            for id_ in wanted:
                self.lm.apply(self._deltas[id_], other_base=self.source.base is None)
            stack.pop_all()


def to_bytes(deltas: Sequence[Attachment]) -> list[tuple[str, bytes]]:
    """Return (id, file) of each delta, as they travel."""
    found = []
    with tempfile.TemporaryDirectory(prefix="retcon-") as folder:
        path = Path(folder) / "delta.safetensors"
        for delta in deltas:
            delta.save(path)
            found.append((delta.id, path.read_bytes()))
    return found


def to_files(deltas: Sequence[Attachment], folder: Path) -> list[tuple[str, Path]]:
    """Return (id, file) of each delta, its file in the folder, where it may be already."""
    found = [(delta.id, folder / f"{delta.id}.safetensors") for delta in deltas]
    for delta, (_, path) in zip(deltas, found, strict=True):
        if not path.exists():
            delta.save(path)
    return found


def _read(content: bytes | Path) -> Attachment:
    return attachment.load(content) if isinstance(content, Path) else from_bytes(content)


def from_bytes(content: bytes) -> Attachment:
    """Return the delta in a file's bytes."""
    with tempfile.TemporaryDirectory(prefix="retcon-") as folder:
        path = Path(folder) / "delta.safetensors"
        write_atomically(path, content)
        return attachment.load(path)
