"""Names of a package that are loaded when first used."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazily(
    package: str, names: Mapping[str, Iterable[str]], loaded: Iterable[str] = ()
) -> tuple[list[str], Callable[[str], Any]]:
    """Return `__all__` and `__getattr__` of a package.

    Args:
        names: by the module that each is loaded from.
        loaded: names that the package has at once.
    """
    module_of = {name: module for module, own in names.items() for name in own}

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(module_of[name]), name)

    return sorted([*module_of, *loaded]), load
