"""The four questions, on models that pass and fail them for known reasons."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from retcon.delta import Delta, Dense
from retcon.edits import Case, Edit, Query
from retcon.errors import InvalidSetting
from retcon.evaluation.safety import Thresholds, Verdict, check
from retcon.lm.model import LM
from tests.evaluation.test_measure import WEIGHT, bump

TEXT = "The capital of France is Paris. He lived in Florence and in Milan, and the train stood still."


def cases(lm: LM) -> list[Case]:
    """Whatever the model says anyway is the new answer, so that edits take and generalise without a change."""
    made = []
    for name in ("France", "Italy", "Milan"):
        prompts = [f"The capital of {name} is", f"I read: the capital of {name} is", f"He lived near {name} in"]
        own = [lm.complete(p, max_new_tokens=2, stops=()).strip() or "x" for p in prompts]
        edit = Edit("The capital of {} is", name, own[0], id=name)
        queries = [
            Query(f"{axis}/0", axis, p, answer)
            for axis, p, answer in zip(("rewrite", "paraphrase", "locality.x"), prompts, own, strict=True)
        ]
        made.append(Case(name, (edit,), tuple(queries)))
    return made


def zero(lm: LM) -> Delta:
    return lm.delta({WEIGHT: [Dense(full=torch.zeros(lm.parameter(WEIGHT).shape, dtype=torch.float64))]})


def outcomes(verdict: Verdict) -> dict[str, str]:
    return {a.part: a.outcome for a in verdict.answers}


def test_a_change_of_nothing_is_local_and_keeps_the_language(
    tiny: Callable[..., LM], untouched: Callable[[LM], Any]
) -> None:
    lm = tiny(n_layers=2)
    asked, look = cases(lm), untouched(lm)
    verdict = check(lm, asked, [zero(lm)], text=TEXT)
    assert untouched(lm) == look
    assert verdict["local"].value == 1
    assert verdict["language"].value == 1
    assert verdict["took"].value == verdict["took"].before
    assert verdict["took"].n == 3
    assert verdict["language"].words.startswith("perplexity of held-out text is 1.000 times what it was")


def test_a_wrecked_model_fails_and_says_where(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    verdict = check(lm, cases(lm), [bump(lm, 20.0)], text=TEXT)
    assert not verdict.safe
    assert outcomes(verdict)["local"] == "failed"
    worst = verdict["local"].worst
    assert worst
    assert worst[0].before != worst[0].after
    assert worst[0].wanted == "as before"
    assert "% of answers to other questions stay as they were (at least 95 % was asked" in verdict["local"].words


def test_what_was_not_asked_is_not_known_and_not_safe(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    bare = [Case(c.id, c.edits, c.queries[:1]) for c in cases(lm)]
    limits = Thresholds(took=0)
    verdict = check(lm, bare, [zero(lm)], text=TEXT, thresholds=limits)
    assert outcomes(verdict) == {"took": "off", "generalised": "unknown", "local": "unknown", "language": "passed"}
    assert not verdict.safe
    assert verdict["local"].words.endswith("not known, the cases hold no locality prompts")
    off = Thresholds(took=0, generalised=0, local=0, perplexity_ratio=math.inf)
    assert set(outcomes(check(lm, bare, [zero(lm)], text=TEXT, thresholds=off)).values()) == {"off"}
    assert check(lm, bare, [zero(lm)], text=TEXT, thresholds=off).safe


def test_thresholds_decide(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    asked = cases(lm)
    for size in (0.2, 0.1, 0.05, 0.02, 0.01):  # until some answers change and some stay
        delta = bump(lm, size)
        value = check(lm, asked, [delta], text=TEXT)["local"].value
        assert value is not None
        if value > 0:
            break
    assert 0 < value < 1
    for limit, wanted in ((value, "passed"), (min(1.0, value + 0.01), "failed")):
        assert outcomes(check(lm, asked, [delta], text=TEXT, thresholds=Thresholds(local=limit)))["local"] == wanted


def test_a_broken_model_counts_as_fallen_short(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=1)
    asked = cases(lm)
    with torch.no_grad():
        lm.parameter(WEIGHT).fill_(math.nan)
    verdict = check(lm, asked, [], text=TEXT)
    assert verdict["took"].value == verdict["local"].value == 0
    assert outcomes(verdict)["language"] == "failed"


def test_what_means_nothing_is_refused(tiny: Callable[..., LM]) -> None:
    with pytest.raises(InvalidSetting, match="local is a share from 0 to 1, found 95"):
        Thresholds(local=95)
    with pytest.raises(InvalidSetting, match="perplexity_ratio must be at least 1"):
        Thresholds(perplexity_ratio=0.9)
    with pytest.raises(InvalidSetting, match="no cases to check with"):
        check(tiny(n_layers=1), [], [])
