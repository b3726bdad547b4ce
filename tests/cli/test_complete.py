"""`retcon complete`."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import retcon
from retcon.chat import Chat
from retcon.delta import Delta
from retcon.lm.generate import Written
from retcon.lm.model import LM
from tests.cli.conftest import EDIT

PROMPT = "The capital of France is"


def test_says_what_the_model_says(cli: Callable[..., Any]) -> None:
    lm = retcon.load("gptj")
    assert cli("complete", "gptj", PROMPT).stdout == f"{PROMPT}{lm.complete(PROMPT)}\n"
    short = cli("complete", "gptj", PROMPT, "--max-tokens", "3").stdout
    assert short == f"{PROMPT}{lm.complete(PROMPT, max_new_tokens=3)}\n"


def test_a_prompt_longer_than_the_context_is_refused(cli: Callable[..., Any]) -> None:
    for n in (130, 2000):
        told = cli("complete", "gptj", "very " * n, code=2).stderr
        assert "the prompt 'very very" in told
        assert "reads 128 tokens at once" in told


def test_no_room_for_an_answer_is_refused_with_one_message(cli: Callable[..., Any], chatting: LM) -> None:
    """A prompt, a question and a conversation that fill the context to the last token."""
    room = chatting.context_length
    assert room is not None

    def filling(chat: retcon.Chat | None) -> str:
        text = "a"
        while len(chatting.encode(text, chat=chat).ids) < room:
            text += " a"
        return text

    asked, question = filling(None), filling(retcon.Chat())
    for told in (
        cli("complete", "chatty", asked, code=2),
        cli("complete", "chatty", question, "--chat", code=2),
        cli("chat", "chatty", stdin=f"{question}\n", code=2),
        cli("chat", "chatty", "--max-tokens", "1", stdin=f"{question[:-80]}\n{question}\n", code=2),
    ):
        assert "tokens; chatty reads 128 tokens at once, its answer included" in told.stderr
    assert json.loads(cli("complete", "chatty", question[:-2], "--chat", "--json").stdout)["cut"]


def test_who_types_a_turn_that_does_not_fit_goes_on(
    cli: Callable[..., Any], chatting: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = Typed("Who?\n" + "a " * 200 + "\n/reset\nWho?\n")
    monkeypatch.setattr("retcon.cli.chat.sys", SimpleNamespace(stdin=typed))
    monkeypatch.setattr("retcon.lm.generate.generate", lambda *_, **__: [Written("Ada.", 1, False)])
    told = cli("chat", "chatty").stdout
    assert told.count("Ada.") == 2
    assert "tokens; chatty reads 128 tokens at once" in told


def test_what_is_not_utf_8_is_refused(cli: Callable[..., Any], chatting: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python hands on an argument's bytes that are not UTF-8 as halves of surrogate pairs."""
    broken = b"caf\xe9 is".decode("utf-8", "surrogateescape")
    told = cli("complete", "nowhere", broken, code=2).stderr  # before a model is looked for
    assert told == "error: the prompt is not UTF-8 text (character 4); give it in UTF-8\n"
    assert "--stop is not UTF-8 text" in cli("complete", "nowhere", PROMPT, "--stop", broken, code=2).stderr
    for option in (("--system", broken), ("--template-arg", f"date={broken}"), ("--template-arg", f"{broken}=1")):
        for command in (("complete", "nowhere", PROMPT), ("chat", "nowhere")):
            assert "holds half a surrogate pair, which is no text" in cli(*command, *option, code=2).stderr
    answers = iter([Written("Ada.", 1, False)] * 3)
    monkeypatch.setattr("retcon.lm.generate.generate", lambda *_, **__: [next(answers)])
    for errors in ("strict", "surrogateescape"):
        piped = io.TextIOWrapper(io.BytesIO(b"Who?\ncaf\xe9\n"), "utf-8", errors)
        monkeypatch.setattr("retcon.cli.chat.sys", SimpleNamespace(stdin=piped))
        said = cli("chat", "chatty", code=2)
        assert "the turn is not UTF-8 text (character 4)" in said.stderr
        assert "Ada." in said.stdout  # the turn before it was answered

    class Typed(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    typed = Typed(io.BytesIO(b"caf\xe9\nWho?\n"), "utf-8")
    monkeypatch.setattr("retcon.cli.chat.sys", SimpleNamespace(stdin=typed))
    told = cli("chat", "chatty").stdout
    assert "the turn is not UTF-8 text" in told
    assert told.count("Ada.") == 1


def test_with_a_delta(cli: Callable[..., Any], delta: Path) -> None:
    lm = retcon.load("gptj")
    plain = lm.complete(PROMPT)
    lm.apply(Delta.load(delta))
    record = json.loads(cli("complete", "gptj", PROMPT, "--delta", str(delta), "--json").stdout)
    assert record["completion"] == lm.complete(PROMPT) != plain
    assert record["deltas"] == [Delta.load(delta).id]


def test_a_delta_given_twice_is_refused(cli: Callable[..., Any], delta: Path) -> None:
    told = cli("complete", "gptj", PROMPT, "--delta", str(delta), "--delta", str(delta), code=2).stderr
    assert told == f"error: {delta}: the delta {Delta.load(delta).id} is given twice; a model takes it once\n"


def test_nothing_of_transformers_spoils_the_output(cli: Callable[..., Any]) -> None:
    result = cli("complete", "gptj", PROMPT)
    assert result.stderr == ""
    assert result.stdout.startswith(PROMPT)


def test_markup_in_texts_is_text(cli: Callable[..., Any]) -> None:
    assert cli("complete", "gptj", "[red]I[/] [x").stdout.startswith("[red]I[/] [x")


def test_what_ends_an_answer_is_the_users(cli: Callable[..., Any]) -> None:
    lm = retcon.load("gptj")
    whole = lm.complete(PROMPT, max_new_tokens=12, stops=())
    told = cli("complete", "gptj", PROMPT, "--max-tokens", "12", "--stop", "").stdout
    assert told == f"{PROMPT}{whole}\n"
    stop = whole.strip()[2:4]
    told = cli("complete", "gptj", PROMPT, "--max-tokens", "12", "--stop", stop, "--stop", "\\n").stdout
    assert told == f"{PROMPT}{lm.complete(PROMPT, max_new_tokens=12, stops=(stop, chr(10)))}\n"


def test_drawn_text_follows_the_seed(cli: Callable[..., Any]) -> None:
    def drawn(seed: str) -> str:
        more = ("--temperature", "2", "--top-k", "40", "--top-p", "0.99", "--seed", seed, "--stop", "")
        text: str = cli("complete", "gptj", PROMPT, *more).stdout
        return text

    assert drawn("1") == drawn("1") != drawn("2")
    assert "temperature must be above 0" in cli("complete", "gptj", PROMPT, "--temperature", "0", code=2).stderr


def test_a_model_without_a_template_is_no_chat_model(cli: Callable[..., Any]) -> None:
    edit = ("edit", "gptj", "edits.jsonl", "--out", "delta.safetensors", "--method", "kn")
    without = "leave out --chat, the options that imply it and chat in the facts"
    for command, way_out in (
        (("complete", "gptj", "Who?", "--chat"), without),
        ((*edit, "--train-end"), without),
        (("chat", "gptj"), "ask with retcon complete\n"),
    ):
        told = cli(*command, code=2).stderr
        assert "the tokenizer has no chat template" in told
        assert way_out in told
    told = cli("complete", "gptj", "Who?", "--template-arg", "thinking", code=2).stderr
    assert "--template-arg thinking: expected NAME=VALUE" in told
    assert "--both compares with the unedited model" in cli("chat", "gptj", "--both", code=2).stderr


@pytest.fixture
def chatting(here: Path) -> LM:
    """The model in the folder `chatty`: that of the commands, with a chat template."""
    lm = retcon.load("gptj")
    tok = copy.deepcopy(lm.tokenizer)
    tok.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    lm.model.save_pretrained("chatty")
    tok.save_pretrained("chatty")
    return retcon.load("chatty")


def test_complete_puts_the_prompt_in_a_chat(cli: Callable[..., Any], chatting: LM) -> None:
    more = ("--system", "Be brief.", "--max-tokens", "4")
    record = json.loads(cli("complete", "chatty", "Who?", *more, "--json").stdout)
    chat = retcon.Chat("Be brief.")
    assert record["completion"] == chatting.complete("Who?", max_new_tokens=4, stops=(), chat=chat)
    assert record["completion"] == chatting.complete("Who?", max_new_tokens=4, stops=(), system="Be brief.")


def test_a_model_that_did_not_finish_its_reasoning_is_said_to(
    cli: Callable[..., Any], chatting: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    unended = Written("", 256, True, "<think>Was it")
    monkeypatch.setattr("retcon.lm.generate.generate", lambda *_, **__: [unended])
    for told in (cli("complete", "chatty", "Who?", "--chat"), cli("chat", "chatty", stdin="Who?\n")):
        assert "no answer within 256 tokens, all of them reasoning; give it room: --max-tokens N" in told.stderr


def test_edits_of_a_chat_can_end_the_turn(cli: Callable[..., Any], chatting: LM) -> None:
    cli("edit", "chatty", *EDIT[2:], "--system", "Be brief.", "--train-end")
    assert {edit.chat for edit in Delta.load("delta.safetensors").edits} == {Chat("Be brief.", train_end=True)}


def test_a_conversation_is_drawn_by_its_seed(cli: Callable[..., Any], chatting: LM) -> None:
    def drawn(*options: str) -> str:
        told = cli("chat", "chatty", "--max-tokens", "6", "--stop", "", "--temperature", "3", *options, stdin="Who?\n")
        return str(told.stdout)

    assert drawn("--seed", "1") == drawn("--seed", "1") != drawn("--seed", "2")
    assert drawn("--seed", "1", "--top-k", "1") == drawn("--seed", "2", "--top-p", "1e-6")


def test_a_conversation_remembers_its_turns(
    cli: Callable[..., Any], chatting: LM, delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = "Who?\n\nWhere?\n/reset\nWho?\n/quit\nnever\n"
    told = cli("chat", "chatty", "--max-tokens", "3", "--delta", str(delta), "--both", stdin=typed).stdout
    assert told.count("before") == 3
    seen: list[str] = []
    monkeypatch.setattr(
        "retcon.lm.generate.generate",
        lambda lm, rows, how, **_: seen.append(lm.tokenizer.decode(rows[0].ids)) or [Written("Ada.", 1, False)],
    )
    assert cli("chat", "chatty", stdin="Who?\nWhere?\n/reset\nWho?\n").stdout == "Ada.\n" * 3
    assert seen[0] == seen[2] == "user: Who?</s>assistant:"
    assert seen[1] == "user: Who?</s>assistant: Ada.</s>user: Where?</s>assistant:"
