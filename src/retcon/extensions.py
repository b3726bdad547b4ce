"""Code of the user's own, by "module:name" or by a name that an installed package announces."""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from operator import attrgetter
from pathlib import Path
from typing import Any

from retcon.errors import InvalidSetting


def installed(group: str) -> Mapping[str, str]:
    """Return what installed packages announce in a group of entry points: "module:name" by name."""
    return {point.name: point.value for point in entry_points(group=group)}


def named_object(name: str) -> Any:
    """Import what "module:attribute" names. Modules of the current folder are found too, after all installed ones."""
    module, _, attribute = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        return attrgetter(attribute)(import_module(module))
    finally:
        sys.path.pop()


def named_function(name: str, group: str, what: str) -> Callable[..., Any]:
    """Return the function that "module:function" names, or the one that a package announces by that name."""
    table = installed(group)
    place = table.get(name, name)
    if ":" not in place:
        known = f"; installed packages bring {', '.join(sorted(table))}" if table else ""
        raise InvalidSetting(f"no {what} {name!r}; one of your own is named module:function{known}")
    try:
        found = named_object(place)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidSetting(
            f"cannot find the {what} {name!r}: {error}. module:function names a function in a file of the current "
            "folder or in an installed package"
        ) from None
    if not callable(found):
        raise InvalidSetting(f"the {what} {name!r} is no function but {type(found).__name__}")
    return found


def code_hash(found: Any) -> str | None:
    """SHA-256 of the files that a function, or a class and its bases, are written in, ours and Python's left out; None
    where there is none."""
    written = found.__mro__ if isinstance(found, type) else (found,)
    modules = sorted({each.__module__ for each in written})
    own = [name for name in modules if name.partition(".")[0] not in ("retcon", *sys.stdlib_module_names)]
    try:
        files = [Path(str(sys.modules[name].__file__)).read_bytes() for name in own]
    except (KeyError, AttributeError, OSError):  # typed at a prompt, or in a notebook
        return None
    return hashlib.sha256(b"".join(files)).hexdigest() if files else None
