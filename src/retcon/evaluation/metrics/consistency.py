"""Consistency ("RS", reference score; ROME, arXiv:2202.05262): generated text against passages about the new object.

The passages and the vocabulary are optional companion files of CounterFact; see docs/evaluation.md. TF-IDF as in
scikit-learn's defaults: lower case, words of two or more characters, smooth idf, unit length.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retcon.errors import InvalidSetting, MalformedFile
from retcon.evaluation.metrics.names import Measured

VARIANT = "cons.tfidf"
"""Of the texts for `flu.new`; of those for another fluency, `@` and its name follow."""
_WORD = re.compile(r"(?u)\b\w\w+\b")


@dataclass(frozen=True)
class TfIdf:
    """Inverse document frequency by word; words that are not in it count nothing."""

    idf: Mapping[str, float]

    @classmethod
    def fit(cls, documents: Iterable[str]) -> "TfIdf":
        """Return idf(w) = ln((1 + n) / (1 + df(w))) + 1 over `documents`."""
        counts: Counter[str] = Counter()
        n = 0
        for document in documents:
            counts.update(set(_words(document)))
            n += 1
        return cls({word: math.log((1 + n) / (1 + df)) + 1 for word, df in counts.items()})

    @classmethod
    def from_files(cls, idf: str | os.PathLike[str], vocabulary: str | os.PathLike[str]) -> "TfIdf":
        """Read CounterFact's `idf.npy` (numbers by index) and `tfidf_vocab.json` (index by word).

        Raises:
            MalformedFile: one of them cannot be read, or they do not fit each other.
        """
        import numpy

        try:
            values = numpy.load(idf, allow_pickle=False).ravel().tolist()
        except (OSError, EOFError, ValueError, AttributeError) as error:  # the last of an archive of arrays
            raise MalformedFile(f"{idf}: expected an array of numbers ({error})") from None
        try:
            places = {word: int(i) for word, i in json.loads(Path(vocabulary).read_text("utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise MalformedFile(f"{vocabulary}: expected an object of indices by word ({error})") from None
        if any(not 0 <= i < len(values) for i in places.values()):
            raise MalformedFile(f"{vocabulary}: does not fit {idf} ({len(values)} values)")
        return cls({word: values[i] for word, i in places.items()})

    def vector(self, text: str) -> dict[str, float]:
        """Return a text's vector, of unit length; empty where no word is known."""
        weights = {w: c * self.idf[w] for w, c in Counter(_words(text)).items() if w in self.idf}
        norm = math.sqrt(math.fsum(v * v for v in weights.values()))
        return {w: v / norm for w, v in weights.items()} if norm else {}


@dataclass(frozen=True)
class References:
    """Passages by (relation, object id): texts about other subjects of which the new fact is true."""

    passages: Mapping[tuple[str, str], Sequence[str]]
    about: Mapping[str, Sequence[str]]
    """By the name of the subject they are about."""
    tfidf: TfIdf

    @classmethod
    def from_files(
        cls,
        snippets: str | os.PathLike[str],
        idf: str | os.PathLike[str] | None = None,
        vocabulary: str | os.PathLike[str] | None = None,
    ) -> "References":
        """Read CounterFact's `attribute_snippets.json`; the vocabulary is fitted on it where none is given.

        Raises:
            InvalidSetting: one of `idf` and `vocabulary` without the other.
            MalformedFile: not the file's shape.
        """
        if (idf is None) != (vocabulary is None):
            given, lacking = ("idf", "vocabulary") if vocabulary is None else ("vocabulary", "idf")
            raise InvalidSetting(f"{given} is given without {lacking}; they go together, or none is given")
        try:
            entries = json.loads(Path(snippets).read_text("utf-8"))
            passages: dict[tuple[str, str], list[str]] = {}
            about: dict[str, list[str]] = {}
            for entry in entries:
                for sample in entry["samples"]:
                    passages.setdefault((entry["relation_id"], entry["target_id"]), []).append(sample["text"])
                    about.setdefault(sample["name"], []).append(sample["text"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MalformedFile(
                f"{snippets}: expected objects with relation_id, target_id and samples (name, text): {error!r}"
            ) from None
        if idf is not None and vocabulary is not None:
            return cls(passages, about, TfIdf.from_files(idf, vocabulary))
        return cls(passages, about, TfIdf.fit(text for texts in passages.values() for text in texts))


def consistency(texts: Sequence[str], references: Sequence[str], tfidf: TfIdf) -> Measured:
    """Return the cosine of all generated texts of a case, joined, and all its references, joined."""
    if not references or not texts:
        return Measured("consistency", VARIANT, None, 0, "no text written" if references else "no reference passages")
    left, right = tfidf.vector(" ".join(texts)), tfidf.vector(" ".join(references))
    note = None if left and right else "zero_vector"
    value = math.fsum(v * right[w] for w, v in left.items() if w in right)
    return Measured("consistency", VARIANT, min(value, 1.0), sum(map(len, map(str.split, texts))), note)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
