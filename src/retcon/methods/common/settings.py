"""A method's settings as they are read by people and checked before they are used: descriptions, types, finiteness.

`checked_settings` needs the method's class, which brings torch; `declared` reads the fields of a class of this package
from its source, so that a setting that cannot be is refused at once.
"""

import ast
import builtins
import difflib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from retcon.errors import InvalidSetting

_PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Constraint:
    """What a setting's value has to be beside its type: an annotation of the field."""

    words: str
    """What it must do, for a message."""
    holds: Callable[[Any], bool]


Count = Annotated[int, Constraint("be at least 1", lambda n: n >= 1)]
"""A number of things, from 1 on."""
CountFromZero = Annotated[int, Constraint("not be negative", lambda n: n >= 0)]
"""A number of things, from 0 on."""
Layer = Annotated[int, Constraint("not be negative", lambda layer: layer >= 0)]
"""A block, counted from 0."""
AnyLayers = Annotated[
    tuple[int, ...],
    Constraint(
        "ascend without repeats from 0 on",
        lambda layers: list(layers) == sorted(set(layers)) and not any(layer < 0 for layer in layers),
    ),
]
"""Blocks, ascending, counted from 0; there may be none."""
Layers = Annotated[AnyLayers, Constraint("name a layer, or there is nothing to edit", bool)]
"""Blocks, ascending, counted from 0: one at least."""
EACH_ONCE = Constraint("name one or more, each once", lambda names: 0 < len(names) == len(set(names)))
Matrices = Annotated[tuple[str, ...], EACH_ONCE]
"""Kinds of matrices, or paths inside a block: one at least, none twice."""
NotNegative = Annotated[float, Constraint("not be negative", lambda value: value >= 0)]
"""A number from 0 on."""
Positive = Annotated[float, Constraint("be positive", lambda value: value > 0)]
"""A number above 0."""
Share = Annotated[float, Constraint("be above 0 and at most 1", lambda value: 0 < value <= 1)]
"""A part of a whole."""


def descriptions(method: type[Any]) -> dict[str, str]:
    """Return what each setting means: the text beneath its field, in the class or the nearest base."""
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


