"""Second moments C = E[k k^T] of the keys entering an edited matrix: what a write must leave alone (ROME, section 3).

Collected on the unedited model, for all needed sites of one width in one pass over a corpus, and kept on disk under
everything that determines them. `Moments` is what methods are handed: it prepares the sites a method names, and gives
one layer's moment at a time, so that no more than one need be in memory.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from retcon import shared_cache
from retcon.atomic import write_atomically
from retcon.checked import Kind, cached, checksum, keep, warn_unwritable
from retcon.errors import InvalidSetting, MalformedFile, RetconWarning, TooFewTokens
from retcon.files import cache_dir
from retcon.lm.model import LM
from retcon.lm.prompts import Row, encode
from retcon.lm.site import Site
from retcon.lm.tokenizer import tokenizer_hash
from retcon.memory.collect import collect
from retcon.memory.corpus import Corpus
from retcon.memory.solve import CPU, cholesky, definite
from retcon.version import __version__
from retcon.work import silent

TOKENS_PER_DIMENSION = 20
"""Default number of corpus tokens per key dimension; under 10 is warned about, under 1 refused."""
MAX_LENGTH = 1024
"""Documents are cut to this many tokens (or the model's context, if that is shorter)."""
FACTOR_FILE_FROM = 2048
"""Key dimensions from which a moment's Cholesky factor is read from disk sooner than it is made again."""
FORMAT = "retcon-moments-4"
COMPUTATION = 1
"""Raised only when a pass over the same text gives other moments."""
DERIVED = Kind("matrices made from a second moment", format=1, computation=1)
DERIVED_SUFFIX = ".derived"
SHIPPED_DTYPE = "float32"
"""That the shipped moments of the embedded models were collected in."""


@dataclass(frozen=True)
class MomentKey:
    """All that determines a second moment."""

    fingerprint: str
    """Of the unedited model."""
    site: str
    corpus: str
    n_tokens: int
    max_length: int
    tokenizer: str
    """Hash of the vocabulary and rules that made tokens of the corpus."""
    dtype: str
    """That the model computed in."""
    computation: int = COMPUTATION

    @property
    def file(self) -> Path:
        return cache_dir() / "moments" / f"{self._digest}.safetensors"

    def file_of(self, what: str) -> Path:
        """Return where something made from this moment is kept."""
        digest = hashlib.sha256(what.encode()).hexdigest()[:12]
        return cache_dir() / "moments" / f"{self._digest}-{digest}{DERIVED_SUFFIX}"

    @property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]


