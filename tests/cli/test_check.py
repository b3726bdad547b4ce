"""`retcon check`: words, examples, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ASK = ("check", "gptj", "--delta", "delta.safetensors", "--cases", "edits.jsonl", "--text", "corpus.txt")


def test_what_the_cases_do_not_ask_is_not_safe(cli: Callable[..., Any], delta: Path) -> None:
    told = cli(*ASK, "--took", "0", "--perplexity-ratio", "inf", code=1).stdout
    assert "Not known to be safe" in told
    assert "--generalised 0, --local 0" in told
    everything_off = ("--took", "0", "--generalised", "0", "--local", "0", "--perplexity-ratio", "inf")
    assert "Safe to ship by these thresholds, on 2 cases" in cli(*ASK, *everything_off).stdout


def test_failing_is_told_with_examples(cli: Callable[..., Any], delta: Path) -> None:
    told = cli(*ASK, "--generalised", "0", "--local", "0", "--took", "1", "--perplexity-ratio", "1", code=1)
    assert "Not safe to ship" in told.stdout
    assert "where it fell short" in told.stdout or "language is intact" in told.stdout
    found = json.loads(cli(*ASK, "--took", "1", "--json", code=1).stdout)
    assert found["safe"] is False
    assert set(found["answers"]) == {"took", "generalised", "local", "language"}
    assert found["answers"]["local"]["outcome"] == "unknown"
    assert found["answers"]["took"]["n"] == 2


def test_bad_input_is_refused(cli: Callable[..., Any], delta: Path) -> None:
    cases = ("--cases", "edits.jsonl")
    assert "no such file" in cli("check", "gptj", "--delta", "none.safetensors", *cases, code=2).stderr
    other = cli("check", "llama", "--delta", "delta.safetensors", *cases, code=2)
    assert "was the delta made for another one" in other.stderr
    assert "share from 0 to 1" in cli(*ASK, "--local", "95", code=2).stderr
