"""Command lines that repeat what was done on the page."""

import shlex
from collections.abc import Mapping
from typing import Any


def command_line(verb: str, *words: object, how: str = "", **options: object) -> str:
    """Return a command as it is typed. What is None, False or empty is left out, and a list's option repeated.

    Args:
        how: more options as they are typed, with a space before each.
    """
    given = [str(word) for word in words if word is not None]
    named = "".join(f" {shlex.quote(word)}" for word in given)
    asked = ""
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one:
                asked += f" --{name}" if one is True else f" --{name} {shlex.quote(str(one))}"
    if any(word.startswith("-") for word in given):  # which would be read as an option
        return f"retcon {verb}{asked}{how} --{named}"
    return f"retcon {verb}{named}{asked}{how}"


def assignments(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as `--set` reads them, `field=value` each."""
    from retcon.workflow import as_toml

    return [f"{name}={as_toml(value)}" for name, value in settings.items()]
