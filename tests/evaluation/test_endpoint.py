"""A served model, asked over loopback: what is sent, what is judged, and what every failure says."""

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from retcon.chat import Chat
from retcon.edits import Case, Edit, Query, in_chat
from retcon.errors import EndpointFailed, InvalidSetting
from retcon.evaluation.endpoint import Endpoint
from retcon.evaluation.safety import Thresholds, check_endpoint

Answer = Callable[[str, dict[str, Any] | None], tuple[int, Any]]


@contextmanager
def server(answer: Answer, headers: dict[str, str] | None = None) -> Iterator[tuple[str, list[tuple[str, Any, Any]]]]:
    """An address, and what was asked there: (path, object, authorization)."""
    asked: list[tuple[str, Any, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            record = json.loads(self.rfile.read(length)) if length else None
            asked.append((self.path, record, self.headers.get("Authorization")))
            code, found = answer(self.path, record)
            body = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
    finally:
        running.shutdown()
        running.server_close()


def says(text: str) -> Answer:
    def answer(path: str, record: dict[str, Any] | None) -> tuple[int, Any]:
        if path.endswith("/models"):
            return 200, {"data": [{"id": "edited"}]}
        message = {"role": "assistant", "content": text}
        return 200, {"choices": [{"message": message} if "chat" in path else {"text": text}]}

    return answer


def cases(n: int = 20) -> list[Case]:
    made = []
    for i in range(n):
        edit = Edit("The capital of {} is", f"Land {i}", "Rome", "Paris", id=str(i))
        queries = (
            Query("rewrite/0", "rewrite", edit.text, "Rome", "Paris", (("Rome",),)),
            Query("neighborhood/0", "neighborhood", "The Louvre is in", "Paris", "Rome"),
        )
        made.append(Case(str(i), (edit,), queries))
    return made


def test_text_is_asked_for_and_judged_by_how_it_begins() -> None:
    with server(says(" Rome, of course")) as (url, asked):
        verdict = check_endpoint(Endpoint(url=url, model="edited"), cases())
    assert {a.part: a.outcome for a in verdict.answers} == {
        "took": "passed", "generalised": "passed", "local": "unmeasurable", "language": "unmeasurable",
    }  # fmt: skip
    assert verdict.safe
    assert verdict["took"].n == 20
    assert "begins with the answer" in verdict["took"].words
    assert verdict["local"].words.endswith("not measurable there, an endpoint gives text only")
    path, record, key = asked[1]
    assert (path, key) == ("/v1/completions", None)
    assert record == {
        "model": "edited", "max_tokens": 32, "temperature": 0, "stream": False,
        "prompt": "The capital of Land 0 is", "stop": ["\n"],
    }  # fmt: skip
    assert len(asked) == 1 + 20 + 40  # models, prompts, paraphrases that were made


def test_a_served_model_is_asked_as_another_speaker_does() -> None:
    asking = [
        replace(c, queries=(*c.queries, Query("p/0", "paraphrase.persona", "Yo, the capital is", "Rome")))
        for c in cases(3)
    ]
    with server(says(" Rome")) as (url, asked):
        verdict = check_endpoint(Endpoint(url=url, model="edited"), asking)
    assert (verdict["generalised"].value, verdict["generalised"].n) == (1, 3)
    assert len(asked) == 1 + 2 * 3


def test_an_answer_after_a_newline_of_the_facts_own_is_heard() -> None:
    def answer(path: str, record: dict[str, Any] | None) -> tuple[int, Any]:
        stops = (record or {}).get("stop", [])
        return says("" if "\n" in stops else "\nRome\nParis")(path, record)  # a server cuts its text at a stop

    asking = [
        replace(c, edits=(replace(c.edits[0], separator="\n"),), queries=(replace(c.queries[0], separator="\n"),))
        for c in cases(2)
    ]
    with server(answer) as (url, _):
        verdict = check_endpoint(Endpoint(url=url, model="edited"), asking)
    assert verdict["took"].value == verdict["generalised"].value == 1


def test_what_falls_short_is_shown() -> None:
    with server(says(" Paris")) as (url, _):
        verdict = check_endpoint(Endpoint(url=url, model="edited"), cases(3), thresholds=Thresholds(generalised=0))
    assert (verdict["took"].outcome, verdict["took"].value, verdict.safe) == ("failed", 0, False)
    assert verdict["took"].worst[0].after == "Paris"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>Paris?\nNo.</think>\n\nRome.", "\n\nRome."),
        ("Paris?</think>Rome.", "Rome."),  # the template has opened it
        ("<think>Paris, or", ""),
        ("Rome, I <think> so", "Rome, I <think> so"),
    ],
)
def test_the_reasoning_part_is_taken_off_a_chats_answer(said: str, answer: str) -> None:
    with server(says(said)) as (url, _):
        served = Endpoint(url=url, model="edited")
        assert served.write(["Who?"], [Chat()]) == [answer]
        assert served.write(["Who?"], [None]) == [said]


