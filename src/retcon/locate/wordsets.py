"""Word sets for the contrast-based probe: what else a state speaks of (JEEP, appendix A).

`related`: words of texts about the subject; `factual`: words of facts about it; `non_factual`: related ones that are
neither factual nor stopwords; `stopword`: words of any text; `left`: all other tokens of the vocabulary. The paper
draws the related words from Wikipedia by BM25 and the factual ones from GPT-4; such lists can be given as a file.
Without one, the related words come from any corpus, and the factual ones are subjects and answers of the other edits of
the same relation.
"""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.arguments import list_of_texts
from retcon.boundary import is_spaceless
from retcon.edits import Edit, list_of_edits
from retcon.errors import MalformedFile
from retcon.files import read_json_rows, require
from retcon.lm.prompts import encode
from retcon.plural import plural

SETS = ("related", "factual", "non_factual", "stopword", "left")
N_PARAGRAPHS = 100
"""Documents that a record's related words are taken from, at most."""
N_FACTUAL = 50
"""Other edits of the same relation whose subjects and answers count as factual, at most."""
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def words_of(text: str) -> list[str]:
    """Return the words of a text as they are spelt there, punctuation left out."""
    return _WORD.findall(text)


def default_stopwords() -> frozenset[str]:
    """Return our own English list: articles, pronouns, auxiliaries, conjunctions, prepositions, particles, signs."""
    return frozenset((files("retcon.locate") / "stopwords.txt").read_text(encoding="utf-8").split())


@dataclass(frozen=True)
class WordSets:
    """Words by the id of the edit; an edit that is not there has none."""

    related: Mapping[str, frozenset[str]]
    factual: Mapping[str, frozenset[str]]
    stopwords: frozenset[str]


def read_word_sets(path: str | os.PathLike[str], *, stopwords: Iterable[str] | None = None) -> WordSets:
    """Read sets from JSON lines with `id` (of an edit) and the lists `related` and `factual`; either may be missing.

    Raises:
        MalformedFile: names file, row and field.
    """
    found: dict[str, dict[str, frozenset[str]]] = {"related": {}, "factual": {}}
    for number, record in read_json_rows(path):
        where = f"{path}, row {number}"
        name = str(require(record, "id", str | int, where))  # type: ignore[arg-type]
        if unknown := sorted(set(record) - {"id", "related", "factual"}):
            raise MalformedFile(
                f"{where}: {plural(len(unknown), 'unknown field')} ({', '.join(unknown)}); known: id, related, factual"
            )
        for kind, of in found.items():
            words = record.get(kind, [])
            if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
                raise MalformedFile(f"{where}: field {kind!r} must be a list of words")
            of[name] = frozenset(part for word in words for part in word.split())
    return WordSets(**found, stopwords=default_stopwords() if stopwords is None else frozenset(stopwords))


def retrieve_word_sets(
    edits: Iterable[Edit], documents: Iterable[str], *, stopwords: Iterable[str] | None = None
) -> WordSets:
    """Make sets without anybody's lists: related words by BM25 from `documents`, factual ones from the other edits.

    Related: the documents that fit the edit's prompt best, as many as name the subject, as a word by itself, among the
    first `N_PARAGRAPHS`; the words of the original answer are left out. Factual: subjects and answers of other edits of
    the same relation (or of the same template, where edits name no relation).
    """
    edits, documents = list_of_edits(edits), list_of_texts(documents, "documents")
    index = Bm25(documents)
    stop = default_stopwords() if stopwords is None else frozenset(stopwords)
    related, factual = {}, {}
    by_relation: dict[str, list[Edit]] = defaultdict(list)
    for edit in edits:
        by_relation[_relation(edit)].append(edit)
    for edit in edits:
        name = _by_itself((edit.subject or edit.text).casefold())
        fitting = index.search([w for w in words_of(edit.text) if w.casefold() not in stop], N_PARAGRAPHS)
        texts = [documents[i] for i in fitting if name.search(documents[i].casefold())]
        answer = {w.casefold() for w in words_of(edit.target_true or "")}
        related[edit.id] = _words_but(texts, answer)
        others = [e for e in by_relation[_relation(edit)] if e.subject != edit.subject][:N_FACTUAL]
        mentions = [t for e in others for t in (e.subject, e.target_true, e.target_new) if t]
        factual[edit.id] = _words_but(mentions, answer)
    return WordSets(related, factual, stop)


