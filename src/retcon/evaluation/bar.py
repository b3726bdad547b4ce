"""The progress bars that `evaluate` draws where no function listens."""

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from retcon.work import Progress


@contextmanager
def drawn_bars() -> Iterator[Progress]:
    """Draw a progress bar per stage, on stderr or in a notebook."""
    bars: dict[str, Any] = {}
    if hasattr(builtins, "get_ipython"):  # rich draws nothing lasting there
        from tqdm.auto import tqdm

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = tqdm(total=total, desc=f"evaluate: {stage}")
            bars[stage].update(done - bars[stage].n)

        try:
            yield draw
        finally:
            for each in bars.values():
                each.close()
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as shown:

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = shown.add_task(f"evaluate: {stage}", total=total)
            shown.update(bars[stage], completed=done)

        yield advance
