"""A list of texts is a list: one text would be taken for its characters."""

from collections.abc import Callable
from typing import Any

import pytest

import retcon
from retcon.errors import InvalidSetting
from retcon.evaluation import Measures
from retcon.lm.generate import Writing
from retcon.lm.model import LM
from retcon.locate import retrieve_word_sets

TAKERS: dict[str, Callable[[LM, Any], Any]] = {
    "documents": lambda lm, given: retcon.Corpus(given).documents,
    "prefixes": lambda lm, given: retcon.Contexts(given).prefixes,
    "stops": lambda lm, given: Writing(stops=given).stops,
    "stops of Measures": lambda lm, given: Measures(stops=given).answers.stops,
    "stops of evaluate": lambda lm, given: retcon.evaluate(lm, [], stops=given) and given,
    "stops of complete": lambda lm, given: lm.complete("a", stops=given, max_new_tokens=1) and given,
    "prompts": lambda lm, given: tuple(given) if len(lm.generate(given, max_new_tokens=1)) == 2 else None,
    "documents of word sets": lambda lm, given: retrieve_word_sets([], given) and given,
}


@pytest.mark.parametrize("taker", TAKERS)
def test_one_text_is_no_list_of_texts(taker: str, tiny: Callable[..., LM]) -> None:
    lm, take = tiny("gptj"), TAKERS[taker]
    for wrong in ("abc", None, [1]):
        if wrong is None and taker in ("stops of Measures", "stops of evaluate"):
            continue  # as the preset has it
        with pytest.raises(InvalidSetting, match=rf"{taker.split()[0]} must be a list of texts, found "):
            take(lm, wrong)
    assert take(lm, ("a", "b")) == ("a", "b")
    assert tuple(take(lm, ["a", "b"])) == ("a", "b")


def test_contexts_of_a_list_are_those_of_a_tuple() -> None:
    prefixes: Any = ["a. "]
    assert {retcon.Contexts(prefixes), retcon.Contexts(("a. ",))} == {retcon.Contexts(("a. ",))}
