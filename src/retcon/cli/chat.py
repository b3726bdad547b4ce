"""`retcon chat`: a conversation with a model, edited or not, or with both side by side."""

import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

import typer

from retcon.cli.chat_options import chat_of, check_is_text
from retcon.cli.complete import MaxTokens, Stops, Temperature, TopK, TopP, warn_of_no_answer, writing
from retcon.cli.models import load_deltas, load_model, loads_a_model
from retcon.cli.options import Deltas, Model, OtherBase, Seed, System, TemplateArgs
from retcon.cli.printing import console, plain_table, styled
from retcon.cli.progress import spinner
from retcon.errors import InvalidEdit, InvalidSetting

if TYPE_CHECKING:
    from retcon.chat import Chat
    from retcon.lm.generate import Writing, Written
    from retcon.lm.model import LM

HELP = "/reset begins anew, /quit or Ctrl-D ends"


@loads_a_model
def chat(
    model: Model,
    delta: Deltas = None,
    both: Annotated[
        bool, typer.Option("--both", help="Answer with the unedited model too, the two side by side.")
    ] = False,
    system: System = None,
    template_args: TemplateArgs = None,
    stops: Stops = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    other_base: OtherBase = False,
) -> None:
    """Hold a conversation with a chat model; with --delta, with the edited one.

    Each line of the input is a turn, from a terminal or a pipe. With --both each model remembers its own answers.
    """
    if both and not delta:
        raise InvalidSetting("--both compares with the unedited model; give the edits: --delta DELTA")
    frame = chat_of(True, system, template_args)
    assert frame is not None
    how = writing(frame, stops, max_tokens, temperature, top_k, top_p)
    deltas = load_deltas(delta or [])
    lm = load_model(model)

    from retcon.lm.prompts import render

    if not getattr(lm.tokenizer, "chat_template", None):
        raise InvalidSetting("the tokenizer has no chat template, so it is no chat model's; ask with retcon complete")
    render(lm.tokenizer, frame, ["Hello"])  # what its template refuses is refused before anybody types
    for each in deltas:
        lm.apply(each, other_base=other_base)
    show = console()
    if sys.stdin.isatty():
        show.print(styled("[dim]{}; {}[/]", lm, HELP), soft_wrap=True)
    now: list[str] = []
    before: list[str] = []
    for n, line in enumerate(_lines()):
        if line == "/reset":
            now, before = [], []
            continue
        try:
            with spinner("writing"):
                answer = _answer(lm, frame, [*now, line], how, seed + n)
                if both:
                    with lm.without_deltas():
                        old = _answer(lm, frame, [*before, line], how, seed + n)
        except InvalidEdit as error:
            if not sys.stdin.isatty():
                raise
            show.print(styled("[red]{}[/]", error), soft_wrap=True)  # whoever types can go on: /reset, a shorter turn
            continue
        warn_of_no_answer(answer)
        if both:
            table = plain_table(expand=True)
            table.add_column("before", ratio=1)
            table.add_column("after", ratio=1)
            table.add_row(old.text.strip(), styled("[bold]{}[/]", answer.text.strip()))
            show.print(table)
            before += [line, old.text.strip()]
        else:
            show.print(styled("[bold]{}[/]", answer.text.strip()), soft_wrap=True)
        now += [line, answer.text.strip()]


def _answer(lm: "LM", frame: "Chat", turns: list[str], how: "Writing", seed: int) -> "Written":
    """Return what the model says to the last turn.

    Raises:
        InvalidEdit: the turn is no text, or the conversation leaves no room for an answer in the model's context.
    """
    check_is_text(turns[-1], "the turn")

    from retcon.lm.generate import generate
    from retcon.lm.prompts import encode_turns

    row = encode_turns(lm.tokenizer, frame, [*turns[:-1], lm.prompted(turns[-1])])
    lm.check_length(turns[-1], row, what=f"the conversation ({HELP}) up to" if len(turns) > 1 else "the turn")
    return generate(lm, [row], how, seeds=[seed])[0]


def _lines() -> Iterator[str]:
    """Yield the turns that are typed or piped in, empty lines left out, until the end or /quit."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused by itself, as a turn
    while True:
        if sys.stdin.isatty():
            console().print(styled("[dim]> [/]"), end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()
