"""What the probes share: the facts they look at, and the files they write."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retcon.atomic import write_atomically
from retcon.cli.output_checks import check_output
from retcon.cli.printing import finite, plural
from retcon.cli.progress import spinner
from retcon.errors import InvalidSetting
from retcon.version import versions
from retcon.workflow.facts import Facts, Reading, read_facts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from retcon.lm.model import LM
    from retcon.locate import Contrast

Cases = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Facts: a file that `retcon edit` reads.", show_default="the embedded models' own"
    ),
]
Out = Annotated[str, typer.Option(metavar="STEM", help="Files to write: STEM.png, STEM.svg, STEM.json.")]


def check_stem(stem: str, *inputs: Path | None) -> None:
    """Check, before the work, that the three files can be written and are none of those read.

    Raises:
        InvalidSetting: they cannot, or one is an input.
    """
    if not Path(stem).name or stem.endswith(("/", os.sep)):
        raise InvalidSetting(f"--out {stem}: expected the files' name without its ending, such as figures/contrast")
    for kind in ("png", "svg", "json"):
        check_output(Path(f"{stem}.{kind}"), *inputs)


def facts(model: str, cases: Path | None, reading: Reading, seed: int) -> Facts:
    """Return the facts to probe with: a file's, or the embedded model's own.

    Raises:
        InvalidSetting: none are named, and the model has none of its own.
    """
    if cases is not None:
        asked = read_facts(cases, reading)
        return replace(asked, about=asked.about.replace(str(cases), cases.name))

    from retcon.evaluation.datasets import WORLD
    from retcon.lm.load import DEMO

    if not model.startswith(DEMO):
        raise InvalidSetting(f"which facts shall {model} be probed with? Give a file of them: --cases FILE")
    return read_facts(WORLD, replace(reading, seed=seed))


def left_out(skipped: Mapping[str, str]) -> str:
    """Return how many facts were not looked at, and why; empty where all were."""
    reasons = list(skipped.values())
    counted = ", ".join(f"{reasons.count(r):,} ({r})" for r in dict.fromkeys(reasons))
    return f"; left out: {counted}" if counted else ""


def stood_in(n: int) -> str:
    """Return how many facts have no original answer; empty where all have one."""
    return f" ({n:,} without an original answer: the model's own next token stands in)" if n else ""


def probed(found: "Contrast") -> str:
    """Return one line on what was and what was not looked at."""
    line = f"probed {plural(len(found), 'fact')}; the model says the original answer in {int(found.known.sum()):,}"
    return line + stood_in(int(found.assumed.sum())) + left_out(found.skipped)


def write_figures(stem: str, figures: Mapping[str, "Figure"], record: Mapping[str, Any]) -> list[Path]:
    """Write the figures as `stem``suffix`.png and .svg, their numbers as `stem`.json; return the paths."""
    from retcon.drawing import save

    with spinner("drawing"):
        written = [path for suffix, made in figures.items() for path in save(made, stem + suffix)]
    path = Path(f"{stem}.json")
    write_atomically(path, (json.dumps(rounded(finite(record)), ensure_ascii=False) + "\n").encode())
    return [*written, path]


def rounded(value: Any) -> Any:
    """Return the same with numbers of six significant digits: more than any figure shows, in half the space."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def about(lm: "LM", facts: str, seed: int) -> dict[str, Any]:
    """Return the head of every record."""
    return {
        "model": lm.label,
        "fingerprint": None if lm.offloaded else lm.fingerprint(),
        "model_type": lm.model.config.model_type,
        "n_layers": lm.n_layers,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "facts": facts,
        "seed": seed,
        "versions": versions(),
    }
