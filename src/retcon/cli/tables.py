"""What the verbs show of settings, facts, estimates and deltas: tables for a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from retcon.cli.printing import plain_table, plural, seconds, size, styled
from retcon.edits import Edit
from retcon.workflow import Estimate, Resolved, as_toml, search_line, took_line

if TYPE_CHECKING:
    from retcon.attachment import Attachment, EditReport
    from retcon.lm.model import LM

N_SHOWN = 12
"""Edits shown; of those of a report, the least successful ones."""


def settings_table(resolved: Resolved) -> Table:
    """Return all settings, in columns; bold what was asked for, dim what is as by default."""
    defaults = {f.name: f.default for f in fields(resolved.method)}

    def shown(name: str, value: Any) -> list[Text]:
        style = "[bold]{}[/]" if name in resolved.given else "[dim]{}[/]" if value == defaults[name] else "{}"
        parts = {f"{name}.{n}": v for n, v in value.items()} if isinstance(value, Mapping) else {name: value}
        return [styled("  " + style, f"{n} = {as_toml(v)}") for n, v in parts.items()]

    table = Table.grid(padding=(0, 3), pad_edge=False)
    cells = [cell for name, value in resolved.settings.items() for cell in shown(name, value)]
    rows = -(-len(cells) // 3)
    for row in range(rows):
        table.add_row(*cells[row::rows])
    return table


def estimate_table(expected: Estimate) -> Table:
    """Return what a run would take, in words."""
    table = Table.grid(padding=(0, 2), pad_edge=False)
    tried = f"from {plural(expected.tried, 'edit')} tried just now"
    time = f"about {seconds(expected.edit_seconds)} for {plural(expected.edits, 'edit')}"
    table.add_row("time", time, styled("[dim]{}[/]", tried))
    if expected.moments_missing:
        what = f"{plural(expected.moments_missing, 'second moment')} from {expected.moments_tokens:,} tokens, once"
        table.add_row("", f"about {seconds(expected.moments_seconds)} before that", styled("[dim]{}[/]", what))
    elif expected.moments_asked:
        table.add_row("", "no second moments to collect", styled("[dim]they are on disk[/]"))
    peak = size(expected.peak_bytes) if expected.peak_bytes else "unknown"
    table.add_row("memory", f"model {size(expected.model_bytes)}, peak {peak}", styled("[dim]of the trial[/]"))
    if expected.float_bytes:
        what = f"{size(expected.float_bytes)} of packed matrices as floats"
        table.add_row("", what, styled("[dim]while the edit is applied, and twice that to undo it[/]"))
    table.add_row("delta", f"about {size(expected.delta_bytes)}", "")
    return table


def edits_preview(edits: Sequence[Edit]) -> Group:
    """Return what would be written, the first few."""
    table = plain_table(("prompt", 60), ("new answer", 60))
    for edit in edits[:N_SHOWN]:
        table.add_row(edit.text, edit.target_new)
    more = len(edits) - N_SHOWN
    return Group(table, styled("[dim]and {:,} more[/]", more)) if more > 0 else Group(table)


def edits_table(delta: "Attachment", edits: Sequence[Edit]) -> Group:
    """Return how far each edit got in its search and in the weights; of many, those that got least far."""
    by_id = {e.id: e for e in edits}
    reports = [r for r in delta.report if r.id in by_id]
    if len(reports) > N_SHOWN:
        reports = sorted(reports, key=_how_far)[:N_SHOWN]
    table = plain_table()
    for name in ("subject", "new answer", "searched", "final", "steps", "outcome"):
        right = name in ("searched", "final", "steps")
        table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis", max_width=44)
    for report in reports:
        edit = by_id[report.id]
        colour = {"reached": "green", "conflict": "red", "missed": "red"}.get(report.outcome, "yellow")
        table.add_row(
            edit.subject or "-",
            edit.target_new,
            "-" if report.stopped == "written" else f"{report.search_probability:.3f}",
            "-" if report.final_probability is None else f"{report.final_probability:.3f}",
            str(report.steps),
            styled("[{}]{}[/]", colour, report.outcome),
        )
    shown = f"shown are the {len(reports)} furthest from it" if len(reports) < len(delta.report) else ""
    rest = "; ".join(filter(None, (search_line(delta.report), shown)))
    return Group(table, took_line(delta.report), *([styled("[dim]{}[/]", rest)] if rest else []))


def _how_far(report: "EditReport") -> float:
    return report.search_probability if report.final_probability is None else report.final_probability


def changes_table(lm: "LM", delta: "Attachment") -> Table:
    """Return how much each parameter changes."""
    table = plain_table(("parameter", None), right=("change", "of its norm", "rank"))
    ranks = delta.ranks()
    for name, norm in delta.norms().items():
        weight = float(lm.base_weight(name).double().norm())
        rank = ranks[name]
        table.add_row(
            name, f"{norm:.3g}", f"{norm / weight:.1%}" if weight else "-", "-" if rank is None else f"≤ {rank}"
        )
    return table
