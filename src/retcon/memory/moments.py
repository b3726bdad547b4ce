"""Second moments C = E[k k^T] of the keys entering an edited matrix: what a write must leave alone (ROME, section 3).

Collected on the unedited model, for all needed sites in one pass over a corpus, and kept on disk under everything that
determines them. `Moments` is what methods are handed: it prepares the sites a method names, and gives one layer's
moment at a time, so that no more than one need be in memory.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from retcon.errors import InvalidSetting, MalformedFile, NonFinite, RetconWarning, TooFewTokens
from retcon.files import cache_dir, read_json_rows, write_atomically
from retcon.lm.model import LM, Site
from retcon.lm.prompts import Row, buckets, encode, pad
from retcon.lm.trace import Point, Tap, run

TOKENS_PER_DIMENSION = 20
"""Default number of corpus tokens per key dimension; under 10 is warned about, under 1 refused."""
MAX_LENGTH = 1024
"""Documents are cut to this many tokens (or the model's context, if that is shorter)."""
FORMAT = "retcon-moments-1"


@dataclass(frozen=True)
class Corpus:
    """Documents that stand for the text a model should go on treating as before."""

    documents: Sequence[str]

    @cached_property
    def id(self) -> str:
        """Hash of the text: part of a moment's key."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode() + b"\x00")
        return digest.hexdigest()[:16]

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Corpus":
        """A `.jsonl`/`.json` file of objects with a `text` field, or plain text with blank lines between documents.

        Raises:
            MalformedFile: unreadable, or without any text.
        """
        if str(path).endswith((".jsonl", ".json")):
            documents = []
            for row, record in read_json_rows(path):
                if not isinstance(record.get("text"), str):
                    raise MalformedFile(f"{path}, row {row}: field 'text' is missing or no text")
                documents.append(record["text"])
        else:
            try:
                text = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise MalformedFile(f"{path}: not a readable UTF-8 text file ({error})") from None
            documents = re.split(r"\n\s*\n", text)
        documents = [d.strip() for d in documents if d.strip()]
        if not documents:
            raise MalformedFile(f"{path}: holds no text")
        return cls(tuple(documents))


@dataclass(frozen=True)
class MomentKey:
    """All that determines a second moment."""

    fingerprint: str
    """Of the unedited model."""
    site: str
    corpus: str
    n_tokens: int
    max_length: int

    @property
    def file(self) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]
        return cache_dir() / "moments" / f"{digest}.safetensors"


@runtime_checkable
class Moments(Protocol):
    """Where methods get second moments from."""

    def prepare(self, lm: LM, sites: Sequence[Site]) -> None:
        """Make sure that the moments of these sites can be had; missing ones are collected in one pass."""

    def second_moment(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        """Mean of k k^T over tokens of the corpus (activation squared), float32 or float64 on the CPU, not scaled."""

    def keys(self, lm: LM, sites: Sequence[Site]) -> dict[str, str]:
        """What identifies the moment of each site, for the record."""


@dataclass(frozen=True)
class GivenMoments:
    """Moments that the caller already has, by parameter name."""

    by_name: Mapping[str, Float[Tensor, "d_in d_in"]]

    def prepare(self, lm: LM, sites: Sequence[Site]) -> None:
        missing = [s.name for s in sites if s.name not in self.by_name]
        if missing:
            raise InvalidSetting(f"no second moment given for {', '.join(missing)}; given: {', '.join(self.by_name)}")

    def second_moment(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        return self.by_name[site.name]

    def keys(self, lm: LM, sites: Sequence[Site]) -> dict[str, str]:
        return {s.name: "given" for s in sites}


@dataclass(frozen=True)
class CorpusMoments:
    """Moments collected from a corpus, kept in the cache directory."""

    corpus: Corpus
    tokens_per_dimension: int = TOKENS_PER_DIMENSION
    """Corpus tokens per key dimension."""
    max_length: int = MAX_LENGTH
    """Cap on a document, in tokens."""
    shipped: Path | None = None
    """A file of moments to look in before the cache (the embedded models')."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Hears (tokens done, tokens wanted) while collecting."""

    def key(self, lm: LM, site: Site) -> MomentKey:
        """The cache key of one site's moment."""
        n_tokens = self.tokens_per_dimension * site.weight.shape[1]
        return MomentKey(lm.fingerprint(), site.name, self.corpus.id, n_tokens, self.max_length)

    def prepare(self, lm: LM, sites: Sequence[Site]) -> None:
        """Collect what neither the shipped file nor the cache holds, in one pass.

        Raises:
            TooFewTokens: the corpus has fewer tokens than the keys have dimensions.
        """
        missing = [s for s in sites if self.stored(lm, s) is None]
        if not missing:
            return
        n_tokens = max(self.key(lm, s).n_tokens for s in missing)
        rows = document_rows(lm, self.corpus.documents, n_tokens, self.max_length)
        _check_enough(sum(len(r.ids) for r in rows), n_tokens, max(s.weight.shape[1] for s in missing))
        for site, moment in collect_moments(lm, missing, rows, progress=self.progress).items():
            save_moments(self.key(lm, site).file, {self.key(lm, site): moment})

    def second_moment(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        path = self.stored(lm, site)
        if path is None:
            self.prepare(lm, [site])
            path = self.key(lm, site).file
        return load_moment(path, self.key(lm, site))

    def keys(self, lm: LM, sites: Sequence[Site]) -> dict[str, str]:
        return {s.name: f"{self.corpus.id}/{self.key(lm, s).n_tokens}/{self.max_length}" for s in sites}

    def stored(self, lm: LM, site: Site) -> Path | None:
        """The file that holds one site's moment, or None where it has yet to be collected."""
        key = self.key(lm, site)
        if self.shipped is not None and self.shipped.is_file() and key in moment_keys(self.shipped):
            return self.shipped
        return key.file if key.file.is_file() and key in moment_keys(key.file) else None


def document_rows(lm: LM, documents: Iterable[str], n_tokens: int, max_length: int) -> list[Row]:
    """Tokenised documents, each cut to `max_length` (or the context), as many as it takes to reach `n_tokens`."""
    config = lm.model.config
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or max_length
    cap, rows, total = min(max_length, context), [], 0
    for document in documents:
        if total >= n_tokens:
            break
        if not document.strip():
            continue
        ids = encode(lm.tokenizer, document).ids[: min(cap, n_tokens - total)]
        rows.append(Row(ids, len(ids)))
        total += len(ids)
    return rows


def collect_moments(
    lm: LM,
    sites: Sequence[Site],
    rows: Sequence[Row],
    *,
    max_batch_tokens: int = 8192,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Site, Float[Tensor, "d_in d_in"]]:
    """E[k k^T] over every token of the rows (first positions included, padding excluded), for all sites in one pass.

    On the unedited weights (live deltas are taken off for the pass), stopping after the highest site. Products are
    accumulated in float32 (or the model's own wider dtype) within a batch, sums in float64 on the CPU.

    Raises:
        NonFinite: a moment came out NaN or infinite.
    """
    sums = {s: torch.zeros(s.weight.shape[1], s.weight.shape[1], dtype=torch.float64) for s in sites}
    mask = torch.empty(0)

    def adder(site: Site) -> Tap:
        def add(value: Tensor) -> None:
            keys = value[mask.to(value.device)]
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
            sums[site] += (keys.T @ keys).cpu()

        return add

    taps = {Point(s.layer, "key" if s.kind == "down_proj" else "attn_key"): adder(s) for s in sites}
    total, done = sum(len(r.ids) for r in rows), 0
    with lm.borrowed(), lm.unedited(), torch.no_grad():
        for group in buckets([len(r.ids) for r in rows], max_batch_tokens):
            batch = pad([rows[i] for i in group], lm.device)
            mask = batch.mask
            run(lm, batch, taps)
            done += int(mask.sum())
            progress(done, total)
    for site, value in sums.items():
        value /= total
        if not torch.isfinite(value).all():
            raise NonFinite(f"the second moment of {site.name} is NaN or infinite; load the model in a wider dtype")
    return sums


def save_moments(path: Path, moments: Mapping[MomentKey, Float[Tensor, "d d"]]) -> None:
    """Write moments as packed upper triangles in float32, with their keys."""
    tensors = {}
    for key, moment in moments.items():
        i, j = torch.triu_indices(*moment.shape)
        tensors[key.site] = moment[i, j].to(torch.float32)
    record = {"format": FORMAT, "keys": [asdict(k) for k in moments]}
    write_atomically(path, save(tensors, metadata={"retcon": json.dumps(record)}))


def moment_keys(path: Path) -> list[MomentKey]:
    """The keys of the moments in a file.

    Raises:
        MalformedFile: not a file of moments.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["retcon"])
        if record["format"] != FORMAT:
            raise MalformedFile(f"{path}: moments format {record['format']!r}, this version reads {FORMAT!r}")
        return [MomentKey(**k) for k in record["keys"]]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise MalformedFile(
            f"{path}: not a file of second moments ({error}); delete it to collect them again"
        ) from None


def load_moment(path: Path, key: MomentKey) -> Float[Tensor, "d d"]:
    """One moment out of a file, float32 on the CPU.

    Raises:
        MalformedFile: the file does not hold this key.
    """
    if key not in moment_keys(path):
        raise MalformedFile(f"{path}: holds no second moment for {key}")
    with safe_open(path, framework="pt") as file:
        packed = file.get_tensor(key.site)
    d = int((8 * len(packed) + 1) ** 0.5 - 1) // 2
    i, j = torch.triu_indices(d, d)
    moment = torch.empty(d, d)
    moment[i, j] = packed
    moment[j, i] = packed
    return moment


def _check_enough(found: int, wanted: int, d: int) -> None:
    if found < d:
        raise TooFewTokens(
            f"the corpus has {found} tokens, the keys have {d} dimensions: their second moment would be singular. "
            f"Give at least {10 * d} tokens, better {TOKENS_PER_DIMENSION * d}."
        )
    if found < 10 * d:
        warnings.warn(
            f"second moments from {found} tokens for {d} dimensions ({found / d:.1f} a dimension); at least 10 a "
            "dimension are wanted for stable edits",
            RetconWarning,
            stacklevel=4,
        )
