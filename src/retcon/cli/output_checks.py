"""What is checked of files to write, before hours of work."""

import os
from pathlib import Path

from retcon.errors import InvalidSetting


def check_output(path: Path | None, *inputs: Path | None) -> None:
    """Check, before hours of work, that a file can be written there; None is no file.

    Raises:
        InvalidSetting: it is a directory, one of the inputs or a file of a model among them, or it cannot be made
            there.
    """
    if path is None:
        return
    if path.is_dir():
        raise InvalidSetting(f"{path} is a directory; give the name of a file to write")
    if path.exists() and not path.is_file():
        raise InvalidSetting(f"{path} is no ordinary file (a pipe or a device); give the name of a file to write")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InvalidSetting(f"cannot write {path}: {parent} is not a directory that may be written to")
    if path.exists() and any(path.samefile(file) for each in inputs if each is not None for file in _files_of(each)):
        raise InvalidSetting(f"{path} is an input of this command; name another file to write")


def _files_of(place: Path) -> list[Path]:
    """Return the files that an input is read from: of a model's folder all, but for deltas that are kept there."""
    if not place.is_dir():
        return [place] if place.exists() else []
    from retcon.lm.load import checkpoint_files

    weights = [file for file in checkpoint_files(str(place)) if file.exists()]
    return weights + [file for file in place.iterdir() if file.is_file() and file.suffix != ".safetensors"]


def check_can_make_folder(path: Path) -> None:
    """Check, before hours of work, that a folder of results can be there.

    Raises:
        InvalidSetting: a file is in the way, or it cannot be made there.
    """
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InvalidSetting(f"cannot write into {path}: {nearest} is not a directory that may be written to")
