"""What is kept in the cache: listed, sized, and removed where nobody has a use for it."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retcon.atomic import TEMPORARY, remove_abandoned
from retcon.errors import InvalidSetting, MalformedFile
from retcon.files import cache_dir

KINDS = {
    "moments": "second moments, and matrices made from them",
    "passes": "second moments that were begun",
    "values": "searched values of runs that did not end",
    "pre": "the unedited model, as measured for benchmarks",
    "corpora": "text of datasets",
    "fingerprints": "fingerprints of checkpoints",
}
"""What there is, by the name that the command line takes."""
DAY = 86_400.0


@dataclass(frozen=True)
class Kept:
    """A file of the cache; of values, the folder of one search."""

    path: Path
    kind: str
    n_bytes: int
    written: float
    """Seconds since the epoch."""


def kept_files(kinds: Sequence[str] = ()) -> list[Kept]:
    """Return what the cache holds, of all kinds or of some, the oldest first.

    Raises:
        InvalidSetting: a kind that is none of `KINDS`.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidSetting(f"the cache holds no {kind!r}; it may hold {', '.join(KINDS)}")
    found = [kept for kept in _kept() if not kinds or kept.kind in kinds]
    return sorted(found, key=lambda kept: (kept.written, kept.path))


def prune(kinds: Sequence[str] = (), *, days: float | None = None) -> list[Kept]:
    """Remove from the cache, and return what was removed.

    What a killed process has left half written goes, and so do files that are damaged. Beyond these, of the kinds
    named or of all: what was written over `days` ago; with kinds and no `days`, everything.

    Raises:
        InvalidSetting: a kind that is none of `KINDS`.
    """
    asked = kept_files(kinds)
    removed = [Kept(path, "temporary", 0, 0.0) for path in remove_abandoned(cache_dir(), f"**/.*{TEMPORARY}")]
    for kept in asked:
        old = bool(kinds) if days is None else time.time() - kept.written > days * DAY
        if old or any(_is_damaged(path, kept.kind) for path in _files(kept.path)):
            _remove(kept.path)
            removed.append(kept)
    return removed


def _kept() -> Iterator[Kept]:
    root = cache_dir()
    for folder in ("moments", "values", "pre", "corpora", "fingerprints"):
        for path in sorted((root / folder).glob("*")) if (root / folder).is_dir() else ():
            files = _files(path)
            kind = "passes" if path.suffix == ".partial" else folder
            if files and not path.name.startswith("."):
                facts = [file.stat() for file in files]
                yield Kept(path, kind, sum(f.st_size for f in facts), max(f.st_mtime for f in facts))


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _is_damaged(path: Path, kind: str) -> bool:
    """Return whether a file of the cache is not what its checksum says."""
    from retcon.checked import read_intact
    from retcon.memory.moments import DERIVED_SUFFIX, load_moment, moment_keys

    try:
        if kind == "moments" and path.suffix != DERIVED_SUFFIX:
            for key in moment_keys(path):
                load_moment(path, key)
        else:
            read_intact(path)
    except MalformedFile:
        return True
    return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
