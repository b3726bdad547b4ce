"""Tables from runs made by hand: the layouts, their numbers, their escapes; pictures and the page."""

import csv
import dataclasses
import io
import json
import re
import unicodedata
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from retcon.bench import Bench, Run
from retcon.bench.report import Table, groups_of, tables_of
from retcon.bench.report import plots as drawing
from retcon.bench.report.facts import fact_tables
from retcon.bench.report.names import distinct
from retcon.bench.report.page import page
from retcon.bench.report.plots import Picture, pictures_of
from retcon.errors import MissingPackage
from retcon.evaluation.records import Record, write_records
from tests.evaluation.test_results import axis

ENVIRONMENT = {"processor": "a processor", "threads": 1, "os": "an OS", "commit": None, "command": "retcon bench <x>"}
VERSIONS = {"retcon": "1", "python": "3", "torch": "2", "transformers": "5"}


def told(es: list[float], ls: list[float], when: str, **fields: Any) -> list[Record]:
    """ES (and GS, the same) and LS by case; agreement as LS, token accuracy as ES."""
    cases = "abcdefgh"
    by_es = {c: [v] for c, v in zip(cases, es, strict=False)}
    by_ls = {c: [v] for c, v in zip(cases, ls, strict=False)}
    more: dict[str, Any] = {"when": when, **fields}
    return [
        *axis("rewrite", "ES", by_es, **more),
        *axis("paraphrase", "GS", by_es, **more),
        *axis("neighborhood", "LS", by_ls, **more),
        *axis("rewrite", "ES", by_es, variant="ee.tok", **more),
        *axis("paraphrase", "GS", by_es, variant="ee.tok", **more),
        *axis("neighborhood", "LS", by_ls, variant="ee.loc.argmax", **more),
        *axis("rewrite", "ES", by_es, variant="gen.prefix", **more),
    ]


def seconds(value: float) -> Record:
    return Record(
        when="immediate", case_id=None, subject=None, axis=None, query_id=None, metric="time", variant="time.edit",
        value=value, n=4,
    )  # fmt: skip


