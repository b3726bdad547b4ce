"""Who may look at the page, without a server."""

from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from retcon.web.app import Page

COOKIE = (b"cookie", b"retcon-token-8377=secret")


def asked(
    *headers: tuple[bytes, bytes], method: str = "GET", host: bytes = b"localhost:8377", query: str = ""
) -> Request:
    scope = {"type": "http", "method": method, "scheme": "http", "path": "/", "query_string": query.encode()}
    return Request({**scope, "headers": [(b"host", host), *headers]})


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (asked(COOKIE), None),
        (asked(query="token=secret"), None),
        (asked(), "wrong token, or none"),
        (asked(query="token=Secret"), "wrong token, or none"),
        (asked(COOKIE, host=b"evil.example:8377"), "asked for as 'evil.example'"),
        (asked(COOKIE, (b"origin", b"http://evil.example"), method="POST"), "another site"),
        (asked(COOKIE, (b"origin", b"http://localhost:8377"), method="POST"), None),
    ],
)
def test_a_request_needs_the_token_the_host_and_the_page_s_own_origin(request_: Request, why: str | None) -> None:
    session: Any = SimpleNamespace()
    refused = Page(session, "secret", ("localhost",)).check(request_)
    assert (refused is None) is (why is None)
    if refused is not None:
        assert refused.status_code == 403
        assert str(why) in bytes(refused.body).decode()
