"""A method's settings as they are read by people and checked before they are used: descriptions, types, finiteness."""

import ast
import difflib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from retcon.errors import InvalidSetting


def descriptions(method: type[Any]) -> dict[str, str]:
    """What each setting means: the text beneath its field, in the class or the nearest one that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(method.__mro__):
        if base is not object:
            found |= dict(_described_fields(base))
    return {f.name: found.get(f.name, "") for f in fields(method)}


def _described_fields(base: type[Any]) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base)))
    except (OSError, TypeError, SyntaxError):  # made at run time: there is no text
        return
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for field, text in pairwise(body):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            yield field.target.id, inspect.cleandoc(str(text.value.value)).replace("\n", " ")  # type: ignore[attr-defined]


def checked(name: str, method: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the method's fields want them, from wherever they come: Python, `--set`, a preset, a file.

    Lists become tuples, whole numbers floats where a float is wanted.

    Raises:
        InvalidSetting: an unknown name, a value of another type, NaN or infinity; the message names the setting.
    """
    hints = get_type_hints(method)
    known = [f.name for f in fields(method)]
    made: dict[str, Any] = {}
    for setting, value in settings.items():
        if setting not in known:
            close = difflib.get_close_matches(setting, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidSetting(f"{name} has no setting {setting!r}{hint} (known: {', '.join(known)})")
        made[setting] = _fitted(value, hints[setting], f"{name}: {setting}")
    return made


def _fitted(value: Any, hint: Any, what: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        problems = []
        for part in (a for a in args if a is not NoneType):
            try:
                return _fitted(value, part, what)
            except InvalidSetting as error:
                problems.append(error)
        raise problems[0]
    if origin is Literal:
        if value not in args or isinstance(value, bool) != any(isinstance(a, bool) for a in args):
            raise InvalidSetting(f"{what} is {value!r}; known: {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InvalidSetting(f"{what} must be a list, found {value!r}")
        return tuple(_fitted(item, args[0], what) for item in value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidSetting(f"{what} must be a number, found {value!r}")
        if not math.isfinite(value):
            raise InvalidSetting(f"{what} must be finite, found {value}")
        return float(value)
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidSetting(f"{what} must be a whole number, found {value!r}")
        return value
    if hint is bool and not isinstance(value, bool):
        raise InvalidSetting(f"{what} must be true or false, found {value!r}")
    if hint is str and not isinstance(value, str):
        raise InvalidSetting(f"{what} must be text, found {value!r}")
    return value
