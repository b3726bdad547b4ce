"""Contexts and second moments for a model when the caller names none."""

from functools import cache
from weakref import WeakKeyDictionary

from retcon import world
from retcon.errors import TooFewTokens
from retcon.lm.load import DEMO
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts, ContextStyle, sample_contexts
from retcon.memory.moments import Corpus, CorpusMoments, Moments

SHIPPED_MOMENTS = "moments.safetensors"
"""The embedded models' moments, beside their weights."""

_SAMPLED: WeakKeyDictionary[LM, dict[tuple[int, ContextStyle], Contexts]] = WeakKeyDictionary()


def default_contexts(lm: LM, seed: int, style: ContextStyle = "memit") -> Contexts:
    """`sample_contexts`, done once for each model, seed and style: like the fingerprint, they are the base's."""
    known = _SAMPLED.setdefault(lm, {})
    if (seed, style) not in known:
        known[seed, style] = sample_contexts(lm, seed=seed, style=style)
    return known[seed, style]


def default_moments(lm: LM) -> Moments:
    """The embedded world's text and shipped moments for its models, WikiText-103 from the hub for others.

    Raises:
        TooFewTokens: no corpus can be had; the message says how to give one.
    """
    if lm.name.startswith(DEMO):
        shipped = world.model_path(lm.name.removeprefix(DEMO)) / SHIPPED_MOMENTS
        return CorpusMoments(_world(), shipped=shipped)
    return CorpusMoments(wikitext())


@cache
def _world() -> Corpus:
    return Corpus(tuple(world.corpus()))


@cache
def wikitext() -> Corpus:
    """Paragraphs of WikiText-103's training split, through the `datasets` package.

    Raises:
        TooFewTokens: `datasets` is not installed, or the hub cannot be reached.
    """
    try:
        return Corpus.from_dataset("Salesforce/wikitext", "wikitext-103-raw-v1")
    except TooFewTokens as error:
        raise TooFewTokens(
            f"no corpus for second moments was given: {error}. Give any text of the kind the model should go on "
            "treating as before: moments=CorpusMoments(Corpus.from_file(PATH)) in Python, --corpus PATH on the command "
            "line"
        ) from error.__cause__
