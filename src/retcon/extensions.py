"""Code of the user's own, by "module:name" or by a name that an installed package announces."""

import hashlib
import os
import sys
import traceback
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
    """Import what "module:attribute" names. Modules of the current folder are found too, after all installed ones.

    Raises:
        ImportError: there is none, or its module cannot be imported, whatever that ends in.
    """
    module, _, attribute = name.partition(":")
    if not module or module.startswith("."):
        raise ImportError(f"{module!r} is no module's name; write it as in an import, without a path")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        imported = import_module(module)
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" ({Path(last.filename).name}, line {last.lineno})"
        raise ImportError(f"{module} ends in {type(error).__name__}: {error}{place}") from error
    finally:
        if added and here in sys.path:  # what the module adds stays
            sys.path.remove(here)
    try:
        return attrgetter(attribute)(imported)
    except AttributeError as error:
        raise ImportError(str(error)) from None


def named_function(name: str, group: str, what: str) -> Callable[..., Any]:
    """Return the function that "module:function" names, or the one that a package announces by that name."""
    if not isinstance(name, str):
        raise InvalidSetting(f"a {what} is named by text, found {name!r}; one of your own by 'module:function'")
    table = installed(group)
    place = table.get(name, name)
    if ":" not in place:
        known = f"; installed packages bring {', '.join(sorted(table))}" if table else ""
        raise InvalidSetting(f"no {what} {name!r}; one of your own is named module:function{known}")
    try:
        found = named_object(place)
    except ImportError as error:
        raise InvalidSetting(
            f"cannot find the {what} {name!r}: {error}. module:function names a function in a file of the current "
            "folder or in an installed package"
        ) from error
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
