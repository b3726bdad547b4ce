"""How what goes wrong in a verb becomes one line and an exit code."""

import warnings
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from retcon.cli.printing import say
from retcon.errors import DeltaNotApplied, NonFinite, RetconError, RetconWarning

FAILURES = (NonFinite, DeltaNotApplied)
"""Errors that say something of the edit: exit code 1, as a check that fails has; all others 2."""


class CommandGroup(TyperGroup):
    """The verbs' group: turns what goes wrong in any of them into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RetconWarning)
            warnings.showwarning = _shown_once(warnings.showwarning)
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise _failed("interrupted", 130) from None
            except RetconError as error:
                raise _failed(error.on_command_line, 1 if isinstance(error, FAILURES) else 2) from None
            except BrokenPipeError:  # `retcon ... | head`: typer ends quietly
                raise
            except OSError as error:
                raise _failed(str(error), 1) from None
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":
                    raise
                reason = str(error).split(". ")[0]
                raise _failed(f"{reason}. Try a narrower --dtype (bfloat16), or --device cpu.", 1) from None


def _failed(message: str, code: int) -> typer.Exit:
    say("error", "red", message)
    return typer.Exit(code)


def _shown_once(others: Callable[..., None]) -> Callable[..., None]:
    """Return a `showwarning` that prints each of our warnings once, in one line, and leaves the rest to `others`."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not isinstance(message, RetconWarning):
            others(message, category, *place, **more)
        elif str(message) not in seen:
            seen.add(str(message))
            say("warning", "yellow", message.on_command_line)

    return show