def test_a_chat_is_asked_as_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_API_KEY", "s3cret")
    asking = in_chat(cases(2), Chat("Be brief.", (("enable_thinking", False),)))
    with server(says("Rome")) as (url, asked):
        check_endpoint(Endpoint(url=f"{url}/v1/", model="edited"), asking)
    path, record, key = asked[1]
    assert (path, key) == ("/v1/chat/completions", "Bearer s3cret")
    assert record["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The capital of Land 0 is"},
    ]
    assert record["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("code", "found", "message"),
    [
        (401, {"error": "no key"}, r"wants a key; put it into the environment variable RETCON_API_KEY: HTTP 401"),
        (403, {}, "refuses the key in RETCON_API_KEY: HTTP 403"),
        (429, {"error": "slow down"}, r"too many requests; wait, or ask for fewer cases.*HTTP 429.*slow down"),
        (404, {}, "knows no such address or no model 'edited'.*may take a chat: HTTP 404"),
        (500, b"<html>", "cannot answer: HTTP 500"),
        (200, b"<html>", "gave no JSON"),
        (200, [], "answered something else than an object"),
        (200, {"choices": []}, "answered something else than a completion"),
        (
            200,
            {"choices": [{"text": [{"type": "text", "text": " Rome"}]}]},
            "answered something else than a completion",
        ),
        (200, {"choices": [{"text": 5}]}, "answered something else than a completion"),
        (200, b"[" * 100_000, "gave no JSON"),
    ],
)
def test_a_failure_is_one_clear_error(code: int, found: Any, message: str) -> None:
    def answer(path: str, record: Any) -> tuple[int, Any]:
        return (200, {"data": []}) if path.endswith("/models") else (code, found)

    with server(answer) as (url, asked):
        with pytest.raises(EndpointFailed, match=message):
            check_endpoint(Endpoint(url=url, model="edited"), cases(3))
        assert len(asked) == 2  # nothing is asked again


def test_a_wrong_name_is_told_with_the_right_ones() -> None:
    with server(says("Rome")) as (url, asked):
        with pytest.raises(EndpointFailed, match="serves no model 'edit'; it serves edited"):
            check_endpoint(Endpoint(url=url, model="edit"), cases(1))
        assert len(asked) == 1


def test_a_server_need_not_list_its_models_nor_a_folder_that_it_loads(tmp_path: Path) -> None:
    def answer(path: str, record: dict[str, Any] | None) -> tuple[int, Any]:
        return (500, b"broken") if path.endswith("/models") else says("Rome")(path, record)

    for serving in (answer, says("Rome")):
        with server(serving) as (url, _):
            verdict = check_endpoint(Endpoint(url=url, model=str(tmp_path)), cases(1))
            assert verdict["took"].value == 1


@pytest.mark.parametrize("listed", [5, True, "edited", {"id": "edited"}, [5, None], None])
def test_a_list_of_models_that_is_none_is_passed_over(listed: Any) -> None:
    def answer(path: str, record: dict[str, Any] | None) -> tuple[int, Any]:
        return (200, {"data": listed}) if path.endswith("/models") else says("Rome")(path, record)

    with server(answer) as (url, _):
        assert check_endpoint(Endpoint(url=url, model="edited"), cases(1))["took"].value == 1


def test_answers_that_hold_no_text_are_counted() -> None:
    with server(says("<think>Paris, or")) as (url, _):
        verdict = check_endpoint(Endpoint(url=url, model="edited"), in_chat(cases(2), Chat()), max_tokens=8)
    assert verdict["took"].value == 0
    assert verdict.notes[-1] == "6 answers without text; a model that is still reasoning after 8 tokens gives none"


