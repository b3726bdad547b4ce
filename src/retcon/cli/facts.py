"""The options of verbs that read a file of facts."""

import shlex
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from retcon.cli.chat_options import chat_of
from retcon.cli.options import AsChat, System, TemplateArgs, TrainEnd, add_options
from retcon.workflow.facts import Conflicts, Reading


def _format(option: str) -> Any:
    return typer.Option(
        option,
        metavar="NAME",
        help="Format of the file of facts, or module:function that reads its rows.",
        show_default="found by its fields",
    )


FileFormat = Annotated[str | None, _format("--format")]
OnError = Annotated[
    Literal["stop", "skip"],
    typer.Option("--on-error", help="When a row cannot be used: refuse the file, or leave the row out."),
]
CaseTarget = Annotated[
    Literal["new", "alt"],
    typer.Option("--case-target", help="The answer to write: the row's new one, or its alternative (field alt)."),
]
Conflicting = Annotated[
    Conflicts, typer.Option("--conflicts", help="When facts contradict each other: refuse, or keep the first or last.")
]

CHAT = ("as_chat", "system", "template_args", "train_end")
"""Options that become a `Chat`."""


def reads_facts(
    file: str,
    *,
    limit: int | None = None,
    trains: bool = False,
    conflicts: Conflicts = "drop",
    format_option: str = "--format",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb, in the place of its argument `reading`, the options that say how its file of facts is read.

    Args:
        file: what the verb calls the file.
        limit: rows to read where the user names no number; None: all.
        trains: whether it trains their answers, so that the end of a turn can be trained with them.
        conflicts: what happens to facts that contradict each other where the user does not say.
        format_option: how the option of the file's format is called, where the verb has a `--format` of its own.
    """
    start = Annotated[int, typer.Option(min=0, help=f"Rows of {file} to pass over.")]
    rows = typer.Option(min=1, help=f"Rows of {file} to read.", show_default="all" if limit is None else True)
    options: dict[str, tuple[Any, Any]] = {
        "file_format": (Annotated[str | None, _format(format_option)], None),
        "on_error": (OnError, "stop"),
        "case_target": (CaseTarget, "new"),
        "conflicts": (Conflicting, conflicts),
        "as_chat": (AsChat, False),
        "system": (System, None),
        "template_args": (TemplateArgs, None),
        **({"train_end": (TrainEnd, False)} if trains else {}),
        "start": (start, 0),
        "limit": (Annotated[int | None if limit is None else int, rows], limit),
    }

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        def run(asked: dict[str, Any], own: dict[str, Any]) -> None:
            chat = chat_of(**{name: asked.pop(name) for name in CHAT if name in asked})
            verb(**own, reading=Reading(**asked, chat=chat))

        return add_options(verb, options, run, before="reading", replaced=True)

    return decorate


def reading_options(reading: Reading) -> str:
    """Return the options that say how a file's rows are read, as they were given, to be repeated in a command that is
    suggested."""
    given = [] if reading.file_format is None else [f"--format {shlex.quote(reading.file_format)}"]
    given += ["--on-error skip"] * (reading.on_error == "skip") + ["--case-target alt"] * (reading.case_target == "alt")
    given += ["--conflicts last"] * (reading.conflicts == "last")
    return "".join(f" {option}" for option in given)
