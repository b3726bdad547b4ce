"""Pictures with matplotlib (`pip install 'retcon-lm[plot]'`), the same bytes for the same figure.

Nothing here touches matplotlib's global state: figures are made without pyplot and saved with their own settings.
"""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retcon.atomic import write_atomically
from retcon.errors import MissingPackage, how_to_install
from retcon.escaping import plain_texts, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
_LOOK = {
    "svg.hashsalt": "retcon",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "text.parse_math": False,  # of ticks, which are made while drawing
}


def figure(n_rows: int, n_columns: int, width: float, height: float, **options: Any) -> tuple["Figure", Any]:
    """Return an empty figure of that many inches and its axes, an array of rows.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage(f"figures need matplotlib, which is not installed: {how_to_install('plot')}") from None
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(n_rows, n_columns, squeeze=False, **options)


def drawn(made: "Figure", kind: str, **options: Any) -> bytes:
    """Return the figure as a file of that kind, `png` or `svg`."""
    from matplotlib import rc_context

    plain_texts(made)
    out = io.BytesIO()
    about = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    with rc_context(_LOOK):
        made.savefig(out, format=kind, metadata=about, **options)
    return out.getvalue() if kind == "png" else printable(out.getvalue().decode()).encode()


def save(made: "Figure", stem: str | os.PathLike[str], *, title: str | None = None) -> list[Path]:
    """Write `stem`.png and `stem`.svg."""
    if title:
        made.suptitle(title, fontsize=10)
    plain_texts(made)
    if made.get_layout_engine() is not None:  # it would move things a little at each drawing
        made.draw_without_rendering()
        made.set_layout_engine("none")
    written = []
    for kind in ("png", "svg"):
        path = Path(f"{stem}.{kind}")
        write_atomically(path, drawn(made, kind, dpi=DPI))
        written.append(path)
    return written
