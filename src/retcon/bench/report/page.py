"""One self-contained HTML page: what was run, what held, what broke, and the worst cases with their texts."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from retcon.bench import Bench, Run
from retcon.bench.report.groups import Group, Number, blocks
from retcon.bench.report.plots import Picture
from retcon.bench.report.tables import MISSING, Table
from retcon.evaluation.metrics import is_locality
from retcon.evaluation.records import Record
from retcon.evaluation.summary import generation_variant, main_variant

N_WORST = 6
"""Cases shown per method."""
HELD = 0.9
"""A share that counts as held, in words; under `BROKE` it broke."""
BROKE = 0.6


def page(bench: Bench, groups: Sequence[Group], tables: Sequence[Table], pictures: Sequence[Picture]) -> str:
    """The whole page as a text."""
    body = [
        _header(bench, groups),
        _section("findings", "What held, what broke", _findings(groups)),
        _section("numbers", "Numbers", "\n".join(_table(t) for t in tables if not t.name.startswith("case-"))),
    ]
    if pictures:
        body.append(_section("pictures", "Pictures", "\n".join(map(_picture, pictures))))
    body.append(_section("worst", "Worst cases, in the models' own words", _worst_cases(groups)))
    studies = [t for t in tables if t.name.startswith("case-")]
    if studies:
        body.append(_section("case", "One case, every method", "\n".join(map(_table, studies))))
    body.append(_section("left-out", "What was left out or looked odd", _left_out(groups)))
    body.append(_section("again", "To run it again", _again(bench, groups)))
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title in _LINKS if f'id="{name}"' in "".join(body))
    return _PAGE.format(title=_e(bench.name), style=_STYLE, nav=links, body="\n".join(body))


_LINKS = (
    ("findings", "Findings"),
    ("numbers", "Numbers"),
    ("pictures", "Pictures"),
    ("worst", "Worst cases"),
    ("case", "One case"),
    ("left-out", "Left out"),
    ("again", "Run again"),
)


# --- parts -------------------------------------------------------------------------------------------------------


def _header(bench: Bench, groups: Sequence[Group]) -> str:
    listed = {
        "Models": dict.fromkeys(g.model for g in groups),
        "Methods": dict.fromkeys(g.method for g in groups),
        "Data": dict.fromkeys(g.dataset for g in groups),
        "Protocols": dict.fromkeys(g.protocol for g in groups),
        "Seeds": dict.fromkeys(str(r.manifest["seed"]) for g in groups for r in g.runs),
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{_e(', '.join(values))}</dd></div>" for name, values in listed.items())
    todo = f'<p class="warn">Not finished: {_e(", ".join(bench.unfinished))}</p>' if bench.unfinished else ""
    return f'<header><p class="kind">retcon benchmark</p><h1>{_e(bench.name)}</h1><dl>{items}</dl>{todo}</header>'


def _findings(groups: Sequence[Group]) -> str:
    """A card per method: three bars, and a sentence."""
    parts = []
    for model, protocol, block in blocks(groups):
        cards = "".join(_card(g) for g in block)
        parts.append(f'<h3>{_e(model)} <span>{_e(protocol)}</span></h3><div class="cards">{cards}</div>')
    return (
        '<p class="lead">Bars are shares after the edits; the thin line marks the unedited model. Green: at least '
        "90 %. Red: under 60 %.</p>" + "\n".join(parts)
    )


def _card(group: Group) -> str:
    bars = []
    for name, means in (
        ("ES", "edits take"),
        ("GS", "in other words"),
        ("LS", "neighbours stay"),
        ("Portability", "what follows"),
    ):
        number, before = group.number(name), group.number(name, before=True)
        if number is not None:
            bars.append(_bar(name, means, number, before))
    variant = generation_variant(group.family)
    written = group.number("ES", variant)
    if written is not None:
        bars.append(_bar("ES gen", "written out", written, group.number("ES", variant, before=True)))
    score = group.number("Score", "score.am" if group.family == "ee" else "score.hm")
    shown = f"{100 * score.value:.1f}" if score else MISSING
    data = f'<span class="of">{_e(group.dataset)}</span>'
    return (
        f'<article class="card"><h4>{_e(group.method)} {data}<b title="Score">{shown}</b></h4>{"".join(bars)}'
        f"<p>{_e(_sentence(group))}</p></article>"
    )


def _bar(name: str, means: str, number: Number, before: Number | None) -> str:
    value = 100 * number.value
    tone = "good" if number.value >= HELD else "bad" if number.value < BROKE else "mid"
    mark = f'<i style="left:{100 * before.value:.1f}%"></i>' if before is not None else ""
    half = ""
    if number.interval is not None:
        low, high = 100 * number.interval.low, 100 * number.interval.high
        lopsided = number.interval.kind == "ci.wilson"
        half = f" [{low:.1f}, {high:.1f}]" if lopsided else f" ± {100 * number.interval.half_width:.1f}"
    return (
        f'<div class="bar"><span>{name} <em>{means}</em></span><span class="track"><u class="{tone}" '
        f'style="width:{max(0.0, min(100.0, value)):.1f}%"></u>{mark}</span><span class="num">{value:.1f}'
        f"<em>{half}</em></span></div>"
    )


def _sentence(group: Group) -> str:
    """What the numbers say, in words."""
    es, gs, ls = (group.number(name) for name in ("ES", "GS", "LS"))
    failed = [r for run in group.runs for r in run.records if r.axis == "edit" and r.status == "error"]
    if es is None:
        return f"No edit could be made: {failed[0].detail}" if failed else "Nothing was measured."
    said = [
        _judged(es, "The edits took", "Most edits took", "Many edits did not take"),
        _judged(gs, "they hold in other words", "they hold in other words mostly", "other words often lose them"),
        _judged(ls, "neighbours kept their answers", "some neighbours changed", "many neighbours changed"),
    ]
    text = ", ".join(part for part in said if part) + "."
    before = group.number("LS", before=True)
    if ls is not None and before is not None and before.value - ls.value > 0.005:
        text += f" Locality fell by {100 * (before.value - ls.value):.1f} points."
    variant = generation_variant(group.family)
    written = group.number("ES", variant)
    if written is not None and es.value - written.value > 0.05:
        how = "exactly" if variant == "gen.em" else "with the new answer first"
        text += f" Written out freely, {100 * written.value:.0f} % of the edits are answered {how}."
    ppl = group.number("perplexity", "ppl.ratio")
    if ppl is not None:
        text += f" Perplexity of held-out text is {ppl.value:.2f} times what it was."
    return text + (f" {len(failed)} edits could not be made: {failed[0].detail}" if failed else "")


def _judged(number: Number | None, held: str, half: str, broke: str) -> str:
    if number is None:
        return ""
    return held if number.value >= HELD else broke if number.value < BROKE else half


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_e(h)}</th>' for h in table.head)
    rows = []
    for i, row in enumerate(table.rows):
        if len(row) == 1:
            rows.append(f'<tr class="block"><th colspan="{len(table.head)}">{_e(row[0])}</th></tr>')
            continue
        cells = [
            f"<td><strong>{_e(c)}</strong></td>" if (i, j) in table.bold else f"<td>{_e(c)}</td>"
            for j, c in enumerate(row)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<p>{_e(note)}</p>" for note in table.notes)
    wide = " text" if table.name.startswith("case-") else ""
    return (
        f'<figure><figcaption>{_e(table.title)}</figcaption><div class="scroll"><table class="numbers{wide}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<div class="notes">{notes}</div></figure>'
    )


def _picture(picture: Picture) -> str:
    svg = picture.svg.replace("<svg ", f'<svg role="img" aria-label="{_e(picture.alt)}" ', 1)
    return f'<figure><figcaption>{_e(picture.title)}</figcaption><div class="scroll picture">{svg}</div></figure>'


# --- worst cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worst:
    """A case that went wrong under a method."""

    case_id: str
    edit: str
    rows: tuple[tuple[str, str, str, str, str], ...]
    """(axis, prompt, wanted, before, after)."""


def _worst_cases(groups: Sequence[Group]) -> str:
    parts = []
    for model, protocol, block in blocks(groups):
        for group in block:
            found = worst_of(group)
            title = f"{group.method} <span>{_e(model)}, {_e(group.dataset)}, {_e(protocol)}</span>"
            if not found:
                parts.append(f"<details><summary>{title}</summary><p>No case went wrong.</p></details>")
                continue
            parts.append(f"<details><summary>{title}</summary>{''.join(map(_worst_card, found))}</details>")
    return (
        '<p class="lead">For each method, the cases with most failures of seed '
        f"{_e(str(groups[0].runs[0].manifest['seed'])) if groups else '-'}. Open a line to read what the model wrote "
        "before and after.</p>" + "\n".join(parts)
    )


def worst_of(group: Group) -> list[Worst]:
    """The cases of a group's first run with the most failed queries, worst first."""
    run = group.runs[0]
    failed: dict[str, list[Record]] = {}
    was = {(r.case_id, r.query_id): r.value for r in run.at("pre") if _decides(group, r)}
    for record in run.at("final"):
        if not _decides(group, record) or record.value is None or record.case_id is None:
            continue
        locality = is_locality(record.axis or "")
        fell = record.value < 1 and (not locality or (was.get((record.case_id, record.query_id)) or 0.0) > record.value)
        if fell:
            failed.setdefault(record.case_id, []).append(record)
    order = {case_id: place for place, case_id in enumerate(run.cases)}
    ranked = sorted(failed, key=lambda c: (-_weight(failed[c]), order.get(c, 0)))
    texts = _texts(run)
    return [_worst(run, case_id, failed[case_id], texts) for case_id in ranked[:N_WORST]]


