"""All files of a report, into one directory."""

import os
from dataclasses import dataclass
from pathlib import Path

from retcon.atomic import write_atomically
from retcon.bench import read_bench
from retcon.bench.report.groups import groups_of
from retcon.bench.report.page import page
from retcon.bench.report.plots import Picture, pictures_of
from retcon.bench.report.tables import Table, tables_of

MARKDOWN = "tables.md"
PAGE = "index.html"


@dataclass(frozen=True)
class Report:
    """What was written."""

    directory: Path
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]

    @property
    def page(self) -> Path:
        return self.directory / PAGE


def write_report(
    directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, pictures: bool = True
) -> Report:
    """Write tables as Markdown (one file), CSV and LaTeX, pictures as SVG, and the page.

    Args:
        directory: of a benchmark.
        out: where to; `report` inside the benchmark's directory by default.
        pictures: needs matplotlib.

    Raises:
        MalformedFile: no benchmark, or none of its runs is finished.
        MissingPackage: pictures are wanted and matplotlib is missing.
    """
    bench = read_bench(directory)
    place = Path(out) if out is not None else Path(directory) / "report"
    groups = groups_of(bench)
    tables = tables_of(groups)
    drawn = pictures_of(groups) if pictures else []
    for table in tables:
        write_atomically(place / f"{table.name}.csv", table.csv().encode())
        write_atomically(place / f"{table.name}.tex", table.latex().encode())
    for picture in drawn:
        write_atomically(place / f"{picture.name}.svg", picture.svg.encode())
    write_atomically(place / MARKDOWN, "\n".join(t.markdown() for t in tables).encode())
    write_atomically(place / PAGE, page(bench, groups, tables, drawn).encode())
    return Report(place, tuple(tables), tuple(drawn))