def checked_settings(name: str, method: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the method's fields want them, from wherever they come: Python, `--set`, a preset, a file.

    Lists, arrays and tensors become tuples, NumPy's numbers Python's, whole numbers floats where a float is wanted, and
    "none" None where that is allowed and text is not.

    Raises:
        InvalidSetting: an unknown name, a value of another type, NaN or infinity; the message names the setting.
    """
    return fitted(name, types_of(method), settings)


def types_of(method: type[Any]) -> dict[str, Any]:
    """Return the type of each setting of a method's class, in order."""
    hints = get_type_hints(method, include_extras=True)
    return {f.name: hints[f.name] for f in fields(method)}


def fitted(name: str, hints: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as these fields want them; `checked_settings` says what is refused.

    Args:
        name: the method's, for messages.
        hints: the type of each field.
    """
    made: dict[str, Any] = {}
    for setting, value in settings.items():
        if setting not in hints:
            close = difflib.get_close_matches(setting, hints, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidSetting(f"{name} has no setting {setting!r}{hint} (known: {', '.join(hints)})")
        made[setting] = fitted_value(value, hints[setting], f"{name}: {setting}")
    return made


@dataclass(frozen=True)
class Declared:
    """A method's class as its source has it."""

    fields: Mapping[str, Any]
    """The type of each setting; `Any` where the source does not say it plainly."""
    bases: tuple[str, ...]
    """The classes that it inherits from, nearest first, as "module:Class"."""


@cache
def declared(path: str) -> Declared:
    """Read the settings of a class of this package, "module:Class", from its source: nothing is imported.

    So settings are checked before torch is there, and before a model is. Each base's own fields come before those
    of the class, and a field that is named again keeps its place, as dataclasses have it.
    """
    module, _, name = path.partition(":")
    source = _source(module)
    body = source.classes[name]
    found: dict[str, Any] = {}
    bases: list[str] = []
    for base in body.bases:
        if (place := source.place(ast.unparse(base))) is not None:
            above = declared(place)
            found = {**above.fields, **found}
            bases += [place, *above.bases]
    for line in body.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            hint = source.value(line.annotation)
            if get_origin(hint) is not ClassVar:
                found[line.target.id] = hint
    return Declared(found, tuple(dict.fromkeys(bases)))


def toml_value(value: Any) -> str:
    """Return a setting as TOML writes it; None is left out of a table, for TOML has no word for it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name} = {toml_value(v)}' for name, v in value.items() if v is not None)}}}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    quoted = json.dumps(str(value), ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


class _Source(dict[str, Any]):
    """Names of a module as annotations use them, each found in the source when it is asked for."""

    def __init__(self, module: str) -> None:
        super().__init__()
        path = _PACKAGE.joinpath(*module.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.module = module
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.assigned: dict[str, ast.expr] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.assigned[node.targets[0].id] = node.value
            elif isinstance(node, ast.ImportFrom):
                self.imported |= {a.asname or a.name: (node.module or "", a.name) for a in node.names}

    def place(self, name: str) -> str | None:
        """Return where a class of this package is defined; None for one from elsewhere."""
        if name in self.classes:
            return f"{self.module}:{name}"
        module, original = self.imported.get(name, ("", ""))
        return _source(module).place(original) if module.startswith("retcon.") else None

    def value(self, annotation: ast.expr) -> Any:
        """Return what an annotation means; `Any` where that is not to be had without importing."""
        try:
            return eval(compile(ast.Expression(annotation), self.module, "eval"), {}, self)  # our own source
        except (NameError, TypeError, AttributeError):
            return Any

    def __missing__(self, name: str) -> Any:
        if name in self.assigned:
            return self.value(self.assigned[name])
        module, original = self.imported.get(name, ("", ""))
        if module in ("typing", "collections.abc"):
            return getattr(import_module(module), original)
        if module == __name__:
            return globals()[original]
        if module.startswith("retcon."):
            return _source(module)[original]
        if hasattr(builtins, name):
            return getattr(builtins, name)
        raise NameError(name)


_source = cache(_Source)


_LISTS = {int: "[1, 2, 3]", float: "[0.1, 0.5]", str: '["one", "two"]'}
"""An example of a list, by the type of its items."""


def fitted_value(value: Any, hint: Any, what: str) -> Any:
    """Return a value as a field of this type wants it; `what` names it in messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = fitted_value(value, args[0], what)
        for constraint in hint.__metadata__:
            if isinstance(constraint, Constraint) and not constraint.holds(value):
                raise InvalidSetting(f"{what} must {constraint.words}, found {value!r}")
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        problems = []
        for part in (a for a in args if a is not NoneType):
            try:
                return fitted_value(value, part, what)
            except InvalidSetting as error:
                problems.append(error)
        if isinstance(value, str) and value == "none" and NoneType in args:  # TOML has no word for it
            return None
        raise problems[0]
    if origin is Literal:
        for known in args if isinstance(value, str | Integral) else ():
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return known
        raise InvalidSetting(f"{what} is {value!r}; known: {', '.join(map(str, args))}")
    if origin is tuple:
        items = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
        if not isinstance(items, list | tuple | Set | range | Iterator):
            example = f" ({_LISTS[args[0]]}, say)" if args[0] in _LISTS else ""
            raise InvalidSetting(f"{what} must be a list{example}, found {value!r}")
        return tuple(fitted_value(item, args[0], f"{what}[{i}]") for i, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping) and not isinstance(value, Mapping):
        raise InvalidSetting(f"{what} must be a table, found {value!r}")
    return _PLAIN[hint](value, what) if hint in _PLAIN else value


def reads_none(hint: Any) -> bool:
    """Return whether a field of this type takes "none" for None."""
    try:
        return fitted_value("none", hint, "") is None
    except InvalidSetting:
        return False


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidSetting(f"{what} must be a number, found {value!r}")
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise InvalidSetting(f"{what} must be finite, found {number}")
    return number


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidSetting(f"{what} must be a whole number, found {value!r}")
    return int(value)


def _flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidSetting(f"{what} must be true or false, found {value!r}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidSetting(f"{what} must be text, found {value!r}")
    return value


_PLAIN: Mapping[Any, Callable[[Any, str], Any]] = {float: _number, int: _whole, bool: _flag, str: _text}
