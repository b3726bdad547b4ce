"""Fluency: the entropy of a text's n-grams (ROME, arXiv:2202.05262, "GE"). Healthy text of 90 words: 6.0 to 6.35 bits.

Variants: `flu.new` reads the continuation only; `flu.rome` and `flu.easyedit` sample with k = 5 up to 100 tokens with
the prompt and read the whole text; the second asks the edit's own prompt only. The word tokenizer is NLTK's where that
and its data are installed, else a regular expression, and the variant's name says which: `flu.new.nltk`, `flu.new.re`.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Literal

from retcon.evaluation.metrics.names import Measured

Fluency = Literal["flu.new", "flu.rome", "flu.easyedit"]
MIN_WORDS = 3
"""Fewer words have no trigram."""
_WORD = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]")


def ngram_entropy(words: Sequence[str]) -> float:
    """Return GE = (H_2 + 2 H_3) / 3 in bits, H_n the entropy of the relative frequencies of n-grams.

    The factor 1/2 that some papers leave out is in it, as in released code. H_n is 0 for fewer than n words.
    """
    return _entropy(words, 2) / 3 + 2 * _entropy(words, 3) / 3


def fluency(text: str, variant: str) -> Measured:
    """Return the entropy of what the variant reads: the continuation, or the whole text with its prompt."""
    name, split = word_tokenizer()
    words = split(plain(text))
    note = "few_words" if len(words) < MIN_WORDS else None
    return Measured("fluency", f"{variant}.{name}", ngram_entropy(words), len(words), note)


def plain(text: str) -> str:
    """Return a text in NFKD, blank lines made spaces, as ROME prepares its texts."""
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")


@cache
def word_tokenizer() -> tuple[str, Callable[[str], list[str]]]:
    """Return (name, function): NLTK's `word_tokenize` where it and its data are there, else a regular expression."""
    try:
        word_tokenize = import_module("nltk").word_tokenize

        word_tokenize("a b")
    except (ImportError, LookupError):
        return "re", _words
    return "nltk", word_tokenize


def _words(text: str) -> list[str]:
    r"""Return words and marks of punctuation; a combining mark, which is no `\w`, belongs to its word."""
    letters = "".join("x" if unicodedata.category(c).startswith("M") else c for c in text)
    return [text[found.start() : found.end()] for found in _WORD.finditer(letters)]


def _entropy(words: Sequence[str], n: int) -> float:
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    bits = math.fsum(c / total * math.log2(c / total) for c in grams.values())
    return 0.0 - bits  # 0 without a sign for one word again and again
