"""Units of a run, the grain of its results: each is kept on disk whole, or not at all."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from retcon.attachment import Attachment, load
from retcon.checked import Kind, as_bytes, cached, from_bytes, write_checked
from retcon.errors import MalformedFile, RetconWarning
from retcon.evaluation.records import Record, encode_records, parse_records
from retcon.evaluation.results import Evaluation
from retcon.evaluation.score import TokenScore

UNITS = Kind("unit of a benchmark", format=2, computation=1)

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
    weights_hash: str | None = None
    """Of the edited weights, after a step of a sequence; None where nothing was applied."""
    delta: str | None = None
    """Id of the delta that a step of a sequence has made."""
    scores: Mapping[TextKey, tuple[TokenScore, ...]] = field(default_factory=dict)
    """Token by token; kept on disk only where that is asked for."""

    def extended(self, found: Evaluation) -> "Unit":
        """Return the unit with the records and texts of another measurement after its own."""
        records = (*self.records, *found.records)
        texts, scores = {**self.texts, **found.texts}, {**self.scores, **found.scores}
        return replace(self, records=records, texts=texts, scores=scores)


class Units:
    """The units of a run in a directory; without one (None) nothing is found and nothing is kept."""

    def __init__(
        self, directory: str | os.PathLike[str] | None, run_id: str = "", *, keep_tokens: bool = False
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.run_id = run_id
        self.keep_tokens = keep_tokens

    def key(self, index: int, ids: Sequence[str]) -> str:
        """Return the name of a unit: its number, and a hash of the run and of the cases in it."""
        digest = hashlib.sha256(json.dumps([self.run_id, index, list(ids)]).encode()).hexdigest()
        return f"{index:06d}-{digest[:16]}"

    def load(self, key: str) -> Unit | None:
        """Return a unit that was kept; None where there is none, or, with a warning, where its file is damaged."""
        if self.directory is None:
            return None
        path = self._file(key)
        found = cached(path, UNITS, self._identity(key))
        if found is None:
            return None
        tensors, head = found
        records = tuple(parse_records(bytes(as_bytes(tensors["records"])), path)) if head["n_records"] else ()
        return Unit(
            key,
            records,
            {(when, case, query): text for when, case, query, text in head["texts"]},
            tuple(Record(**row) for row in head["timings"]),
            head["mark"],
            head["delta"],
            {(w, c, q): tuple(map(_score_from, scores)) for w, c, q, scores in head["scores"]},
        )

    def save(self, unit: Unit) -> None:
        """Keep a unit. A crash leaves it whole, or leaves none."""
        if self.directory is None:
            return
        scores = unit.scores if self.keep_tokens else {}
        head = {
            "n_records": len(unit.records),
            "mark": unit.weights_hash,
            "delta": unit.delta,
            "timings": [record._asdict() for record in unit.timings],
            "texts": [[*key, text] for key, text in unit.texts.items()],
            "scores": [[*key, [_score_row(score) for score in own]] for key, own in scores.items()],
        }
        tensors = {"records": from_bytes(encode_records(unit.records, {}))}
        write_checked(self._file(unit.key), UNITS, self._identity(unit.key), tensors, head)

    def _file(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / "units" / f"{key}.safetensors"

    def _identity(self, key: str) -> dict[str, Any]:
        return {"run": self.run_id, "unit": key, "tokens": self.keep_tokens}

    def save_delta(self, key: str, delta: Attachment) -> None:
        """Keep the delta of a step, with its state for the next one."""
        if self.directory is not None:
            delta.save(self.directory / "deltas" / f"{key}.safetensors")

    def load_delta(self, unit: Unit) -> Attachment | None:
        """Return the delta of a step; None, with a warning, where its file is gone or damaged."""
        assert self.directory is not None
        path = self.directory / "deltas" / f"{unit.key}.safetensors"
        try:
            delta = load(path)
            if delta.id != unit.delta:
                raise MalformedFile(f"{path}: holds delta {delta.id}, the step made {unit.delta}")
            return delta
        except MalformedFile as error:
            warnings.warn(f"{error}; the step is made again", RetconWarning, stacklevel=3)
            return None


def _score_row(score: TokenScore) -> dict[str, object]:
    """Return a score as JSON has it; NaN and infinities are texts."""
    row = asdict(score)
    return {**row, "logp": [p if math.isfinite(p) else repr(p) for p in score.logp]}


def _score_from(row: Mapping[str, Any]) -> TokenScore:
    logp = tuple(float(p) for p in row["logp"])
    return TokenScore(logp, tuple(row["pred"]), tuple(row["target"]), bool(row["boundary_merge"]))
