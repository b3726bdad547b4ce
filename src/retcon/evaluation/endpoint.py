"""A model behind an OpenAI-compatible endpoint: it writes text, and nothing else can be asked of it.

Requests go to the one address that is given: no proxy, no redirect. A key is read from RETCON_API_KEY where it is set.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from retcon.arguments import list_of_texts
from retcon.chat import Chat, without_reasoning
from retcon.errors import EndpointFailed, InvalidSetting
from retcon.work import silent

KEY = "RETCON_API_KEY"
"""Environment variable with the endpoint's key."""
MAX_TIMEOUT = 86_400
"""Seconds that an answer is waited for at most: a day."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A served model.

    Raises:
        InvalidSetting: the address is not one of http or https, or nobody would wait that long.
    """

    url: str
    """Address of the server, with or without /v1."""
    model: str
    """Name of the model there."""
    timeout: float = 60.0
    """Seconds to wait for an answer."""

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise InvalidSetting(f"{self.url}: expected an address such as http://localhost:8000")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise InvalidSetting(f"timeout {self.timeout:g}: expected seconds above 0, and {MAX_TIMEOUT:,} at most")

    @property
    def base(self) -> str:
        """The address up to /v1."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"

    def check(self) -> None:
        """Refuse a name that the server does not have, where it lists its models.

        A folder is asked for in any case: `transformers serve` loads it, and lists the hub's cache alone.

        Raises:
            EndpointFailed: the server cannot be reached, or serves other models.
            InvalidSetting: what the environment has as the key cannot be one.
        """
        try:
            listed = self._ask("models", None)
        except EndpointFailed as error:
            if error.status in (404, 405, 500, 501):  # a server need not list its models
                return
            raise
        data = listed.get("data")
        known = data if isinstance(data, list) else []
        names = [str(each["id"]) for each in known if isinstance(each, dict) and "id" in each]
        if names and self.model not in names and not Path(self.model).is_dir():
            raise EndpointFailed(f"{self.url} serves no model {self.model!r}; it serves {', '.join(sorted(names)[:8])}")

    def write(
        self,
        prompts: Sequence[str],
        chats: Sequence[Chat | None],
        *,
        max_tokens: int = 32,
        stops: Sequence[str] = ("\n",),
        on_progress: Callable[[int, int], None] = silent,
    ) -> list[str]:
        """Return the model's greedy text after each prompt; in a chat, its answer to the prompt, reasoning left out.

        Raises:
            EndpointFailed: the server does not answer, refuses, or answers something else; nothing is asked again.
            InvalidSetting: what the environment has as the key cannot be one.
        """
        texts, stops = [], list_of_texts(stops, "stops")
        for prompt, chat in zip(prompts, chats, strict=True):
            texts.append(self._write(prompt, chat, max_tokens, stops))
            on_progress(len(texts), len(prompts))
        return texts

    def _write(self, prompt: str, chat: Chat | None, max_tokens: int, stops: Sequence[str]) -> str:
        asked: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": 0, "stream": False}
        if chat is None:
            found = self._ask("completions", asked | {"prompt": prompt, "stop": list(stops)})
        else:
            more = {"chat_template_kwargs": chat.arguments} if chat.arguments else {}
            found = self._ask("chat/completions", asked | {"messages": chat.turns([prompt])} | more)
        text: Any = found
        with suppress(KeyError, IndexError, TypeError):
            choice = found["choices"][0]
            text = choice["text"] if chat is None else choice["message"]["content"]
        if not isinstance(text, str | None):
            raise EndpointFailed(f"{self.url} answered something else than a completion: {found!r:.120}")
        return text or "" if chat is None else without_reasoning(text or "")

    def _ask(self, path: str, record: Mapping[str, Any] | None) -> dict[str, Any]:
        address = f"{self.base}/{path}"
        headers = {"Content-Type": "application/json"}
        if key := _key():
            headers["Authorization"] = f"Bearer {key}"
        body = None if record is None else json.dumps(record).encode()
        request = urllib.request.Request(address, body, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        try:
            with opener.open(request, timeout=self.timeout) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise EndpointFailed(_refused(address, self.model, error), status=error.code) from None
        except (TimeoutError, urllib.error.URLError) as error:
            if isinstance(error, TimeoutError) or isinstance(error.reason, TimeoutError):
                waited = f"{address} gave no answer within {self.timeout:g} s; give it a longer timeout"
                raise EndpointFailed(waited) from None
            raise EndpointFailed(f"{address} cannot be reached ({error.reason}); is the server running?") from None
        except (OSError, HTTPException) as error:
            raise EndpointFailed(f"{address} gave no answer in HTTP ({type(error).__name__}: {error})") from None
        except (RecursionError, ValueError) as error:
            raise EndpointFailed(f"{address} gave no JSON ({type(error).__name__}: {error})") from None
        if not isinstance(found, dict):
            raise EndpointFailed(f"{address} answered something else than an object: {found!r:.120}")
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What is asked goes to the address that was given and nowhere else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _is_address(url: str) -> bool:
    """Return whether a request can be sent there: http or https, a host, and nothing that HTTP cannot spell."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:  # a port that is no number, a bracket that is not closed, a host that is no name
        return False
    spelt = _is_one_word(url) and (parts.path + parts.query).isascii()
    return spelt and parts.scheme in ("http", "https") and bool(host) and port != 0


def _key() -> str:
    """Return the key of the environment without the whitespace around it, "" for none.

    Raises:
        InvalidSetting: it cannot be sent in a header. The message does not show it.
    """
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not _is_one_word(key):
        raise InvalidSetting(f"{KEY} holds no key: a key is one word of ASCII, without line breaks or spaces inside")
    return key


def _is_one_word(text: str) -> bool:
    return text.isprintable() and " " not in text


def _refused(address: str, model: str, error: urllib.error.HTTPError) -> str:
    """Return what an HTTP status means, and what to do."""
    try:
        detail = " ".join(error.read(400).decode("utf-8", "replace").split())
    except (OSError, HTTPException):
        detail = ""
    said = f" ({detail[:200]})" if detail else ""
    meaning = {
        401: f"wants a key; put it into the environment variable {KEY}",
        403: f"refuses the key in {KEY}",
        404: f"knows no such address or no model {model!r}; a server without /completions may take a chat",
        429: "has had too many requests; wait, or ask for fewer cases",
    }.get(error.code, "cannot answer" if error.code >= 500 else "refuses the request")
    if error.code in (301, 302, 303, 307, 308):
        meaning = "sends elsewhere, which is not followed; give the final address"
    return f"{address} {meaning}: HTTP {error.code}{said}"
