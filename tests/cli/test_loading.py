"""The options of how a model is loaded, which every verb that loads one has."""

import inspect
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import retcon
from retcon.cli import app
from retcon.cli.chat_options import chat_of, chat_options
from retcon.cli.facts import reads_facts
from retcon.cli.models import loading_options, loads_a_model
from retcon.lm.load import load
from retcon.workflow.facts import Reading
from tests.lm.test_load import write_gguf

PROMPT = "The capital of France is"
OPTIONS = ("--device", "--dtype", "--revision", "--device-map", "--packed", "--trust-remote-code", "--verify-base")
LOADING = (
    "amend", "apply", "audit", "chat", "check", "checkout", "complete", "doctor", "edit", "export", "fit", "init",
    "moments", "revert", "tune", "ui", "verify",
    "probe contrast", "probe trace", "probe layers", "probe attribution", "probe paths",
)  # fmt: skip


@pytest.mark.parametrize("verb", LOADING)
def test_every_verb_that_loads_a_model_has_them(verb: str) -> None:
    import typer

    command: Any = typer.main.get_command(app)
    for name in verb.split():
        command = command.commands[name]
    found = {option for parameter in command.params for option in parameter.opts}
    assert set(OPTIONS) <= found
    assert command.help


def test_they_reach_the_loader(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def watch(name: str, **options: Any) -> Any:
        seen.append(options)
        return load(name)

    monkeypatch.setattr(retcon, "load", watch)
    cli(
        "complete",
        "gptj",
        PROMPT,
        "--revision",
        "main",
        "--device-map",
        '{"": "cpu"}',
        "--trust-remote-code",
        "--verify-base",
    )
    asked = {"revision": "main", "device_map": {"": "cpu"}, "trust_remote_code": True, "verify_base": True}
    assert asked.items() <= seen[-1].items()
    cli("complete", "gptj", PROMPT)  # and are gone with the command
    asked = {"revision": None, "device_map": None, "trust_remote_code": False, "verify_base": False}
    assert asked.items() <= seen[-1].items()


def test_a_gguf_file_by_its_path(cli: Callable[..., Any], here: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    write_gguf(here / "tiny.gguf")
    for path in ("./tiny.gguf", str(here / "tiny.gguf")):
        cli("complete", path, PROMPT, "--max-tokens", "1")
    assert "cannot load './none.gguf': no such dir" in cli("complete", "./none.gguf", PROMPT, code=2).stderr


def test_a_command_that_is_suggested_repeats_them() -> None:
    heard: list[str] = []

    def verb() -> None:
        heard.append(loading_options())

    asked: Any = loads_a_model(verb)
    asked()
    asked(revision="my branch", device_map='{"": "cpu"}', packed=True, trust_remote_code=True)
    assert heard == ["", """ --revision 'my branch' --device-map '{"": "cpu"}' --packed --trust-remote-code"""]


def test_a_suggested_command_asks_in_the_chat_of_the_edits() -> None:
    plain = retcon.Edit("Who made {}?", "Norr", "Ida")
    briefly = replace(plain, chat=retcon.Chat("It's all.", (("think", False), ("tone", "kind"))))
    assert chat_options([plain]) == chat_options([plain, briefly]) == ""
    assert chat_options([replace(plain, chat=True)] * 2) == " --chat"  # type: ignore[type-var]
    options = shlex.split(chat_options([briefly]))
    assert options == ["--system", "It's all.", "--template-arg", "think=false", "--template-arg", 'tone="kind"']
    assert chat_of(False, options[1], options[3::2]) == briefly.chat


def test_a_verb_that_trains_facts_hears_that_ends_are_trained_and_no_other_offers_it() -> None:
    heard: list[Any] = []

    @reads_facts("FILE", trains=True)
    def verb(reading: Reading) -> None:
        heard.append(reading.chat)

    read: Any = verb
    rest: dict[str, Any] = dict.fromkeys(("file_format", "system", "template_args", "limit"))
    rest |= dict(on_error="stop", case_target="new", conflicts="drop", start=0)
    read(as_chat=False, train_end=True, **rest)
    read(as_chat=True, train_end=False, **rest)
    assert heard == [retcon.Chat(train_end=True), retcon.Chat()]
    assert "train_end" in inspect.signature(verb).parameters
    assert "train_end" not in inspect.signature(reads_facts("FILE")(read.__wrapped__)).parameters
    assert chat_options([retcon.Edit("Who made {}?", "Norr", "Ida", chat=heard[0])]) == " --chat"


def test_code_of_others_is_run_only_when_asked_for_and_that_is_said(cli: Callable[..., Any]) -> None:
    assert cli("complete", "gptj", PROMPT).stderr == ""
    said = cli("complete", "gptj", PROMPT, "--trust-remote-code").stderr
    assert said == (
        "warning: --trust-remote-code: code that comes with gptj, if there is any, is run with your rights\n"
    )


def test_a_model_is_placed_by_a_map(cli: Callable[..., Any]) -> None:
    plain = cli("complete", "gptj", PROMPT).stdout
    assert cli("complete", "gptj", PROMPT, "--device-map", "auto").stdout == plain
    assert cli("complete", "gptj", PROMPT, "--device-map", '{"": "cpu"}').stdout == plain


def test_maps_that_cannot_be_meant(cli: Callable[..., Any], here: Path) -> None:
    both = cli("complete", "gptj", PROMPT, "--device", "cpu", "--device-map", "auto", code=2)
    assert "both say where the model goes" in both.stderr
    assert "is no JSON object" in cli("complete", "gptj", PROMPT, "--device-map", "{", code=2).stderr
    assert "cannot load 'gptj'" in cli("complete", "gptj", PROMPT, "--device-map", "everywhere", code=2).stderr
