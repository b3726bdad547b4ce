"""Where facts live in a model, and which layers to edit.

`contrast_probe` watches the original and the target answer on their way through the layers (JEEP), `causal_trace` asks
which states carry the original one (ROME), `advise` turns the first into layers to edit. Pictures: `locate.figures`.
"""

from retcon.locate.advice import Advice, Choice, Rule, advise
from retcon.locate.contrast import Contrast, Curve, contrast_probe
from retcon.locate.tracing import Trace, Traces, Tracing, causal_trace
from retcon.locate.wordsets import WordSets, read_word_sets, retrieve_word_sets

__all__ = [
    "Advice",
    "Choice",
    "Contrast",
    "Curve",
    "Rule",
    "Trace",
    "Traces",
    "Tracing",
    "WordSets",
    "advise",
    "causal_trace",
    "contrast_probe",
    "read_word_sets",
    "retrieve_word_sets",
]
