"""Generated text held against the answers that count as right. Nothing was handed to the model but the prompt."""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, partial

from retcon.arguments import check_choice
from retcon.boundary import is_spaceless
from retcon.edits import AnswersMode, Query
from retcon.evaluation.metrics.names import Measured, metric_names

Answers = Sequence[Sequence[str]]
"""Outer: distinct answers; inner: aliases of one."""

Judge = Callable[[str, str, str], bool]
"""(question, gold answer, answer) -> right or not; the caller's own, the library calls nothing over a network."""


def normalise(text: str, articles: str = "a|an|the") -> str:
    """Return a text for comparing only: NFC, lower case, no punctuation, no articles (a, an, the), single spaces.

    Punctuation is of every script, and the signs of ASCII; other signs, such as the degree's, mean something. An em
    dash is between words. Text that is nothing but articles and punctuation keeps them ("The The", "+", "A+"), but for
    the marks of a sentence around it ("A.").
    """
    lowered = _lowered(text)
    bare = "".join(c for c in lowered.replace("\u2014", " ") if not _is_punctuation(c))
    return " ".join(re.sub(rf"\b({articles})\b", " ", bare).split()) or lowered.strip(".,;:!?\"'") or lowered


def _lowered(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _with_signs(text: str) -> str:
    """Return text for comparing with its articles, and with every sign as a word of its own ("C++" is "c + +")."""
    return " ".join(re.findall(r"\w+|[^\w\s]", _lowered(text)))


@cache
def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def gen_em(text: str, answers: Answers, mode: AnswersMode = "any") -> bool:
    """Return whether the text is an answer, both normalised."""
    return _matches(text, answers, mode, lambda written, alias: written == alias)


def gen_prefix(text: str, answers: Answers, mode: AnswersMode = "any") -> bool:
    """Return whether the text starts with an answer, at a word boundary (anywhere, in scripts that write no spaces)."""
    return _matches(text, answers, mode, _starts_with)


def _starts_with(written: str, alias: str) -> bool:
    return written.startswith(alias) and _is_boundary(alias[-1], written[len(alias) : len(alias) + 1])


def gen_contains(text: str, answers: Answers, mode: AnswersMode = "any") -> bool:
    """Return whether an answer occurs in the text as whole words (anywhere, in scripts that write no spaces).

    Rambling text that quotes many answers passes.
    """
    return _matches(text, answers, mode, lambda written, alias: bool(_places(written, alias)))


def _places(written: str, alias: str) -> list[int]:
    """Return where an answer begins and ends at word boundaries; places do not overlap."""
    found = []
    at = written.find(alias)
    while at >= 0:
        end = at + len(alias)
        whole = _is_boundary(written[max(at - 1, 0) : at], alias[0]) and _is_boundary(alias[-1], written[end : end + 1])
        if whole:
            found.append(at)
        at = written.find(alias, end if whole else at + 1)
    return found


def _is_boundary(left: str, right: str) -> bool:
    """Return whether words end between two characters; "" is where the text ends."""
    return not left.strip() or not right.strip() or is_spaceless(left) or is_spaceless(right)


def matches(query: Query, text: str, judge: Judge | None = None) -> list[Measured]:
    """Return all generation variants for one query. `text` is newly written text only, never the prompt.

    `gen.em` and `gen.prefix` count only where the rival answer, if the query has one, does not occur in the text.
    """
    success, n = metric_names(query.axis)[0], len(text.split())
    answers = accepted(query)
    tests = {"gen.em": gen_em, "gen.prefix": gen_prefix, "gen.contains": gen_contains}
    right = {v: test(text, answers, query.answers_mode) for v, test in tests.items()}
    if _names_rival(query, text):
        right["gen.em"] = right["gen.prefix"] = False
    found = [Measured(success, v, float(value), n) for v, value in right.items()]
    if judge is not None:
        verdicts = (judge(query.prompt, aliases[0], text) for aliases in answers)
        verdict = bool(answers) and (all(verdicts) if query.answers_mode == "all" else any(verdicts))
        found.append(Measured(success, "gen.judge", float(verdict), n))
    return found


def _names_rival(query: Query, text: str) -> bool:
    """Return whether the text contains the rival answer, other than as a part of an answer that counts as right.

    A rival that is normalised like an answer (C and C++, 15 and 1.5) differs in signs or articles, which count then.
    """
    if query.contrast is None:
        return False
    aliases = [alias for aliases in accepted(query) for alias in aliases]
    form = _with_signs if normalise(query.contrast) in map(normalise, aliases) else _form(query.contrast)
    written, rival, own = form(text), form(query.contrast), map(form, aliases)
    right = [(at, at + len(alias)) for alias in own for at in _places(written, alias)]
    found = [(at, at + len(rival)) for at in _places(written, rival)]
    return any(not any(start <= first and last <= end for start, end in right) for first, last in found)


def same_text(text: str, before: str | None) -> Measured:
    """Return `ee.loc.gen` for one locality query: the continuation is the unedited model's own."""
    if before is None:
        return Measured("LS", "ee.loc.gen", None, 0, "no text of the unedited model for this prompt")
    return Measured("LS", "ee.loc.gen", float(text == before), len(text.split()))


def length(axis: str, n_tokens: int, hit_limit: bool) -> list[Measured]:
    """Return how much was written, and whether it was cut: models that never stop are seen here."""
    success = metric_names(axis)[0]
    return [
        Measured(success, "gen.tokens", float(n_tokens), n_tokens),
        Measured(success, "gen.cut", float(hit_limit), n_tokens),
    ]


def accepted(query: Query) -> Answers:
    """Return what counts as right in generated text: the query's answers, or its target where it names none."""
    return query.answers or (((query.target,),) if query.target and query.target.strip() else ())


def _matches(text: str, answers: Answers, mode: str, test: Callable[[str, str], bool]) -> bool:
    check_choice(mode, AnswersMode, "mode of answers")
    written = cache(lambda form: form(text))

    def right(alias: str) -> bool:
        form = _form(alias)
        return test(written(form), form(alias))

    found = [any(right(alias) for alias in aliases if alias.strip()) for aliases in answers]
    return bool(found) and (all(found) if mode == "all" else any(found))


_with_a = partial(normalise, articles="an|the")


def _form(answer: str) -> Callable[[str], str]:
    """Return the form in which texts are compared with an answer: an "a" that ends it ("Serie A") is no article."""
    return _with_a if _with_a(answer).endswith(" a") else normalise
