"""The options that many verbs have, each declared once."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from retcon.errors import InvalidSetting
from retcon.seed import check_seed

Model = Annotated[str, typer.Argument(metavar="MODEL", help="demo:gptj, demo:llama, a directory, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU where there is one")]
DType = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="float32, bfloat16, ...", show_default="float32 on a CPU, as stored on a GPU"),
]
StoredDType = Annotated[
    str | None, typer.Option(metavar="DTYPE", help="float32, bfloat16, ...", show_default="as stored")
]


def seed_option(seed: int) -> int:
    """Return a seed from the command line, refused where it is too large."""
    try:
        return check_seed(seed)
    except InvalidSetting as error:
        raise typer.BadParameter(str(error)) from None


Seed = Annotated[int, typer.Option(help="Seed of all that is drawn at random.", callback=seed_option)]
Method = Annotated[str, typer.Option(help="One of those that `retcon methods` lists.")]
PresetsOf = Annotated[str | None, typer.Option(help="Which of the model's presets: counterfact, zsre, ...")]
Preset = Annotated[
    str | None,
    typer.Option(
        help="A preset by its full name, method/model/dataset; none: as if no preset knew the model.",
        show_default="the model's",
    ),
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A setting over the preset's; repeat.")
]
Corpus = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DATASET",
        help="Text for the second moments: a file of text, JSON lines with a field text, or "
        "NAME/NAME[:CONFIG[:SPLIT]] on the hub.",
        show_default="WikiText-103, or the small text that ships with retcon",
    ),
]
Deltas = Annotated[
    list[Path] | None,
    typer.Option("--delta", metavar="DELTA", help="A delta to apply first; repeat for several, in order."),
]
AppliedDeltas = Annotated[list[Path], typer.Argument(metavar="DELTA...", help="Deltas, in order of application.")]
Revision = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the hub.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP", help="Spread the model over devices: auto, balanced, or a JSON object of modules and devices."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint. Off unless asked for.")
]
Packed = Annotated[
    bool,
    typer.Option(
        "--packed",
        help="Keep a checkpoint's 4- or 8-bit matrices as they are (bitsandbytes, torchao), except those that are "
        "edited: less memory, slower, the same results.",
    ),
]
VerifyBase = Annotated[
    bool,
    typer.Option(
        "--verify-base",
        help="Hash all of the model's weights, rather than believe what is kept of files that look the same.",
    ),
]
Shrink = Annotated[
    bool,
    typer.Option(
        "--shrink", help="Where memory runs out, go on with less at a time; the result then differs in its last bits."
    ),
]
On = Annotated[
    str,
    typer.Option(
        metavar="PLACE",
        help="Where the work is shared out: local, processes:N of this machine, ray, or ray:ADDRESS. The result is the "
        "same.",
    ),
]
OtherBase = Annotated[bool, typer.Option("--other-base", help="Apply deltas made for other weights than these.")]
AsChat = Annotated[
    bool, typer.Option("--chat", help="Put prompts to a chat model: as the user's turn in its tokenizer's template.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The chat's system turn (implies --chat).")]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="NAME=VALUE",
        help="For the chat template, such as enable_thinking=false (implies --chat); repeat.",
    ),
]
TrainEnd = Annotated[
    bool,
    typer.Option(
        "--train-end",
        help="Train answers with the end of their turn, for a model that goes on after them (implies --chat).",
    ),
]


def add_options(
    verb: Callable[..., None],
    options: Mapping[str, tuple[Any, Any]],
    run: Callable[[dict[str, Any], dict[str, Any]], None],
    *,
    before: str,
    replaced: bool = False,
) -> Callable[..., None]:
    """Return a verb with more options, for typer to read.

    Args:
        options: type and default of each.
        run: runs the verb, given the values of these options and those of the verb's own.
        before: the parameter before which they come; where there is none, they come last.
        replaced: whether they come in the place of that parameter.
    """

    @wraps(verb)
    def with_options(**given: Any) -> None:
        run({name: given.pop(name, default) for name, (_, default) in options.items()}, given)

    parameters = list(inspect.signature(verb).parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.name == before), len(parameters))
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(n, kind, default=d, annotation=a) for n, (a, d) in options.items()]
    parameters[at : at + replaced] = more
    with_options.__signature__ = inspect.Signature([p.replace(kind=kind) for p in parameters])  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}  # typer reads both
    return with_options
