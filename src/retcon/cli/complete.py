"""`retcon complete`: what a model says after a prompt, edited or not."""

from typing import TYPE_CHECKING, Annotated

import typer

from retcon.cli.chat_options import chat_of, check_is_text
from retcon.cli.models import load_deltas, load_model, loads_a_model
from retcon.cli.options import AsChat, Deltas, Json, Model, OtherBase, Seed, System, TemplateArgs
from retcon.cli.printing import console, emit, plural, styled, warn
from retcon.cli.progress import spinner
from retcon.errors import InvalidSetting

if TYPE_CHECKING:
    from retcon.chat import Chat
    from retcon.lm.generate import Writing, Written

CHAT_TOKENS = 256
"""Tokens that a chat model may write by default; it ends its turn by itself."""
PLAIN_TOKENS = 32

Stops = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help=r"Text that ends an answer (\n is a newline); repeat. '' for none.",
        show_default="a newline; none in a chat",
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Tokens to write at most.", show_default="32; 256 in a chat")
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Draw the text at random, at this temperature.", show_default="the likeliest token each time"),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", min=1, help="Draw from the K likeliest tokens.", show_default="all")
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", help="Draw from the likeliest tokens whose probabilities together make this share.", show_default="1"
    ),
]


@loads_a_model
def complete(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from.")],
    delta: Deltas = None,
    as_chat: AsChat = False,
    system: System = None,
    template_args: TemplateArgs = None,
    stops: Stops = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Say what a model answers, up to the end of the line; with --delta, what it answers once edited.

    The prompt is sent as it is, whitespace at its end included. Newlines before the answer do not end it.
    """
    check_is_text(prompt, "the prompt")
    if not prompt.strip():
        raise InvalidSetting("the prompt is empty; give some text to go on from")
    chat = chat_of(as_chat, system, template_args)
    how = writing(chat, stops, max_tokens, temperature, top_k, top_p)
    deltas = load_deltas(delta or [])
    lm = load_model(model)

    from retcon.lm.generate import generate

    with spinner("writing"):
        for each in deltas:
            lm.apply(each, other_base=other_base)
        [written] = generate(lm, [prompt], how, seeds=[seed])
    warn_of_no_answer(written)
    if as_json:
        more = {"reasoning": written.reasoning} if written.reasoning else {}
        about = {"model": model, "prompt": prompt, "completion": written.text, "deltas": [d.id for d in deltas]}
        emit(about | {"cut": written.cut} | more)
        return
    show = console()
    if written.reasoning:
        show.print(styled("[dim]{}[/]", written.reasoning.strip()), soft_wrap=True)
    before = "" if chat else prompt
    show.print(styled("{}[bold]{}[/]", before, written.text.strip() if chat else written.text), soft_wrap=True)


def warn_of_no_answer(written: "Written") -> None:
    """Say why nothing is shown where a model was still reasoning when its tokens ran out."""
    if written.cut and written.reasoning and not written.text.strip():
        warn(
            f"no answer within {plural(written.n_tokens, 'token')}, all of them reasoning; give it room: --max-tokens N"
        )


def writing(
    chat: "Chat | None",
    stops: list[str] | None,
    max_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
) -> "Writing":
    """Return how text is written, as the options ask for it."""
    for stop in stops or ():
        check_is_text(stop, "--stop")

    from retcon.lm.generate import Writing

    usual = () if chat else ("\n",)
    sampled = temperature is not None or top_k is not None or top_p is not None
    return Writing(
        max_new_tokens=max_tokens or (CHAT_TOKENS if chat else PLAIN_TOKENS),
        stops=usual if stops is None else tuple(unescaped(stop) for stop in stops if stop),
        sample_top_k=(top_k or ALL) if sampled else None,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        chat=chat,
        skip_newlines=True,
    )


ALL = 10**9
"""More tokens than any vocabulary has."""


def unescaped(text: str) -> str:
    r"""Return an option's text with \n and \t as what they mean."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
