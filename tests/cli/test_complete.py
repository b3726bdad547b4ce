"""`retcon complete`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import retcon
from retcon.delta import Delta

PROMPT = "The capital of France is"


def test_says_what_the_model_says(cli: Callable[..., Any]) -> None:
    lm = retcon.load("gptj")
    assert cli("complete", "gptj", PROMPT).stdout == f"{PROMPT}{lm.complete(PROMPT)}\n"
    short = cli("complete", "gptj", PROMPT, "--max-new-tokens", "3").stdout
    assert short == f"{PROMPT}{lm.complete(PROMPT, max_new_tokens=3)}\n"


def test_with_a_delta(cli: Callable[..., Any], delta: Path) -> None:
    lm = retcon.load("gptj")
    plain = lm.complete(PROMPT)
    lm.apply(Delta.load(delta))
    record = json.loads(cli("complete", "gptj", PROMPT, "--delta", str(delta), "--json").stdout)
    assert record["completion"] == lm.complete(PROMPT) != plain
    assert record["deltas"] == [Delta.load(delta).id]


def test_nothing_of_transformers_spoils_the_output(cli: Callable[..., Any]) -> None:
    result = cli("complete", "gptj", f"{PROMPT} ")
    assert result.stderr == ""
    assert result.stdout.startswith(PROMPT)


def test_markup_in_texts_is_text(cli: Callable[..., Any]) -> None:
    assert cli("complete", "gptj", "[red]I[/] [x").stdout.startswith("[red]I[/] [x")
