"""Writing that a crash cannot leave half done, files and folders; one process at a time in a folder."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from retcon.errors import PlaceBusy

TEMPORARY = ".tmp"
"""How the names of files end that are being written."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` so that a crash at any point leaves the old file or the new one, never a part."""
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        stream.write(data)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; what is written there takes the place of `path` when the scope ends well.

    A crash at any point leaves the old file or the new one, never a part. What a process that was killed here has left
    behind is removed by the next one that writes the same file.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name[:100]}.{writer_mark()}{TEMPORARY}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, f".{_escaped(target.name[:100])}.*{TEMPORARY}")
        with open(temporary, "xb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))  # safetensors puts a file there that nobody else may read
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if (named := _naming(error, temporary, target)) is not None:
            raise named from error
        raise


@contextmanager
def turn_in(folder: str | os.PathLike[str], *, wait: bool) -> Iterator[None]:
    """Take one process's turn in a folder, which must be there. It ends with the process, however that ends.

    Where the file system knows no locks, everybody has the turn.

    Args:
        wait: until another process ends its turn; else:

    Raises:
        PlaceBusy: another process has the turn.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlaceBusy(
                f"{folder}: another process is at work in this folder; wait for it, stop it, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


@contextmanager
def replacing_folder(path: str | os.PathLike[str], *, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Give a fresh folder beside `path` that takes its place when the scope ends well; else what was there stays.

    Its files become readable for everybody, whatever their writer thought of that. What a process that was killed here
    has left behind is put in order by the next one that writes the same folder.

    Args:
        check: raises where what is at `path` by then must not be replaced.

    Raises:
        OSError: it cannot be written; the error names `path` or a file in it.
    """
    place = Path(path).resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    mend_folder(place)
    mark = writer_mark()
    fresh, old = (place.with_name(f".{place.name}.{mark}{part}") for part in (_NEW, _OLD))
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                sync(file)
        with turn_in(place.parent, wait=True):
            check()
            try:
                if place.exists():
                    place.rename(old)
                fresh.rename(place)
            except BaseException:
                _put_back(old, place)
                raise
    except Exception as error:
        if (named := _naming(error, fresh, place)) is not None:
            raise named from error
        raise
    finally:
        _put_back(old, place)  # again, where an interrupt has cut the first attempt
        shutil.rmtree(fresh, ignore_errors=True)
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, place: Path) -> None:
    """Bring a folder that was moved aside back, unless another one has taken its place."""
    if old.exists() and not place.exists():
        old.rename(place)


@contextmanager
def errors_naming(place: str | os.PathLike[str]) -> Iterator[None]:
    """Let a write that fails raise an OSError that names a file, `place` where the writer names none."""
    try:
        yield
    except Exception as error:
        if (named := _naming(error, Path(place), Path(place))) is not None:
            raise named from error
        raise


def _naming(error: BaseException, temporary: Path, target: Path) -> OSError | None:
    """Return the error of a write with the name that the caller knows; None for errors of another kind."""
    if type(error).__name__ == "SafetensorError":  # which is how safetensors reports a full disk
        return OSError(errno.EIO, str(error), os.fspath(target))
    if isinstance(error, OSError) and (error.filename is None or os.fspath(temporary) in str(error.filename)):
        return type(error)(error.errno or errno.EIO, error.strerror or str(error), os.fspath(target))
    return None


_NEW, _OLD = ".new", ".old"


def mend_folder(path: str | os.PathLike[str]) -> None:
    """Put in order what a process has left that was killed in `replacing_folder`: the folder is as it was, or new."""
    place = Path(path).resolve()
    for old in place.parent.glob(f".{_escaped(place.name)}.*{_OLD}"):
        if _is_abandoned(old, _OLD):
            if place.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(place)
    for new in place.parent.glob(f".{_escaped(place.name)}.*{_NEW}"):
        if _is_abandoned(new, _NEW):
            shutil.rmtree(new, ignore_errors=True)


def _escaped(name: str) -> str:
    """Return a name for `glob`, which would take some characters for patterns."""
    return re.sub(r"([*?[])", r"[\1]", name)


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_abandoned(folder: Path, pattern: str = f".*{TEMPORARY}") -> list[Path]:
    """Remove the temporary files of a folder that nobody is writing any more, and return them.

    Args:
        pattern: of their names, as `Path.glob` takes it; "**/" before it looks in folders below too.
    """
    removed = []
    for path in folder.glob(pattern):
        if _is_abandoned(path, TEMPORARY):
            with suppress(OSError):
                path.unlink()
                removed.append(path)
    return removed


LONGEST_WRITE = 86_400.0
"""Seconds after which a temporary file that nobody has touched is abandoned, whatever process wrote it."""


def writer_mark() -> str:
    """Return what a temporary name says of its writer: machine, process, and something of its own."""
    return f"{_machine()}.{os.getpid()}-{secrets.token_hex(8)}"


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "-"


def _is_abandoned(path: Path, suffix: str) -> bool:
    """Return whether the writer of a temporary file or folder is gone. Processes of other machines cannot be asked."""
    machine, _, rest = path.name.removesuffix(suffix).rpartition(".")
    process = rest.partition("-")[0]
    if not process.isdecimal():
        return False
    if machine.endswith(f".{_machine()}") and not _is_running(int(process)):
        return True
    try:
        return time.time() - path.stat().st_mtime > LONGEST_WRITE
    except OSError:  # gone already
        return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, and is somebody else's
        return True
    return True
