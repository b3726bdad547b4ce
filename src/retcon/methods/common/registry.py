"""The table of methods: which there are, the class and the settings of each."""

import difflib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from retcon.edits import Edit
from retcon.errors import InvalidEdit, InvalidSetting, RetconWarning, UnknownMethod
from retcon.extensions import installed, named_object
from retcon.methods.common.settings import checked_settings, declared, types_of

if TYPE_CHECKING:
    from retcon.lm.model import LM
    from retcon.methods.common.contract import Method

METHODS = {
    "adalora": "retcon.methods.adalora:AdaLora",
    "alphaedit": "retcon.methods.alphaedit:AlphaEdit",
    "ctp": "retcon.methods.ctp:Ctp",
    "emmet": "retcon.methods.emmet:Emmet",
    "ft": "retcon.methods.ft:Ft",
    "ft_l": "retcon.methods.ft_l:FtL",
    "ft_m": "retcon.methods.ft_m:FtM",
    "ft_wd": "retcon.methods.ft_wd:FtWd",
    "full_c": "retcon.methods.full_c:FullC",
    "jeep": "retcon.methods.jeep:Jeep",
    "kn": "retcon.methods.kn:Kn",
    "kne": "retcon.methods.kne:Kne",
    "lora": "retcon.methods.lora:Lora",
    "malmen": "retcon.methods.malmen:Malmen",
    "memit": "retcon.methods.memit:Memit",
    "mend": "retcon.methods.mend:Mend",
    "pmet": "retcon.methods.pmet:Pmet",
    "prune": "retcon.methods.prune:Prune",
    "r_rome": "retcon.methods.r_rome:RRome",
    "rect": "retcon.methods.rect:Rect",
    "rome": "retcon.methods.rome:Rome",
}


ENTRY_POINTS = "retcon.methods"
"""Group of entry points by which an installed package brings methods of its own."""
NO_PRESET = "none"
"""In place of a preset's name: as if no preset knew the model."""


def list_methods() -> list[str]:
    """Return the names of all registered methods, those of installed packages among them."""
    return sorted({**installed(ENTRY_POINTS), **METHODS})


def method_class(name: str) -> type["Method"]:
    """Return the class registered under a name, or the one that "module:Class" names.

    Raises:
        UnknownMethod: there is none, or it is no method.
    """
    from retcon.methods.common.contract import Method

    try:
        found = named_object(_place(name))
    except ImportError as error:
        raise UnknownMethod(
            f"cannot find the method {name!r}: {error}. module:Class names a class in a file of the current folder "
            "or in an installed package; see docs/guides/add-a-method.md"
        ) from error
    lacks = [] if isinstance(found, type) and issubclass(found, Method) else ["Method as a base class"]
    lacks += [what for what in ("name", "propose") if not hasattr(found, what)]
    lacks += sorted(getattr(found, "__abstractmethods__", ()))
    if not is_dataclass(found):
        lacks.append("@dataclass(frozen=True, kw_only=True)")
    if lacks:
        raise UnknownMethod(f"{name} is no method: it lacks {', '.join(lacks)}; see docs/guides/add-a-method.md")
    return found


def registered_classes() -> dict[str, type["Method"]]:
    """Return the class of every registered method by name; what a package announces and cannot be imported is left out,
    with a warning."""
    found = {}
    for name in list_methods():
        try:
            found[name] = method_class(name)
        except UnknownMethod as error:
            warnings.warn(str(error), RetconWarning, stacklevel=2)
    return found


def _place(name: str) -> str:
    """Return where the class of a method is, as "module:Class"."""
    if not isinstance(name, str):
        raise UnknownMethod(f"a method is named by text, found {name!r}; one of your own by 'module:Class'")
    table = {**installed(ENTRY_POINTS), **METHODS}
    if name not in table and ":" not in name:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownMethod(
            f"no method {name!r}; known: {', '.join(list_methods())}; one of your own is named module:Class.{hint}"
        )
    return table.get(name, name)


def class_at_hand(name: str) -> "type[Method] | None":
    """Return the class of a method as `method_class`; None where it is neither registered nor in a module that is
    imported already. No other code is imported for it."""
    if name in list_methods():
        return method_class(name)
    if name.partition(":")[0] not in sys.modules:
        return None
    try:
        return method_class(name)
    except UnknownMethod:
        return None


def setting_types(name: str) -> Mapping[str, Any]:
    """Return the type of each setting of a method, in order.

    Raises:
        UnknownMethod: there is none of that name.
    """
    place = _place(name)
    if place.startswith("retcon."):
        return declared(place).fields
    return types_of(method_class(name))


def parents_of(name: str) -> tuple[str, ...]:
    """Return the names of the registered methods that one inherits from: their presets are its own too."""
    place = _place(name)
    own = {path: known for known, path in METHODS.items()}
    if place.startswith("retcon."):
        return tuple(own[base] for base in declared(place).bases if base in own)
    bases = (f"{base.__module__}:{base.__qualname__}" for base in method_class(name).__mro__[1:])
    return tuple(own[base] for base in bases if base in own)


def check_subjects(method: Any, edits: Sequence[Edit]) -> None:
    """Raise InvalidEdit where an edit names no subject and `method` needs one; the message names those that do not."""
    lost = next((edit for edit in edits if edit.subject is None), None)
    if lost is None or not method.needs_subject:
        return
    able = [name for name, known in registered_classes().items() if known.needs_subject is False]
    raise InvalidEdit(
        f"edit {lost.id!r} names no subject, and {method.name} writes at the subject's last token; name the subject, "
        f"or take a method that needs none: {', '.join(able)}"
    )


def build(name: str, settings: Mapping[str, Any], *, lm: "LM | None" = None) -> "Method":
    """Return the method with these settings, the class's defaults for the rest.

    Args:
        lm: the model that settings were looked for by, for the message where one is missing.

    Raises:
        UnknownMethod, InvalidSetting: the message names the method or the setting.
    """
    chosen = method_class(name)
    settings = checked_settings(name, chosen, settings)
    needed = [f.name for f in fields(chosen) if f.default is MISSING and f.default_factory is MISSING]
    missing = [field for field in needed if field not in settings]
    if missing:
        tried = "neither a preset nor the model's shape gives" if lm is not None else "no default gives"
        raise InvalidSetting(
            f"{name} needs {', '.join(missing)}, which {tried}: set it (on the command line --set {missing[0]}=..., in "
            "Python by keyword)" + ("" if lm is not None else ", or pass for_model=lm for a model's preset")
        )
    return chosen(**settings)
