"""Replay: run only the layers from one on, and only the tokens from a column on, on recorded states.

While weights are fixed, nothing below an edited layer and nothing before an edited token changes. `capture` computes
those parts once: the states that enter the first block that runs, and the attention keys and values of earlier tokens
there and above. Inside `replaying`, the model's own forward runs the rest (`lm/forward.py`), and the blocks below
answer at once with the recorded states. The block list keeps its length, since masks and rotary tables are looked up by
place in it.
"""

from retcon.lm.replay.capture import (
    after_common_beginnings,
    capture_states,
    common_beginnings,
    embedded_states,
)
from retcon.lm.replay.run import flat_places, mlp_entries, replaying, running_at
from retcon.lm.replay.states import Replayable, ReplayState, suffix_starts, tail, tokens_at

__all__ = [
    "ReplayState",
    "Replayable",
    "after_common_beginnings",
    "capture_states",
    "common_beginnings",
    "embedded_states",
    "flat_places",
    "mlp_entries",
    "replaying",
    "running_at",
    "suffix_starts",
    "tail",
    "tokens_at",
]
