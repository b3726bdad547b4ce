"""Names of a report's files, made from labels that people chose."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from retcon.files import short_name

if TYPE_CHECKING:
    from retcon.bench.report.plots import Picture
    from retcon.bench.report.tables import Table

Named = TypeVar("Named", "Table", "Picture")


def slug(text: str) -> str:
    """Return a text in lower case, with a hyphen for whatever is neither a letter nor a digit of some script."""
    kept = "".join(c if c.isalnum() else " " for c in unicodedata.normalize("NFC", text).lower())
    return "-".join(kept.split())


def distinct(items: Iterable[Named]) -> list[Named]:
    """Return the items with a name each, none too long for a file: those whose names are one to a file system get a
    hash of their titles, and a number where those are one, too."""
    items = [replace(item, name=short_name(item.name)) for item in items]
    found = Counter(_on_disk(item.name) for item in items)
    seen: Counter[str] = Counter()
    named = []
    for item in items:
        if found[_on_disk(item.name)] > 1:
            name = f"{item.name}-{_hash(item.title)}"
            seen[name] += 1
            item = replace(item, name=name if seen[name] == 1 else f"{name}-{seen[name]}")
        named.append(item)
    return named


def _on_disk(name: str) -> str:
    """Return what file systems compare that know no case and one form of each letter."""
    return unicodedata.normalize("NFKC", name).casefold()


def _hash(title: str) -> str:
    return hashlib.sha256(title.encode()).hexdigest()[:8]
