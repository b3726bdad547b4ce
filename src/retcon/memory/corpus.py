"""Text that stands for what a model should go on treating as before: from a file, or from the `datasets` package."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from retcon.arguments import list_of_texts
from retcon.checked import Kind, as_bytes, cached, from_bytes, keep
from retcon.errors import MalformedFile, TooFewTokens, how_to_install
from retcon.files import cache_dir, read_json_rows

CORPORA = Kind("text of a dataset", format=1, computation=1)
DATASET_CHARACTERS = 16_000_000
"""How much is read of a dataset: some 4 million tokens."""
MIN_CHARACTERS = 200
"""Of a dataset's document that is read."""
_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]*)(:(?P<split>[\w.+%\[\]:-]+))?)?")


@dataclass(frozen=True)
class Corpus:
    """Documents, in the order in which they are read."""

    documents: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", list_of_texts(self.documents, "documents"))

    @cached_property
    def id(self) -> str:
        """Hash of the text: part of a moment's key."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode() + b"\x00")
        return digest.hexdigest()[:16]

    @classmethod
    def named(cls, source: str | os.PathLike[str]) -> "Corpus":
        """Return a file (see `from_file`), or a dataset as NAME/NAME[:CONFIG[:SPLIT]] (see `from_dataset`).

        Raises:
            MalformedFile: neither, or a file without text.
            TooFewTokens: the dataset cannot be read.
        """
        check_corpus(source)
        if Path(source).is_file():
            return cls.from_file(source)
        found = _DATASET.fullmatch(os.fspath(source))
        assert found is not None
        return cls.from_dataset(found["name"], found["config"] or None, found["split"] or "train")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Corpus":
        """Return a `.jsonl`/`.json` file of objects with a `text` field, or plain text with blank lines between.

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

    @classmethod
    def from_dataset(
        cls, name: str, config: str | None = None, split: str = "train", *, field: str = "text"
    ) -> "Corpus":
        """Return the first documents of a dataset of the Hugging Face hub (or a local folder of data files), streamed.

        Documents under `MIN_CHARACTERS` (headings, empty lines) are passed over; `DATASET_CHARACTERS` are read. What
        was read is kept in the cache directory: the text stays the same and needs no network a second time.

        Raises:
            TooFewTokens: `datasets` is not installed, the dataset cannot be read, or it has no such text.
        """
        asked = json.dumps([name, config, split, field, MIN_CHARACTERS, DATASET_CHARACTERS])
        kept = cache_dir() / "corpora" / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.safetensors"
        found = cached(kept, CORPORA, {"dataset": asked})
        if found is not None:
            return cls(tuple(json.loads(bytes(as_bytes(found[0]["documents"])))))
        try:
            from datasets import load_dataset

            rows = load_dataset(name, config, split=split, streaming=True)
            documents = tuple(_first(rows, field))
        except ImportError:
            raise TooFewTokens(
                f"the corpus {name} needs the package 'datasets', which is not installed ({how_to_install('hub')})"
            ) from None
        except Exception as error:  # whatever a network, a hub, a file format can come up with
            raise TooFewTokens(f"the corpus {name} cannot be read ({type(error).__name__}: {error})") from error
        if not documents:
            raise TooFewTokens(f"the corpus {name} has no document of {MIN_CHARACTERS} characters in field {field!r}")
        keep(kept, CORPORA, {"dataset": asked}, {"documents": from_bytes(json.dumps(documents).encode())})
        return cls(documents)


def check_corpus(source: str | os.PathLike[str]) -> None:
    """Check that `source` can name a corpus, before a model is loaded.

    Raises:
        MalformedFile: it is neither a file nor of the form of a dataset's name.
    """
    path, name = Path(source), os.fspath(source)
    if path.is_file():
        return
    if path.is_dir():
        raise MalformedFile(f"{name}: is a directory, expected a file of text or a dataset's name")
    if not _DATASET.fullmatch(name) or path.suffix in (".txt", ".json", ".jsonl", ".md") or name.startswith("."):
        raise MalformedFile(f"{name}: no such file (and a dataset is named NAME/NAME[:CONFIG[:SPLIT]])")


def _first(rows: Iterable[dict[str, Any]], field: str) -> Iterator[str]:
    """Yield documents of a stream until there are `DATASET_CHARACTERS`."""
    n_characters = 0
    for row in rows:
        document = str(row[field]).strip()
        if len(document) < MIN_CHARACTERS:
            continue
        yield document
        n_characters += len(document)
        if n_characters >= DATASET_CHARACTERS:
            return
