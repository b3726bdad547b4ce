"""`retcon report`: a benchmark's tables, pictures and page."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from retcon.cli.options import Json
from retcon.cli.printing import console, emit, plural, styled
from retcon.cli.progress import spinner
from retcon.errors import how_to_install


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a benchmark (`retcon bench`).")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder that the files go to.", show_default="report in the benchmark's directory"
        ),
    ] = None,
    pictures: Annotated[
        bool | None,
        typer.Option("--pictures/--no-pictures", help="Draw pictures.", show_default="if matplotlib is installed"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a benchmark's tables (Markdown, CSV, LaTeX), pictures, and one page to read; print the tables."""
    from retcon.bench.report.write import write_report

    drawing = find_spec("matplotlib") is not None if pictures is None else pictures
    with spinner("writing the report"):
        made = write_report(directory, out, pictures=drawing)
    if as_json:
        files = sorted(str(path) for path in made.directory.iterdir() if path.is_file())
        emit({"directory": str(made.directory), "page": str(made.page), "files": files})
        return
    for table in made.tables:
        typer.echo(table.markdown())
    show = console()
    if not drawing and pictures is None:
        hint = f"no pictures: matplotlib is not installed ({how_to_install('plot')})"
        show.print(styled("[dim]{}[/]", hint), soft_wrap=True)
    what = f"{plural(len(made.tables), 'table')}, {plural(len(made.pictures), 'picture')}"
    show.print(styled("[dim]{} in {};[/] read [bold]{}[/]", what, made.directory, made.page), soft_wrap=True)
