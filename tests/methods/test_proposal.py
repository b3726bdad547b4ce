"""What a batch is warned of before it is written."""

import warnings

import pytest

from retcon.edits import Edit
from retcon.errors import RetconWarning
from retcon.methods.common.choosing import method
from tests.conftest import random_moments
from tests.methods.common import CONTEXTS, SEARCH

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight", "ignore:.*ROME divides by")
WRITERS = {
    "rome": lambda top: dict(layer=top),
    "r_rome": lambda top: dict(layer=top),
    "memit": lambda top: dict(layers=(1, top)),
    "pmet": lambda top: dict(layers=(1, top)),
    "emmet": lambda top: dict(layers=(top,)),
    "alphaedit": lambda top: dict(layers=(1, top), threshold_mode="rank", null_threshold=0.6),
    "jeep": lambda top: dict(low=(1, top), high=(3,)),
}


def said(name, lm, edit, top):
    """Return what is warned of about subjects where `edit` is written, the last layer at the subject being `top`."""
    searched = {"steps": 2, "learning_rate": SEARCH["learning_rate"]}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        method(name, **WRITERS[name](top), **searched).propose(
            lm, [edit], contexts=CONTEXTS, moments=random_moments(lm)
        )
    return [str(w.message) for w in found if issubclass(w.category, RetconWarning) and "subject" in str(w.message)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_value_that_cannot_reach_the_answer_is_warned_of(name, tiny, edit):
    """Nothing at a token of the last block reaches another token."""
    lm = tiny("llama")
    (message,) = said(name, lm, edit, 3)
    assert f"{name}: what the last layer (3) writes at the subject does not reach" in message
    assert message.endswith(" a later token. Write lower layers")
    assert said(name, lm, edit, 2) == []
    assert said(name, lm, Edit("You know {}", "France", "Rome"), 3) == []  # the subject predicts the answer


def test_a_subject_that_is_the_first_token_is_warned_of(tiny):
    lm, edits = tiny("gpt2"), [Edit("{} is here, says", letter, "Rome", id=letter) for letter in "abcde"]
    chosen = method("memit", layers=(1, 2), **SEARCH)
    with pytest.warns(RetconWarning, match="prompt's first token.*: 'a' \\('a'\\), 'b' .* and 2 more"):
        chosen.propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm))
    assert said("rome", lm, edits[0], 2) == said("rome", lm, edits[1], 2)  # facts written one by one are warned of once
    (message,) = said("memit", lm, edits[0], 2)
    assert message.endswith("after other text. Write the fact with text before it")
    assert said("memit", tiny("llama", tok="bos"), edits[0], 2) == []  # BOS comes first
