"""What the verbs of a store share: how they find the store, and how they load the model it is of."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from retcon.cli.models import load_model
from retcon.cli.options import add_options
from retcon.cli.printing import plain_table, plural, warn
from retcon.cli.progress import progress_bars
from retcon.errors import UnsupportedModel
from retcon.files import found_from
from retcon.memory.corpus import check_corpus

if TYPE_CHECKING:
    from retcon.lm.model import LM
    from retcon.store import Entry, State, Store
    from retcon.store.index import Line

StorePath = Annotated[Path, typer.Option("--store", metavar="DIR", help="The store's folder.")]
OtherModel = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Where the model is now.", show_default="as in the store")
]
Corpus = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DATASET", help="Text for the second moments.", show_default="what the edit was made with"
    ),
]
Again = Annotated[
    bool, typer.Option("--repropose", help="Propose the later deltas again too, in order, on top of the changed one.")
]
Editor = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The trained editor that the fact's batch was made with (mend, malmen); a store keeps its name only.",
    ),
]
OwnMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="MODULE:CLASS",
        help="The method of your own that the fact's batch was made with; its code is not run unless you name it.",
    ),
]
Message = Annotated[str, typer.Option("-m", "--message", help="Message of the store's log.")]
N_SHOWN = 20
"""Facts shown; the JSON has all."""


@dataclass(frozen=True)
class Rewriting:
    """How a fact's batch is written again: the options of `rewrites`."""

    repropose: Again = False
    editor: Editor = None
    method: OwnMethod = None
    message: Message = ""
    model: OtherModel = None
    corpus: Corpus = None
    store: StorePath = Path(".retcon")


def rewrites(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb, in the place of its argument `how`, the options of how a fact's batch is written again."""
    options = {field.name: (field.type, field.default) for field in fields(Rewriting)}
    return add_options(verb, options, lambda how, own: verb(**own, how=Rewriting(**how)), before="how", replaced=True)


def open_store(path: Path) -> "Store":
    """Return the store there."""
    from retcon.store import Store

    return Store(path)


def load_base(store: "Store", model: str | None) -> "LM":
    """Return the model that the store is of.

    Raises:
        UnsupportedModel: it is no longer where the store says.
    """
    place = model or found_from(store.model, store.path)
    try:
        lm = load_model(place)
    except UnsupportedModel as error:
        if model is not None:
            raise
        moved = "if it has moved, name its place (--model; MODEL of retcon ui)"
        raise UnsupportedModel(f"{error.on_command_line}; {store.path} is of that model: {moved}") from None
    store.check_base(lm)
    return lm


def rewritten(write: Callable[..., "Entry"], store: "Store", how: Rewriting, *fact: str) -> "Entry":
    """Return the entry of `write`, a verb of the store that writes a fact's batch again."""
    from retcon.workflow import moments_for

    store.fact(fact[0])  # what can be refused before the model is loaded
    if how.corpus is not None:
        check_corpus(how.corpus)
    lm = load_base(store, how.model)
    options: dict[str, Any] = {n: getattr(how, n) for n in ("repropose", "editor", "method", "message")}
    with progress_bars() as advance:
        moments = None if how.corpus is None else moments_for(lm, how.corpus)
        return write(lm, *fact, moments=moments, progress=advance, **options)


def lines_table(lines: "list[Line]") -> Table:
    """Return the first of some facts."""
    table = plain_table(("fact", 24), ("prompt", 48), ("answer", 24))
    for line in lines[:N_SHOWN]:
        table.add_row(line.fact, line.prompt, line.target)
    return table


def fact_record(line: "Line") -> dict[str, Any]:
    """Return a fact for machines."""
    return {"id": line.fact, "prompt": line.prompt, "answer": line.target, "entry": line.entry}


def entry_record(entry: "Entry", state: "State") -> dict[str, Any]:
    """Return an entry for machines."""
    return {
        "id": entry.id,
        "time": entry.time,
        "action": entry.action,
        "message": entry.message,
        "sets": {slot: list(pair) for slot, pair in entry.sets.items()},
        "drops": list(entry.drops),
        "about": dict(entry.about),
        "state": state.id,
    }


def say_on_top(entry: "Entry", *, offer: bool) -> None:
    """Warn of later deltas that were proposed on top of what an entry has changed."""
    if on_top := entry.about.get("on_top"):
        way = "; --repropose proposes them again on what is there now" if offer else ""
        later = plural(len(on_top), "later delta")
        warn(f"{later} stayed as proposed on what was there before: {', '.join(on_top)}{way}")
