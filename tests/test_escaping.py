"""Text that would be markup, a formula or a command to the terminal, through everything that writes."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Group
from rich.table import Table as Grid

from retcon.bench import Bench
from retcon.bench.report import Table, groups_of, tables_of
from retcon.bench.report.page import page
from retcon.bench.report.plots import pictures_of
from retcon.cli.printing import PlainTextConsole, console, emit, say, styled
from retcon.delta import Delta
from retcon.drawing import figure, save
from retcon.edits import Edit, Query
from retcon.escaping import csv_cell, json_text, latex, markdown, one_line, plain_texts, printable
from retcon.evaluation.safety import Answer, Example, Verdict
from retcon.evaluation.summary import Summary
from retcon.export.card import model_card
from retcon.store.history import Entry, State
from retcon.store.verify import Check, Verification
from retcon.workflow.checking import write_verdict
from tests.bench.test_report import ENVIRONMENT, VERSIONS, make_run, told

HOSTILE = (
    "<script>x()</script>[red]r[/blue][link=http://x]l[/] | `c` **b** $x^$ & =A1 \\ \x1b[31m\x9b2J\u202e\r\x07\x00"
)
HALF = HOSTILE + "\ud800"
"""With what no edit holds, and a file's name or a message may."""
NEVER = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What no output may hold: a terminal obeys it, a reader is misled by it, or it cannot be encoded."""


def check_html(text: str) -> None:
    assert not NEVER.search(text)
    assert "x()</script>" not in text
    assert "&lt;script&gt;" in text


def check_markdown(text: str) -> None:
    assert not NEVER.search(text)
    assert "<script" not in text
    for line in text.split("\n"):
        bare = re.sub(r"\\.", "", line)
        assert "[red]" not in bare, line
        assert "`c`" not in bare, line
        assert "**b**" not in bare, line
        if line.startswith("|"):
            assert bare.endswith("|"), line
    for rows in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # as many cells in every row of a table
        assert len({re.sub(r"\\.", "", row).count("|") for row in rows.splitlines()}) == 1, rows


def check_xml(text: str) -> None:
    assert not NEVER.search(text)
    told = "".join(part for e in ElementTree.fromstring(text).iter() for part in (e.text or "", *e.attrib.values()))
    assert "<script>" in told  # as text


CHECKS: dict[str, Callable[[str], None]] = {".html": check_html, ".md": check_markdown, ".xml": check_xml}


def test_the_kinds_of_output() -> None:
    assert printable("a\x1b[2J\r\n\tb\x9b\u202e\x7f") == "a␛[2J␍\n\tb��␡"
    assert one_line("  a\n b\x00 ") == "a b␀"
    assert markdown("a_b _c_ <b> | [x](y) & 1 > 0") == r"a_b \_c\_ &lt;b> \| \[x\](y) &amp; 1 > 0"
    assert [csv_cell(x) for x in ("=A1", "-1+cmd|' /C'!A0", "@x", "+a", "\t=1")] == [
        "'=A1", "'-1+cmd|' /C'!A0", "'@x", "'+a", "'\t=1",
    ]  # fmt: skip
    numbers = ("-", "-1.5", "+3.2 [-0.1, 6.5]", "99.0 (1.2)", "1,000", "+1.2 %", "plain")
    assert [csv_cell(x) for x in numbers] == list(numbers)
    assert latex("50 % of $x_1$\n~^") == r"50 \% of \$x\_1\$ \textasciitilde{}\textasciicircum{}"
    assert json.loads(json_text(json.dumps({"a": "\x9b\x1b\u202e"}, ensure_ascii=False))) == {"a": "\x9b\x1b\u202e"}
    assert not NEVER.search(json_text(json.dumps("\x9b\x1b\u202e\ud800", ensure_ascii=False)))


def test_tables_of_a_report() -> None:
    table = Table("t", HALF, ("Method", HALF), ((HALF,), ("=1+1", HALF)), (HALF,), frozenset({(1, 1)}))
    check_markdown(table.markdown())
    assert not NEVER.search(table.csv())
    cells = [cell for row in csv.reader(io.StringIO(table.csv())) for cell in row]
    assert "'=1+1" in cells
    assert not [cell for cell in cells if cell.lstrip().startswith(("=", "+", "@"))]
    tex = table.latex()
    assert not NEVER.search(tex)
    assert "\\$x\\textasciicircum{}\\$" in tex
    assert len(tex.splitlines()) == 10  # a line break in a title ends no comment


def test_the_page_of_a_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, the extra `plot`")
    runs = []
    for method in ("<script>x()</script>$a^$", "=b_[red]"):
        run = make_run(tmp_path, "m", told([1, 1, 0, 1], [1, 0, 1, 1], "final"), dataset=f"{HOSTILE}{len(runs)}")
        run.manifest["method"]["label"] = method  # type: ignore[index]
        run.manifest["model"]["label"] = HOSTILE  # type: ignore[index]
        runs.append(run)
    bench = Bench(tmp_path, {"spec": {"name": HOSTILE}, **VERSIONS}, ENVIRONMENT, tuple(runs), ())
    groups = groups_of(bench)
    drawn = pictures_of(groups)
    assert drawn
    for picture in drawn:
        assert not NEVER.search(picture.svg)
        ElementTree.fromstring(picture.svg)
    assert any("$a^$" in "".join(ElementTree.fromstring(p.svg).itertext()) for p in drawn)
    check_html(page(bench, groups, tables_of(groups), drawn))


def test_figures_of_probes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra `plot`")
    made, axes = figure(1, 1, 20, 6)
    axes[0, 0].plot([0, 1], [0, 1], label=HALF)
    axes[0, 0].set_xticks([0, 1], ["$x^$", "$"])
    axes[0, 0].legend()
    _, svg = save(made, tmp_path / "f", title="$x^$ \x1b")
    text = svg.read_text("utf-8")
    assert not NEVER.search(text)
    assert "".join(ElementTree.fromstring(text).itertext()).count("$x^$") >= 3


def test_what_a_store_is_verified_with() -> None:
    entry = Entry("e1", "2026-01-01", "edit", HOSTILE, None)
    query = Query(id="q", axis="paraphrase", prompt=HOSTILE, target=HOSTILE)
    checks = (
        Check(HOSTILE, query, "took", "broke", entry, HOSTILE),
        Check("f", query, "generalised", "never", None, HOSTILE),
    )
    found = Verification(HOSTILE, HOSTILE, State("base", {}), checks, 2, 0)
    check_markdown(found.markdown())
    check_xml(found.junit())
    check_html(found.html())


@pytest.mark.parametrize("ending", CHECKS)
def test_the_report_of_a_check(tmp_path: Path, ending: str) -> None:
    worst = (Example(HOSTILE, HOSTILE, HOSTILE, HOSTILE),)
    answer = Answer("took", "failed", 0.5, 0.1, 0.8, 4, None, worst, measured_by=HOSTILE)
    write_verdict(tmp_path / f"v{ending}", Verdict((answer,), 4, (HOSTILE,)), HOSTILE)
    CHECKS[ending]((tmp_path / f"v{ending}").read_text("utf-8"))


def test_a_model_card(tiny: Any) -> None:
    lm = tiny(n_layers=1)
    lm.name = HOSTILE
    edit = Edit(id="a", prompt="{} " + HOSTILE, subject=HOSTILE.replace("{", ""), target_new=HOSTILE)
    delta: Delta = lm.delta({}, edits=(edit,), provenance={"method": HOSTILE})
    card = model_card(
        lm,
        [delta],
        kind="merged checkpoint",
        called=lm.label,
        base_name="a/b\n- x: y",
        scores={HOSTILE: 1.0},
        notes=[HOSTILE],
    )
    check_markdown(card.partition("---\n\n")[2])
    assert "base_model" not in card


def test_a_summary_in_a_notebook() -> None:
    check_html(Summary("cf", 1, (), {HALF: 1}, {HALF: HALF})._repr_html_())


def test_the_terminal_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    shown = PlainTextConsole(file=out, width=400, force_terminal=False, emoji=False, highlight=False)
    shown.print(styled("[bold]{}[/] and [dim]{:>3}[/] {}", HOSTILE, "[red]", styled("[bold]{}[/]", "[red]x[/]")))
    assert out.getvalue().rstrip().endswith(" and [red] [red]x[/]")
    shown.print(HOSTILE)
    shown.print(HALF, markup=True)
    table = Grid(title=HALF)
    table.add_column(HALF)
    table.add_row(HALF)
    shown.print(table, Group(HALF))
    assert not NEVER.search(out.getvalue())
    assert out.getvalue().count("[link=http://x]") == 7
    console.cache_clear()  # so that it prints to the stream that is captured
    say("error", "red", HALF)
    said = capsys.readouterr().err
    assert not NEVER.search(said)
    assert "[red]r[/blue]" in said
    emit({HALF: HALF})
    assert not NEVER.search(capsys.readouterr().out)


@pytest.mark.parametrize("scale", ["log", "symlog"])
def test_logarithmic_scales_of_a_figure_are_written_as_numbers(scale: str) -> None:
    """Their ticks are formulas by default, which are not read where a dollar sign begins none."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib (pip install 'retcon-lm[plot]')")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2, 3], [0.001, 1.0, 20000.0])
    axes.set_yscale(scale)
    plain_texts(figure)
    with rc_context({"text.parse_math": False}):
        figure.draw_without_rendering()
    labels = {label.get_text() for label in axes.get_yticklabels()}
    assert {"1", "10000"} <= labels
    assert not any("$" in label for label in labels)
