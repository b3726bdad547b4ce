"""`retcon probe contrast`: how the original and the target answer travel through the layers."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from retcon.atomic import write_atomically
from retcon.cli.facts import reads_facts
from retcon.cli.models import load_model, loads_a_model
from retcon.cli.options import Json, Model, Seed
from retcon.cli.output_checks import check_output
from retcon.cli.printing import console, emit, plain_table, plural, styled, warn
from retcon.cli.probe.shared import Cases, Out, about, check_stem, facts, probed, write_figures
from retcon.cli.progress import progress_bars, spinner
from retcon.errors import InvalidSetting
from retcon.files import check_exists, read_text
from retcon.workflow.facts import Reading, facts_that_fit

if TYPE_CHECKING:
    from retcon.edits import Edit
    from retcon.locate import Contrast, WordSets

WRITTEN = (".png", ".svg", ".json", "-sets.png", "-sets.svg")
"""How the names of the files end that `--out` stands for."""


@loads_a_model
@reads_facts("--cases", limit=1_000)
def contrast(
    model: Model,
    cases: Cases = None,
    *,
    reading: Reading,
    modules: Annotated[bool, typer.Option("--modules", help="Read attention and MLP outputs as well.")] = False,
    final_norm: Annotated[
        bool, typer.Option("--final-norm/--no-final-norm", help="Read states with the final norm, too.")
    ] = True,
    sets: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Word sets to follow: JSON lines with id, related and factual (lists of words)."
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to find word sets in, by BM25, where no lists are at hand."),
    ] = None,
    stopwords: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Stopwords, separated by white space.", show_default="an English list"),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a row per fact, position, state and set, as JSON lines."),
    ] = None,
    out: Out = "contrast",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Follow the original and the target answer's first token through the layers (JEEP's probe).

    Every state is read as if it were the last one, without the final norm (as the paper does) and with it (as the model
    does), at the subject's last token and where the answer is predicted. Draws probability and rank over layers; with
    --sets or --corpus also those of word sets (STEM-sets.png).
    """
    check_stem(out, cases, sets, corpus, stopwords)
    for path in (sets, corpus, stopwords):
        if path is not None:
            check_exists(path)
    if sets is not None and corpus is not None:
        raise InvalidSetting("--sets and --corpus both say where word sets come from; give one of them")
    check_output(records, cases, sets, corpus, stopwords)
    if records is not None and records.resolve() in {Path(f"{out}{end}").resolve() for end in WRITTEN}:
        raise InvalidSetting(f"--records {records}: --out {out} writes that file, too; name another one")
    asked = facts(model, cases, reading, seed)
    word_sets = _word_sets(list(asked.edits), sets, corpus, stopwords)
    lm = load_model(model)
    asked = facts_that_fit(lm, asked, reading.on_error)
    edits = list(asked.edits)

    from retcon.locate import contrast_probe, figures

    with progress_bars() as advance:
        found = contrast_probe(
            lm,
            edits,
            tensors=("block", "attn", "mlp") if modules else ("block",),
            norms=(False, True) if final_norm else (False,),
            word_sets=word_sets,
            progress=partial(advance, "reading facts"),
        )
    drawn = {"": figures.contrast_figure(found)}
    if word_sets is not None:
        drawn["-sets"] = figures.sets_figure(found)
    record = {**about(lm, asked.about, seed), "n": len(found), "skipped": found.skipped, "means": found.means()}
    record |= {"n_known": int(found.known.sum()), "n_assumed": int(found.assumed.sum())}
    written = write_figures(out, drawn, record)
    if records is not None:
        _write_records(records, found)
        written.append(records)
    if as_json:
        emit(record)
        return
    show = console()
    show.print(styled("[bold]contrast[/] on {}", lm))
    show.print(f"facts  {asked.about}", soft_wrap=True)
    show.print(probed(found), soft_wrap=True)
    show.print()
    show.print(_table(found))
    show.print(f"written  {', '.join(map(str, written))}", soft_wrap=True)


def _word_sets(
    edits: "list[Edit]", sets: Path | None, corpus: Path | None, stopwords: Path | None
) -> "WordSets | None":
    if sets is None and corpus is None:
        if stopwords is not None:
            raise InvalidSetting("--stopwords goes with --sets or --corpus")
        return None
    stop = None if stopwords is None else read_text(stopwords).split()

    from retcon.locate import read_word_sets, retrieve_word_sets
    from retcon.memory.moments import Corpus

    if sets is not None:
        found = read_word_sets(sets, stopwords=stop)
        without = [edit.id for edit in edits if edit.id not in found.related]
        some = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        if len(without) == len(edits):
            raise InvalidSetting(f"--sets {sets}: no id there is that of a fact; the facts' are {some}")
        if without:
            warn(f"--sets {sets} has no words for {plural(len(without), 'fact')}: {some}")
        return found
    assert corpus is not None
    with spinner("looking for word sets"):
        return retrieve_word_sets(edits, Corpus.from_file(corpus).documents, stopwords=stop)


def _write_records(path: Path, found: "Contrast") -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.records()).encode())


def _table(found: "Contrast") -> Table:
    """Return mean rank and probability of both answers, layer by layer; with the final norm where they were read so."""
    final_norm = found.norms[-1]
    read = ("subject: original", "target", "prediction: original", "target")
    table = plain_table(right=("layer", *read, "p(original)", "p(target)"))
    ranks: list[Any] = [
        found.curve("mean_rank", of, where, final_norm=final_norm)
        for where in found.positions
        for of in ("original", "target")
    ]
    probabilities = [found.curve("sum_prob", of, "prediction", final_norm=final_norm) for of in ("original", "target")]
    for i, layer in enumerate(ranks[0].layers):
        cells = [f"{curve.mean[i]:,.0f}" for curve in ranks] + [f"{curve.mean[i]:.3f}" for curve in probabilities]
        table.add_row("E" if layer < 0 else str(layer), *cells)
    how = "with" if final_norm else "without"
    table.caption = f"mean ranks and probabilities, read {how} the final norm; E is the embedding"
    return table
