"""Contexts and second moments for a model when the caller names none."""

import warnings
from collections.abc import Hashable
from functools import cache
from weakref import WeakKeyDictionary

from retcon import world
from retcon.errors import InvalidSetting, RetconWarning, TooFewTokens
from retcon.lm.load import DEMO
from retcon.lm.model import LM
from retcon.lm.tokenizer import chat_hash
from retcon.memory.contexts import STARTS, Contexts, ContextStyle, sample_contexts
from retcon.memory.moments import Corpus, CorpusMoments

SHIPPED_MOMENTS = "moments.safetensors"
"""The embedded models' moments, beside their weights."""

_SAMPLED: WeakKeyDictionary[LM, dict[tuple[Hashable, ...], Contexts]] = WeakKeyDictionary()


def default_contexts(lm: LM, seed: int, style: ContextStyle = "memit") -> Contexts:
    """Return `sample_contexts`, done once for each model, seed and style, and again where something else has changed
    the model's weights, dtype or tokenizer."""
    key = (lm.fingerprint(), lm.dtype, chat_hash(lm.tokenizer), seed, style)
    known = _SAMPLED.setdefault(lm, {})
    if key not in known:
        known[key] = sample_contexts(lm, seed=seed, style=style)
    return known[key]


def first_prefixes(method: str, lm: LM, n: int, contexts: Contexts | None, seed: int) -> tuple[str, ...]:
    """Return `n` prefixes of the contexts given, or as many as they have; None: of the model's default ones.

    Raises:
        InvalidSetting: `n` is more than are sampled.
    """
    if n == 0:
        return ()
    if contexts is None and n > len(STARTS):
        raise InvalidSetting(
            f"{method}: n_prefixes is {n}, and {len(STARTS)} prefixes are sampled; set it to {len(STARTS)} at most, or "
            "in Python hand over contexts that have more"
        )
    return (contexts or default_contexts(lm, seed)).prefixes[:n]


def default_moments(lm: LM) -> CorpusMoments:
    """Return the embedded models' shipped moments; for other models those of WikiText-103, or of the shipped text.

    The shipped text serves where the `datasets` package or the hub is absent, and a warning says so: it is small and
    plain, and says less of what a model should go on treating as before than text of that kind does. What that costs is
    measured by `benchmarks/corpora.py`.
    """
    if lm.name.startswith(DEMO):
        shipped = world.model_path(lm.name.removeprefix(DEMO)) / SHIPPED_MOMENTS
        return CorpusMoments(shipped_text(), shipped=shipped)
    try:
        return CorpusMoments(wikitext())
    except TooFewTokens as error:
        warning = RetconWarning(
            f"second moments come from the small text that ships with retcon, for {error}. Text of the kind that the "
            "model should go on treating as before is better: ",
            python="moments=CorpusMoments(Corpus.from_file(PATH))",
            option="--corpus FILE",
        )
        warnings.warn(warning, stacklevel=2)
        return CorpusMoments(shipped_text())


@cache
def shipped_text() -> Corpus:
    """Return the text that ships with the package: statements of the embedded world and plain paragraphs."""
    return Corpus(tuple(world.corpus()))


@cache
def wikitext() -> Corpus:
    """Return paragraphs of WikiText-103's training split, through the `datasets` package.

    Raises:
        TooFewTokens: `datasets` is not installed, or the hub cannot be reached.
    """
    return Corpus.from_dataset("Salesforce/wikitext", "wikitext-103-raw-v1")
