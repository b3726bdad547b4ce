"""Identity of a tokenizer: what the caches of anything made from text depend on beside the model."""

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

_HASHES: WeakKeyDictionary[Any, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()
"""Of each tokenizer, as it looked when its rules were hashed."""


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash over the vocabulary and rules of a fast tokenizer: equal ones give equal tokens for every text.

    Worked out once, and again where the rules look changed. How calls pad and truncate does not count.
    """
    look = _look(tokenizer)
    known = _HASHES.get(tokenizer)
    if known is None or known[0] != look:
        known = _HASHES[tokenizer] = (look, hashlib.sha256(_rules(tokenizer.backend_tokenizer).encode()).hexdigest())
    return known[1][:16]


def chat_hash(tokenizer: Any) -> str:
    """Return a hash over vocabulary, rules, chat template and special tokens: equal ones give equal tokens for every
    text and every conversation.

    The padding token does not count.
    """
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    own = [tokenizer_hash(tokenizer), getattr(tokenizer, "chat_template", None), special]
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def _look(tokenizer: Any) -> tuple[Any, ...]:
    """Return enough of a tokenizer to notice that its rules have changed (a BOS token switched on, tokens added)."""
    backend = tokenizer.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    return (id(backend), len(tokenizer), *(None if part is None else part.__getstate__() for part in parts))


def _rules(backend: Any) -> str:
    """Return a tokenizer's vocabulary and rules as text."""
    if backend.padding is not None or backend.truncation is not None:
        backend = type(backend).from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
    rules: str = backend.to_str()
    return rules
