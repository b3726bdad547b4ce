"""`retcon moments`: collect the second moments that methods need, ahead of time."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from retcon.cli.models import load_model, loads_a_model
from retcon.cli.options import Corpus, Json, Model, On, Shrink
from retcon.cli.printing import console, emit, seconds, size, styled
from retcon.cli.progress import progress_bars, spinner
from retcon.cluster import workers, working_on
from retcon.errors import InvalidSetting
from retcon.memory.corpus import check_corpus
from retcon.workflow.moments import moments_for

if TYPE_CHECKING:
    from retcon.lm.model import LM


@loads_a_model
def moments(
    model: Model,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Layers, such as 3-8,15,16.", show_default="those of the model's JEEP settings"
        ),
    ] = None,
    module: Annotated[
        Literal["down_proj", "o_proj"], typer.Option(help="The MLP's or the attention's output matrix.")
    ] = "down_proj",
    corpus: Corpus = None,
    tokens_per_dimension: Annotated[
        int | None, typer.Option(min=1, help="Corpus tokens per key dimension.", show_default="20")
    ] = None,
    shrink: Shrink = False,
    on: On = "local",
    as_json: Json = False,
) -> None:
    """Collect the second moments of a model's keys, all layers in one pass, and keep them in the cache.

    Methods that need them find them there; what they lack they collect themselves. How far the moments of the text's
    two halves lie apart (relative, Frobenius norm) is printed; more tokens bring them together. A run that was stopped
    goes on where it was.
    """
    place = workers(on)
    wanted = None if layers is None else _layers(layers)
    if corpus is not None:
        check_corpus(corpus)
    lm = load_model(model)
    with spinner("reading the corpus"):
        source: Any = moments_for(lm, corpus, shrink=shrink)
    if tokens_per_dimension is not None:
        source = replace(source, tokens_per_dimension=tokens_per_dimension)
    sites = [lm.site(layer, module) for layer in (_jeep_layers(lm) if wanted is None else wanted)]
    with spinner("looking in the cache"):
        had = {s: source.stored(lm, s) for s in sites}
    started = time.perf_counter()
    n_read = 0
    with place as at, working_on(lm, at), progress_bars() as advance:

        def report(done: int, total: int) -> None:
            nonlocal n_read
            n_read = done
            advance("corpus tokens", done, total)

        replace(source, progress=report).prepare(lm, sites)
    took = time.perf_counter() - started
    rows = [
        {
            "layer": s.layer,
            "parameter": s.name,
            "tokens_asked": source.key(lm, s).n_tokens,
            "dimensions": s.shape[1],
            "convergence": source.convergence(lm, s),
            "file": str(source.stored(lm, s)),
            "found": had[s] is not None,
        }
        for s in sites
    ]
    if as_json:
        emit({"model": model, "corpus": source.corpus.id, "moments": rows, "tokens_read": n_read, "seconds": took})
        return
    out = console()
    for row in rows:
        how = styled("[dim]was there already[/]") if row["found"] else styled("[green]collected[/]")
        asked = f"{row['tokens_asked']:,} tokens asked for {row['dimensions']:,} dimensions"
        apart = "" if row["convergence"] is None else f"  halves {row['convergence']:.1%} apart"
        line = styled("layer {:>3}  {}  {}{}  {}", row["layer"], row["parameter"], asked, apart, how)
        out.print(line, soft_wrap=True)
    for file in sorted({row["file"] for row in rows}):
        out.print(styled("[dim]{}, {}[/]", file, size(Path(file).stat().st_size)), soft_wrap=True)
    n_new = sum(not row["found"] for row in rows)
    done = f"{n_new} collected from {n_read:,} tokens in {seconds(took)}"
    out.print(done if n_new else "nothing left to collect")


def _layers(text: str) -> list[int]:
    """Return the layers of a list such as "1,2,5-7"."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InvalidSetting(f"--layers {text}: expected numbers and ranges, such as 3-8,15,16")
        found.extend(range(int(first), int(last or first) + 1))
    if not found:
        raise InvalidSetting(f"--layers {text}: a range that holds no layer")
    return sorted(set(found))


def _jeep_layers(lm: "LM") -> list[int]:
    from retcon.methods.common.choosing import method

    jeep: Any = method("jeep", for_model=lm)
    return [*jeep.low, *jeep.high]
