"""One edit as rows of tokens, and the part of the model that its vectors can change."""

from collections.abc import Sequence
from dataclasses import dataclass

from retcon.edits import Edit
from retcon.lm.forward import Point
from retcon.lm.hooks import hooked
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.lm.replay import suffix_starts
from retcon.memory.contexts import Contexts
from retcon.memory.values.objective import ValueSearch, ValueSite, kl_row, rewriting_rows, with_kl


@dataclass(frozen=True)
class EditRows:
    """One edit as rows of tokens."""

    edit: Edit
    rewriting: tuple[Row, ...]
    """Prompt and answer in every context, bare first."""
    starts: tuple[int, ...]
    """First token that a site touches, per rewriting row."""
    kl: Row | None
    """"<subject> is a", up to the subject's last token; None without a KL term."""
    kl_start: int = 0
    """First token of the KL row that is run."""

    @classmethod
    def of(cls, lm: LM, edit: Edit, sites: Sequence[ValueSite], contexts: Contexts, search: ValueSearch) -> "EditRows":
        """Tokenise, for a search over `sites`."""
        rows = tuple(rewriting_rows(lm, edit, contexts))
        starts = suffix_starts(lm, [min(r.position(s.where) for s in sites) for r in rows])
        kl, kl_start = None, 0
        if with_kl(sites, search):
            whole = kl_row(lm, edit)
            end = whole.position("subject_last") + 1
            kl = Row(whole.ids[:end], end, end - 1)
            kl_start = suffix_starts(lm, [end - 1])[0]
        return cls(edit, rows, starts, kl, kl_start)

    @property
    def columns(self) -> int:
        """Active tokens of the longest rewriting row."""
        return max(len(r.ids) - 1 - s for r, s in zip(self.rewriting, self.starts, strict=True))


def active_part(lm: LM, sites: Sequence[ValueSite]) -> tuple[int, list[Point]]:
    """Return the first block that must be run, and where each site's vector is then added.

    Adding to what a block's last summand puts out is adding to the block's output, so with one such site in the lowest
    layer that block need not run.
    """
    lowest = min(s.point.layer for s in sites)
    points = [s.point for s in sites]
    here = [i for i, p in enumerate(points) if p.layer == lowest]
    if len(here) > 1 or not _adds_to_the_output(lm, points[here[0]]):
        return lowest, points
    points[here[0]] = Point(lowest, "block")
    return lowest + 1, points


def _adds_to_the_output(lm: LM, point: Point) -> bool:
    if point.tensor == "block":
        return True
    summand = point.tensor == "mlp" or (point.tensor == "attn" and lm.layout.parallel)
    return summand and lm.layout.adds_mlp_output and not hooked(lm.block(point.layer))
