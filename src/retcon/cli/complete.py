"""`retcon complete`: what a model says after a prompt, edited or not."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from retcon.cli.shell import Device, DType, Json, Model, console, emit, load_deltas, load_model, spinner
from retcon.errors import InvalidSetting


def complete(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from.", show_default=False)],
    delta: Annotated[
        list[Path] | None,
        typer.Option(help="A delta to apply first; repeat for several, in order.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 32,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Apply deltas made for other weights than these.")
    ] = False,
    device: Device = None,
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Say what a model answers, greedily, up to the end of the line; with --delta, what it answers once edited."""
    if not prompt.strip():
        raise InvalidSetting("the prompt is empty; give some text to go on from")
    deltas = load_deltas(delta or [])
    lm = load_model(model, device=device, dtype=dtype)
    with spinner("writing"):
        for each in deltas:
            lm.apply(each, other_base=other_base)
        text = lm.complete(prompt.rstrip(), max_new_tokens=max_new_tokens)
    if as_json:
        emit({"model": model, "prompt": prompt, "completion": text, "deltas": [d.id for d in deltas]})
    else:
        console().print(f"{escape(prompt.rstrip())}[bold]{escape(text)}[/]", soft_wrap=True)
