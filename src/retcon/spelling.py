"""How texts are compared, and where a subject is in a text."""

import unicodedata
from collections.abc import Callable, Iterator

from retcon.boundary import is_spaceless


def nfc(text: str) -> str:
    """Return the text in one form: characters that look alike are the same."""
    return unicodedata.normalize("NFC", text)


def _nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _nfd_folded(text: str) -> str:
    return "".join(" " if c.isspace() else c for c in _nfd(_nfd(text).casefold()))


def fold(text: str) -> str:
    """Return the text as it is compared: in one form, without case, and with single spaces."""
    return " ".join(nfc(text).casefold().split())


def mentions(text: str, subject: str, *, any_case: bool = False) -> list[tuple[int, int]]:
    """Return (start, end) of the occurrences of `subject` in `text`: exact ones, else as NFC, else case-folded.

    Case-folded, any space is as good as any other. Parts of longer words count only where all are.

    Args:
        any_case: case-folded ones count beside exact ones.
    """
    found: list[tuple[int, int]] = []
    if not any_case:
        found = [(at, at + len(subject)) for at in range(len(text)) if text.startswith(subject, at)]
        found = found or list(_occurrences(text, subject, _nfd))
    found = found or list(_occurrences(text, subject, _nfd_folded))
    return [span for span in found if _is_whole(text, *span)] or found


def _is_whole(text: str, start: int, end: int) -> bool:
    """Return whether no letter, mark or digit continues a part of the text as a word, on either side."""
    return not any(
        all(unicodedata.category(c)[0] in "LMN" and not is_spaceless(c) for c in text[at - 1 : at + 1])
        for at in (start, end)
        if 0 < at < len(text)
    )


def _occurrences(text: str, subject: str, fold: Callable[[str], str]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each occurrence of `subject` in `text` once both are folded.

    Forms are compared decomposed, which tells the same strings apart as NFC does and treats each character with its
    marks by itself, so that a place in the folded text leads back to one in `text`.
    """
    starts = [i for i, character in enumerate(text) if i == 0 or not unicodedata.combining(character)]
    wanted, folded = fold(subject), ""
    if not wanted or not text:
        return
    place = {}  # in the folded text -> in the text
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        place[len(folded)] = start
        folded += fold(text[start:end])
    place[len(folded)] = len(text)
    at = folded.find(wanted)
    while at >= 0:
        if at in place and at + len(wanted) in place:
            yield place[at], place[at + len(wanted)]
        at = folded.find(wanted, at + 1)