def _decides(group: Group, record: Record) -> bool:
    if record.axis not in ("rewrite", "paraphrase", "neighborhood") and not (record.axis or "").startswith("locality."):
        return False
    return record.variant == main_variant(group.summaries[0].family, record.metric)


def _weight(records: Iterable[Record]) -> float:
    """A failed edit weighs most."""
    return sum({"rewrite": 10.0, "paraphrase": 2.0}.get(r.axis or "", 1.0) for r in records)


def _texts(run: Run) -> dict[tuple[str, str, str], tuple[str, str]]:
    """(when, case, query) -> (prompt, text)."""
    return {(row["when"], row["case_id"], row["query_id"]): (row["prompt"], row["text"]) for row in run.texts}


def _worst(
    run: Run, case_id: str, failed: Sequence[Record], texts: dict[tuple[str, str, str], tuple[str, str]]
) -> Worst:
    case = run.cases[case_id]
    edit = "; ".join(
        f"{e['prompt']} → {e['target_new']}" + (f" (was {e['target_true']})" if e["target_true"] else "")
        for e in case["edits"]
    )
    wrong = {r.query_id for r in failed}
    rows = []
    for when, found_case, query in texts:
        axis = query.partition("/")[0]
        if when == "final" and found_case == case_id and (query in wrong or axis == "rewrite"):
            prompt, after = texts[when, case_id, query]
            before = texts.get(("pre", case_id, query), ("", MISSING))[1]
            wanted = case["edits"][0]["target_new"] if axis in ("rewrite", "paraphrase") else "as before"
            rows.append(("✗ " * (query in wrong) + axis, prompt, wanted, before, after))
    silent = [r for r in failed if ("final", case_id, str(r.query_id)) not in texts]
    if silent:
        counts = ", ".join(f"{sum(r.axis == a for r in silent)} {a}" for a in dict.fromkeys(r.axis for r in silent))
        rows.append(("✗", f"also failed, by likelihood: {counts}", "", "", ""))
    return Worst(case_id, edit, tuple(rows))


