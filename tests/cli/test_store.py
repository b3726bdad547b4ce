"""The verbs of a store: init, edit --store, log, show, diff, revert, amend, checkout, gc."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import retcon
from tests.cli.conftest import write_rows

Cli = Callable[..., Any]
EDIT = (
    "edit",
    "gptj",
    "edits.jsonl",
    "--store",
    ".retcon",
    "--corpus",
    "corpus.txt",
    "--set",
    "steps=3",
    "--set",
    "low=[0, 1]",
    "--set",
    "joint_optimisation=true",  # a high value that was searched on what Step 2 wrote is searched again with it
)


@pytest.fixture
def store(cli: Cli, here: Path) -> Path:
    cli("init", "gptj")
    cli(*EDIT)
    return Path(".retcon")


def log(cli: Cli) -> list[dict[str, Any]]:
    return json.loads(cli("log", "--json").stdout)["entries"]


def test_a_day_with_a_store(cli: Cli, store: Path, here: Path) -> None:
    (entry,) = log(cli)
    assert (entry["action"], entry["about"]["facts"]) == ("edit", 2)
    assert "2 facts in force in 1 delta" in cli("log").stdout
    assert "Danielle Darrieux" in cli("show", "HEAD").stdout
    assert "The capital of France is Rome" in cli("show", "fr").stdout

    assert "0 values searched" in cli("revert", "--fact", "fr").stdout
    assert "(reverted)" in cli("show", "fr").stdout
    went = json.loads(cli("diff", entry["id"], "--json").stdout)["went"]
    assert [fact["id"] for fact in went] == ["fr"]
    assert cli("diff", entry["id"]).stdout.startswith("- fr  The capital of France is Rome")

    assert "1 value searched" in cli("amend", "dd", "--target", "Greek").stdout
    assert "~ dd" in cli("diff", "HEAD~1").stdout
    cli("checkout", entry["id"], "--save", "was")
    assert (here / "was" / "model.safetensors").is_file()

    cli("revert", "HEAD")
    cli("revert", "HEAD~2")
    assert [e["action"] for e in log(cli)] == ["revert", "revert", "amend", "revert", "edit"]
    assert log(cli)[0]["state"] == entry["state"]
    assert cli("gc").stdout == "nothing to remove\n"
    assert "removed 4 files" in cli("gc", "--before", "HEAD").stdout


def test_a_store_stands_for_its_deltas(cli: Cli, store: Path) -> None:
    asked = ("complete", "gptj", "The capital of France is", "--max-tokens", "3", "--json", "--delta")
    assert json.loads(cli(*asked, ".retcon").stdout) != json.loads(cli(*asked, ".retcon@base").stdout)
    cli("apply", "gptj", ".retcon@HEAD", "--save", "edited")
    assert "no entry 'nope'" in cli(*asked, ".retcon@nope", code=2).stderr


def test_verify_writes_its_files_and_its_exit_code(cli: Cli, store: Path, here: Path) -> None:
    files = ("--junit", "verify.xml", "--markdown", "verify.md", "--html", "verify.html")
    result = cli("verify", *files, "--json", code=1)  # a random model learns nothing in three steps
    found = json.loads(result.stdout)
    assert {check["since"] for check in found["failed"]} == {None}
    assert (here / "verify.xml").read_text().count("<failure") == len(found["failed"])
    assert "never passed" in (here / "verify.md").read_text()
    assert "The capital of France is" in (here / "verify.html").read_text()
    assert "never passed" in cli("verify", code=1).stdout
    assert "nothing to verify" in cli("verify", "base", code=2).stderr


def test_what_must_stay_is_a_file_of_what_the_base_says(cli: Cli, here: Path) -> None:
    cli("init", "gptj")
    prompts = [f"Numbers like {n}" for n in range(40)]
    words = retcon.load("gptj").generate(prompts, max_new_tokens=1)
    prompt, said = next(pair for pair in zip(prompts, words, strict=True) if re.fullmatch(r" \w+", pair[1]))
    for name, answer in (("stays", said.strip()), ("never", "Rome")):
        write_rows(here / f"{name}.jsonl", [{"prompt": prompt, "subject": None, "target_new": answer}])
    assert "Nothing broke" in cli("verify", "base", "--stay", "stays.jsonl", "--strict").stdout
    assert json.loads(cli("verify", "--stay", "never.jsonl", "--json").stdout)["counts"]["stays"]["never"] == 1
    strict = json.loads(cli("verify", "--stay", "never.jsonl", "--strict", "--json", code=1).stdout)
    assert [(check["kind"], check["outcome"]) for check in strict["failed"]] == [("stays", "never")]
    assert "has never passed" in cli("verify", "--stay", "never.jsonl", "--strict", "--bisect", code=1).stdout
    unsought = cli("verify", "--stay", "never.jsonl", "--no-bisect", code=1).stdout
    assert "the entry that broke it was not searched for" in unsought


def test_the_file_of_what_must_stay_is_read_as_others_are(cli: Cli, here: Path) -> None:
    cli("init", "gptj")
    fact = {"prompt": "Numbers like 1", "subject": None, "target_new": "Rome"}
    write_rows(here / "stays.jsonl", [fact, {**fact, "prompt": "Numbers like 2"}, {**fact, "target_new": ""}])
    read = ("verify", "--stay", "stays.jsonl", "--json")
    assert "row 3: the answer to write is empty" in cli(*read, code=2).stderr
    for options, n in ((("--on-error", "skip"), 2), (("--start", "1", "--limit", "1"), 1)):
        assert json.loads(cli(*read, *options).stdout)["counts"]["stays"]["never"] == n
    assert "--start, --chat, ...) goes with --stay" in cli("verify", "--limit", "1", code=2).stderr


def test_a_store_of_half_precision_for_git_lfs(cli: Cli, here: Path) -> None:
    made = json.loads(cli("init", "gptj", "--precision", "float16", "--lfs", "--json").stdout)
    assert (made["store"], made["precision"]) == (".retcon", "float16")
    assert "deltas/*.safetensors filter=lfs" in (here / ".retcon/.gitattributes").read_text()
    cli(*EDIT, "-m", "two  facts")
    assert log(cli)[0]["message"] == "two facts"
    (delta,) = (here / ".retcon/deltas").iterdir()
    changes = {name: t for name, t in load_file(delta).items() if t.is_floating_point() and "change" in name}
    assert changes
    assert {t.dtype for t in changes.values()} == {torch.float16}
    removed = json.loads(cli("gc", "--values", "--json").stdout)
    assert removed["removed"] == [f"values/{delta.name}"]
    assert removed["bytes"] > 0
    taken = cli("revert", "--fact", "fr", "-m", "no longer so")
    assert "1 value searched" in taken.stdout
    assert "no values in the store" in taken.stderr
    assert log(cli)[0]["message"] == "no longer so"


def test_later_deltas_are_proposed_again_where_asked(cli: Cli, store: Path, here: Path) -> None:
    write_rows(here / "edits.jsonl", [{"prompt": "The capital of {} is", "subject": "Italy", "target_new": "Paris"}])
    cli(*EDIT)
    later = next(iter(log(cli)[0]["sets"]))
    assert "1 value searched" in cli("amend", "dd", "--target", "Greek", "-m", "why").stdout
    assert log(cli)[0]["about"]["on_top"] == [later]
    cli("revert", "--fact", "fr", "--repropose")
    assert log(cli)[0]["about"]["proposed_again"] == [later]


def test_a_model_that_has_moved_is_named_anew(cli: Cli, store: Path, here: Path) -> None:
    (here / "gptj").rename(here / "moved")
    for command in (("verify",), ("revert", "--fact", "fr"), ("ui", "--port", "0")):
        assert ".retcon is of that model: if it has moved, name its place" in cli(*command, code=2).stderr
    cli("revert", "--fact", "fr", "--model", "moved")


def test_bad_input_changes_nothing(cli: Cli, store: Path, here: Path) -> None:
    before = (store / "log.jsonl").read_text()
    assert "fact 'fr' is in force already" in cli(*EDIT, code=2).stderr
    assert "no entry 'nope'" in cli("revert", "nope", code=2).stderr
    assert "no fact 'nope'" in (said := cli("show", "nope", code=2).stderr)
    assert "no entry 'nope'" in said
    assert "no fact 'nope'" in cli("amend", "nope", "--target", "x", code=2).stderr
    assert "name an entry to revert, or one fact" in cli("revert", code=2).stderr
    assert "load the model the store was made for" in cli("revert", "--fact", "fr", "--model", "llama", code=2).stderr
    assert "a store already" in cli("init", "gptj", code=2).stderr
    assert "holds no store" in cli("log", "--store", "elsewhere", code=2).stderr
    assert "--store and --out" in cli(*EDIT, "--out", "x.safetensors", code=2).stderr
    assert "with --store, measure with `retcon verify`" in cli(*EDIT, "--evaluate", code=2).stderr
    assert (
        "-m is the message of a store's log"
        in cli("edit", "gptj", "edits.jsonl", "--out", "x", "-m", "why", code=2).stderr
    )
    assert "is in force already" in cli("edit", "nowhere", *EDIT[2:], code=2).stderr  # before the model is loaded
    write_rows(here / "edits.jsonl", [{"prompt": "The capital of {} is", "subject": "France", "target_new": "Milan"}])
    assert "retcon amend fr" in cli(*EDIT, code=2).stderr
    delta = next((store / "deltas").iterdir())
    delta.rename(here / "away")
    asked = ("complete", "gptj", "The capital of France is", "--delta", ".retcon")
    for command in (asked, ("checkout", "HEAD", "--save", "now"), ("revert", "--fact", "fr"), ("verify",)):
        assert "not committed to git, or not fetched" in cli(*command, code=2).stderr
    assert not (here / "now").exists()
    (here / "away").rename(delta)
    facts = next((store / "facts").iterdir())
    facts.write_text("<<<<<<< ours\n" + facts.read_text())
    assert "marks of a merge" in cli("diff", "base", code=2).stderr
    assert (store / "log.jsonl").read_text() == before
    (store / "log.jsonl").write_text("<<<<<<< ours\n" + before)
    assert "marks of a merge" in cli("log", code=2).stderr
