"""A cache that several machines share: a folder, or storage behind any URL that fsspec knows (s3://bucket/retcon).

Where RETCON_SHARED_CACHE names one, what is written to the cache of this machine is put there too, and what the cache
lacks is fetched from there. What is fetched is believed after reading, as every file of the cache. Storage that does
not answer costs time, nothing else: the process says so once and goes on without it.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from retcon.atomic import TEMPORARY, replacing, writer_mark
from retcon.errors import InvalidSetting, MissingPackage, RetconWarning
from retcon.files import cache_dir

Found = TypeVar("Found")

VARIABLE = "RETCON_SHARED_CACHE"
SHARED = ("moments", "values", "pre", "corpora")
"""Folders of the cache whose content is the same on every machine. Fingerprints are kept by this machine's paths."""
UNFINISHED = ".partial"
"""Not shared: the sums of a pass over text that was begun, as large as all its moments and written again and again."""


@dataclass
class _Storage:
    url: str
    """With its protocol and, of a folder, from the root on."""
    files: Any
    """fsspec's file system."""
    root: str
    answers: bool = True

    def place_of(self, path: Path) -> str | None:
        """Return where a file of the cache is in the storage; None for one that is not shared."""
        if not path.is_relative_to(cache_dir()) or path.suffix == UNFINISHED:
            return None
        within = path.relative_to(cache_dir())
        return f"{self.root}/{within.as_posix()}" if within.parts[0] in SHARED else None

    def ask(self, what: Callable[[], Found]) -> Found | None:
        """Return what the storage gives; None, and from then on nothing is asked of it, where it does not answer.

        Raises:
            FileNotFoundError: there is no such file.
        """
        try:
            return what()
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever a storage's own client comes up with
            self.answers = False
            warnings.warn(
                f"the shared cache {self.url} cannot be used: {error} ({type(error).__name__}). This process goes on "
                "without it",
                RetconWarning,
                stacklevel=4,
            )
            return None


def shared_cache() -> str | None:
    """Return the URL of the shared cache; None where there is none.

    Raises:
        InvalidSetting: RETCON_SHARED_CACHE is no URL that fsspec knows.
        MissingPackage: its kind of storage needs a package that is not installed.
    """
    storage = _storage()
    return None if storage is None else storage.url


def fetch(path: Path) -> bool:
    """Fetch a file that the cache lacks; return whether it is there now."""
    if (found := _place(path)) is None:
        return False
    storage, place = found

    def get() -> bool:
        storage.files.info(place)
        with replacing(path) as temporary:
            storage.files.get_file(place, str(temporary))
        return True

    try:
        return bool(storage.ask(get))
    except FileNotFoundError:
        return False


def put(path: Path) -> None:
    """Put a file of the cache into the storage: readers there see the old one or this one, whole."""
    if (found := _place(path)) is None:
        return
    storage, place = found
    folder, _, name = place.rpartition("/")
    temporary = f"{folder}/.{name}.{writer_mark()}{TEMPORARY}"

    def send() -> None:
        storage.files.makedirs(folder, exist_ok=True)
        storage.files.put_file(str(path), temporary)
        storage.files.mv(temporary, place)

    with suppress(FileNotFoundError):  # another process has removed it in between
        storage.ask(send)


def remove(path: Path) -> None:
    """Remove a file or folder of the cache from the storage."""
    if (found := _place(path)) is None:
        return
    storage, place = found
    with suppress(FileNotFoundError):
        storage.ask(lambda: storage.files.rm(place, recursive=True))


def _place(path: Path) -> tuple[_Storage, str] | None:
    storage = _storage()
    if storage is None or not storage.answers or (place := storage.place_of(path)) is None:
        return None
    return storage, place


def _storage() -> _Storage | None:
    url = os.environ.get(VARIABLE)
    if not url:
        return None
    return _opened(url if "://" in url else os.path.abspath(os.path.expanduser(url)))


@cache
def _opened(url: str) -> _Storage:
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url)
    except ImportError as error:
        raise MissingPackage(f"{VARIABLE}={url}: {error}") from error
    except ValueError as error:
        raise InvalidSetting(f"{VARIABLE}={url}: {error}; name a folder, or a URL that fsspec knows") from error
    return _Storage(files.unstrip_protocol(root), files, root.rstrip("/"))
