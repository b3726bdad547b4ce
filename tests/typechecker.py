"""What checks annotations in tests: beartype, but for functions inside functions while shapes are not checked.

Such a function is made anew at every call of the outer one, and making its check takes longer than most of them run.
"""

from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and result checked, or as it is."""
    inner = "<locals>" in function.__qualname__
    return function if inner and jaxtyping.config.jaxtyping_disable else beartype(function)
