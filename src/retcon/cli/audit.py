"""`retcon audit`: what differs between two checkpoints, and what explains it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retcon.cli.facts import reads_facts
from retcon.cli.models import check_model_exists, load_deltas, load_model, loads_as_stored
from retcon.cli.options import Json
from retcon.cli.output_checks import check_output
from retcon.cli.printing import console, emit, plain_table, plural, size, styled
from retcon.cli.progress import spinner
from retcon.errors import InvalidSetting, NotEditable
from retcon.workflow.facts import Reading, facts_that_fit, read_facts

if TYPE_CHECKING:
    from retcon.audit import Audit

N_SHOWN = 30
"""Rows shown of each table; the JSON has all."""


@loads_as_stored
@reads_facts("--facts")
def audit(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The unedited model.")],
    edited: Annotated[str, typer.Argument(metavar="EDITED", help="The other checkpoint.")],
    explain: Annotated[
        list[Path] | None, typer.Option(metavar="DELTA", help="A delta that may explain the difference; repeat.")
    ] = None,
    facts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Facts that both models are asked; any format.")
    ] = None,
    *,
    reading: Reading,
    delta: Annotated[
        Path | None, typer.Option(metavar="OUT", help="File that the difference goes to, as a delta.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is at OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Say which matrices of EDITED differ from BASE, by what rank and norm, which settings, and which answers.

    Exit code 0 whether they differ or not. With --delta, anybody's edit becomes a delta that can be measured, undone
    and exported.
    """
    from retcon.audit import audit as compare
    from retcon.delta import only_deltas

    check_output(delta, *(explain or []), facts, Path(base), Path(edited))
    if delta is not None and delta.exists() and not force:
        raise InvalidSetting(f"{delta} exists; name another file, or replace it with --force")
    if facts is None and reading != Reading(conflicts="drop"):
        raise InvalidSetting("how facts are read (--start, --chat, ...) goes with --facts; leave it out, or give that")
    asked = None if facts is None else read_facts(facts, reading)
    known = load_deltas(explain or [])
    for each in (base, edited):
        check_model_exists(each)
    lm = load_model(base)
    other = load_model(edited)
    edits = () if asked is None else facts_that_fit(lm, asked, reading.on_error).edits
    with spinner("comparing"):
        found = compare(lm, other, edits=edits, known=only_deltas(known, "an audit"))
    if delta is not None:
        if found.left_out:
            name, why = next(iter(found.left_out.items()))
            raise NotEditable(f"{name} differs, and no delta can hold that: {why}; without --delta, all is reported")
        found.delta.save(delta)
    if as_json:
        emit(
            {
                "differences": [asdict(d) for d in found.differences],
                "n_parameters": found.n_parameters,
                "unexplained": found.unexplained,
                "absent": dict(found.absent),
                "left_out": dict(found.left_out),
                "settings": dict(found.settings),
                "answers": [
                    {"id": a.edit.id, "prompt": a.edit.text, "base": a.base, "edited": a.edited, "changed": a.changed}
                    for a in found.answers
                ],
                "delta": None if delta is None else {"id": found.delta.id, "file": str(delta), "exact": found.exact},
            }
        )
        return
    _show(found, known=bool(known))
    if delta is not None:
        exact = "base and delta give EDITED bit for bit" if found.exact else "exact to float32's rounding"
        about = f"{size(delta.stat().st_size)}, delta {found.delta.id}; {exact}"
        console().print(styled("saved  [bold]{}[/]  [dim]{}[/]", delta, about))


def _show(found: "Audit", *, known: bool) -> None:
    show = console()
    n = len(found.differences)
    agree = f"all {plural(found.n_parameters, 'parameter')} agree bit for bit"
    if not n and not found.left_out and not found.settings:
        show.print(styled("[green]The same[/]: {}.", agree))
    elif not n:
        show.print(f"Not the same, though {agree}.")
    else:
        right = ("difference", "of its norm", "rank", *(("unexplained",) if known else ()))
        table = plain_table(("parameter", None), right=right)
        for d in found.differences[:N_SHOWN]:
            cells = [d.parameter, f"{d.norm:.3g}", f"{d.share:.2%}", "-" if d.rank is None else str(d.rank)]
            table.add_row(*cells, *([f"{d.unexplained or 0:.2%}"] if known else []))
        show.print(table)
        more = f"; {n - N_SHOWN:,} more in --json" if n > N_SHOWN else ""
        show.print(styled("[dim]{:,} of {} differ{}[/]", n, plural(found.n_parameters, "parameter"), more))
        if found.unexplained is not None:
            show.print(f"The deltas given leave {found.unexplained:.2%} of the difference unexplained.")
    for name, why in found.left_out.items():
        show.print(f"No delta can hold the difference of {name}: {why}.", soft_wrap=True)
    for name, (ours, other) in found.settings.items():
        show.print(
            f"The setting {name} differs, and no delta holds it: {ours} in BASE, {other} in EDITED.", soft_wrap=True
        )
    for name in found.absent:
        show.print(f"{name} does not differ, and the deltas given change it.", soft_wrap=True)
    if found.answers:
        changed = [a for a in found.answers if a.changed]
        answers = plain_table(("prompt", 44), ("base", 22), ("edited", 22))
        for a in changed[:N_SHOWN]:
            answers.add_row(*(" ".join(part.split()) for part in (a.edit.text, a.base, a.edited)))
        show.print()
        if changed:
            show.print(answers)
        took = sum(a.took for a in found.answers)
        show.print(
            f"{len(changed):,} of {plural(len(found.answers), 'answer')} changed; {took:,} begin with the new answer "
            "of the list"
        )
