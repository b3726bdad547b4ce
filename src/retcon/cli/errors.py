"""How what goes wrong in a verb becomes one line and an exit code."""

import warnings
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from retcon.cli.printing import say
from retcon.errors import DeltaNotApplied, NonFinite, RetconError, RetconWarning, UnusableRow

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
                raise _failed(_as_options(error), 1 if isinstance(error, FAILURES) else 2) from None
            except BrokenPipeError:  # `retcon ... | head`: typer ends quietly
                raise
            except OSError as error:
                raise _failed(str(error), 1) from None
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":
                    raise
                reason = str(error).split(". ")[0]
                raise _failed(f"{reason}. Try a narrower --dtype (bfloat16), or --device cpu.", 1) from None


_AS_OPTIONS = (
    ("load with conflicts='drop' or 'last'", "keep one of them: --conflicts drop or last"),
    ("pass other_base=True", "add --other-base,"),
    ("case_target 'alt'", "--case-target alt"),
    (", or pass allow_bin=True", ""),
    (" (packed=True)", ""),
    ("ask without a chat, or", "leave out --chat, the options that imply it and chat in the facts, or"),
    ("(bisect=False)", "(--no-bisect)"),
    (" (moments=CorpusMoments(Corpus.from_file(PATH)))", ""),
)
"""What messages say to who works in Python, and what the command line says for it."""


def _as_options(message: Exception | str) -> str:
    """Return the message with the way out in the command line's words."""
    if isinstance(message, UnusableRow):
        return f"{message.problem}. Mend the row, or leave such rows out: --on-error skip"
    text = str(message)
    for python, option in _AS_OPTIONS:
        text = text.replace(python, option)
    return text


def _failed(message: str, code: int) -> typer.Exit:
    say("error", "red", message)
    return typer.Exit(code)


def _shown_once(others: Callable[..., None]) -> Callable[..., None]:
    """Return a `warnings.showwarning` that prints each of our warnings once, as one line, and leaves the rest to
    `others`."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, RetconWarning):
            others(message, category, *place, **more)
        elif str(message) not in seen:
            seen.add(str(message))
            say("warning", "yellow", _as_options(message))

    return show