def test_a_refusal_that_quotes_another_status_is_a_refusal() -> None:
    with server(lambda path, record: (403, {"detail": "upstream said HTTP 404"})) as (url, asked):
        with pytest.raises(EndpointFailed, match="refuses the key"):
            check_endpoint(Endpoint(url=url, model="edited"), cases(1))
        assert len(asked) == 1


def test_a_server_that_is_slow_or_not_there() -> None:
    def slow(path: str, record: Any) -> tuple[int, Any]:
        time.sleep(0.5)
        return 200, {}

    with (
        server(slow) as (url, _),
        pytest.raises(EndpointFailed, match=r"gave no answer within 0.1 s; give it a longer timeout"),
    ):
        check_endpoint(Endpoint(url=url, model="edited", timeout=0.1), cases(1))
    with pytest.raises(EndpointFailed, match=r"cannot be reached .*is the server running"):
        check_endpoint(Endpoint(url="http://127.0.0.1:9", model="edited", timeout=5.0), cases(1))
    with pytest.raises(InvalidSetting, match="expected an address such as http://localhost:8000"):
        Endpoint(url="localhost:8000", model="edited")


def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(says("Rome")) as (url, asked):
        monkeypatch.setenv("RETCON_API_KEY", " sk-SECRET123\r\n")  # as a shell reads it from a file
        check_endpoint(Endpoint(url=url, model="edited"), cases(1))
        assert {key for _, _, key in asked} == {"Bearer sk-SECRET123"}
        monkeypatch.setenv("RETCON_API_KEY", " \n")
        check_endpoint(Endpoint(url=url, model="edited"), cases(1))
        assert asked[-1][2] is None
        n = len(asked)
        for key in ("sk-SECRET\n123", "sk-SECRET 123", "sk-SECRÉT123", "sk-SECRET\u2026", "sk-SECRET\x7f"):
            monkeypatch.setenv("RETCON_API_KEY", key)
            with pytest.raises(InvalidSetting, match="RETCON_API_KEY holds no key") as caught:
                check_endpoint(Endpoint(url=url, model="edited"), cases(1))
            assert "SECR" not in str(caught.value)
        assert len(asked) == n


@pytest.mark.parametrize(
    "url", ["http://local host:8000", "http://localhost:abc", "http://", "http://[::1", "http://localhost:99999",
            "http://a\nb:8000", "http://cafe:80/caf\u00e9", "http://a..b"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting, match=r"expected an address such as http://localhost:8000"):
        Endpoint(url=url, model="edited")


@pytest.mark.parametrize("timeout", [0.0, math.nan, math.inf, 1e12])
def test_a_timeout_that_cannot_be_is_refused(timeout: float) -> None:
    with pytest.raises(InvalidSetting, match=f"timeout {timeout:g}".replace("+", r"\+")):
        Endpoint(url="http://127.0.0.1:9", model="edited", timeout=timeout)


@pytest.mark.parametrize(
    "reply",
    [
        b"hello\r\n\r\n",  # no status line
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",  # cut short
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 500 Broken\r\nContent-Length: 100\r\n\r\n{}",
        b"",
    ],
)
def test_an_answer_that_is_no_http_is_one_clear_error(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # a socket that is closed with something unread is reset
                    pass

        threading.Thread(target=serve, daemon=True).start()
        served = Endpoint(url=f"http://127.0.0.1:{listening.getsockname()[1]}", model="edited", timeout=5.0)
        with pytest.raises(EndpointFailed, match=r"/v1/completions (gave no answer in HTTP|cannot answer: HTTP 500)"):
            served.write(["Who?"], [None])


def test_nothing_is_sent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(says("Rome")) as (elsewhere, there):
        monkeypatch.setenv("http_proxy", elsewhere)
        moved = {"Location": f"{elsewhere}/v1/completions"}
        with (
            server(lambda path, record: (307, {}), moved) as (url, _),
            pytest.raises(EndpointFailed, match="sends elsewhere, which is not followed"),
        ):
            check_endpoint(Endpoint(url=url, model="edited"), cases(1))
        assert there == []
