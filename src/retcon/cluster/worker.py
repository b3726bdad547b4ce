"""A worker: loads a model once, and works on pieces with the weights that the asking process has."""

import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pickle import dumps, loads
from traceback import format_exception
from typing import Any

import torch

from retcon import attachment
from retcon.atomic import replacing_folder, write_atomically
from retcon.attachment import Attachment
from retcon.errors import InvalidSetting, RetconWarning, WorkFailed, WrongBase
from retcon.lm.generate import save_model
from retcon.lm.load import load, quietly
from retcon.lm.model import LM
from retcon.lm.tokenizer import chat_hash
from retcon.shared_cache import VARIABLE, shared_cache
from retcon.version import versions
from retcon.work import silent

Sent = tuple[str, str, bytes | Path]
"""A delta that travels: its id, the module of its class, its file or what is in it."""
FOLDER = "retcon-workers-"
"""What folders begin with that models and deltas are written to for workers."""


@dataclass(frozen=True)
class Source:
    """Where a worker finds a model as it is now, and how it computes. Of a model that has changed it is another one."""

    name: str
    options: dict[str, Any]
    """Of `load`."""
    base: str
    """Fingerprint that the loaded model must have."""
    n_threads: int
    implementations: dict[str, str | None] = field(default_factory=dict)
    """transformers' name of how the model computes its attention and its experts, which no checkpoint has."""
    end_tokens: tuple[int, ...] = ()
    shared_cache: str | None = None
    """URL of the cache that the worker shares with the asking process (`retcon.shared_cache`)."""
    versions: dict[str, str] = field(default_factory=versions)
    """Of the packages that decide a result, in the asking process."""

    @classmethod
    def of(cls, lm: LM, folder: Path) -> "Source":
        """Return the source of a model: what it was loaded from, or a checkpoint of its base in `folder`, which is
        written where it is not there."""
        base, dtype = lm.fingerprint(), str(lm.dtype).removeprefix("torch.")
        if lm.source is not None:
            name, options = lm.source
            name = str(Path(name).resolve()) if Path(name).exists() else name
        else:
            name = str(folder / f"{base[:16]}-{dtype}-{chat_hash(lm.tokenizer)}")
            if not Path(name).exists():
                with lm.without_deltas(), quietly(), replacing_folder(name) as fresh:
                    save_model(lm, fresh)
                    lm.tokenizer.save_pretrained(fresh)
            spread: dict[str, Any] = getattr(lm.model, "hf_device_map", {})
            place = {"device_map": dict(spread)} if len(set(spread.values())) > 1 else {"device": str(lm.device)}
            options = {"layout": lm.layout, "packed": bool(lm.packed), **place}
        return cls(
            name,
            {**options, "dtype": dtype},
            base,
            torch.get_num_threads(),
            _implementations(lm),
            tuple(sorted(lm.end_tokens)),
            shared_cache(),
        )


def _implementations(lm: LM) -> dict[str, str | None]:
    return {part: getattr(lm.config, f"_{part}_implementation", None) for part in ("attn", "experts")}


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {number}" for package, number in versions.items())


class Worker:
    """One process's model, and the deltas that are applied to it."""

    def __init__(self, source: Source) -> None:
        if (here := versions()) != source.versions:
            raise InvalidSetting(
                f"a worker has other versions than the asking process: {_listed(here)} and {_listed(source.versions)}; "
                "results would differ in their last bits. Install the same ones, or do without workers"
            )
        from transformers import GenerationConfig

        torch.set_num_threads(source.n_threads)
        if source.shared_cache is not None:
            os.environ[VARIABLE] = source.shared_cache
        self.lm = load(source.name, **source.options)
        if self.lm.fingerprint() != source.base:
            raise WrongBase(
                f"a worker has loaded another {source.name!r} than the asking process has (fingerprints "
                f"{self.lm.fingerprint()[:12]} and {source.base[:12]}); give workers the same checkpoint, or do "
                "without workers"
            )
        own = _implementations(self.lm)
        for part, wanted in source.implementations.items():
            if wanted != own[part]:
                getattr(self.lm.model, f"set_{part}_implementation")(wanted)
        self.lm.model.generation_config = GenerationConfig(eos_token_id=list(source.end_tokens))
        self._deltas: dict[str, Attachment] = {}
        self.work: Any = None
        """What was done with the last piece, where it is sent once for many."""

    def run(self, work: Any, piece: Any, deltas: Sequence[Sent]) -> Any:
        """Return the result of a piece, with these deltas applied in their order.

        Raises:
            MalformedFile: a delta is of a kind that this process knows nothing of.
        """
        self._apply(deltas)
        return work(self.lm, piece, silent)

    def _apply(self, deltas: Sequence[Sent]) -> None:
        wanted = [id_ for id_, *_ in deltas]
        if [d.id for d in self.lm.applied] == wanted:
            return
        self._deltas = {id_: self._deltas.get(id_) or _read(module, content) for id_, module, content in deltas}
        self.lm.revert_all()
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore", RetconWarning)  # the asking process has said so
            stack.callback(self.lm.revert_all)  # nothing, or all of them
            for id_ in wanted:
                self.lm.apply(self._deltas[id_], other_base=True)  # the asking process has allowed it
            stack.pop_all()


def sendable(error: Exception) -> Exception:
    """Return an error that arrives in the asking process: this one, or one that says the same."""
    where = "".join(format_exception(error))
    try:
        loads(dumps(error))
    except Exception:  # whatever a class of somebody else's makes of it
        error = WorkFailed(f"a piece of work ended in a worker with {type(error).__qualname__}: {error}")
    error.add_note(f"In the worker:\n{where}")
    return error


def to_bytes(deltas: Sequence[Attachment]) -> list[Sent]:
    """Return deltas as they travel to another machine."""
    found: list[Sent] = []
    with tempfile.TemporaryDirectory(prefix="retcon-") as folder:
        path = Path(folder) / "delta.safetensors"
        for delta in deltas:
            delta.save(path)
            found.append((delta.id, type(delta).__module__, path.read_bytes()))
    return found


def to_files(deltas: Sequence[Attachment], folder: Path) -> list[Sent]:
    """Return deltas as they travel on this machine, their files in the folder, where they may be already."""
    found: list[Sent] = []
    for delta in deltas:
        path = folder / f"{delta.id}.safetensors"
        if not path.exists():
            delta.save(path)
        found.append((delta.id, type(delta).__module__, path))
    return found


def _read(module: str, content: bytes | Path) -> Attachment:
    with suppress(ImportError):  # a kind of one's own is registered there
        import_module(module)
    return attachment.load(content) if isinstance(content, Path) else from_bytes(content)


def from_bytes(content: bytes) -> Attachment:
    """Return the delta in a file's bytes."""
    with tempfile.TemporaryDirectory(prefix="retcon-") as folder:
        path = Path(folder) / "delta.safetensors"
        write_atomically(path, content)
        return attachment.load(path)