def _worst_card(worst: Worst) -> str:
    rows = "".join(
        f'<tr class="{"bad" if axis.startswith("✗") else ""}"><td>{_e(axis)}</td><td>{_e(prompt)}</td>'
        f'<td data-h="wanted">{_e(wanted)}</td><td data-h="before">{_e(_short(before))}</td>'
        f'<td data-h="after">{_e(_short(after))}</td></tr>'
        for axis, prompt, wanted, before, after in worst.rows
    )
    return (
        f'<div class="worst"><h4>{_e(worst.edit)} <span>case {_e(worst.case_id)}</span></h4><div class="scroll"><table>'
        "<thead><tr><th></th><th>prompt</th><th>wanted</th><th>before</th><th>after</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _short(text: str, most: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


# --- the rest ----------------------------------------------------------------------------------------------------


def _left_out(groups: Sequence[Group]) -> str:
    items = []
    seen = set()
    for group in groups:
        report = group.runs[0].manifest["dataset"]
        if report["path"] not in seen:
            seen.add(report["path"])
            told = [
                f"{report['cases']:,} of {report['rows']:,} rows kept ({report['format']})",
                *(f"dropped for {k}: {v:,}" for k, v in report["dropped"].items()),
                *(f"queries dropped for {k}: {v:,}" for k, v in report["dropped_queries"].items()),
                *(f"flagged {k}: {v:,}" for k, v in report["flags"].items()),
            ]
            items.append(f"<li><b>{_e(report['path'])}</b>: {_e('; '.join(told))}</li>")
    for group in groups:
        counts: dict[str, int] = {}
        for summary in group.summaries:
            for name, n in summary.counts.items():
                counts[name] = counts.get(name, 0) + n
        told = [f"{name} {n:,}" for name, n in counts.items() if n]
        edits = [r for run in group.runs for r in run.records if r.axis == "edit" and r.status != "ok"]
        if edits:
            told.append(f"edits not made {len(edits):,} ({edits[0].detail})")
        if told:
            where = f"{group.method}, {group.model}, {group.dataset}, {group.protocol}"
            items.append(f"<li>{_e(where)}: queries {_e('; '.join(told))}</li>")
    return f"<ul>{''.join(items)}</ul>"


def _again(bench: Bench, groups: Sequence[Group]) -> str:
    around = bench.environment
    versions = ", ".join(f"{k} {bench.manifest[k]}" for k in ("retcon", "python", "torch", "transformers"))
    rows = [
        ("Command", f"<code>{_e(str(around['command']))}</code>"),
        ("Machine", _e(f"{around['processor']}, {around['threads']} thread(s), {around['os']}")),
        ("Versions", _e(versions + (f", commit {around['commit']}" if around["commit"] else ""))),
        *(("Note", _e(note)) for note in dict.fromkeys(note for g in groups for note in g.model_notes)),
        *(
            (f"Model {m}", f"<code>{_e(f)}</code>")
            for m, f in dict.fromkeys((g.model, g.runs[0].manifest["model"]["fingerprint"]) for g in groups)
        ),
    ]
    settings = "".join(
        f"<details><summary>{_e(g.method)} <span>{_e(g.model)}</span></summary><p><code>{_e(_settings(g))}</code></p>"
        "</details>"
        for g in {(g.model, g.method): g for g in groups}.values()
    )
    table = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="facts">{table}</table></div><h3>Settings</h3>{settings}'


def _settings(group: Group) -> str:
    return ", ".join(f"{k} = {v}" for k, v in group.runs[0].manifest["method"]["settings"].items())


def _section(name: str, title: str, inside: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>\n{inside}\n</section>'


def _e(text: str) -> str:
    return html.escape(text, quote=True)


_STYLE = """
:root { --ink: #1a202c; --soft: #5a6578; --line: #e2e8f0; --paper: #fff; --wash: #f7f9fc; --good: #2f855a;
  --mid: #b7791f; --bad: #c53030; --link: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
nav { position: sticky; top: 0; z-index: 2; background: rgba(255, 255, 255, .94); border-bottom: 1px solid var(--line);
  padding: .55rem 1rem; display: flex; gap: 1.1rem; overflow-x: auto; white-space: nowrap; }
nav a { color: var(--link); text-decoration: none; font-size: .9rem; }
nav a:hover { text-decoration: underline; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
header h1 { font-size: 1.9rem; line-height: 1.2; margin: .1rem 0 1rem; }
.kind { color: var(--soft); margin: 0; font-size: .85rem; letter-spacing: .04em; text-transform: uppercase; }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 0; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-weight: 600; }
.warn { color: var(--bad); }
section { margin-top: 2.6rem; scroll-margin-top: 3rem; }
h2 { font-size: 1.3rem; margin: 0 0 .6rem; padding-bottom: .3rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .6rem; }
h3 span, h4 span, summary span { color: var(--soft); font-weight: 400; font-size: .9em; margin-left: .4em; }
.lead, .notes p { color: var(--soft); font-size: .86rem; margin: .2rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .9rem; }
.card, figure, details, .facts { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: .8rem 1rem; } .card h4 { margin: 0 0 .5rem; display: flex; align-items: baseline; gap: .4rem; }
.card h4 b { margin-left: auto; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.card p { margin: .6rem 0 0; font-size: .86rem; color: var(--soft); }
.bar { display: grid; grid-template-columns: 8.6rem 1fr 5.2rem; align-items: center; gap: .5rem; font-size: .84rem; }
.bar em, .num em { color: var(--soft); font-style: normal; font-size: .92em; }
.track { position: relative; height: .6rem; background: #edf2f7; border-radius: 4px; }
.track u { display: block; height: 100%; border-radius: 4px; }
.track i { position: absolute; top: -2px; bottom: -2px; width: 2px; background: var(--ink); opacity: .65; }
.good { background: var(--good); } .mid { background: var(--mid); } u.bad { background: var(--bad); }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; padding: .8rem 1rem; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { padding: .32rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; font-size: .8rem; }
.numbers td + td, .numbers th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers.text td + td, .numbers.text th + th { text-align: left; white-space: normal; min-width: 7rem; }
tr.block th { background: var(--wash); font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
.picture svg { max-width: 100%; height: auto; min-width: 20rem; display: block; margin: 0 auto; }
details { padding: .5rem .9rem; margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
.worst { margin: .9rem 0; padding-left: .8rem; border-left: 3px solid var(--line); }
.worst h4 { margin: 0 0 .3rem; font-size: .93rem; }
tr.bad td:first-child { color: var(--bad); font-weight: 600; white-space: nowrap; }
tr.bad td:last-child { color: var(--bad); }
code { font: .84rem ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.facts th { white-space: nowrap; color: var(--soft); font-weight: 600; width: 1%; }
@media (max-width: 40rem) {
  .bar { grid-template-columns: 1fr 5.2rem; } .bar .track { grid-column: 1 / -1; grid-row: 2; margin-bottom: .35rem; }
  .cards { grid-template-columns: 1fr; }
  .worst thead { display: none; } .worst tr, .worst td { display: block; border: 0; padding: .05rem 0; }
  .worst tr { border-bottom: 1px solid var(--line); padding: .35rem 0; }
  .worst td[data-h]:not(:empty)::before { content: attr(data-h) ": "; color: var(--soft); }
}
@media print { nav { display: none; } body { background: #fff; } details { break-inside: avoid; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<nav>{nav}</nav>
<main>
{body}
</main>
</body>
</html>
"""
