"""Where the verbs print, and how: text is text, numbers are for reading."""

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from string import Formatter
from typing import Any

import typer
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from retcon.escaping import json_text, printable
from retcon.plural import plural as plural

WIDTH = 100
"""Columns of output that goes to a file or a pipe."""


class _Fields(Formatter):
    """What is put into a template is text; only another styled text keeps its style."""

    def format_field(self, value: Any, spec: str) -> str:
        return value.markup if isinstance(value, Text) else escape(format(value if spec else str(value), spec))


def styled(template: str, *values: Any) -> Text:
    """Return a text with the styles that the template names, its fields filled in as `str.format` does.

    Args:
        template: such as "[bold]{}[/] saved, {:,} bytes". Only here is there markup: a string that is printed, or in a
            table's cell, is text.
        values: shown as they are, whatever they look like.
    """
    return Text.from_markup(_Fields().format(template, *values), emoji=False)


class PlainTextConsole(Console):
    """A console on which a string is text: it is no markup, and the terminal does not obey it."""

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield every segment of every renderable, control characters of texts shown in place of obeyed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as text; what is to have a style is `styled`."""
        return super().render_str(text, **options | {"markup": False})


@cache
def console(*, stderr: bool = False) -> Console:
    """Return the terminal, as wide as it is; files and pipes are `WIDTH` wide. Numbers in texts are not coloured."""
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "emoji": False}  # or demo:llama: becomes a picture
    made = PlainTextConsole(**plain)
    return made if made.is_terminal or "COLUMNS" in os.environ else PlainTextConsole(**plain, width=WIDTH)


def emit(record: Mapping[str, Any]) -> None:
    """Print one JSON object; NaN and infinity, which JSON does not have, become null."""
    plain = (
        not (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    )  # what it cannot spell is escaped as JSON is
    typer.echo(json_text(json.dumps(finite(record), ensure_ascii=plain, allow_nan=False)))


def finite(value: Any) -> Any:
    """Return the same with NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def examples(*commands: str) -> str:
    """Return the end of a verb's help; blank lines between, for typer joins adjacent lines."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {escape(c)}" for c in commands)])


def add_verbs(app: typer.Typer, package: str, shown: Mapping[str, Sequence[str]]) -> None:
    """Make commands of a package's verbs: in each module the function of the same name, with the examples shown."""
    for name, commands in shown.items():
        verb = getattr(import_module(f"{package}.{name}"), name)
        app.command(epilog=examples(*commands))(verb)


def program() -> str:
    """Return what to type to run this program again from here."""
    if shutil.which("retcon"):
        return "retcon"
    called = Path(sys.argv[0])
    if called.name == "retcon" and called.is_file():
        return shlex.quote(_from_here(called))
    return f"{shlex.quote(_from_here(Path(sys.executable)))} -m retcon"


def _from_here(path: Path) -> str:
    """Return the path as it is typed in the current directory; links (of a virtual environment) are not followed."""
    whole = path.absolute()
    return f".{os.sep}{whole.relative_to(Path.cwd())}" if whole.is_relative_to(Path.cwd()) else str(whole)


def size(n_bytes: float) -> str:
    """Return a number of bytes for reading."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def seconds(value: float) -> str:
    """Return a duration for reading."""
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def plain_table(*heads: str | tuple[str, int | None], right: Iterable[str] = (), **options: Any) -> Table:
    """Return a table without lines.

    Args:
        heads: of the columns; one with a width (None: as wide as there is room) ends what is longer in an ellipsis.
        right: heads of further columns, of numbers.
    """
    table = Table(box=None, pad_edge=False, **{"header_style": "dim", **options})
    for head in heads:
        if isinstance(head, str):
            table.add_column(head)
        else:
            table.add_column(head[0], no_wrap=True, overflow="ellipsis", max_width=head[1])
    for name in right:
        table.add_column(name, justify="right")
    return table


def say(kind: str, colour: str, message: str) -> None:
    line = " ".join(message.split("\n"))
    console(stderr=True).print(styled("[bold {}]{}:[/] [{}]{}[/]", colour, kind, colour, line), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning of the command line's own."""
    say("warning", "yellow", message)
