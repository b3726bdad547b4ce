"""What is written between a prompt and its answer."""

import re
import unicodedata

_SPACELESS = (
    *("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "FULLWIDTH", "HALFWIDTH", "IDEOGRAPHIC"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE"),
)
"""How the Unicode names of characters begin in scripts that write no spaces between words."""
_JOINS_NEXT = frozenset("-\u2010\u2011/\\#@_$\u00a3\u00a5\u20ac\u00bf\u00a1")
"""Characters that what follows is attached to: hyphens, slashes, signs before names, amounts, questions."""
_STRAIGHT_QUOTES = frozenset("\"'`")
_OPENED_BY = dict(
    zip(
        "\u201c\u201d\u2018\u2019\u00ab\u00bb\u2039\u203a",
        ("\u201e", "\u201c\u201e", "\u201a", "\u2018\u201a", "\u00bb", "\u00ab", "\u203a", "\u2039"),
        strict=True,
    )
)
"""The signs that open the quotes which a sign closes, where it does not open one itself."""
_FOLLOWS_DIRECTLY = frozenset(",;:!?")
"""Punctuation that is attached to what precedes it; so is a full stop that no word follows, and a closing bracket."""
_CLITICS = frozenset(sign + word for sign in "'\u2019" for word in ("s", "d", "m", "ll", "re", "ve"))
"""Ends of English words, as the possessive of the prompt's last one."""
_ELIDED = frozenset(
    (
        *("c", "d", "j", "l", "m", "s", "t", "qu", "jusqu", "lorsqu", "puisqu", "quelqu", "presqu", "quoiqu", "entr"),
        *("un", "all", "dall", "dell", "nell", "sull", "coll", "quell", "quest", "bell", "sant", "tutt", "anch", "gl"),
        *("nessun", "alcun", "senz", "degl", "dov", "com", "quand", "v"),
    )
)
"""Words of French and Italian that lose their last vowel before another, with an apostrophe in place of the space;
not n, which English has, too (rock n' roll)."""


def separator_between(prompt: str, answer: str) -> str:
    """Return what the language writes between a prompt and its answer: a space or nothing.

    Nothing after whitespace, an opening quote or bracket, a hyphen, a slash or the like, and after an elided word
    (l', dell', O'); nothing before a closing bracket, a comma or a possessive; and nothing where the last letter of the
    prompt, or the first of the answer, is of a script that writes no spaces (Chinese, Japanese, Thai, Lao, Khmer,
    Burmese, Tibetan).
    """
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return ""
    if _opens(prompt) or _elides(prompt) or _closes(answer):
        return ""
    last = next((c for c in reversed(prompt) if c.isalpha()), prompt[-1])
    first = next((c for c in answer if c.isalpha()), answer[0])
    return "" if any(map(is_spaceless, (prompt[-1], last, first))) else " "


def _opens(prompt: str) -> bool:
    """Return whether the prompt's last character belongs to what comes next."""
    last, before = prompt[-1], prompt[-2:-1]
    kind = unicodedata.category(last)
    apart = not before or before.isspace() or before == "=" or unicodedata.category(before) in ("Ps", "Pi")
    if last in _STRAIGHT_QUOTES:  # the same sign opens and closes
        if prompt.split()[-1] == last:
            return prompt.split().count(last) % 2 == 1
        return apart or (last != "'" and prompt.count(last) % 2 == 1)
    if last in "=\u2013\u2014":  # attached to a word: attached to the next one
        return bool(before) and not before.isspace()
    if kind in ("Pi", "Pf"):  # each closes in one language and opens in another
        opened = sum(map(prompt.count, _OPENED_BY.get(last, ""))) - prompt[:-1].count(last)
        return opened <= 0 and (apart if kind == "Pf" else not before.isalnum())
    return last in _JOINS_NEXT or kind == "Ps"


def _elides(prompt: str) -> bool:
    """Return whether the prompt ends with an elided word of French or Italian, or the O' of a name.

    An apostrophe may close a quote as well: where one has been opened, it does.
    """
    found = re.search(r"(?:^|[^\w'\u2019])([^\W\d_]+)['\u2019]$", prompt)
    if found is None or re.search(r"(?<!\w)['\u2018\u2019\u201a]", prompt[:-1]):
        return False
    return found[1] == "O" or found[1].casefold() in _ELIDED


def _closes(answer: str) -> bool:
    """Return whether the answer begins with punctuation that is attached to what precedes it."""
    if answer[0] == ".":
        return not answer[1:2].strip()
    if answer[0] in _FOLLOWS_DIRECTLY or answer.split()[0] in _CLITICS:
        return True
    kind = unicodedata.category(answer[0])
    return kind == "Pe" or (kind == "Pf" and not answer[1:2].isalnum())


def is_spaceless(character: str) -> bool:
    """Return whether a character is of a script that writes no spaces between words."""
    return unicodedata.name(character, "").startswith(_SPACELESS)
