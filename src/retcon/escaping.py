"""Text that stays text wherever it is written: one function per kind of output.

What writes an output escapes all that it writes, not what its caller thought of: prompts, targets, answers, names of
files, models and methods, messages of a store. HTML pages come from templates that escape every value
(`retcon.pages`); terminals (`retcon.cli.printing.console`), tables of reports, model cards and figures use these.
"""

import html
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def is_text(value: str) -> bool:
    """Return whether a string is text; one of bytes that are not UTF-8 holds halves of surrogate pairs."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_LOST = "\ufffd"
_UNPRINTABLE = {c: chr(0x2400 + c) for c in range(0x20) if chr(c) not in "\t\n"}  # each has a picture of its own
_UNPRINTABLE |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), _LOST)
_UNPRINTABLE |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), _LOST)  # they turn text around
_UNPRINTABLE |= dict.fromkeys((*range(0xD800, 0xE000), 0xFFFE, 0xFFFF), _LOST)


_NO_GLYPH = dict.fromkeys(_UNPRINTABLE, _LOST)  # fonts lack the pictures of control characters


def printable(text: str) -> str:
    """Return text for a terminal, a page or XML: control characters are shown, not obeyed; lines and tabs stay."""
    return text.translate(_UNPRINTABLE)


def one_line(text: str) -> str:
    """Return printable text with every run of white space as one space."""
    return printable(" ".join(text.split()))


def as_html(text: str) -> str:
    """Return text for HTML, in an element or a quoted attribute, where no template is."""
    return html.escape(printable(text))


_MARKDOWN = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[#+-](?= )|^>")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def markdown(text: str) -> str:
    """Return a line of text for Markdown, in a table or elsewhere: no markup, no HTML, no link."""
    marked = _MARKDOWN.sub(lambda found: "\\" + found[0], one_line(text))
    return re.sub("[&<]", lambda found: _ENTITIES[found[0]], marked)


_NUMBER = re.compile(r"-|[-+]?[\d.,]+(?: ?%)?(?: ?[\[(±][-+\d., %±]*[\])]?)?")


def csv_cell(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula: one that could be begins with an apostrophe."""
    flat = printable(text)
    return f"'{flat}" if flat.lstrip().startswith(("=", "+", "-", "@")) and not _NUMBER.fullmatch(flat) else flat


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        **{c: f"\\{c}" for c in "&%$#_{}"},
    }
)


def latex(text: str) -> str:
    """Return a line of text for LaTeX, a comment among it."""
    return one_line(text).translate(_LATEX)


def json_text(text: str) -> str:
    r"""Return JSON with the characters that a terminal would obey as `\u` escapes: the same JSON."""
    return "".join(f"\\u{ord(c):04x}" if ord(c) in _UNPRINTABLE and c >= "\x7f" else c for c in text)


def _plain_label(label: Callable[[float, int], str], x: float, position: int) -> str:
    return label(x, position).translate(_NO_GLYPH)


def plain_texts(figure: "Figure") -> None:
    """Have every text of a figure drawn as it is: a dollar sign begins no formula, and powers of ten are written out.

    Ticks are made while drawing: save with the setting `text.parse_math` off.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter, LogFormatter

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(text.get_text().translate(_NO_GLYPH))
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(formatter := axis.get_major_formatter(), FuncFormatter):  # ticks that were given labels
                axis.set_major_formatter(partial(_plain_label, formatter.func))
            elif isinstance(formatter, LogFormatter):
                axis.set_major_formatter(LogFormatter())
                axis.set_minor_formatter(LogFormatter())
