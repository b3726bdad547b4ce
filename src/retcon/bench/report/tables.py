"""The papers' table layouts from tidy records, as Markdown, CSV and LaTeX.

One column holds one variant throughout; a footnote names each, with cases, seeds and kind of interval.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from retcon.bench.report.curves import curves
from retcon.bench.report.groups import UNEDITED, Group, Number, blocks, by_dataset, row_names
from retcon.bench.report.names import distinct, slug
from retcon.escaping import csv_cell, latex, markdown
from retcon.evaluation.metrics import score_am
from retcon.evaluation.paired import Difference, differences
from retcon.evaluation.summary import generation_variant
from retcon.plural import plural

MISSING = "-"
TOKENS = ("ee.tok", "zsre.tok")
"""Two names of one number: token accuracy of the target."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    name: str
    """For its files; unlike that of every other table."""
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """A row of one cell starts a block."""
    notes: tuple[str, ...] = ()
    bold: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the best values."""

    def markdown(self) -> str:
        """Return the table as Markdown, numbers to the right."""
        lines = [
            f"**{markdown(self.title)}**",
            "",
            _pipes(map(markdown, self.head)),
            _pipes(["---", *["---:"] * (len(self.head) - 1)]),
        ]
        for i, row in enumerate(self.rows):
            cells = [f"**{markdown(c)}**" if (i, j) in self.bold else markdown(c) for j, c in enumerate(row)]
            if len(row) == 1:
                cells = [f"*{markdown(row[0])}*", *[""] * (len(self.head) - 1)]
            lines.append(_pipes(cells))
        return "\n".join([*lines, "", *(f"{markdown(note)}  " for note in self.notes)]).rstrip() + "\n"

    def csv(self) -> str:
        """Return the table as CSV; blocks are a column of their own, nothing is bold, notes are left out."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        has_blocks = any(len(row) == 1 for row in self.rows)
        writer.writerow([*(["block"] if has_blocks else []), *map(csv_cell, self.head)])
        block = ""
        for row in self.rows:
            if len(row) == 1:
                block = csv_cell(row[0])
            else:
                writer.writerow([*([block] if has_blocks else []), *map(csv_cell, row)])
        return out.getvalue()

    def latex(self) -> str:
        """Return the table as a LaTeX `tabular` with booktabs rules."""
        lines = [f"% {latex(self.title)}", f"\\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}", "\\toprule"]
        lines += [" & ".join(map(latex, self.head)) + r" \\", "\\midrule"]
        for i, row in enumerate(self.rows):
            if len(row) == 1:
                lines.append(f"\\multicolumn{{{len(self.head)}}}{{l}}{{\\emph{{{latex(row[0])}}}}} \\\\")
            else:
                cells = [f"\\textbf{{{latex(c)}}}" if (i, j) in self.bold else latex(c) for j, c in enumerate(row)]
                lines.append(" & ".join(cells) + r" \\")
        lines += ["\\bottomrule", "\\end{tabular}", *(f"% {latex(note)}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def tables_of(groups: Sequence[Group]) -> list[Table]:
    """Return every layout that the runs have the numbers for."""
    layouts: list[Callable[[Sequence[Group]], list[Table]]] = [
        jeep,
        ctp,
        kne,
        multihop,
        own_metrics,
        curve,
        paired,
        cost,
        case_study,
    ]
    about = tuple(dict.fromkeys(note for group in groups for note in (*group.unfinished_notes, *group.model_notes)))
    made = [replace(table, notes=(*table.notes, *about)) for layout in layouts for table in layout(groups)]
    return distinct(made)


# --- layouts -----------------------------------------------------------------------------------------------------


def jeep(groups: Sequence[Group]) -> list[Table]:
    """Return JEEP's Tables 2, 3 and 4: Method | Score | ES | GS | LS, `mean (half-width)`, one decimal."""
    tables = []
    for dataset in dict.fromkeys(g.dataset for g in groups if g.family in ("cf", "zsre")):
        own = [g for g in groups if g.dataset == dataset]
        names = ("Score", "ES", "GS", "LS", "ES gen", "GS gen")
        head = ("Method", *names)
        builder = _Builder(head)
        kinds: set[str] = set()
        for model, protocol, block in blocks(own):
            builder.block(f"{model}: {protocol}")
            for label, group, before in [(UNEDITED, block[0], True), *((g.method, g, False) for g in block)]:
                numbers = [
                    group.number("Score", "score.hm", before=before),
                    *(group.number(name, before=before) for name in ("ES", "GS", "LS")),
                    *(group.number(name, generation_variant(group.family), before=before) for name in ("ES", "GS")),
                ]
                kinds |= _kinds(numbers[1:])
                cells = [_plain(numbers[0]), *(_with_half_width(n) for n in numbers[1:])]
                builder.row(label, cells, numbers, compete=not before)
        variant = "cf.prob_mean" if own[0].family == "cf" else "zsre.tok"
        written = {
            "gen.em": "gen.em, the text that the model writes is the answer",
            "gen.prefix": "gen.prefix, the text that the model writes starts with the answer, without the old one",
        }[generation_variant(own[0].family)]
        notes = (f"x100. ES, GS, LS: {variant}; Score: score.hm, of the three; gen: {written}.", _counts(own, kinds))
        tables.append(builder.table(f"jeep-{slug(dataset)}", f"{dataset}: Score, ES, GS, LS", notes))
    return tables


def ctp(groups: Sequence[Group]) -> list[Table]:
    """Return CTP's Tables 1 and 2: Efficacy, Locality, Generality, Score per dataset, two decimals, no intervals."""
    fitting = [g for g in groups if g.number("LS", "ee.loc.argmax") and g.number("ES", *TOKENS)]
    datasets = list(dict.fromkeys(g.dataset for g in fitting))
    if not fitting:
        return []
    parts = ("Efficacy", "Locality", "Generality", "Score")
    head = ("Editor", *(f"{d} {part}" if len(datasets) > 1 else part for d in datasets for part in parts))
    builder = _Builder(head)
    for model, protocol, block in blocks(fitting):
        builder.block(f"{model}: {protocol}")
        methods = list(dict.fromkeys(g.method for g in block))
        for label in (UNEDITED, *methods):
            cells: list[str] = []
            values: list[Number | None] = []
            for dataset in datasets:
                group = next((g for g in block if g.dataset == dataset and label in (UNEDITED, g.method)), None)
                numbers = _ctp_numbers(group, before=label == UNEDITED) if group else [None] * 4
                values += numbers
                cells += [MISSING if n is None else f"{100 * n.value:.2f}" for n in numbers]
            builder.row(label, cells, values, compete=label != UNEDITED)
    notes = (
        "x100. Efficacy, Generality: ee.tok, token accuracy of the new answer on the edit's prompt and on paraphrases; "
        "Locality: ee.loc.argmax, agreement with the unedited model; Score: score.am, their mean (of the first two for "
        "the unedited model).",
        _counts(fitting, set()),
    )
    return [builder.table("ctp", "Efficacy, Locality, Generality (token accuracy and agreement)", notes)]


def _ctp_numbers(group: Group, *, before: bool) -> list[Number | None]:
    es, gs = (group.number(name, *TOKENS, before=before) for name in ("ES", "GS"))
    ls = None if before else group.number("LS", "ee.loc.argmax")
    am = score_am(*(None if n is None else n.value for n in (es, gs, ls)))
    return [es, ls, gs, None if am is None or es is None else Number(am, None, es.n, es.n_cases, es.runs)]


def kne(groups: Sequence[Group]) -> list[Table]:
    """Return KNE's Table 1: rows dataset x {Edit Succ., Portability, Locality, Fluency}, columns methods.

    A row for each fluency that was measured (`fluency` of a benchmark's measures); KNE's is `flu.easyedit`.
    """
    fitting = [g for g in groups if g.family == "ee"]
    tables = []
    for model, protocol, block in blocks(fitting):
        methods = list(dict.fromkeys(g.method for g in block))
        builder = _Builder(("Dataset", "Metric", *methods), text_columns=2)
        fluencies = _fluencies(block)
        for dataset in dict.fromkeys(g.dataset for g in block):
            for metric, name, variants in (
                ("Edit Succ.", "ES", ("ee.tok",)),
                ("Portability", "Portability", ("ee.tok",)),
                ("Locality", "LS", ("ee.loc.argmax",)),
                *((row, "fluency", (variant,)) for row, variant, _ in fluencies),
            ):
                own = {g.method: g for g in block if g.dataset == dataset}
                numbers = [own[m].number(name, *variants) if m in own else None for m in methods]
                cells = [MISSING if n is None else f"{100 * n.value:.2f}" for n in numbers]
                builder.row_of(dataset, metric, cells, numbers)
        notes = (
            "x100. Edit Succ., Portability: ee.tok, token accuracy; Edit Succ. is asked on the edit's own prompt, "
            "rephrased prompts are not in it (as in EasyEdit's script); Locality: ee.loc.argmax, agreement with the "
            "unedited model"
            + "".join(f"; {row}: {variant}, n-gram entropy of {of}" for row, variant, of in fluencies)
            + ".",
            _counts(block, set()),
        )
        tables.append(
            builder.table(f"kne-{slug(model)}-{slug(protocol)}", f"{model}: {protocol} (KnowEdit's columns)", notes)
        )
    return tables


def _fluencies(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """Return (row, variant, what it reads) for every fluency that some of the groups have."""
    known = (
        ("Fluency", "flu.new", "greedy continuations"),
        ("Fluency, sampled", "flu.easyedit", "the edit's prompt with a sampled continuation"),
        ("Fluency, ROME's", "flu.rome", "generation prompts with sampled continuations"),
    )
    return [
        (row, variant, of)
        for row, family, of in known
        for variant in (f"{family}.nltk", f"{family}.re")
        if any(g.number("fluency", variant) for g in groups)
    ]


def multihop(groups: Sequence[Group]) -> list[Table]:
    """Return MQuAKE and RippleEdits: one column per metric."""
    tables = []
    for family, names in (
        ("mq", ("edit_wise", "instance_wise", "multi_hop", "hop_wise", "unedited_hops")),
        ("ripple", ("edit_success",)),
    ):
        for dataset in dict.fromkeys(g.dataset for g in groups if g.family == family):
            own = [g for g in groups if (g.family, g.dataset) == (family, dataset)]
            lines = [line for g in own for s in g.summaries for line in s.lines]
            axes = dict.fromkeys(line.metric for line in lines if line.variant.startswith("ripple."))
            columns = [(n, ()) for n in names] + [(a, ("ripple.taken",)) for a in axes]
            builder = _Builder(("Method", *(name for name, _ in columns)))
            kinds: set[str] = set()
            for model, protocol, block in blocks(own):
                builder.block(f"{model}: {protocol}")
                for group in block:
                    numbers = [group.number(name, *variants or _variants(group, name)) for name, variants in columns]
                    kinds |= _kinds(numbers)
                    builder.row(group.method, [_with_half_width(n) for n in numbers], numbers)
            notes = ("x100; the variants are in the records.", _counts(own, kinds))
            title = f"{dataset}: what follows from the edits"
            tables.append(builder.table(f"{family}-{slug(dataset)}", title, notes))
    return tables


def _variants(group: Group, metric: str) -> list[str]:
    return [line.variant for line in group.summaries[0].lines if line.metric == metric]


def own_metrics(groups: Sequence[Group]) -> list[Table]:
    """Return the metrics of the user's own, a column for each number: as they are, since no unit of theirs is known."""
    tables = []
    for dataset in dict.fromkeys(g.dataset for g in groups):
        own = [g for g in groups if g.dataset == dataset]
        asked = {name for g in own for name in g.runs[0].manifest.get("measures", {}).get("metrics", ())}
        lines = [line for g in own for s in g.summaries for line in s.lines if line.variant in asked]
        columns = list(dict.fromkeys((line.metric, line.variant) for line in lines))
        if not columns:
            continue
        builder = _Builder(("Method", *(metric for metric, _ in columns)))
        for model, protocol, block in blocks(own):
            builder.block(f"{model}: {protocol}")
            for label, group, before in [(UNEDITED, block[0], True), *((g.method, g, False) for g in block)]:
                numbers = [group.number(*column, before=before) for column in columns]
                builder.row(label, [MISSING if n is None else f"{n.value:.4g}" for n in numbers], numbers)
        notes = (f"Means over cases of {', '.join(sorted(asked))}.", _counts(own, set()))
        tables.append(builder.table(f"own-{slug(dataset)}", f"{dataset}: metrics of your own", notes, best=False))
    return tables


def curve(groups: Sequence[Group]) -> list[Table]:
    """Return JEEP's Figures 4 and 6, CTP's 5 and 6 as numbers: scores against the number of edits or a setting."""
    tables = []
    for found in curves(groups):
        builder = _Builder((_capital(found.x), "Method", "Score", "ES", "GS", "LS"), text_columns=2)
        kinds: set[str] = set()
        for number, line, group in found.points:
            numbers = [group.number("Score", "score.hm"), *(group.number(name) for name in ("ES", "GS", "LS"))]
            builder.row_of(f"{number:,g}", line, [_plain(numbers[0]), *map(_with_half_width, numbers[1:])], numbers)
            kinds |= _kinds(numbers[1:])
        own = [group for _, _, group in found.points]
        notes = ("x100.", _counts(own, kinds))
        tables.append(builder.table(slug(found.name), found.title, notes, best=False))
    return tables


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if " " in text else text


def paired(groups: Sequence[Group]) -> list[Table]:
    """Compare each method with the one of the best Score, over common cases, by a paired bootstrap."""
    tables = []
    for model, protocol, dataset, own in by_dataset(groups):
        own = [g for g in own if g.number("Score", "score.hm")]
        if len(own) < 2:
            continue
        best = max(own, key=lambda g: getattr(g.number("Score", "score.hm"), "value", 0.0))
        builder = _Builder(("Method", "Score", "ES", "GS", "LS"))
        for group in own:
            if group is best:
                continue
            found = {d.metric: d for d in differences(group.runs[0].at("final"), best.runs[0].at("final"))}
            compared = [found.get(name) for name in ("Score", "ES", "GS", "LS")]
            counted = [None if d is None else Number(d.value, None, d.n, group.n_cases, 1) for d in compared]
            builder.row(group.method, [_difference(d) for d in compared], counted, compete=False)
        notes = (
            "Points, method minus "
            f"{best.method}, [95 % interval] of a paired bootstrap by subject over common cases of seed "
            f"{best.runs[0].manifest['seed']}; * where the interval leaves out 0.",
        )
        name = f"paired-{slug(model)}-{slug(dataset)}-{slug(protocol)}"
        title = f"{model}, {dataset}, {protocol}: against {best.method}"
        tables.append(builder.table(name, title, notes))
    return tables


def _difference(found: Difference | None) -> str:
    if found is None or found.interval is None:
        return MISSING
    low, high = 100 * found.interval.low, 100 * found.interval.high
    return f"{100 * found.value:+.1f} [{low:+.1f}, {high:+.1f}]{'*' if found.clear else ''}"


def cost(groups: Sequence[Group]) -> list[Table]:
    """Return seconds per edit (CTP's Figure 3) and peak memory."""
    timed = [g for g in groups if g.seconds_per_edit() is not None]
    if not timed:
        return []
    builder = _Builder(("Method", "s per edit", "peak memory, MB"))
    for model, protocol, block in blocks(timed):
        builder.block(f"{model}: {protocol}")
        for name, group in zip(row_names(block), block, strict=True):
            seconds, peak = group.seconds_per_edit(), group.peak_bytes()
            cells = [f"{seconds:.3f}", MISSING if peak is None else f"{peak / 1e6:,.0f}"]
            builder.row(name, cells, [None, None])
    kinds = {r.variant for g in timed for run in g.runs for r in run.timings if r.metric == "memory"}
    of = "the device's" if "memory.device" in kinds else "the whole process's"
    machine = timed[0].runs[0].environment
    notes = (
        "Wall time of the method's calls over the number of edits; statistics, loading and measuring are not in it, "
        f"nor a first call that was thrown away. Memory is {of} peak in these calls. {machine['processor']}, "
        f"{plural(machine['threads'], 'thread')}.",
    )
    return [builder.table("cost", "What an edit costs", notes)]


def case_study(groups: Sequence[Group]) -> list[Table]:
    """Return JEEP's Table 1: what the methods write after one case's edited, equivalent and unrelated prompts."""
    tables = []
    for model, protocol, dataset, own in by_dataset(groups):
        said = {g.method: _said(g) for g in own}
        case = next((c for c, _, _ in said[own[0].method]), None)
        rows = [key for key in said[own[0].method] if key[0] == case]
        if not rows:
            continue
        builder = _Builder(("", "Input prompt", UNEDITED, *said), text_columns=2 + 1 + len(said))
        for axis, name in (("rewrite", "Edited"), ("paraphrase", "Equivalent"), ("neighborhood", "Unrelated")):
            for _, query, prompt in [row for row in rows if row[1].startswith(axis)][:1]:
                key = (str(case), query, prompt)
                texts = [said[own[0].method][key][0], *(found.get(key, ("", MISSING))[1] for found in said.values())]
                builder.rows.append((name, prompt, *(" ".join(t.split()) or MISSING for t in texts)))
                builder.values.append(None)
        title = f"{model}, {dataset}, {protocol}: case {case}"
        name = f"case-{slug(model)}-{slug(dataset)}-{slug(protocol)}"
        tables.append(builder.table(name, title, ("Greedy continuations.",)))
    return tables


def _said(group: Group) -> dict[tuple[str, str, str], tuple[str, str]]:
    """Return (case, query, prompt) -> (before, after), where both were written."""
    found: dict[str, dict[tuple[str, str, str], str]] = {"pre": {}, "final": {}}
    for row in group.runs[0].texts:
        if row["when"] in found:
            found[row["when"]][row["case_id"], row["query_id"], row["prompt"]] = row["text"]
    return {key: (found["pre"][key], text) for key, text in found["final"].items() if key in found["pre"]}


# --- cells -------------------------------------------------------------------------------------------------------


class _Builder:
    """Collects rows and finds the best of each block's columns."""

    def __init__(self, head: Sequence[str], *, text_columns: int = 1) -> None:
        self.head = tuple(head)
        self.text_columns = text_columns
        self.rows: list[tuple[str, ...]] = []
        self.values: list[list[Number | None] | None] = []
        self.starts = [0]
        self.fewer: dict[tuple[str, str, int, int], list[str]] = {}
        """Columns by block, row, cases measured and cases in all, where some were not."""

    def block(self, title: str) -> None:
        self.starts.append(len(self.rows))
        self.rows.append((title,))
        self.values.append(None)

    def row(self, label: str, cells: Sequence[str], numbers: Sequence[Number | None], *, compete: bool = True) -> None:
        self._count(label, numbers)
        self.rows.append((label, *cells))
        self.values.append(list(numbers) if compete else None)

    def row_of(self, first: str, second: str, cells: Sequence[str], numbers: Sequence[Number | None]) -> None:
        """Add a row of two texts whose numbers compete with each other."""
        self._count(f"{first} {second}", numbers)
        best = _best(numbers)
        kept = [n if n is not None and n.value == best else None for n in numbers]
        self.starts.append(len(self.rows))
        self.rows.append((first, second, *cells))
        self.values.append(kept)

    def _count(self, row: str, numbers: Sequence[Number | None]) -> None:
        block = next((own[0] for own in reversed(self.rows) if len(own) == 1), "")
        for column, number in zip(self.head[self.text_columns :], numbers, strict=True):
            if number is not None and 0 < number.n < number.n_cases:
                self.fewer.setdefault((block, row, number.n, number.n_cases), []).append(column)

    def _of_fewer_cases(self) -> list[str]:
        """Return a note on the numbers that are of fewer cases than their runs have; none where there are none."""
        several = sum(len(row) == 1 for row in self.rows) > 1
        found = [
            f"{f'{block}, ' if several else ''}{row}: {', '.join(columns)} {n:,} of {n_cases:,}"
            for (block, row, n, n_cases), columns in self.fewer.items()
        ]
        return [f"Cases that could be measured, where not all: {'; '.join(found)}."] if found else []

    def table(self, name: str, title: str, notes: Sequence[str], *, best: bool = True) -> Table:
        bold: set[tuple[int, int]] = set()
        for start, end in zip(self.starts, [*self.starts[1:], len(self.rows)], strict=True):
            rows = [i for i in range(start, end) if self.values[i] is not None]
            for column in range(len(self.head) - self.text_columns if best else 0):
                values = {i: own[column] for i in rows if (own := self.values[i]) is not None}
                if len(rows) > 1 or self.text_columns > 1:
                    best_value = _best(values.values())
                    places = [i for i, n in values.items() if n is not None and n.value == best_value]
                    bold |= {(i, column + self.text_columns) for i in places}
        return Table(name, title, self.head, tuple(self.rows), (*notes, *self._of_fewer_cases()), frozenset(bold))


def _best(numbers: Iterable[Number | None]) -> float | None:
    """Return the highest value; None where there is none, or where they are of unequally many runs."""
    known = [n for n in numbers if n is not None]
    return max((n.value for n in known), default=None) if len({n.runs for n in known}) == 1 else None


def _plain(n: Number | None) -> str:
    return MISSING if n is None else f"{100 * n.value:.1f}"


def _with_half_width(n: Number | None) -> str:
    if n is None:
        return MISSING
    if n.interval is not None and n.interval.kind == "ci.wilson":  # which lies to one side
        return f"{100 * n.value:.1f} [{100 * n.interval.low:.1f}, {100 * n.interval.high:.1f}]"
    return f"{100 * n.value:.1f}" + (f" ({100 * n.interval.half_width:.1f})" if n.interval else "")


def _kinds(numbers: Sequence[Number | None]) -> set[str]:
    return {n.interval.kind for n in numbers if n is not None and n.interval is not None}


def _counts(groups: Sequence[Group], kinds: set[str]) -> str:
    *fewer, most = sorted({g.n_cases for g in groups})
    cases = ", ".join([*(f"{n:,}" for n in fewer), plural(most, "case")])
    seeds = sorted({int(run.manifest["seed"]) for g in groups for run in g.runs})
    said = {
        "ci.seed": "ci.seed, Student's t over the runs",
        "ci.case": "ci.case, 1.96 s / sqrt(n) over cases",
        "ci.boot": "ci.boot, half of a bootstrap interval by subject",
    }
    width = "; ".join(said[kind] for kind in sorted(kinds - {"ci.wilson"}))
    bounds = " In square brackets: Wilson's 95 % interval, near 0 and 100." if "ci.wilson" in kinds else ""
    return (
        f"{cases}; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}."
        + (f" In brackets: half-width of a 95 % interval, {width}." if width else "")
        + bounds
    )


def _pipes(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
