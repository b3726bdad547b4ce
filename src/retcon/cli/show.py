"""`retcon show`: one entry, or one fact through time."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from retcon.cli.options import Json
from retcon.cli.printing import console, emit, plain_table, plural, size, styled
from retcon.cli.stores import N_SHOWN, StorePath, entry_record, fact_record, lines_table, open_store
from retcon.errors import UnknownEntry

if TYPE_CHECKING:
    from retcon.store import Entry, Store


def show(
    name: Annotated[str, typer.Argument(metavar="ID|FACT", help="An entry (HEAD is the last) or a fact.")],
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """Show one entry with its facts and deltas, or one fact with its checks and what became of it."""
    found = open_store(store)
    if found.history(name):
        _fact(found, name, as_json)
        return
    try:
        entry = found.entry(name)
    except UnknownEntry as no_entry:
        try:
            line, _ = found.fact(name)  # the beginning of an id is enough, as everywhere
        except UnknownEntry as no_fact:
            raise UnknownEntry(f"{no_entry}; {no_fact}") from None
        _fact(found, line.fact, as_json)
        return
    _entry(found, entry, as_json)


def _entry(store: "Store", entry: "Entry", as_json: bool) -> None:
    facts = store.index.of_entry(entry.id)
    if as_json:
        emit(entry_record(entry, store.state(entry.id)) | {"facts": [fact_record(line) for line in facts]})
        return
    out = console()
    out.print(styled("[yellow]{}[/]  [bold]{}[/]  {}", entry.id, entry.action, entry.message))
    about = ", ".join(f"{k} {v}" for k, v in entry.about.items() if not isinstance(v, list))
    out.print(styled("[dim]{}; {}[/]", entry.time, about or "no details"), soft_wrap=True)
    for before, now in entry.sets.values():
        out.print(styled("  delta  {} -> {}", _delta(store, before), _delta(store, now)), soft_wrap=True)
    for fact in entry.drops:
        out.print(styled("  [red]-[/] fact {}", fact))
    for what in ("on_top", "proposed_again", "removed"):
        if named := entry.about.get(what):
            out.print(styled("  [dim]{}: {}[/]", what.replace("_", " "), ", ".join(map(str, named))), soft_wrap=True)
    if facts:
        out.print()
        out.print(lines_table(facts))
        if len(facts) > N_SHOWN:
            out.print(styled("[dim]and {:,} more[/]", len(facts) - N_SHOWN))


def _delta(store: "Store", delta: str | None) -> Text:
    if delta is None:
        return styled("[dim]nothing[/]")
    path = store.path / "deltas" / f"{delta}.safetensors"
    if not path.is_file():
        return styled("{} [red](no file)[/]", delta)
    return styled("{} [dim]({})[/]", delta, size(path.stat().st_size))


def _fact(store: "Store", name: str, as_json: bool) -> None:
    steps = store.history(name)
    line = next(line for _, line in reversed(steps) if line is not None)
    case = store.index.case(line)
    live = steps[-1][1] is not None
    if as_json:
        emit(
            {
                "fact": name,
                "in_force": live,
                "history": [{"entry": e.id, "action": e.action, "answer": s and s.target} for e, s in steps],
                "edits": [asdict(e) for e in case.edits],
                "checks": [asdict(q) for q in case.queries],
            }
        )
        return
    out = console()
    out.print(styled("[bold]{}[/] {}", line.prompt, line.target) + ("" if live else styled("  [red](reverted)[/]")))
    for entry, step in steps:
        answer = styled("[dim]taken back[/]") if step is None else step.target
        when = entry.time[:16].replace("T", " ")
        out.print(styled("  [yellow]{}[/]  [dim]{}[/]  {:8}{}", entry.id, when, entry.action, answer))
    table = plain_table(("check", 18), ("prompt", 56), ("answer", 22))
    for query in case.queries[:N_SHOWN]:
        table.add_row(query.axis, query.prompt, query.target or "as before")
    out.print()
    out.print(table)
    if len(case.queries) > N_SHOWN:
        out.print(styled("[dim]and {}[/]", plural(len(case.queries) - N_SHOWN, "more check")))
