"""`retcon ui`: a page on this machine to look at edits, make them and undo them."""

import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retcon.cli.models import load_model, loading, loading_options, loads_a_model
from retcon.cli.printing import console, styled
from retcon.cli.stores import load_base
from retcon.errors import InvalidSetting, MissingPackage

if TYPE_CHECKING:
    from retcon.lm.model import LM


@loads_a_model
def ui(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model, as for edit.", show_default="the store's")
    ] = None,
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="A store; made where there is none.")] = Path(
        ".retcon"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: one that is free.")] = 8377,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Any but this machine's own lets others change the model.")
    ] = "127.0.0.1",
) -> None:
    """Serve a page for MODEL and its store to browsers on this machine, until Ctrl-C.

    Nothing is sent anywhere else. The address that is printed holds a token; without it, nothing is shown.
    """
    try:
        import uvicorn

        from retcon.web.app import LOOPBACK, make_app
    except ImportError as error:
        raise MissingPackage(f"the page needs {error.name}: pip install 'retcon-lm[ui]'") from None
    from retcon.store import Store
    from retcon.store.contents import CONFIG
    from retcon.web.session import Session

    device, dtype = loading().device, loading().dtype
    there = (store / CONFIG).is_file()
    if not there and model is None:
        raise InvalidSetting(f"{store} holds no store, so name the MODEL that one shall be made for")
    if not there:
        Store.check_new(store)
    with _listen(host, port) as listening:
        if there:
            kept = Store(store)
            lm = load_base(kept, model)
        else:
            assert model is not None
            lm = load_model(model)
            kept = Store.init(store, lm, model=model)
        first = {lm.name: lm}
        name, options = lm.source or (lm.name, {})

        def load(wanted: str) -> "LM":
            from retcon.lm.load import load as load_lm

            own = options if wanted == name else {"device": device}  # --revision, say, is of the first model alone
            return first.pop(wanted, None) or load_lm(wanted, dtype=dtype, **own)

        place = f" --device {device}" if device else ""
        own_options = loading_options()
        session = Session(kept, load, name, lambda wanted: place + (own_options if wanted == name else ""), dtype)
        session.jobs.start()
        token = secrets.token_urlsafe(16)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}/?token={token}"
        console().print(styled("open   [bold]{}[/]", address), soft_wrap=True)
        console().print(styled("[dim]Ctrl-C ends it[/]"))
        app = make_app(session, token, hosts=(*LOOPBACK, host))
        try:
            config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # which is how it is meant to end
            pass
        finally:
            session.jobs.stop()


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket at that address.

    Raises:
        InvalidSetting: something else listens there, or there is no such address.
    """
    found = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except OSError as error:
        if found is not None:
            found.close()
        raise InvalidSetting(
            f"cannot listen on {host} port {port} ({error.strerror}); another page may be open there: use --port 0"
        ) from None
    return found