def make_run(
    root: Path,
    method: str,
    records: Iterable[Record],
    *,
    seed: int = 0,
    kind: str = "batch",
    batch: int | None = None,
    n: int = 4,
    dataset: str = "cf & <co>",
) -> Run:
    place = root / f"{method}-{kind}-{batch}-{seed}-{dataset[:2]}"
    context = {"run_id": "x", "method": method, "seed": seed, "edit_batch": batch or (1 if kind == "sequential" else n)}
    write_records(place / "records.jsonl", records, context)
    write_records(place / "timings.jsonl", [seconds(0.5)], context)
    cases = [
        {
            "case_id": c,
            "relation": "capital" if c in "ab" else "tongue",
            "edits": [{"prompt": f"<{c}> is", "subject": c, "target_new": "new", "target_true": "old"}],
            "queries": [
                {"query_id": "rewrite/0", "prompt": f"<{c}> is", "target": "new", "contrast": "old"},
                {"query_id": "neighborhood/0", "prompt": f"neighbours of {c}", "target": "stays", "contrast": "new"},
            ],
            "flags": [],
        }
        for c in "abcdefgh"[:n]
    ]
    (place / "cases.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cases))
    texts = [
        {
            "when": w,
            "unit": 0,
            "case_id": c["case_id"],
            "query_id": "rewrite/0",
            "prompt": "<p> is",
            "text": f"{w} & {method}",
        }
        for w in ("pre", "final")
        for c in cases
    ]
    (place / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    report = {"path": dataset, "format": "x", "rows": n, "cases": n, "dropped": {"conflict": 1}, "dropped_queries": {}}
    manifest = {
        "model": {"name": "m_1", "fingerprint": "0" * 64},
        "method": {"label": method, "name": method, "settings": {"layer": 5}},
        "dataset": {**report, "flags": {}},
        "cases": list("abcdefgh"[:n]),
        "protocol": {"kind": kind, "n": n, "batch": batch, "checkpoints": []},
        "seed": seed,
    }
    return Run(place, manifest, ENVIRONMENT)


@pytest.fixture
def plotting() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, the extra `plot`")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    pre = told([0, 0, 0, 0], [1, 1, 1, 1], "pre")
    runs = [
        *(
            make_run(tmp_path, "jeep", [*pre, *told(es, [1, 1, 1, 0], "final")], seed=seed)
            for seed, es in enumerate(([1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]))
        ),
        *(make_run(tmp_path, "memit", [*pre, *told([1, 0, 0, 0], [1, 1, 1, 1], "final")], seed=s) for s in range(3)),
    ]
    return Bench(tmp_path, {"spec": {"name": "a <bench>"}, **VERSIONS}, ENVIRONMENT, tuple(runs), ())


def named(bench: Bench, start: str) -> Table:
    return next(t for t in tables_of(groups_of(bench)) if t.name.startswith(start))


def test_jeeps_layout(bench: Bench) -> None:
    table = named(bench, "jeep")
    assert table.head[:5] == ("Method", "Score", "ES", "GS", "LS")
    assert table.rows[0] == ("m_1: 4 edits at once",)
    unedited, jeep, memit = table.rows[1:]
    assert unedited[:5] == ("unedited", "0.0", "0.0 (0.0)", "0.0 (0.0)", "100.0 (0.0)")
    scores = [100 * 3 / (2 / es + 1 / 0.75) for es in (1, 0.75, 0.5)]
    assert jeep[:5] == ("jeep", f"{sum(scores) / 3:.1f}", "75.0 (62.1)", "75.0 (62.1)", "75.0 (0.0)")
    assert memit[:2] == ("memit", f"{100 * 3 / (4 + 4 + 1):.1f}")
    assert {(2, 1), (2, 2), (2, 3), (3, 4)} <= table.bold
    assert not any(row == 1 for row, _ in table.bold)  # the unedited model does not compete
    assert "cf.prob_mean" in table.notes[0]
    assert "4 cases; seeds 0, 1, 2" in table.notes[1]
    assert "ci.seed" in table.notes[1]


def test_the_paired_table_is_each_method_minus_the_best(bench: Bench) -> None:
    (row,) = named(bench, "paired").rows
    assert row[0] == "memit"
    assert [cell.split(" [")[0] for cell in row[2:]] == ["-75.0", "-75.0", "+25.0"]  # of the first seed
    assert row[1].startswith("-")


def test_ctps_layout_is_one_variant_throughout(bench: Bench) -> None:
    table = named(bench, "ctp")
    assert table.head == ("Editor", "Efficacy", "Locality", "Generality", "Score")
    assert table.rows[1] == ("unedited", "0.00", "-", "0.00", "0.00")
    assert table.rows[2] == ("jeep", "75.00", "75.00", "75.00", "75.00")
    assert table.rows[3] == ("memit", "25.00", "100.00", "25.00", "50.00")
    assert "ee.tok" in table.notes[0]


def test_knes_layout(tmp_path: Path) -> None:
    def of(method: str, share: float) -> Run:
        records = [
            *axis("rewrite", "ES", {"a": [share]}, variant="ee.tok", when="final"),
            *axis("portability.reasoning", "Portability", {"a": [share, 0]}, variant="ee.tok", when="final"),
            *axis("locality.x", "LS", {"a": [1]}, variant="ee.loc.argmax", when="final"),
            *axis("rewrite", "fluency", {"a": [5.5]}, variant="flu.new.re", when="final"),
            *axis("rewrite", "fluency", {"a": [6]}, variant="flu.easyedit.re", when="final"),
        ]
        return make_run(tmp_path, method, records, kind="single", n=1, dataset="recent")

    bench = Bench(tmp_path, {"spec": {"name": "k"}, **VERSIONS}, ENVIRONMENT, (of("rome", 0.5), of("kne", 1.0)), ())
    table = named(bench, "kne")
    assert table.head == ("Dataset", "Metric", "rome", "kne")
    assert table.rows == (
        ("recent", "Edit Succ.", "50.00", "100.00"),
        ("recent", "Portability", "25.00", "50.00"),
        ("recent", "Locality", "100.00", "100.00"),
        ("recent", "Fluency", "550.00", "550.00"),
        ("recent", "Fluency, sampled", "600.00", "600.00"),
    )
    assert {(0, 3), (1, 3)} <= table.bold
    assert "Fluency: flu.new.re" in table.notes[0]
    assert "Fluency, sampled: flu.easyedit.re" in table.notes[0]
    assert "rephrased prompts are not in it" in table.notes[0]


def test_rows_of_several_datasets_are_told_apart(tmp_path: Path, plotting: None) -> None:
    def hops(share: float) -> list[Record]:
        return [r for when in ("pre", "final") for r in axis(
            "multihop", "multi_hop", {"a": [share]}, variant="mq.vanilla", when=when
        )]  # fmt: skip

    runs = [
        make_run(tmp_path, method, hops(share), dataset=dataset)
        for dataset, shares in (("CF-3k", (0.2, 0.4)), ("T", (0.9, 0.8)))
        for method, share in zip(("jeep", "memit"), shares, strict=True)
    ]
    bench = Bench(tmp_path, {"spec": {"name": "b"}, **VERSIONS}, ENVIRONMENT, tuple(runs), ())
    tables = [t for t in tables_of(groups_of(bench)) if t.name.startswith("mq")]
    assert [t.title for t in tables] == ["CF-3k: what follows from the edits", "T: what follows from the edits"]
    assert [[t.rows[i][0] for i, _ in sorted(t.bold)] for t in tables] == [["memit"], ["jeep"]]
    rows = [row[0] for row in named(bench, "cost").rows]
    assert rows == ["m_1: 4 edits at once", "jeep, CF-3k", "memit, CF-3k", "jeep, T", "memit, T"]
    (times,) = (p for p in pictures_of(groups_of(bench)) if p.name.startswith("time"))
    assert "jeep, T: 0.500 s" in times.alt


def test_conditions_of_tests_have_no_column(tmp_path: Path) -> None:
    records = [
        *axis("rewrite", "edit_success", {"a": [1]}, variant="ripple", when="final"),
        *axis("ripple.condition", "ripple.condition", {"a": [1]}, variant="gen.contains", when="final"),
        *axis("ripple.forgetfulness", "ripple.forgetfulness", {"a": [0.5]}, variant="ripple.taken", when="final"),
    ]
    runs = (make_run(tmp_path, "jeep", records, n=1),)
    table = named(Bench(tmp_path, {"spec": {"name": "r"}, **VERSIONS}, ENVIRONMENT, runs, ()), "ripple")
    assert table.head == ("Method", "edit_success", "ripple.forgetfulness")


def test_metrics_of_ones_own_are_a_table_of_their_values(tmp_path: Path) -> None:
    records = [
        *axis("own", "Please", {"a": [0.25], "b": [0.5]}, variant="mine:politeness", when="pre"),
        *axis("own", "Please", {"a": [3.0], "b": [4.0]}, variant="mine:politeness", when="final"),
    ]
    run = make_run(tmp_path, "jeep", records, n=2)
    run.manifest["measures"] = {"metrics": ["mine:politeness"]}
    table = named(Bench(tmp_path, {"spec": {"name": "r"}, **VERSIONS}, ENVIRONMENT, (run,), ()), "own")
    assert table.head == ("Method", "Please")
    assert table.rows == (("m_1: 2 edits at once",), ("unedited", "0.375"), ("jeep", "3.5"))
    assert "mine:politeness" in table.notes[0]
    assert not table.bold


def test_a_method_that_lacks_seeds_is_named_and_does_not_compete(bench: Bench) -> None:
    spec = {"spec": {"name": "b", "seeds": [0, 1, 2]}, **VERSIONS}
    whole = dataclasses.replace(bench, manifest=spec)
    assert named(whole, "jeep").bold
    assert "Not finished" not in named(whole, "jeep").markdown()
    part = dataclasses.replace(whole, runs=whole.runs[:-2])
    for name in ("jeep", "ctp", "paired", "cost"):
        table = named(part, name)
        note = "Not finished: memit, m_1, cf & <co>, 4 edits at once lacks seeds 1, 2."
        assert note in table.notes
        assert "Not finished: memit" in table.latex()
        assert not table.bold


def test_curves_need_three_sizes(tmp_path: Path) -> None:
    def of(batch: int, share: float) -> Run:
        records = [*told([0] * 4, [1] * 4, "pre"), *told([share] * 4, [1] * 4, "final")]
        return make_run(tmp_path, "jeep", records, batch=batch)

    runs = (of(1, 1.0), of(2, 0.5), of(4, 0.25))
    whole = {"spec": {"name": "c"}, **VERSIONS}
    bench = Bench(tmp_path, whole, ENVIRONMENT, runs, ())
    table = named(bench, "curve")
    assert [row[:2] for row in table.rows] == [("1", "jeep"), ("2", "jeep"), ("4", "jeep")]
    assert [row[3].split()[0] for row in table.rows] == ["100.0", "50.0", "25.0"]
    two = Bench(tmp_path, whole, ENVIRONMENT, runs[:2], ())
    assert not [t for t in tables_of(groups_of(two)) if t.name.startswith("curve")]


def test_a_setting_with_three_values_has_a_curve(tmp_path: Path, plotting: None) -> None:
    def of(clamp: float, even: bool, share: float) -> Run:
        records = [*told([0] * 4, [1] * 4, "pre"), *told([share] * 4, [1] * 4, "final")]
        label = f"jeep {clamp} {even}"
        run = make_run(tmp_path, label, records)
        settings = {"layer": 5, "clamp": clamp, "even": even, "layers": [1] if even else []}  # lists have no curve
        return dataclasses.replace(
            run, manifest={**run.manifest, "method": {"label": label, "name": "jeep", "settings": settings}}
        )

    runs = tuple(of(c, even, c if even else 0.5) for c in (0.25, 1.0, 0.5) for even in (True, False))
    bench = Bench(tmp_path, {"spec": {"name": "c"}, **VERSIONS}, ENVIRONMENT, runs, ())
    table = named(bench, "setting")
    assert table.name == "setting-m-1-cf-co-4-edits-at-once-jeep-clamp"
    assert table.head[:2] == ("clamp", "Method")
    shown = [(*row[:2], row[3].split()[0]) for row in table.rows]
    assert shown == [
        (clamp, f"even {even}, layers {[1] if even else []}", es if even else "50.0")
        for clamp, es in (("0.25", "25.0"), ("0.5", "50.0"), ("1", "100.0"))
        for even in (True, False)
    ]
    (picture,) = (p for p in pictures_of(groups_of(bench)) if p.name.startswith("setting"))
    assert "against clamp for even True, layers [1], even False, layers []" in picture.alt


def test_a_missing_part_is_a_dash(tmp_path: Path) -> None:
    records = [r for r in told([1, 1, 1, 1], [1, 1, 1, 1], "final") if r.metric != "LS"]
    bench = Bench(tmp_path, {"spec": {"name": "x"}, **VERSIONS}, ENVIRONMENT, (make_run(tmp_path, "a", records),), ())
    (row,) = (r for r in named(bench, "jeep").rows if r[0] == "a")
    assert row[1] == row[4] == "-"
    assert row[2].startswith("100.0")


def test_numbers_of_fewer_cases_say_so(tmp_path: Path) -> None:
    pre = told([0, 0, 0, 0], [1, 1, 1, 1], "pre")
    runs = (
        make_run(tmp_path, "jeep", [*pre, *told([1, 1, 0, 1], [1, 1, 0, 1], "final")]),
        make_run(tmp_path, "memit", [*pre, *told([1], [1, 1, 0, 1], "final")]),
    )
    bench = Bench(tmp_path, {"spec": {"name": "x"}, **VERSIONS}, ENVIRONMENT, runs, ())
    start = "Cases that could be measured, where not all: "
    assert named(bench, "jeep").notes[-1] == start + "memit: ES, GS, ES gen 1 of 4."
    assert named(bench, "ctp").notes[-1] == start + "memit: Efficacy, Generality, Score 1 of 4."
    assert named(bench, "paired").notes[-1] == start + "jeep: Score, ES, GS 1 of 4."
    assert "1 of 4 cases could be measured." in page(bench, groups_of(bench), [], [])
    whole = dataclasses.replace(bench, runs=runs[:1])
    assert not [t for t in tables_of(groups_of(whole)) if start in t.markdown()]


def test_one_case_and_one_edit_are_said_to_be_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "jeep", [*told([0], [1], "pre"), *told([1], [1], "final")], n=1)
    bench = Bench(tmp_path, {"spec": {"name": "x"}, **VERSIONS}, ENVIRONMENT, (run,), ())
    table = named(bench, "jeep")
    assert table.rows[0] == ("m_1: 1 edit at once",)
    assert any(note.startswith("1 case; seed 0.") for note in table.notes)


def test_protocols_are_no_seeds(tmp_path: Path) -> None:
    """What differs in its protocol is a row of its own; what is the same run in other words counts once."""

    def of(place: str, kind: str, batch: int | None, checkpoints: list[int], seed: int = 0) -> Run:
        records = [*told([0] * 4, [1] * 4, "pre"), *told([seed % 2] * 4, [1] * 4, "final")]
        run = make_run(tmp_path / place, "jeep", records, kind=kind, batch=batch, seed=seed)
        protocol = run.manifest["protocol"] | {"checkpoints": checkpoints}
        return dataclasses.replace(run, manifest=run.manifest | {"protocol": protocol})

    runs = (
        of("a", "batch", None, []),
        of("b", "batch", 4, []),
        of("c", "sequential", None, [1]),
        of("d", "sequential", None, [2, 1, 4]),
        of("e", "sequential", None, []),
        of("f", "sequential", None, [1], seed=1),
    )
    groups = groups_of(Bench(tmp_path, {"spec": {"name": "p"}, **VERSIONS}, ENVIRONMENT, runs, ()))
    assert [(g.protocol, [run.directory.parent.name for run in g.runs]) for g in groups] == [
        ("4 edits at once", ["a"]),
        ("4 edits, one after another (checkpoints 1)", ["c", "f"]),
        ("4 edits, one after another (checkpoints 1, 2)", ["d"]),
        ("4 edits, one after another (no checkpoints)", ["e"]),
    ]
    kinds = [number.interval.kind for g in groups if (number := g.number("ES")) and number.interval]
    assert kinds == ["ci.wilson", "ci.seed", "ci.wilson", "ci.wilson"]


def test_markdown_csv_and_latex_hold_the_same_cells(bench: Bench) -> None:
    table = named(bench, "jeep")
    markdown = table.markdown()
    assert markdown.startswith("**cf &amp; &lt;co>: Score, ES, GS, LS**\n\n| Method | Score |")
    assert "| jeep | **" in markdown
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert rows[0] == ["block", *table.head]
    assert rows[2] == ["m_1: 4 edits at once", *table.rows[2]]
    latex = table.latex()
    assert r"\multicolumn{7}{l}{\emph{m\_1: 4 edits at once}}" in latex
    assert r"cf \& <co>" in latex
    body = [line for line in latex.splitlines() if line.startswith("jeep")]
    assert body[0].count("&") == len(table.head) - 1
    odd = Table("n", r"a\b", ("h^1", "x~{y}#%$"), (("a|b", "c\nd"),))
    assert r"h\textasciicircum{}1 & x\textasciitilde{}\{y\}\#\%\$" in odd.latex()
    assert r"a\textbackslash{}b" in odd.latex()
    assert "| a\\|b | c d |" in odd.markdown()


def test_numbers_are_those_of_the_records_again(bench: Bench) -> None:
    for group in groups_of(bench):
        number = group.number("ES")
        values = [
            r.value for run in group.runs for r in run.at("final") if (r.metric, r.variant) == ("ES", "cf.prob_mean")
        ]
        assert number is not None
        assert number.value == pytest.approx(sum(v for v in values if v is not None) / len(values))
        assert group.seconds_per_edit() == 0.5
        assert group.peak_bytes() is None


def test_seconds_are_the_mean_over_edits(bench: Bench) -> None:
    place = bench.runs[0].directory / "timings.jsonl"
    write_records(place, [seconds(0.5), seconds(3.0)._replace(n=1)], {})
    (group,) = groups_of(dataclasses.replace(bench, runs=bench.runs[:1]))
    assert group.seconds_per_edit() == (4 * 0.5 + 3.0) / 5


class Tags(HTMLParser):
    """Checks that tags close in order, and collects what is linked and what is loaded."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id") and "svg" not in self.open:
            self.ids.append(str(given["id"]))
        if tag == "a":
            self.links.append(str(given["href"]))
        if tag in ("link", "img", "iframe") or "src" in given:
            self.loads.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


@pytest.mark.usefixtures("plotting")
def test_the_page_is_whole_and_loads_nothing(bench: Bench) -> None:
    groups = groups_of(bench)
    text = page(bench, groups, tables_of(groups), pictures_of(groups))
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.loads == []
    assert [link.removeprefix("#") for link in tags.links] == tags.ids
    assert text.count("<script") == 1
    assert "a &lt;bench&gt;" in text
    assert "retcon bench &lt;x&gt;" in text
    assert "http-equiv" not in text
    assert not re.search(r"(src|href)=\"(?!#)", text.replace('xlink:href="#', ""))
    assert "final &amp; jeep" in text
    assert "dropped for conflict: 1" in text
    assert "Many edits did not take" in text  # memit


def test_every_fact_has_a_row_with_its_texts_and_the_worst_come_first(bench: Bench) -> None:
    (table,) = fact_tables(groups_of(bench))
    assert table.title == "m_1, cf & <co>, 4 edits at once, seed 0"
    assert table.sides == ("jeep", "memit")
    assert [fact.id for fact in table.facts] == ["d", "b", "c", "a"]
    worst = table.facts[0]
    assert (worst.prompt, worst.before, worst.wanted) == ("<d> is", "old", "new")
    jeep, memit = worst.outcomes
    assert jeep is not None
    assert memit is not None
    assert (jeep.untaken, jeep.broke) == (False, True)  # the neighbour of d, of the first seed
    assert (memit.untaken, memit.broke) == (True, False)
    assert jeep.own is not None
    assert (jeep.own.before, jeep.own.after) == ("pre & jeep", "final & jeep")
    (neighbour,) = jeep.of("neighbour")
    assert neighbour.prompt == "neighbours of d"
    assert (neighbour.before, neighbour.after) == ("stays (likelier of the two)", "new (likelier of the two)")
    assert (table.count("broke"), table.count("untaken")) == (1, 3)


@pytest.mark.usefixtures("plotting")
def test_pictures_are_the_same_twice_and_say_what_they_show(bench: Bench) -> None:
    groups = groups_of(bench)
    pictures = pictures_of(groups)
    assert [p.name.split("-")[0] for p in pictures] == ["trade", "relations", "time"]
    assert pictures == pictures_of(groups)
    assert "jeep: LS 75.0, GS 75.0" in pictures[0].alt
    assert all(p.svg.startswith("<svg") for p in pictures)
    for picture in pictures:  # names are inside, for whom a picture reaches by itself
        inside = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", picture.svg))
        assert all(name in inside for name in ("m_1", "4 edits at once", "jeep", "memit")), picture.name


@pytest.mark.usefixtures("plotting")
def test_retention_follows_steps_checkpoints_and_the_end(tmp_path: Path) -> None:
    steps = [r for i in range(4) for r in told([0] * i + [1], [0] * i + [1], "immediate", step=i)]
    own = [r for r in steps if r.case_id == "abcd"[r.step]]
    records = [
        *told([0] * 4, [1] * 4, "pre"),
        *own,
        *told([1, 0], [1, 1], "checkpoint", step=1),
        *told([1, 0, 0, 1], [1] * 4, "final", step=3),
    ]
    bench = Bench(
        tmp_path,
        {"spec": {"name": "s"}, **VERSIONS},
        ENVIRONMENT,
        (make_run(tmp_path, "rome", records, kind="sequential"),),
        (),
    )
    (group,) = groups_of(bench)
    assert drawing._kept(group, "ES") == [(2, 50), (4, 50)]
    assert drawing._right_after(group, "ES") == [(1, 100), (2, 100), (3, 100), (4, 100)]
    (picture,) = drawing.retention([group], {"rome": 0})
    assert "rome: ES 100.0 right after, 50.0 at the end" in picture.alt


def test_pictures_count_every_case_once_as_the_tables_do(tmp_path: Path) -> None:
    records = [
        *told([0] * 4, [1] * 4, "pre"),
        *[r for i in range(4) for r in told([1] * 4, [1] * 4, "immediate", step=i) if r.case_id == "abcd"[i]],
        *told([1] * 4, [1, 1, 0, 0], "final", step=3),
    ]
    of_a = [r for r in records if r.metric == "LS" and r.case_id == "a"]
    more = [r._replace(query_id=f"{r.query_id}.{i}", value=0.0) for r in of_a for i in range(1, 4)]
    run = make_run(tmp_path, "rome", [*records, *more], kind="sequential")
    (group,) = groups_of(Bench(tmp_path, {"spec": {"name": "s"}, **VERSIONS}, ENVIRONMENT, (run,), ()))
    number = group.number("LS")
    assert number is not None
    assert number.value == (1 / 4 + 1 + 0 + 0) / 4
    assert drawing._kept(group, "LS") == [(4, 100 * number.value)]
    assert drawing._right_after(group, "LS") == [(1, 25), (2, 62.5), (3, 75), (4, 81.25)]
    of_relation = {r: [c for c, own in run.relations.items() if own == r] for r in set(run.relations.values())}
    values = {"a": 0.25, "b": 1, "c": 0, "d": 0}
    expected = {r: 100 * sum(values[c] for c in cases) / len(cases) for r, cases in of_relation.items()}
    assert drawing._by_relation(group, "LS") == expected


def test_a_last_batch_that_is_not_full_ends_at_the_number_of_edits(tmp_path: Path) -> None:
    steps = [told([1] * 4, [1] * 4, "immediate", step=i) for i in range(2)]
    own = [r for i, part in enumerate(steps) for r in part if str(r.case_id) in ("abc", "d")[i]]
    records = [*own, *told([1] * 4, [1] * 4, "final", step=1)]
    run = make_run(tmp_path, "rome", records, kind="batch_sequential", batch=3)
    (group,) = groups_of(Bench(tmp_path, {"spec": {"name": "s"}, **VERSIONS}, ENVIRONMENT, (run,), ()))
    assert drawing._kept(group, "ES") == [(4, 100)]
    assert drawing._right_after(group, "ES") == [(3, 100), (4, 100)]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("names", [("中文", "日本"), ("A b", "a-b"), ("!", "?"), ("é", "e\u0301")])
def test_files_of_a_report_never_replace_each_other(names: tuple[str, str], tmp_path: Path, plotting: None) -> None:
    records = [*told([0] * 4, [1] * 4, "pre"), *told([1] * 4, [1] * 4, "final")]
    runs = [
        make_run(tmp_path / str(i), method, records, dataset=name)
        for i, name in enumerate(names)
        for method in ("jeep", "memit")
    ]
    groups = groups_of(Bench(tmp_path, {"spec": {"name": "x"}, **VERSIONS}, ENVIRONMENT, tuple(runs), ()))
    for made in (tables_of(groups), pictures_of(groups)):
        keys = {unicodedata.normalize("NFKC", each.name).casefold() for each in made}
        assert len(keys) == len(made)
        assert not any(set("/\\ .") & set(key) for key in keys)
    if names[0] == "中文":
        assert {t.name for t in tables_of(groups)} >= {"jeep-中文", "jeep-日本"}


def test_without_matplotlib_it_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackage, match=r"pip install 'retcon-lm\[plot\]'"):
        pictures_of(groups_of(bench))


def test_what_is_to_be_known_about_a_model_is_said_beneath_every_table_and_on_the_page(bench: Bench) -> None:
    note = "weights dequantised from x.Q4_1.gguf (Q4_1)"
    assert not [t for t in tables_of(groups_of(bench)) if note in t.markdown()]
    runs = [
        dataclasses.replace(r, manifest=r.manifest | {"model": r.manifest["model"] | {"notes": [note]}})
        for r in bench.runs
    ]
    noted = dataclasses.replace(bench, runs=tuple(runs))
    tables = tables_of(groups_of(noted))
    assert tables
    assert all(f"m_1: {note}." in t.markdown() for t in tables)
    assert f"m_1: {note}." in page(noted, groups_of(noted), tables, [])


def test_methods_are_told_apart_by_colour_and_marker() -> None:
    looks = {(n % len(drawing.COLOURS), n % len(drawing.MARKERS)) for n in range(40)}
    assert len(looks) == 40


def test_files_of_one_name_and_title_are_numbered() -> None:
    same = Picture("jeep-a", "A", "a curve", "<svg/>")
    first, second = distinct([same, same])
    assert second.name == f"{first.name}-2"
    assert distinct([same]) == [same]