@runtime_checkable
class Moments(Protocol):
    """Where methods get second moments from."""

    def prepare(self, lm: LM, sites: Sequence[Site]) -> None:
        """Make sure that the moments of these sites can be had; missing ones of one width take one pass."""

    def second_moment(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        """Return C, the mean of k k^T over tokens (activation squared): float32 or float64 on the CPU, not scaled.

        It has a Cholesky factor: where rounding has left it indefinite, the least jitter that helps is on its diagonal,
        so that every form of a solve sees the same matrix.
        """

    def factor(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        """Return L of C = L L^T, lower triangle, float64 on the CPU. To be read only."""

    def derived(self, lm: LM, site: Site, what: str, build: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `build(C)`, made once. `what` names all that determines it besides C, as in "null-space-0.02"."""

    def keys(self, lm: LM, sites: Sequence[Site]) -> dict[str, str]:
        """Return what identifies the moment of each site, for the record."""


def _matrix(name: str, given: Any) -> Float[Tensor, "d_in d_in"]:
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.dim() != 2 or len(set(found.shape)) != 1 or not found.is_floating_point():
        what = type(given).__name__ if found is None else f"{tuple(found.shape)} of {found.dtype}"
        raise InvalidSetting(f"second moment of {name}: expected a square matrix of floats, found {what}")
    return found


@dataclass(frozen=True, eq=False)
class GivenMoments:
    """Moments that the caller already has, by parameter name (a routed expert's: `Site.id`).

    Raises:
        InvalidSetting: a moment is no square matrix of floats, or `prepare` is asked for one of another width.
    """

    by_name: Mapping[str, Any]
    """Tensors, or arrays of NumPy."""
    _made: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {name: _matrix(name, given) for name, given in self.by_name.items()})

    def prepare(self, lm: LM, sites: Sequence[Site]) -> None:
        missing = [s.id for s in sites if s.id not in self.by_name]
        if missing:
            raise InvalidSetting(f"no second moment given for {', '.join(missing)}; given: {', '.join(self.by_name)}")
        for site in sites:
            if (width := len(self.by_name[site.id])) != site.shape[1]:
                raise InvalidSetting(f"second moment of {site.id}: its keys are {site.shape[1]} wide, found {width}")

    def second_moment(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        return self.derived(lm, site, "definite", lambda c: definite(c, device=site.device))

    def factor(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        return self.derived(lm, site, "factor", lambda c: cholesky(c, site.device)[0])

    def derived(self, lm: LM, site: Site, what: str, build: Callable[[Tensor], Tensor]) -> Tensor:
        if (site.id, what) not in self._made:
            self._made[site.id, what] = build(self.by_name[site.id])
        return self._made[site.id, what]

    def keys(self, lm: LM, sites: Sequence[Site]) -> dict[str, str]:
        return {s.id: "given" for s in sites}


@dataclass(frozen=True)
class CorpusMoments:
    """Moments collected from a corpus, kept in the cache directory."""

    corpus: Corpus
    tokens_per_dimension: int = TOKENS_PER_DIMENSION
    """Corpus tokens per key dimension."""
    max_length: int = MAX_LENGTH
    """Cap on a document, in tokens."""
    shrink: bool = False
    """Where memory runs out, go on with smaller passes, and use moments that were collected so: others in their last
    bits."""
    shipped: Path | None = None
    """A file of moments to look in before the cache (the embedded models'). They were collected in float32, and serve
    in whatever dtype the model is loaded."""
    progress: Callable[[int, int], None] = silent
    """Called with (tokens done, tokens wanted) while collecting."""
    _unwritten: dict[MomentKey, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Moments for which there is no room in the cache directory."""
    _factors: dict[MomentKey, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Small ones, which take less to keep than to make or read again for every edit of a sequence."""
    _shrunk: dict[MomentKey, int] = field(default_factory=dict, repr=False, compare=False)
    """Tokens of a pass, of those moments whose passes had to be smaller."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: it makes factors of its own, and reports to nobody."""
        return vars(self) | {"progress": silent, "_factors": {}}

    def key(self, lm: LM, site: Site) -> MomentKey:
        """Return the cache key of one site's moment."""
        n_tokens = self.tokens_per_dimension * site.shape[1]
        dtype = str(lm.dtype).removeprefix("torch.")
        text = (self.corpus.id, n_tokens, self.max_length, tokenizer_hash(lm.tokenizer))
        own = MomentKey(lm.fingerprint(), site.id, *text, dtype)
        shipped = replace(own, dtype=SHIPPED_DTYPE)
        return shipped if shipped in self._shipped_keys else own

    @cached_property
    def _shipped_keys(self) -> frozenset[MomentKey]:
        """Keys of the moments in the shipped file."""
        return frozenset(moment_keys(self.shipped) if self.shipped is not None and self.shipped.is_file() else ())

    def prepare(self, lm: LM, sites: Sequence[Site]) -> None:
        """Collect what neither the shipped file nor the cache holds; a pass that was killed is taken up again.

        Raises:
            TooFewTokens: the corpus has fewer tokens than the keys have dimensions.
            OutOfMemory: a pass over it does not fit; see `collect`.
        """
        missing = [s for s in sites if self.stored(lm, s) is None and self.key(lm, s) not in self._unwritten]
        before = 0
        for together in self.passes(lm, missing):
            n_read = 0

            def report(done: int, total: int, before: int = before) -> None:
                nonlocal n_read
                n_read = total
                self.progress(before + done, before + total)

            self._collect(lm, together, report)
            before += n_read

    def passes(self, lm: LM, sites: Sequence[Site]) -> list[list[Site]]:
        """Return the sites in groups, each of which is collected in a pass of its own: those whose moments take as many
        tokens, so that a site's moment is the same whatever others are collected with it."""
        found: dict[int, list[Site]] = {}
        for site in sites:
            found.setdefault(self.key(lm, site).n_tokens, []).append(site)
        return list(found.values())

    def _collect(self, lm: LM, sites: Sequence[Site], progress: Callable[[int, int], None]) -> dict[Site, Tensor]:
        """Return the moments of these sites, of as many tokens each, from one pass over the corpus, kept in the cache.

        Where that cannot be written to, they are kept in this object.
        """
        known = {site: self._unwritten[key] for site in sites if (key := self.key(lm, site)) in self._unwritten}
        if len(known) == len(sites):
            return known
        keys = {s: self.key(lm, s) for s in sites}
        rows = document_rows(lm, self.corpus.documents, keys[sites[0]].n_tokens, self.max_length)
        n_found = sum(len(r.ids) for r in rows)
        _check_enough(n_found, sites[0].shape[1], self.max_length)
        partial = partial_file(keys.values())
        moments = {}
        passes = collect(lm, sites, rows, shrink=self.shrink, progress=progress, partial=partial)
        for site, found in passes:
            about = {"convergence": found.convergence, "n_tokens": n_found}
            if found.shrunk_to is not None:
                about["shrunk_to"] = self._shrunk[keys[site]] = found.shrunk_to
            if site.expert is not None:
                about["n_routed"] = found.n_routed
            device = site.device
            try:
                save_moments(keys[site].file, {keys[site]: found.moment}, {site.id: about}, device=device)
                shared_cache.put(keys[site].file)
                if len(sites) == 1:
                    moments[site] = load_moment(keys[site].file, keys[site])
            except OSError as error:
                warn_unwritable(error)
                self._unwritten[keys[site]] = moments[site] = definite(found.moment.to(torch.float32), device=device)
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        return moments

    def second_moment(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        key = self.key(lm, site)
        path = self.stored(lm, site)
        if path is not None:
            try:
                return load_moment(path, key)
            except MalformedFile as error:
                warnings.warn(
                    f"{error}; it is collected again, which takes a pass over {key.n_tokens:,} tokens",
                    RetconWarning,
                    stacklevel=2,
                )
        return self._collect(lm, [site], self.progress)[site]

    def factor(self, lm: LM, site: Site) -> Float[Tensor, "d_in d_in"]:
        d = site.shape[1]
        if d < FACTOR_FILE_FROM:
            key = self.key(lm, site)
            if key not in self._factors:
                self._factors[key] = cholesky(self.second_moment(lm, site), site.device)[0]
            return self._factors[key]
        packed = self.derived(lm, site, "factor", lambda c: pack_triangle(cholesky(c, site.device)[0]))
        return unpack_triangle(packed, d)

    def derived(self, lm: LM, site: Site, what: str, build: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what `build` gives, kept in the cache directory beside the moment."""
        key = self.key(lm, site)
        path, identity = key.file_of(what), {**asdict(key), "what": what}
        if (shrunk_to := self._shrunk_to(lm, site)) is not None:
            identity["shrunk_to"] = shrunk_to
        found = cached(path, DERIVED, identity)
        if found is not None:
            return found[0][what]
        made = build(self.second_moment(lm, site)).contiguous()
        keep(path, DERIVED, identity, {what: made})
        return made

    def keys(self, lm: LM, sites: Sequence[Site]) -> dict[str, str]:
        found = {}
        for site in sites:
            shrunk_to = self._shrunk_to(lm, site)
            passes = "" if shrunk_to is None else f"/passes of {shrunk_to}"
            found[site.id] = f"{self.corpus.id}/{self.key(lm, site).n_tokens}/{self.max_length}{passes}"
        return found

    def convergence(self, lm: LM, site: Site) -> float | None:
        """Return ||C1 - C2|| / ||C|| of the two halves of the text; None where the moment's file does not say."""
        path = self.stored(lm, site)
        return None if path is None else _said(path, site).get("convergence")

    def _shrunk_to(self, lm: LM, site: Site) -> int | None:
        """Return the tokens of a pass, where memory ran out while this moment was collected."""
        if not self.shrink:  # such moments are not used
            return None
        path = self.stored(lm, site)
        return self._shrunk.get(self.key(lm, site)) if path is None else _said(path, site).get("shrunk_to")

    def stored(self, lm: LM, site: Site) -> Path | None:
        """Return the file that holds one site's moment, or None where it has yet to be collected."""
        key = self.key(lm, site)
        if key in self._shipped_keys:
            return self.shipped
        if not key.file.is_file() and not shared_cache.fetch(key.file):
            return None
        try:
            if key not in moment_keys(key.file):
                raise MalformedFile(f"{key.file}: holds another second moment than that of {site.id}")
            if _said(key.file, site).get("shrunk_to") is not None and not self.shrink:
                raise MalformedFile(f"{key.file}: collected in smaller passes, where memory ran out (shrink)")
            return key.file
        except MalformedFile as error:
            warnings.warn(f"{error}; it is not used", RetconWarning, stacklevel=2)
            return None


def collect_moments(
    lm: LM, sites: Sequence[Site], rows: Sequence[Row], *, max_batch_tokens: int | None = None
) -> dict[Site, Float[Tensor, "d_in d_in"]]:
    """Return E[k k^T] over every token of the rows, for all sites in one pass, float64; see `memory/collect.py`."""
    found = collect(lm, sites, rows, max_batch_tokens=max_batch_tokens)
    return {site: collected.moment for site, collected in found}


def partial_file(keys: Iterable[MomentKey]) -> Path:
    """Return where a pass for these moments keeps its partial sums."""
    digest = hashlib.sha256("".join(sorted(k.file.name for k in keys)).encode()).hexdigest()[:24]
    return cache_dir() / "moments" / f"{digest}.partial"


def save_moments(
    path: Path,
    moments: Mapping[MomentKey, Float[Tensor, "d d"]],
    about: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    device: torch.device = CPU,
) -> None:
    """Write moments as packed triangles in float32, with their keys and the jitter that makes each definite.

    Args:
        about: what else the file's record shall say, by site.
        device: where the jitter is looked for, if it is good at float64.
    """
    tensors, record = {}, {}
    for key, moment in moments.items():
        rounded = moment.to(torch.float32)
        tensors[key.site] = pack_triangle(rounded)
        about_site = {"jitter": cholesky(rounded, device)[1], **(about or {}).get(key.site, {})}
        record[key.site] = about_site | {"check": _check_of(key, about_site, tensors[key.site])}
    metadata = {"format": FORMAT, "keys": [asdict(k) for k in moments], "about": record, "retcon": __version__}
    metadata["seal"] = checksum(metadata, {})
    write_atomically(path, save(tensors, metadata={"retcon": json.dumps(metadata)}))


def _check_of(key: MomentKey, about: Mapping[str, Any], packed: Float[Tensor, " triangle"]) -> str:
    """Return the checksum of one moment: its numbers, what they are for, and what is said about them."""
    return checksum({**asdict(key), "about": dict(about)}, {key.site: packed})


def pack_triangle(matrix: Float[Tensor, "d d"]) -> Float[Tensor, " triangle"]:
    """Return the lower triangle column by column, which is a symmetric matrix's upper triangle row by row."""
    return torch.cat([matrix[i:, i] for i in range(len(matrix))])


def unpack_triangle(packed: Float[Tensor, " triangle"], d: int) -> Float[Tensor, "d d"]:
    """Return the (lower) triangular matrix that `pack_triangle` took apart."""
    upper = torch.zeros(d, d, dtype=packed.dtype)
    for i, row in enumerate(packed.split(tuple(range(d, 0, -1)))):
        upper[i, i:] = row
    return upper.T


def moment_keys(path: Path) -> list[MomentKey]:
    """Return the keys of the moments in a file.

    Raises:
        MalformedFile: not a file of moments.
    """
    return [MomentKey(**k) for k in _record(path)["keys"]]


def load_moment(path: Path, key: MomentKey) -> Float[Tensor, "d d"]:
    """Return one moment out of a file, on the CPU: float32, or float64 where it needs its jitter to be definite.

    Raises:
        MalformedFile: the file does not hold this key, or the moment does not match its checksum.
    """
    if key not in moment_keys(path):
        raise MalformedFile(f"{path}: holds no second moment for {key}")
    try:
        with safe_open(path, framework="pt") as file:
            packed = file.get_tensor(key.site)
    except (SafetensorError, OSError) as error:
        raise MalformedFile(f"{path}: not readable ({error})") from None
    about = dict(_record(path)["about"].get(key.site, {}))
    if about.pop("check", None) != _check_of(key, about, packed):
        raise MalformedFile(f"{path}: damaged; the second moment of {key.site} does not match its checksum")
    moment = unpack_triangle(packed, (math.isqrt(8 * len(packed) + 1) - 1) // 2)
    moment += moment.tril(-1).T
    return definite(moment, about["jitter"])


def _record(path: Path) -> dict[str, Any]:
    """Return what a file of moments says about itself, its keys well-formed."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["retcon"])
        sealed = record.pop("seal", None)
        if record["format"] != FORMAT:
            raise MalformedFile(
                f"{path}: moments format {record['format']!r}, this version reads {FORMAT!r}; collect them again"
            )
        if sealed != checksum(record, {}):
            raise MalformedFile(f"{path}: damaged; its record does not match its checksum")
        for key in record["keys"]:
            MomentKey(**key)
        if not isinstance(record["about"], dict):
            raise MalformedFile(f"{path}: not a file of second moments")
        return record
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise MalformedFile(
            f"{path}: not a file of second moments ({error}); delete it to collect them again"
        ) from None


def _said(path: Path, site: Site) -> dict[str, Any]:
    """Return what a file of moments says about one site's."""
    said: dict[str, Any] = _record(path).get("about", {}).get(site.id, {})
    return said


def _check_enough(found: int, d: int, max_length: int) -> None:
    if found < d:
        raise TooFewTokens(
            f"the corpus has {found} tokens, the keys have {d} dimensions: their second moment would be singular. "
            f"Give at least {10 * d} tokens, better {TOKENS_PER_DIMENSION * d}. (Of each document {max_length} tokens "
            "are read; in a text file, blank lines part documents.)"
        )
    if found < 10 * d:
        warnings.warn(
            f"second moments from {found} tokens for {d} dimensions ({found / d:.1f} a dimension); at least 10 a "
            "dimension are wanted for stable edits",
            RetconWarning,
            stacklevel=4,
        )


def document_rows(lm: LM, documents: Iterable[str], n_tokens: int, max_length: int) -> list[Row]:
    """Tokenise documents, each cut to `max_length` (or the context), as many as it takes to reach `n_tokens`."""
    cap, rows, total = min(max_length, lm.context_length or max_length), [], 0
    for document in documents:
        if total >= n_tokens:
            break
        if not document.strip():
            continue
        ids = encode(lm.tokenizer, document).ids[: min(cap, n_tokens - total)]
        rows.append(Row(ids, len(ids)))
        total += len(ids)
    return rows
