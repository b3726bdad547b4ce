"""`retcon export`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.tiny import tiny_wrapper, tokenizer

import retcon
from retcon.delta import Dense
from tests.cli.conftest import write_rows


def test_an_adapter_of_a_smaller_rank_is_measured_beside_the_exact_one(cli: Callable[..., Any], delta: Path) -> None:
    options = ("export", "gptj", str(delta), "--format", "peft", "--rank", "1", "--cases", "edits.jsonl")
    result = cli(*options, "--out", "adapter", "--json")
    found = json.loads(result.stdout)
    assert all(loss["rank"] == 1 for loss in found["losses"].values())
    assert any(loss["error"] > 0 for loss in found["losses"].values())
    assert {"ES", "ES at rank 1"} <= found["scores"].keys()
    assert "at rank 1" in Path("adapter/README.md").read_text()
    shown = cli(*options, "--out", "adapter", "--force").stdout
    assert "AutoPeftModelForCausalLM.from_pretrained('adapter')" in shown
    base = str(Path("gptj").absolute())  # which the adapter does not repeat
    elsewhere = cli("export", base, str(delta), *options[3:], "--out", "adapter", "--force").stdout
    assert f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), 'adapter')" in elsewhere
    assert "lost" in shown


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("wrapper", ["qwen2_5_vl", "gemma3", "gemma4"])
def test_an_adapter_of_a_model_with_images_is_loaded_by_the_line_that_is_printed(
    cli: Callable[..., Any], here: Path, wrapper: str
) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForImageTextToText

    tiny_wrapper(wrapper).float().save_pretrained("images")
    tokenizer().save_pretrained("images")
    lm = retcon.load("images")
    name = lm.site(1, "down_proj").name
    lm.apply(lm.delta({name: [Dense(full=torch.ones(lm.shape_of(name)))]}))
    lm.applied[0].save("d.safetensors")
    line = cli("export", "images", "d.safetensors", "--format", "peft", "--out", "adapter").stdout.splitlines()[-1]
    task = json.loads(Path("adapter/adapter_config.json").read_text())["task_type"]
    if wrapper == "qwen2_5_vl":
        base = "AutoModelForImageTextToText.from_pretrained('images')"
        assert (line, task) == (f"load it with PeftModel.from_pretrained({base}, 'adapter')", None)
        model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("images"), "adapter")
    else:  # AutoModelForCausalLM reads these whole, too
        assert (line, task) == ("load it with AutoPeftModelForCausalLM.from_pretrained('adapter')", "CAUSAL_LM")
        model = AutoPeftModelForCausalLM.from_pretrained("adapter")
    ids = torch.tensor([[15, 16, 17, 18]])
    assert torch.allclose(model(input_ids=ids).logits, lm.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_calls_the_base_as_it_is_told(cli: Callable[..., Any], delta: Path) -> None:
    shown = cli("export", "gptj", str(delta), "--format", "peft", "--base-name", "me/base", "--out", "named").stdout
    assert "AutoPeftModelForCausalLM.from_pretrained('named')" in shown
    assert json.loads(Path("named/adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    assert "base_model: me/base" in Path("named/README.md").read_text()


def test_locality_is_agreement_with_the_unedited_model(cli: Callable[..., Any], here: Path) -> None:
    lm = retcon.load("gptj")
    site, g = lm.site(1, "down_proj"), torch.Generator().manual_seed(0)
    out, inner = site.weight.shape
    left, right = torch.randn(out, 2, generator=g), torch.randn(2, inner, generator=g)
    change = site.stored(left, right)  # so large that answers move
    delta = lm.delta({site.name: [change]})
    delta.save("large.safetensors")
    rows = [
        {
            "prompt": f"The capital of {land} is", "subject": land, "target_new": "Rome", "portability": {},
            "locality": {"Relation_Specificity": [{"prompt": f"The language of {land} is", "ground_truth": "Italian"}]},
        }
        for land in ("France", "Spain", "Norway", "Chile")
    ]  # fmt: skip
    write_rows(Path("knowedit.jsonl"), rows)
    options = ("export", "gptj", "large.safetensors", "--format", "peft", "--cases", "knowedit.jsonl", "--json")
    exact = json.loads(cli(*options, "--out", "exact").stdout)["scores"]
    cases, _ = retcon.read_cases("knowedit.jsonl")
    lines = retcon.evaluate(lm, cases, delta=delta).summary().lines
    wanted = {line.metric: 100 * line.post.value for line in lines[::-1] if line.post and line.post.value is not None}
    assert wanted["LS"] < 100
    assert exact == {name: wanted[name] for name in ("ES", "LS")}
    cut = json.loads(cli(*options, "--rank", "1", "--out", "cut").stdout)["scores"]
    assert exact.items() <= cut.items()
    assert cut["LS at rank 1"] < 100


def test_bad_input_is_one_error_and_nothing_written(cli: Callable[..., Any], delta: Path, here: Path) -> None:
    before = sorted(here.iterdir())
    for options, message in (
        (("--format", "peft", "--rank", "0"), "expected a whole number from 1"),
        (("--format", "hf", "--rank", "3"), "leave it out"),
        (("--push", "badname"), "'badname' is no repository of the hub; expected owner/name"),
        (("--push", "me/bad name"), "'me/bad name' is no repository of the hub"),
        (("--format", "gguf"), "not for gptj"),
        (("--max-shard-size", "lots"), "expected a number and KB, MB, GB or TB"),
        (("--max-shard-size", "0GB"), "expected a number and KB, MB, GB or TB"),
    ):
        assert message in cli("export", "gptj", str(delta), "--out", "made", *options, code=2).stderr
    assert sorted(here.iterdir()) == before


def test_what_needs_no_model_is_refused_before_one_is_loaded(cli: Callable[..., Any], delta: Path) -> None:
    for options in (
        ("--push", "badname"),
        ("--rank", "3"),
        ("--max-shard-size", "lots"),
        ("--format", "peft", "--rank", "0"),
    ):
        told = cli("export", "nowhere", str(delta), "--out", "made", "--cases", "edits.jsonl", *options, code=2).stderr
        assert "nowhere" not in told


def test_what_the_format_cannot_hold_is_refused_before_it_is_measured(
    cli: Callable[..., Any], delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retcon.evaluation.evaluate", lambda *_, **__: pytest.fail("measured"))
    lm = retcon.load("gptj")
    lm.delta({"transformer.ln_f.weight": [Dense(full=torch.ones(32))]}).save("norm.safetensors")
    for path, format, message in ((delta, "gguf", "not for gptj"), ("norm.safetensors", "peft", "no low-rank factors")):
        options = ("--format", format, "--cases", "edits.jsonl", "--out", "made")
        assert message in cli("export", "gptj", str(path), *options, code=2).stderr


def test_cases_are_asked_in_a_chat_where_that_is_said(cli: Callable[..., Any], delta: Path) -> None:
    told = cli("export", "gptj", str(delta), "--out", "made", "--cases", "edits.jsonl", "--chat", code=2).stderr
    assert "the tokenizer has no chat template" in told
    assert not Path("made").exists()


def test_an_option_without_what_it_is_about_is_refused(cli: Callable[..., Any], delta: Path) -> None:
    for options, needed in (
        (("--public",), "--push"),
        (("--type", "q8_0"), "--format gguf"),
        (("--type", "q8_0", "--format", "gguf-lora"), "--format gguf"),
        (("--max-shard-size", "1MB", "--format", "peft"), "--format hf"),
    ):
        told = cli("export", "nowhere", str(delta), "--out", "made", *options, code=2).stderr
        assert told == f"error: {options[0]} goes with {needed}; leave it out, or give that\n"
    for options in (("--cases-format", "nonsense"), ("--limit", "3"), ("--on-error", "skip"), ("--chat",)):
        told = cli("export", "nowhere", str(delta), "--out", "made", *options, code=2).stderr
        assert "(--start, --chat, ...) goes with --cases; leave it out" in told
