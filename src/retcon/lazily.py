"""Names of a package that are loaded when first used."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazily(package: str) -> tuple[list[str], Callable[[str], Any]]:
    """Return `__all__` and `__getattr__` of a package whose file imports its names, each as itself: those under
    `if TYPE_CHECKING` are loaded when they are first asked for."""
    body = ast.parse(Path(str(sys.modules[package].__file__)).read_text("utf-8")).body
    later = {name: module for block in body if isinstance(block, ast.If) for name, module in _exported(block.body)}
    now = [name for name, _ in _exported(body) if not name.startswith("_")]

    def load(name: str) -> Any:
        if name not in later:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(later[name]), name)

    return sorted([*later, *now]), load


def _exported(block: list[ast.stmt]) -> list[tuple[str, str]]:
    """Return each name that a block imports as itself, and the module it is from."""
    imports = [line for line in block if isinstance(line, ast.ImportFrom)]
    return [(a.name, line.module or "") for line in imports for a in line.names if a.asname == a.name]
