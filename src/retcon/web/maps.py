"""Maps of layers: what the contrast-based probe or a causal trace finds, in cells that can be chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.plural import plural
from retcon.work import Progress

if TYPE_CHECKING:
    from retcon.lm.model import LM


@dataclass(frozen=True)
class LayerMap:
    """Values per row and layer, for a map whose cells can be chosen."""

    title: str
    rows: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    def shade(self, row: int, layer: int) -> int:
        """Return 0 to 100, by the largest value in the map."""
        top = max((abs(v) for line in self.values for v in line), default=0.0) or 1.0
        return round(100 * max(0.0, self.values[row][layer]) / top)


def contrast_map(lm: "LM", edits: Sequence[Edit], progress: Progress) -> LayerMap:
    """Return how much the true answers gain on the new ones, layer by layer."""
    from retcon.locate.advice import layer_contrast
    from retcon.locate.contrast import contrast_probe

    found = contrast_probe(lm, edits, norms=(True,), progress=partial(progress, "probing"))
    rows = [layer_contrast(found, where, final_norm=True).mean(0).tolist() for where in ("subject_last", "prediction")]
    title = f"Contrast of {plural(len(found), 'fact')}: where the true answer gains on the new one"
    return LayerMap(title, ("subject's last token", "prediction position"), tuple(map(tuple, rows)))


def trace_map(lm: "LM", edits: Sequence[Edit], progress: Progress) -> LayerMap:
    """Return what each state of the first fact brings back of its answer.

    Raises:
        InvalidSetting: there are no facts.
    """
    from retcon.locate.tracing.causal import causal_trace

    if not edits:
        raise InvalidSetting("no facts to trace; add some first")
    known = [replace(edit, target_true=None) for edit in edits[:1]]
    trace = causal_trace(lm, known, progress=partial(progress, "tracing")).traces[0]
    effect = trace.indirect("block")
    title = f"Causal trace of {known[0].text!r}: how much of {trace.answer!r} each state brings back"
    return LayerMap(title, trace.tokens, tuple(tuple(row) for row in effect.tolist()))