def _by_itself(name: str) -> re.Pattern[str]:
    """Return a pattern for a name that is no part of a longer word; anywhere, in scripts that write no spaces."""
    if any(map(is_spaceless, name)):
        return re.compile(re.escape(name))
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


def _words_but(texts: Iterable[str], answer: set[str]) -> frozenset[str]:
    """Return the words of the texts, without those of the answer however they are written there."""
    return frozenset(w for text in texts for w in words_of(text) if w.casefold() not in answer)


def _relation(edit: Edit) -> str:
    if edit.relation_id or edit.subject_span is None:
        return edit.relation_id or edit.prompt
    start, end = edit.subject_span
    return edit.text[:start] + "{}" + edit.text[end:]


class TokenSets:
    """Word sets as first tokens of one tokenizer."""

    def __init__(self, words: WordSets, tokenizer: Any, vocabulary: int) -> None:
        self._words = words
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._first: dict[str, int] = {}
        self._stopword = self._tokens(words.stopwords)
        self._folded_stopwords = {w.casefold() for w in words.stopwords}

    def of(self, edit: Edit, original: int) -> list[Int[Tensor, " tokens"]]:
        """Return the sets of one edit, in the order of `SETS`: distinct first tokens, ascending.

        The sets of words are disjoint but for `related`; some of their first tokens may be the same.
        """
        related = self._words.related.get(edit.id, frozenset())
        factual = self._words.factual.get(edit.id, frozenset())
        known = {w.casefold() for w in factual} | self._folded_stopwords
        words = [related, factual, [w for w in related if w.casefold() not in known]]
        found = [*map(self._tokens, words), self._stopword]
        left = torch.ones(self._vocabulary, dtype=torch.bool)
        left[original] = False
        for tokens in found:
            left[tokens] = False
        return [*found, left.nonzero()[:, 0]]

    def _tokens(self, words: Iterable[str]) -> Int[Tensor, " tokens"]:
        return torch.tensor(sorted({self._first_token(word) for word in words}), dtype=torch.long)

    def _first_token(self, word: str) -> int:
        """Return a word's first token as in running text: words after a space, punctuation without one."""
        if word not in self._first:
            separator = " " if _WORD.match(word) else ""
            self._first[word] = encode(self._tokenizer, "the", word, separator=separator).target_ids[0]
        return self._first[word]


class Bm25:
    """Okapi BM25 over documents (Robertson and Zaragoza 2009), words compared case-folded."""

    def __init__(self, documents: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(w.casefold() for w in words_of(text)) for text in documents]
        lengths = torch.tensor([float(c.total()) for c in counts])
        self._n = len(documents)
        self._soft = k1 * (1 - b + b * lengths / lengths.mean().clamp(min=1))  # k1 (1 - b + b |d| / mean |d|)
        self._k1 = k1
        places: dict[str, list[int]] = defaultdict(list)
        often: dict[str, list[int]] = defaultdict(list)
        for i, count in enumerate(counts):
            for word, n in count.items():
                places[word].append(i)
                often[word].append(n)
        self._postings = {w: (torch.tensor(places[w]), torch.tensor(often[w]).float()) for w in places}

    def scores(self, words: Iterable[str]) -> Float[Tensor, " documents"]:
        """Score of every document: sum over words of idf f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))."""
        total = torch.zeros(self._n)
        for word in {w.casefold() for w in words} & self._postings.keys():
            where, f = self._postings[word]
            idf = math.log(1 + (self._n - len(where) + 0.5) / (len(where) + 0.5))
            total[where] += idf * f * (self._k1 + 1) / (f + self._soft[where])
        return total

    def search(self, words: Iterable[str], n: int) -> list[int]:
        """Return the n best documents that hold any of the words, best first."""
        scores = self.scores(words)
        order = scores.argsort(descending=True, stable=True)[:n]
        return order[scores[order] > 0].tolist()
