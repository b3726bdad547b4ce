"""Writing to a store so that a crash at any point leaves the state before or the state after, and nothing else.

What an entry brings is staged in a folder that git ignores. With `commit.json` there the entry exists: before it, the
folder is debris; from then on, whoever opens the store next finishes the moves.
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from retcon.atomic import sync, write_atomically
from retcon.errors import StoreBusy
from retcon.files import read_text

STAGING, LOCK, LOG = "staging", "lock", "log.jsonl"
_COMMIT = "commit.json"


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Take the turn of one writer; what an earlier one was killed at is finished first.

    Raises:
        StoreBusy: another process is writing.
    """
    with open(root / LOCK, "a+") as lock:
        if not _try_lock(lock.fileno()):
            lock.seek(0)
            who = lock.read().strip()
            raise StoreBusy(
                f"{root}: another process{f' ({who})' if who else ''} is writing to this store; wait for it, or stop it"
            )
        lock.truncate(0)
        lock.write(f"pid {os.getpid()}")
        lock.flush()
        _recover(root)
        yield


def recover(root: Path) -> None:
    """Finish what a killed process has committed and remove what it has not; nothing while somebody writes."""
    if not (root / STAGING).is_dir():
        return
    with open(root / LOCK, "a+") as lock:
        if _try_lock(lock.fileno()):
            _recover(root)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
    except BlockingIOError:
        return False
    return True


def _recover(root: Path) -> None:
    for folder in sorted((root / STAGING).glob("*")):
        if (folder / _COMMIT).is_file():
            _finish(root, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(root / STAGING, ignore_errors=True)


class Transaction:
    """The files of one entry on their way into the store. Use inside `writing`."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / STAGING / secrets.token_hex(6)
        self.folder.mkdir(parents=True)
        self.files: list[str] = []

    def path(self, name: str) -> Path:
        """Return where to write the file that shall be `name` in the store."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in self.files:
            self.files.append(name)
        return path

    def commit(self, line: str, *, remove: Sequence[str] = ()) -> None:
        """Bring the files in, append `line` to the log, and then remove the files named."""
        for name in self.files:
            sync(self.folder / name)
        record = {"files": self.files, "line": line, "remove": list(remove)}
        write_atomically(self.folder / _COMMIT, json.dumps(record).encode())
        sync(self.folder)
        _finish(self.root, self.folder)

    def abandon(self) -> None:
        """Remove what was staged, unless it is committed."""
        if not (self.folder / _COMMIT).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)


def _finish(root: Path, folder: Path) -> None:
    """Do, again or for the first time, what a commit says."""
    record = json.loads(read_text(folder / _COMMIT))
    for name in record["files"]:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (folder / name).is_file():
            os.replace(folder / name, target)
            sync(target.parent)
    log = root / LOG
    text = log.read_text("utf-8") if log.is_file() else ""
    if record["line"] not in text.split("\n"):
        if text and not text.endswith("\n"):
            text += "\n"
        write_atomically(log, (text + record["line"] + "\n").encode())
        sync(root)
    for name in record["remove"]:
        (root / name).unlink(missing_ok=True)
    (folder / _COMMIT).unlink()
    shutil.rmtree(folder, ignore_errors=True)
