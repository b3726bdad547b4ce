"""A benchmark's directory, read back for reports."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from retcon.bench.manifest import read_manifest, run_id
from retcon.bench.spec import Cell
from retcon.errors import MalformedFile
from retcon.evaluation.records import Record, read_records
from retcon.files import read_json_rows, short_name
from retcon.version import __version__

MANIFEST = "manifest.json"
"""What was asked, of a benchmark and of each of its runs."""
FINISHED = "records.jsonl"
"""File of a run's folder that is there once the run is finished."""

LISTING = "runs.json"
"""The finished runs, in order."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path
    manifest: Mapping[str, Any]
    environment: Mapping[str, Any]

    @cached_property
    def _read(self) -> tuple[list[Record], dict[str, Any]]:
        try:
            return read_records(self.directory / FINISHED)
        except MalformedFile as error:
            made_by = self.manifest["versions"]["retcon"]
            if made_by == __version__:
                raise
            again = f"retcon {made_by} wrote this benchmark and this is {__version__}; run it again with --force"
            raise MalformedFile(f"{error}; {again}") from None

    @property
    def records(self) -> list[Record]:
        return self._read[0]

    @property
    def context(self) -> Mapping[str, Any]:
        """Model, method, dataset, protocol, numbers of edits, seed."""
        return self._read[1]

    @cached_property
    def timings(self) -> list[Record]:
        return read_records(self.directory / "timings.jsonl")[0]

    @cached_property
    def texts(self) -> list[dict[str, Any]]:
        """What the models wrote: objects with when, unit, case_id, query_id, prompt, text."""
        path = self.directory / "texts.jsonl"
        if not path.is_file() or not path.stat().st_size:
            return []
        return [row for _, row in read_json_rows(path)]

    @cached_property
    def cases(self) -> dict[str, dict[str, Any]]:
        """By case id: relation, edits (prompt and answers), queries (prompt, target, rival), flags."""
        return {row["case_id"]: row for _, row in read_json_rows(self.directory / "cases.jsonl")}

    @property
    def relations(self) -> dict[str, str]:
        """By case id, where it is known."""
        return {case_id: row["relation"] for case_id, row in self.cases.items() if row["relation"]}

    def at(self, when: str) -> list[Record]:
        """Return the records of one moment."""
        return [record for record in self.records if record.when == when]


@dataclass(frozen=True)
class Bench:
    """A benchmark's finished runs."""

    directory: Path
    manifest: Mapping[str, Any]
    environment: Mapping[str, Any]
    runs: tuple[Run, ...]
    unfinished: tuple[str, ...]
    """Runs that were begun and have no records yet."""

    @property
    def name(self) -> str:
        return str(self.manifest["spec"]["name"])


def read_listing(root: Path) -> list[dict[str, str]]:
    """Read the list of a benchmark's finished runs, in their order.

    Raises:
        MalformedFile: there is none, or it is none.
    """
    try:
        listing = json.loads((root / LISTING).read_text("utf-8"))
        return [{name: str(line[name]) for name in ("slug", "directory", "id")} for line in listing]
    except FileNotFoundError:
        raise MalformedFile(f"{root}: no run is finished yet") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MalformedFile(f"{root / LISTING}: not a list of runs ({error!r})") from None


def read_bench(directory: str | os.PathLike[str]) -> Bench:
    """Read a directory that `run_bench` wrote.

    Raises:
        MalformedFile: it is none, or none of its runs is finished.
    """
    root = Path(directory)
    whole = read_manifest(root / MANIFEST)
    runs = []
    for line in read_listing(root):
        place = root / line["directory"]
        own = read_manifest(place / MANIFEST)
        runs.append(Run(place, own["manifest"], own["environment"]))
    unfinished = tuple(path.name for path in unfinished_runs(root))
    return Bench(root, whole["manifest"], whole["environment"], tuple(runs), unfinished)


def unfinished_runs(root: Path) -> list[Path]:
    """Return the folders of the runs that were begun and have no records yet."""
    begun = sorted(path.parent for path in (root / "runs").glob(f"*/{MANIFEST}"))
    return [folder for folder in begun if not (folder / FINISHED).is_file()]


def place_of(cell: Cell, manifest: Mapping[str, Any], root: Path) -> tuple[str, Path]:
    """Return a run's identity, and its folder: the one that there is, under whatever words for the protocol."""
    identity = run_id(manifest)
    there = sorted((root / "runs").glob(f"*_{identity[:8]}"))
    return identity, there[0] if there else root / "runs" / f"{short_name(cell.slug)}_{identity[:8]}"
