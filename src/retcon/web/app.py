"""The page as a web application: who may ask, what each address shows, and when browsers look again."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from retcon.errors import InvalidSetting, RetconError
from retcon.web.jobs import Job, problem_of
from retcon.web.session import Session

STATIC = Path(__file__).with_name("static")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TO_NOW = ("model", "edit", "amend")
"""Actions that change what is in force now: a browser that looks at an earlier state leaves it."""
PANELS = ("model", "job", "draft", "method", "state", "replies", "checked", "checks", "maps", "commands")
MAX_BODY = 2**25
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
POLL_SECONDS = 0.1
"""How often a browser's stream looks whether something has changed."""


def make_app(session: Session, token: str, *, hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """Return the application.

    Args:
        token: what a browser must bring, once in the address and from then on as a cookie.
        hosts: names under which it may be asked for, so that no other site's name can be pointed at it.
    """
    page = Page(session, token, hosts)
    return Starlette(
        routes=[
            Route("/", page.checked(page.home)),
            Route("/panel/{name}", page.checked(page.panel)),
            Route("/do/{name}", page.checked(page.act), methods=["POST"]),
            Route("/events", page.checked(page.events)),
            Route("/static/{name}", page.checked(page.static)),
        ]
    )


View = Callable[[Request], Awaitable[Response]]
"""What answers the requests for an address."""


class Page:
    """A session as browsers see it: a view for each kind of address. The arguments are those of `make_app`."""

    def __init__(self, session: Session, token: str, hosts: tuple[str, ...]) -> None:
        self.session, self.token, self.hosts = session, token, hosts
        self.templates = Environment(
            loader=PackageLoader("retcon.web"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self.templates.filters["element_id"] = _element_id
        self.templates.globals.update(session=session, panel=self.render_panel)

    def check(self, request: Request) -> Response | None:
        """Return the answer to a request that must not be served; None where it may be."""
        if (request.url.hostname or "") not in self.hosts:
            return _refused(f"asked for as {request.url.hostname!r}; use the address that retcon ui printed")
        origin = request.headers.get("origin")
        if request.method == "POST" and origin not in (None, f"{request.url.scheme}://{request.url.netloc}"):
            return _refused(f"a request from another site ({origin})")
        brought = (request.query_params.get("token", ""), request.cookies.get(_cookie(request), ""))
        if not any(hmac.compare_digest(given.encode(), self.token.encode()) for given in brought):
            return _refused("wrong token, or none; use the address that retcon ui printed, token included")
        return None

    def checked(self, view: View) -> View:
        """Return a view that answers what passes `check`, and refuses the rest."""

        async def run(request: Request) -> Response:
            return self.check(request) or await view(request)

        return run

    def render(self, template: str, **values: Any) -> Response:
        """Return what a template makes of the session and these values."""
        return HTMLResponse(self.templates.get_template(template).render(**values), headers=_HEADERS)

    def render_panel(self, name: str, at: str | None, **values: Any) -> Markup:
        """Return a panel of the state after an entry (None: of now), or why what it shows cannot be read."""
        try:
            return Markup(self.templates.get_template(f"{name}.html").render(at=at, **values))
        except (RetconError, OSError) as error:
            return Markup(self.templates.get_template("problem.html").render(problem=problem_of(error), at=at))

    async def home(self, request: Request) -> Response:
        """Return the whole page; a token in the address becomes a cookie."""
        asked, at, problem = request.query_params.get("at", "HEAD"), None, ""
        try:
            at = None if asked == "HEAD" else self.session.store.entry(asked).id
        except (RetconError, OSError) as error:
            problem = problem_of(error)
        if "token" in request.query_params:
            response: Response = RedirectResponse(f"/?{urlencode({'at': at})}" if at else "/", status_code=303)
        else:
            response = self.render("page.html", problem=problem, at=at)
        response.set_cookie(_cookie(request), self.token, httponly=True, samesite="strict")
        return response

    async def panel(self, request: Request) -> Response:
        """Return one panel."""
        name, asked = request.path_params["name"], request.query_params
        values: dict[str, Any] = {}
        if name == "facts":
            rows = asked.get("rows", "")
            values["wanted"] = asked.get("words", ""), asked.get("order", ""), int(rows) if rows.isdecimal() else 0
        elif name not in PANELS:
            return PlainTextResponse("no such panel", status_code=404)
        return HTMLResponse(self.render_panel(name, asked.get("at"), **values), headers=_HEADERS)

    async def act(self, request: Request) -> Response:
        """Do one action of the form; what goes wrong at once is shown beside it."""
        body = await request.body()
        if len(body) > MAX_BODY:
            return PlainTextResponse("too much at once", status_code=413, headers=_HEADERS)
        form = {k: v[-1] for k, v in parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True).items()}
        action = ACTIONS.get(request.path_params["name"])
        if action is None:
            return PlainTextResponse("no such action", status_code=404)
        try:
            said = action(self.session, form)
        except (RetconError, OSError) as error:
            return self.render("said.html", said=problem_of(error), bad=True)
        response = self.render("said.html", said=said if isinstance(said, str) else "", bad=False)
        if form.get("at") and request.path_params["name"] in TO_NOW:
            response.headers["HX-Redirect"] = "/"
        return response

    async def events(self, request: Request) -> Response:
        """Return the stream that says when to look again."""

        async def stream() -> AsyncIterator[str]:
            seen = (-1, -1, -1)
            while not await request.is_disconnected():
                now = (self.session.version, self.session.written, self.session.jobs.n_steps)
                if now != seen:
                    kind = "changed" if now[:2] != seen[:2] else "progress"
                    seen = now
                    yield f"event: {kind}\ndata: {json.dumps(now)}\n\n"
                await asyncio.sleep(POLL_SECONDS)

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def static(self, request: Request) -> Response:
        """Return a file of the page's own."""
        path = STATIC / request.path_params["name"]
        if path.parent != STATIC or not path.is_file():
            return PlainTextResponse("no such file", status_code=404)
        return FileResponse(path, headers=_HEADERS)


def _element_id(text: object) -> str:
    """Return an element's id for a fact's, which is any text: htmx looks for elements by selectors."""
    return hashlib.sha256(str(text).encode()).hexdigest()[:16]


def _cookie(request: Request) -> str:
    """Return the name of the cookie with the token; browsers send it to every port, so the port is in the name."""
    return f"retcon-token-{request.url.port or 80}"


def _refused(why: str) -> Response:
    return PlainTextResponse(f"refused: {why}\n", status_code=403, headers=_HEADERS)


def _choose(session: Session, form: dict[str, str]) -> str:
    session.choose(form.get("method", ""), form.get("settings", "").splitlines())
    return f"{session.method} is chosen"


def _dry_run(session: Session, form: dict[str, str]) -> Job:
    _choose(session, form)
    return session.dry_run()


def _edit(session: Session, form: dict[str, str]) -> Job:
    """Edit by the method and settings that this browser shows."""
    _choose(session, form)
    return session.edit()


def _layer(session: Session, form: dict[str, str]) -> str:
    row, layer = form.get("row", ""), form.get("layer", "")
    if not (row.isdecimal() and layer.isdecimal()):
        raise InvalidSetting(f"no layer {layer!r} in row {row!r} of a map; click one of its cells")
    session.choose_layer(int(row), int(layer))
    return "the next edit is made there"


ACTIONS: dict[str, Callable[[Session, dict[str, str]], str | Job | None]] = {
    "add": lambda session, form: session.add_facts(form.get("facts", "")),
    "clear": lambda session, form: session.clear(),
    "choose": _choose,
    "layer": _layer,
    "model": lambda session, form: session.choose_model(form.get("model", "")),
    "amend": lambda session, form: session.amend(form.get("fact", ""), form.get("target", "")),
    "dry-run": _dry_run,
    "edit": _edit,
    "cancel": lambda session, form: session.jobs.cancel(),
    "toggle": lambda session, form: session.toggle(form.get("entry", "")),
    "revert-fact": lambda session, form: session.revert_fact(form.get("fact", "")),
    "ask": lambda session, form: session.ask(form.get("prompt", ""), chat="chat" in form, at=form.get("at")),
    "verify": lambda session, form: session.verify(form.get("at")),
    "contrast": lambda session, form: session.probe(at=form.get("at")),
    "trace": lambda session, form: session.probe(trace=True, at=form.get("at")),
    "export": lambda session, form: session.export(form.get("folder", ""), form.get("format", "hf"), at=form.get("at")),
}
"""What the form can do, by name; a string is shown beside it, and a job reports in its own panel."""
