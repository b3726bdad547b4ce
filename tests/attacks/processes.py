"""Commands in processes of their own, for attacks that kill them or set them on each other.

Each is a copy (fork) of this process, which has imported what is heavy and loaded nothing, so that it begins as a fresh
one does, without the seconds that imports take.
"""

import hashlib
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from typer.testing import CliRunner

from retcon.atomic import TEMPORARY
from retcon.attachment import load
from retcon.cli import app
from retcon.memory.values import store as value_store
from tests.cli.conftest import ROWS
from tests.conftest import tiny_model, tokenizer

EDIT = (
    *("edit", "../gptj", "../edits.jsonl", "--out", "delta.safetensors", "--corpus", "../corpus.txt", "--require", "0"),
    *("--method", "alphaedit", "--set", "steps=4", "--set", "layers=[0, 1]"),
    *("--set", "null_threshold=0.6", "--set", "threshold_mode=rank"),
)
MOMENTS = ("moments", "../gptj", "--corpus", "../corpus.txt", "--layers", "0-3", "--tokens-per-dimension", "30")
APPLY = ("apply", "../gptj", "../delta.safetensors", "--save", "edited", "--force")
BENCH = ("bench", "../bench.toml", "--out", "bench")
BENCH_FILE = """\
[[models]]
name = "../gptj"
corpus = "../corpus.txt"
[[methods]]
name = "memit"
settings = {steps = 2, layers = [0, 1], moment_weight = 10.0}
[[datasets]]
path = "../edits.jsonl"
[[protocols]]
kind = "sequential"
batch = 1
[measures]
generate = false
"""


def furnish(folder: Path) -> None:
    """Put a checkpoint, a corpus, edits, a benchmark file and a delta in a folder; runs are in folders below it."""
    warnings.simplefilter("ignore")
    value_store.KEEP_SECONDS = 0.0  # so that searches of a second are kept at every step
    tiny_model("gptj", torch.float32).save_pretrained(folder / "gptj")
    tokenizer("gpt").save_pretrained(folder / "gptj")
    text = [f"The capital of France is Paris, and {i} of {i * i} trains go home." for i in range(60)]
    (folder / "corpus.txt").write_text("\n\n".join(text))
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "others.jsonl").write_text("".join(json.dumps(row | {"target_new": "Greek"}) + "\n" for row in ROWS))
    (folder / "bench.toml").write_text(BENCH_FILE)
    first = folder / "first"
    run(EDIT, first)
    shutil.copy(first / "delta.safetensors", folder)
    shutil.rmtree(first)


def run(command: Sequence[str], folder: Path, cache: Path | None = None) -> str:
    """Run a command in this process, in a folder with a cache of its own; return what it said on stderr."""
    folder.mkdir(exist_ok=True)
    here = Path.cwd()
    os.chdir(folder)
    os.environ["RETCON_CACHE"] = str(cache or folder / "cache")
    try:
        ran = CliRunner().invoke(app, command)
    finally:
        os.chdir(here)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    assert ran.exit_code == 0, ran.output
    return ran.stderr


@dataclass
class Forked:
    """A command in a process of its own."""

    pid: int
    said: Path
    started: float

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> tuple[int, str]:
        """Return the exit code (negative: the signal) and what was said."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self.said.read_text(errors="replace")


CALLS = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "open")
"""Of `os`, that touch the disk."""


def fork(command: Sequence[str], folder: Path, said: Path, *, cache: Path | None = None, die_at: int = 0) -> Forked:
    """Start a command in a folder.

    Args:
        die_at: the call that touches the disk, counted from 1, before which the process kills itself.
    """
    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child:
        return Forked(child, said, started)
    code = 70
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        os.environ["RETCON_CACHE"] = str(cache or folder / "cache")
        seen = [0]
        for name in CALLS:
            setattr(os, name, _counted(getattr(os, name), seen, die_at))
        try:
            app(list(command), standalone_mode=True)
        except SystemExit as end:
            code = int(end.code or 0)
        os.write(2, f"\ndisk calls {seen[0]}\n".encode())
    except BaseException as error:
        os.write(2, f"\ntraceback {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _counted(function: Callable[..., Any], seen: list[int], die_at: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


# --- results ---------------------------------------------------------------------------------------------------------


def debris(folder: Path) -> list[str]:
    """Files that nobody has a use for: temporary ones, halves of folders, and searches of runs that have ended."""
    ends = (TEMPORARY, ".new", ".old", ".begun", ".partial")
    found = [p for p in folder.rglob("*") if p.name.endswith(ends) or (p.is_file() and "values" in p.parts)]
    return [str(p.relative_to(folder)) for p in found]


def names(folder: Path) -> list[str]:
    """The files of a folder, without what differs from run to run."""
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "fingerprints" not in p.parts
    )


def result_of_edit(folder: Path) -> str:
    """What an edit has made."""
    delta = load(folder / "delta.safetensors")
    digest = hashlib.sha256(f"{delta.id} {delta.report}".encode())
    for name, x in sorted((delta.state or {}).items()):
        digest.update(name.encode() + x.numpy().tobytes())
    return digest.hexdigest()


def result_of_moments(folder: Path, cache: Path | None = None) -> str:
    """The second moments that are kept."""
    digest = hashlib.sha256()
    for path in sorted((cache or folder / "cache").glob("moments/*.safetensors")):
        digest.update(path.name.encode())
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                digest.update(name.encode() + file.get_tensor(name).numpy().tobytes())
    return digest.hexdigest()


def result_of_apply(folder: Path) -> str:
    """The checkpoint, to the byte."""
    digest = hashlib.sha256()
    for path in sorted((folder / "edited").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def result_of_bench(folder: Path) -> str:
    """What was measured, to the byte; times differ from run to run."""
    digest = hashlib.sha256()
    for path in sorted((folder / "bench").rglob("*.jsonl")):
        if path.name != "timings.jsonl":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


COMMANDS: dict[str, tuple[tuple[str, ...], Callable[[Path], str]]] = {
    "edit": (EDIT, result_of_edit),
    "bench": (BENCH, result_of_bench),
    "moments": (MOMENTS, result_of_moments),
    "apply": (APPLY, result_of_apply),
}
