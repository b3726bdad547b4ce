"""Units of a run: what was measured in one go, kept whole or not at all."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from retcon.delta import Delta
from retcon.errors import MalformedFile
from retcon.evaluation.records import Record, encode_records, read_records
from retcon.evaluation.results import Evaluation
from retcon.evaluation.score import TokenScore
from retcon.files import write_atomically

FORMAT = "retcon-unit-1"

TextKey = tuple[str, str, str]
"""(when, case id, query id)."""


@dataclass(frozen=True)
class Unit:
    """One case, one chunk or one step."""

    key: str
    records: tuple[Record, ...]
    texts: Mapping[TextKey, str]
    """What the model wrote."""
    timings: tuple[Record, ...]
    """Seconds and bytes: they differ from run to run, so they are kept apart from the records."""
    mark: str | None = None
    """Of the edited weights after a sequence's step (`weights_hash`); None where nothing was applied."""
    scores: Mapping[TextKey, tuple[TokenScore, ...]] = field(default_factory=dict)
    """Token by token; kept on disk only where that is asked for."""

    def with_looked(self, found: Evaluation) -> "Unit":
        """The unit with another look's records and texts behind its own."""
        records = (*self.records, *found.records)
        texts, scores = {**self.texts, **found.texts}, {**self.scores, **found.scores}
        return replace(self, records=records, texts=texts, scores=scores)


class Units:
    """The units of a run in a directory, or nowhere (None: nothing is found, nothing is kept)."""

    def __init__(
        self, directory: str | os.PathLike[str] | None, run_id: str = "", *, keep_tokens: bool = False
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.run_id = run_id
        self.keep_tokens = keep_tokens

    def key(self, index: int, ids: Sequence[str]) -> str:
        """Identity of a unit: its place and what is in it, under this run."""
        digest = hashlib.sha256(json.dumps([self.run_id, index, list(ids)]).encode()).hexdigest()
        return f"{index:06d}-{digest[:16]}"

    def load(self, key: str) -> Unit | None:
        """A unit as it was kept, or None.

        Raises:
            MalformedFile: there is a file, but it is no unit of this name.
        """
        if self.directory is None:
            return None
        path, told = self.directory / "units" / f"{key}.jsonl", self.directory / "units" / f"{key}.json"
        if not told.is_file():
            return None
        try:
            head = json.loads(told.read_text("utf-8"))
            if head["format"] != FORMAT or head["key"] != key:
                raise MalformedFile(f"{told}: unit {head['key']!r} of format {head['format']!r}, expected {key!r}")
            texts = {(when, case, query): text for when, case, query, text in head["texts"]}
            timings = tuple(Record(**row) for row in head["timings"])
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedFile(f"{told}: not a unit of a run ({error!r})") from None
        records = tuple(read_records(path)[0]) if head["n_records"] else ()
        if len(records) != head["n_records"]:
            raise MalformedFile(f"{path}: {len(records)} records, expected {head['n_records']}")
        return Unit(key, records, texts, timings, head["mark"], self._scores(key) if self.keep_tokens else {})

    def _scores(self, key: str) -> dict[TextKey, tuple[TokenScore, ...]]:
        assert self.directory is not None
        path = self.directory / "units" / f"{key}.tokens.json"
        try:
            rows = json.loads(path.read_text("utf-8"))
            return {(w, c, q): tuple(map(_score_from, scores)) for w, c, q, scores in rows}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise MalformedFile(f"{path}: not the tokens of a unit ({error!r})") from None

    def save(self, unit: Unit) -> None:
        """Keep a unit; a crash leaves it whole or leaves none, for the small file that names it comes last."""
        if self.directory is None:
            return
        where = self.directory / "units"
        if unit.records:
            write_atomically(where / f"{unit.key}.jsonl", encode_records(unit.records, {}))
        if self.keep_tokens:
            rows = [[*key, [_told(score) for score in scores]] for key, scores in unit.scores.items()]
            write_atomically(where / f"{unit.key}.tokens.json", json.dumps(rows, ensure_ascii=False).encode())
        head = {
            "format": FORMAT,
            "key": unit.key,
            "n_records": len(unit.records),
            "mark": unit.mark,
            "timings": [record._asdict() for record in unit.timings],
            "texts": [[*key, text] for key, text in unit.texts.items()],
        }
        write_atomically(where / f"{unit.key}.json", json.dumps(head, ensure_ascii=False).encode())

    def save_delta(self, key: str, delta: Delta) -> None:
        """Keep a step's delta, with the state it hands on."""
        if self.directory is not None:
            delta.save(self.directory / "deltas" / f"{key}.safetensors")

    def load_delta(self, key: str) -> Delta:
        """A step's delta as it was kept."""
        assert self.directory is not None
        return Delta.load(self.directory / "deltas" / f"{key}.safetensors")


def _told(score: TokenScore) -> dict[str, object]:
    """A score as JSON; numbers that JSON lacks are written out."""
    row = asdict(score)
    return {**row, "logp": [p if math.isfinite(p) else repr(p) for p in score.logp]}


def _score_from(row: Mapping[str, Any]) -> TokenScore:
    logp = tuple(float(p) for p in row["logp"])
    return TokenScore(logp, tuple(row["pred"]), tuple(row["target"]), bool(row["boundary_merge"]))
