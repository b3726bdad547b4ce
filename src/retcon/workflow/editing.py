"""Facts into a model, as one delta: in batches, on top of earlier deltas, taken up again after a kill."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retcon.atomic import turn_in
from retcon.edits import Edit
from retcon.errors import InvalidSetting, MalformedFile
from retcon.files import cache_dir
from retcon.plural import plural
from retcon.work import Progress
from retcon.workflow.moments import needed_moments
from retcon.workflow.settings import Resolved

if TYPE_CHECKING:
    from torch import Tensor

    from retcon.attachment import Attachment, EditReport
    from retcon.lm.model import LM
    from retcon.memory.moments import Moments


@dataclass(frozen=True)
class Made:
    """A delta, and what making it took."""

    delta: "Attachment"
    seconds: Mapping[str, float]
    """`moments` (collecting them) and `edit` (all else)."""
    n_resumed: int
    """Edits whose values were there from a run that did not end."""

    @property
    def n_took(self) -> int:
        """Edits that the edited model answers with the new answer, of its own accord."""
        return sum(bool(report.greedy_match) for report in self.delta.report)


def write_facts(
    lm: "LM",
    resolved: Resolved,
    edits: Iterable[Edit],
    *,
    moments: "Moments | None" = None,
    batch_size: int | None = None,
    state: "Mapping[str, Tensor] | None" = None,
    seed: int = 0,
    out: str | Path | None = None,
    check_out: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> Made:
    """Return one delta for all `edits`, on top of what is applied to `lm`, which stays as it is.

    Args:
        moments: None: the model's default ones, where the method uses any.
        batch_size: as `in_steps` takes it.
        state: what a sequential method kept of its earlier batches (`state_after`).
        out: file for the delta. Values that were searched are kept on disk until it is there, so that the same call
            goes on where a killed one was.
        check_out: raises where what is at `out` by then must not be replaced.
        progress: called with tokens read for moments, and with edits done.

    Raises:
        InvalidSetting, InvalidEdit, ConflictingEdits: as `in_steps`.
    """
    from retcon.memory.timed import TimedMoments
    from retcon.memory.values import ValueCache
    from retcon.methods.common.sequence import in_steps

    found = needed_moments(lm, resolved.method) if moments is None else moments
    timed = TimedMoments(found, progress=progress and partial(progress, "corpus tokens"))
    kept = ValueCache(cache_dir() / "values") if out is not None else None
    started = time.perf_counter()
    delta = in_steps(
        resolved.method,
        lm,
        edits,
        batch_size=batch_size,
        moments=timed,
        state=state,
        values=kept,
        seed=seed,
        progress=progress and (lambda stage, done, of: progress(f"optimising {stage}", done, of)),
    )
    took = {"moments": timed.seconds, "edit": time.perf_counter() - started - timed.seconds}
    n_resumed = 0
    if out is not None and kept is not None:
        folder = Path(out).parent
        folder.mkdir(parents=True, exist_ok=True)
        with turn_in(folder, wait=True):
            check_out()
            delta.save(out)
        n_resumed = kept.resumed
        kept.discard()
    return Made(delta, took, n_resumed)


def check_replaces_its_like(out: str | Path, lm: "LM", resolved: Resolved, edits: Sequence[Edit], seed: int) -> None:
    """Refuse to put a delta in the place of another file than the delta of an earlier run of the same command.

    Raises:
        InvalidSetting: the file is something else.
    """
    from retcon.attachment import load

    if not Path(out).exists():
        return
    replace_it = {"python": ", or remove it", "option": ", or replace it with --force"}
    try:
        old = load(out)
    except MalformedFile:
        raise InvalidSetting(f"{out} exists and is no delta; name another file", **replace_it) from None
    made = old.provenance
    same = (old.base, made.get("method"), made.get("seed")) == (lm.fingerprint(), resolved.name, seed)
    if not same or list(old.edits) != list(edits):
        raise InvalidSetting(
            f"{out} holds another delta ({old.id}: {made.get('method')}, edits: {len(old.edits):,}); name another file",
            **replace_it,
        )


def took_line(reports: "Sequence[EditReport]") -> str:
    """Say in a sentence how many edits took, which is whether it worked."""
    n, took = len(reports), sum(bool(report.greedy_match) for report in reports)
    return f"{took:,} of {plural(n, 'edit')} took: the edited model's own answer begins with the new one"


def search_line(reports: "Sequence[EditReport]") -> str:
    """Say how the search ended for the edits, and what was lost after it; nothing where nothing was searched."""
    if reports and all(report.stopped == "written" for report in reports):
        return ""
    n, counts = len(reports), Counter(report.outcome for report in reports)
    parts = [
        f"{counts['reached']:,} of {n:,} reached the target of the search",
        *(f"{counts[name]:,} {text}" for name, text in _SHORT_OF_IT.items() if counts[name]),
    ]
    return ", ".join(parts)


_SHORT_OF_IT = {
    "clamped": "held back by the clamp",
    "steps": "out of steps",
    "conflict": "lost in the write, to old keys or to each other",
}


def remedy(resolved: Resolved, delta: "Attachment") -> str | None:
    """Say which settings to try next, all at once, where a third of the edits or more were lost or held back."""
    from retcon.methods.common.starting_point import NO_WIDER

    if resolved.preset is not None or all(report.greedy_match for report in delta.report):
        return None
    n, counts = len(delta.report), Counter(report.outcome for report in delta.report)
    lost, clamped = counts["conflict"], counts["clamped"]
    if 3 * (lost + clamped) < n:
        return None
    if 2 * clamped > n and any(NO_WIDER in note for note in resolved.notes):
        return (
            f"{clamped} of {n} edits were held back by the clamp, and wider ones did not help: try other layers "
            "(--layers probe), or --method ft"
        )
    tried: dict[str, float] = {}
    for found, endings, factor in ((lost, ("moment_weight", "ridge"), 0.1), (clamped, ("clamp",), 2.0)):
        if 10 * found >= n:
            own = resolved.settings.items()
            tried |= {name: factor * value for name, value in own if name.endswith(endings) and value}
    if not tried:
        return None
    why = [f"{lost} of {n} edits were lost in the write"] if lost else []
    why += [f"{clamped} {'' if lost else f'of {n} edits were '}held back by the clamp"] if clamped else []
    return f"{' and '.join(why)}: add " + " ".join(f"--set {name}={value:g}" for name, value in tried.items())
