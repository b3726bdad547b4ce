"""One self-contained HTML page: what was run, what held, what broke, and every fact in the models' own words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from retcon.bench import Bench
from retcon.bench.report.facts import fact_tables
from retcon.bench.report.groups import Group, Number, blocks
from retcon.bench.report.plots import Picture
from retcon.bench.report.tables import MISSING, Table
from retcon.evaluation.summary import generation_variant
from retcon.pages import render
from retcon.plural import plural

HELD = 0.9
"""A share that counts as held, in words; under `BROKE` it broke."""
BROKE = 0.6
BARS = (("ES", "edits take"), ("GS", "in other words"), ("LS", "neighbours stay"), ("Portability", "what follows"))


def page(bench: Bench, groups: Sequence[Group], tables: Sequence[Table], pictures: Sequence[Picture]) -> str:
    """Return the whole page as a text."""
    families = {g.family for g in groups}
    means = {
        "ee": "the mean of edits that take, other words, what follows and neighbours",
        "cf": "the harmonic mean of ES, GS and LS",
    }
    return render(
        "bench.html",
        bench=bench,
        about=_about(groups),
        held=HELD,
        broke=BROKE,
        score="; ".join(dict.fromkeys(means["ee" if family == "ee" else "cf"] for family in sorted(families))) + ".",
        findings=[(model, protocol, [_card(g) for g in block]) for model, protocol, block in blocks(groups)],
        tables=[t for t in tables if not t.name.startswith("case-")],
        studies=[t for t in tables if t.name.startswith("case-")],
        pictures=[{"title": p.title, "alt": p.alt, "markup": Markup(p.svg)} for p in pictures],
        fact_tables=fact_tables(groups),
        left_out=_left_out(groups),
        again=_again(bench, groups),
        settings=[(g.method, g.model, _settings(g)) for g in {(g.model, g.method): g for g in groups}.values()],
    )


def _about(groups: Sequence[Group]) -> dict[str, list[str]]:
    seeds = dict.fromkeys(str(run.manifest["seed"]) for g in groups for run in g.runs)
    return {
        "Models": list(dict.fromkeys(g.model for g in groups)),
        "Methods": list(dict.fromkeys(g.method for g in groups)),
        "Data": list(dict.fromkeys(g.dataset for g in groups)),
        "Protocols": list(dict.fromkeys(g.protocol for g in groups)),
        "Seeds": list(seeds),
    }


# --- findings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A share as a bar, in per cent."""

    name: str
    means: str
    percent: float
    before: float | None
    """The unedited model's."""
    interval: str

    @property
    def width(self) -> float:
        return max(0.0, min(100.0, self.percent))

    @property
    def tone(self) -> str:
        return "good" if self.percent >= 100 * HELD else "bad" if self.percent < 100 * BROKE else "mid"


def _card(group: Group) -> Mapping[str, Any]:
    """Return a method's bars, its score, and a sentence."""
    variant = generation_variant(group.family)
    found = [(name, means, group.number(name), group.number(name, before=True)) for name, means in BARS]
    found.append(("ES gen", "written out", group.number("ES", variant), group.number("ES", variant, before=True)))
    score = group.number("Score", "score.am" if group.family == "ee" else "score.hm")
    return {
        "method": group.method,
        "dataset": group.dataset,
        "score": f"{100 * score.value:.1f}" if score else MISSING,
        "bars": [_bar(name, means, number, before) for name, means, number, before in found if number is not None],
        "sentence": _sentence(group),
    }


def _bar(name: str, means: str, number: Number, before: Number | None) -> Bar:
    half = ""
    if number.interval is not None:
        low, high = 100 * number.interval.low, 100 * number.interval.high
        lopsided = number.interval.kind == "ci.wilson"
        half = f" [{low:.1f}, {high:.1f}]" if lopsided else f" ± {100 * number.interval.half_width:.1f}"
    return Bar(name, means, 100 * number.value, None if before is None else 100 * before.value, half)


def _sentence(group: Group) -> str:
    """Return what the numbers say, in words."""
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
    if es.n < es.n_cases:
        text += f" {es.n:,} of {plural(es.n_cases, 'case')} could be measured."
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
    return text + (f" {plural(len(failed), 'edit')} could not be made: {failed[0].detail}" if failed else "")


def _judged(number: Number | None, held: str, half: str, broke: str) -> str:
    if number is None:
        return ""
    return held if number.value >= HELD else broke if number.value < BROKE else half


# --- the rest ----------------------------------------------------------------------------------------------------


def _left_out(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Return (dataset or run, what was dropped, flagged or failed there)."""
    items = {}
    for group in groups:
        report = group.runs[0].manifest["dataset"]
        items[report["path"]] = [
            f"{report['cases']:,} of {report['rows']:,} rows kept ({report['format']})",
            *(f"dropped for {k}: {v:,}" for k, v in report["dropped"].items()),
            *(f"queries dropped for {k}: {v:,}" for k, v in report["dropped_queries"].items()),
            *(f"flagged {k}: {v:,}" for k, v in report["flags"].items()),
        ]
    for group in groups:
        counts: dict[str, int] = {}
        for summary in group.summaries:
            for name, n in summary.counts.items():
                if name.endswith("_edits"):  # listed below, with the reason
                    continue
                counts[name] = counts.get(name, 0) + n
        parts = [f"queries {name}: {n:,}" for name, n in counts.items() if n]
        edits = [r for run in group.runs for r in run.records if r.axis == "edit" and r.status != "ok"]
        if edits:
            parts.append(f"edits not made {len(edits):,} ({edits[0].detail})")
        if parts:
            items[f"{group.method}, {group.model}, {group.dataset}, {group.protocol}"] = parts
    return list(items.items())


def _again(bench: Bench, groups: Sequence[Group]) -> list[tuple[str, str]]:
    around = bench.environment
    versions = ", ".join(f"{k} {bench.manifest[k]}" for k in ("retcon", "python", "torch", "transformers"))
    models = dict.fromkeys((g.model, g.runs[0].manifest["model"]["fingerprint"]) for g in groups)
    return [
        ("Command", str(around["command"])),
        ("Machine", f"{around['processor']}, {plural(around['threads'], 'thread')}, {around['os']}"),
        ("Versions", versions + (f", commit {around['commit']}" if around["commit"] else "")),
        *(("Note", note) for note in dict.fromkeys(note for g in groups for note in g.model_notes)),
        *((f"Model {model}", fingerprint) for model, fingerprint in models),
    ]


def _settings(group: Group) -> str:
    return ", ".join(f"{k} = {v}" for k, v in group.runs[0].manifest["method"]["settings"].items())
