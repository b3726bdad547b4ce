"""`retcon diff`: which facts differ between two states."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retcon.cli.options import Json
from retcon.cli.printing import emit, plural
from retcon.cli.stores import StorePath, fact_record, open_store

if TYPE_CHECKING:
    from retcon.store.index import Line


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="An entry, or base.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")] = "HEAD",
    store: StorePath = Path(".retcon"),
    as_json: Json = False,
) -> None:
    """List the facts that came, went or changed from the state after entry A to the state after entry B."""
    found = open_store(store)
    came, went, changed = found.diff(a, b)
    if as_json:
        emit(
            {
                "came": [fact_record(line) for line in came],
                "went": [fact_record(line) for line in went],
                "changed": [{"before": fact_record(one), "after": fact_record(two)} for one, two in changed],
                "deltas": {"a": list(found.state(a).deltas), "b": list(found.state(b).deltas)},
            }
        )
        return
    for line in went:
        typer.secho(f"- {_shown(line)}", fg="red")
    for line in came:
        typer.secho(f"+ {_shown(line)}", fg="green")
    for one, two in changed:
        typer.secho(f"~ {_shown(one)} -> {_one_line(two.target)}", fg="yellow")
    typer.secho(f"{plural(len(came), 'fact')} came, {len(went):,} went, {len(changed):,} changed", dim=True)


def _shown(line: "Line") -> str:
    return _one_line(f"{line.fact}  {line.prompt} {line.target}")


def _one_line(text: str) -> str:
    """Return the text in one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)
