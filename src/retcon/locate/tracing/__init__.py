"""Causal tracing: which states carry a fact to its answer.

Meng et al. 2022, arXiv:2202.05262, section 2. The subject's embeddings are corrupted so that the model no longer finds
the answer; then one state at a time is restored, and the answer's probability shows what that state carries.

`traces` says how to trace and what comes out; `prompt` runs one clean and corrupted, `cells` are the states restored,
`causal` goes through them: by whole passes, or by what a restoration can change alone (`packing`).
"""

from retcon.locate.tracing.causal import causal_trace
from retcon.locate.tracing.prompt import embedding_deviation
from retcon.locate.tracing.traces import GROUPS, Effects, RestoredKind, Trace, Traces, Tracing, default_window

__all__ = [
    "GROUPS",
    "Effects",
    "RestoredKind",
    "Trace",
    "Traces",
    "Tracing",
    "causal_trace",
    "default_window",
    "embedding_deviation",
]
