"""What every verb shares: where it prints, how it reports progress and errors, and how it loads a model."""

import inspect
import json
import logging
import math
import os
import shlex
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from retcon.errors import (
    DeltaNotApplied,
    InvalidEdit,
    InvalidSetting,
    NonFinite,
    RetconError,
    RetconWarning,
    UnsupportedModel,
    UnusableRow,
)
from retcon.escaping import is_text, json_text, printable
from retcon.files import looks_like_path
from retcon.seed import check_seed

if TYPE_CHECKING:
    from retcon.attachment import Attachment
    from retcon.chat import Chat
    from retcon.edits import Edit
    from retcon.lm.model import LM

WIDTH = 100
"""Columns of output that goes to a file or a pipe."""
NARROW = 512
"""Width of the residual stream up to which one thread is used."""
FAILURES = (NonFinite, DeltaNotApplied)
"""Errors that say something of the edit: exit code 1, as a check that fails has; all others 2."""

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="demo:gptj, demo:llama, a directory, or a hub id.", show_default=False)
]
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
PresetsOf = Annotated[
    str | None, typer.Option(help="Which of the model's presets: counterfact, zsre, ...", show_default=False)
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="A preset by its full name, method/model/dataset; none: as if no preset knew the model.",
        show_default="the model's",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A setting over the preset's; repeat.", show_default=False),
]
Deltas = Annotated[
    list[Path] | None,
    typer.Option(
        "--delta", metavar="DELTA", help="A delta to apply first; repeat for several, in order.", show_default=False
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the hub.", show_default=False)
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="Spread the model over devices: auto, balanced, or a JSON object of modules and devices.",
        show_default=False,
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
        "--shrink",
        help="Where memory runs out, go on with less at a time; the result then differs in its last bits.",
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
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The chat's system turn (implies --chat).", show_default=False)
]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="NAME=VALUE",
        help="For the chat template, such as enable_thinking=false (implies --chat); repeat.",
        show_default=False,
    ),
]


TrainEnd = Annotated[
    bool,
    typer.Option(
        "--train-end",
        help="Train answers with the end of their turn, for a model that goes on after them (implies --chat).",
    ),
]


def chat_of(
    as_chat: bool, system: str | None, template_args: Sequence[str] | None, train_end: bool = False
) -> "Chat | None":
    """Return the chat that the options ask for, or None.

    Raises:
        InvalidSetting: a template argument is not NAME=VALUE.
    """
    from retcon.chat import Chat

    if not as_chat and system is None and not template_args and not train_end:
        return None
    given = []
    for text in template_args or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InvalidSetting(f"--template-arg {text}: expected NAME=VALUE, such as enable_thinking=false")
        try:
            given.append((name.strip(), json.loads(value)))
        except ValueError:  # plain text needs no quotes
            given.append((name.strip(), value))
    try:
        return Chat(system, tuple(given), train_end)
    except InvalidEdit as error:
        raise InvalidSetting(str(error)) from None


def check_is_text(text: str, what: str) -> None:
    """Refuse an argument or a line whose bytes are not UTF-8, which Python hands on as halves of surrogate pairs.

    Raises:
        InvalidEdit: no tokenizer takes it. `what` names it in the message.
    """
    if not is_text(text):
        broken = next(i for i, c in enumerate(text, 1) if not is_text(c))
        raise InvalidEdit(f"{what} is not UTF-8 text (character {broken}); give it in UTF-8")


def chat_options(edits: "Sequence[Edit]") -> str:
    """Return the options that put a prompt as all of these are put, to be repeated in a command that is suggested."""
    frames = {edit.chat for edit in edits}
    frame = frames.pop() if len(frames) == 1 else None
    if frame is None:
        return ""
    given = [] if frame.system is None else [f"--system {shlex.quote(frame.system)}"]
    given += [f"--template-arg {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in frame.template_args]
    return "".join(f" {option}" for option in given or ["--chat"])


# --- printing ----------------------------------------------------------------------------------------------------


class _Fields(Formatter):
    """What is put into a template is text; only another styled text keeps its style."""

    def format_field(self, value: Any, spec: str) -> str:
        return value.markup if isinstance(value, Text) else escape(format(value if spec else str(value), spec))


def styled(template: str, *values: Any) -> Text:
    """Return a text with the styles that the template names, its fields filled in as `str.format` does.

    Args:
        template: such as "[bold]{}[/] saved, {:,} bytes". Only here is there markup: a string that is printed, or in a
            table's cell, is text.
        values: shown as they are, whatever they look like.
    """
    return Text.from_markup(_Fields().format(template, *values), emoji=False)


class PlainTextConsole(Console):
    """A console on which a string is text: it is no markup, and the terminal does not obey it."""

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield every segment of every renderable, control characters of texts shown in place of obeyed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as text; what is to have a style is `styled`."""
        return super().render_str(text, **options | {"markup": False})


@cache
def console(*, stderr: bool = False) -> Console:
    """Return the terminal, as wide as it is; files and pipes are `WIDTH` wide. Numbers in texts are not coloured."""
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "emoji": False}  # or demo:llama: becomes a picture
    made = PlainTextConsole(**plain)
    return made if made.is_terminal or "COLUMNS" in os.environ else PlainTextConsole(**plain, width=WIDTH)


def emit(record: Mapping[str, Any]) -> None:
    """Print one JSON object; NaN and infinity, which JSON does not have, become null."""
    typer.echo(json_text(json.dumps(finite(record), ensure_ascii=False, allow_nan=False)))


def finite(value: Any) -> Any:
    """Return the same with NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def examples(*commands: str) -> str:
    """Return the end of a verb's help; blank lines between, for typer joins adjacent lines."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {escape(c)}" for c in commands)])


def program() -> str:
    """Return what to type to run this program again from here."""
    if shutil.which("retcon"):
        return "retcon"
    called = Path(sys.argv[0])
    if called.name == "retcon" and called.is_file():
        return shlex.quote(_from_here(called))
    return f"{shlex.quote(_from_here(Path(sys.executable)))} -m retcon"


def _from_here(path: Path) -> str:
    """Return the path as it is typed in the current directory; links, such as a virtual environment's, are not
    followed."""
    whole = path.absolute()
    return f".{os.sep}{whole.relative_to(Path.cwd())}" if whole.is_relative_to(Path.cwd()) else str(whole)


def size(n_bytes: float) -> str:
    """Return a number of bytes for reading."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def count(n: int, what: str) -> str:
    """Return a number of things for reading."""
    return f"{n:,} {what}" + "s" * (n != 1)


def seconds(value: float) -> str:
    """Return a duration for reading."""
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


# --- progress ----------------------------------------------------------------------------------------------------


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Draw a progress bar per stage on stderr, gone when done; where stderr is no terminal, log what takes long."""
    if not console(stderr=True).is_terminal:
        with log_lines():
            yield StageLog().advance
        return
    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
        disable=not console(stderr=True).is_terminal,
    )
    tasks: dict[str, Any] = {}

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = shown.add_task(stage, total=total)
        shown.update(tasks[stage], completed=done, total=total)

    with shown:
        yield advance


LOGGED_SECONDS, LOG_EVERY = 5.0, 30.0
"""A stage is logged once it takes longer than the first, and again each time the second has passed."""


def _log() -> logging.Logger:
    return logging.getLogger("retcon.progress")


class StageLog:
    """How far each stage is, as lines of the logger `retcon.progress`: done, rate, time left; one line when it ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began: dict[str, float] = {}
        self.logged: dict[str, float] = {}

    def advance(self, stage: str, done: int, total: int) -> None:
        """Hear that `done` of `total` are done."""
        now = self.clock()
        began = self.began.setdefault(stage, now)
        took = now - began
        if took < LOGGED_SECONDS or done < 1:
            return
        if done >= total:
            _log().info("%s: %s done in %s, %.3g a second", stage, f"{total:,}", seconds(took), done / took)
            del self.began[stage]
        elif now - self.logged.get(stage, -LOG_EVERY) >= LOG_EVERY:
            self.logged[stage] = now
            left = took / done * (total - done)
            _log().info(
                "%s: %s of %s, %.3g a second, %s left", stage, f"{done:,}", f"{total:,}", done / took, seconds(left)
            )


@contextmanager
def log_lines() -> Iterator[None]:
    """Send the progress log to stderr, unless the caller has given it a handler of its own."""
    if _log().hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stderr), _log().level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    _log().addHandler(handler)
    _log().setLevel(logging.INFO)
    try:
        yield
    finally:
        _log().removeHandler(handler)
        _log().setLevel(level)


def plain_table(*heads: str | tuple[str, int | None], right: Iterable[str] = (), **options: Any) -> Table:
    """Return a table without lines.

    Args:
        heads: of the columns; one with a width (None: as wide as there is room) ends what is longer in an ellipsis.
        right: heads of further columns, of numbers.
    """
    table = Table(box=None, pad_edge=False, **{"header_style": "dim", **options})
    for head in heads:
        if isinstance(head, str):
            table.add_column(head)
        else:
            table.add_column(head[0], no_wrap=True, overflow="ellipsis", max_width=head[1])
    for name in right:
        table.add_column(name, justify="right")
    return table


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Draw a spinner for a stage whose length is not known; in a pipe, log one that takes long."""
    if not console(stderr=True).is_terminal:
        late = threading.Timer(LOGGED_SECONDS, _log().info, (printable(what),))
        late.daemon = True
        with log_lines():
            late.start()
            try:
                yield
            finally:
                late.cancel()
        return
    shown = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
    )
    with shown:
        shown.add_task(what, total=None)
        yield


# --- errors ------------------------------------------------------------------------------------------------------


class CommandGroup(TyperGroup):
    """The verbs' group: turns what goes wrong in any of them into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RetconWarning)
            warnings.showwarning = _shown_once(warnings.showwarning)
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise _failed("interrupted", 130) from None
            except RetconError as error:
                raise _failed(_as_options(error), 1 if isinstance(error, FAILURES) else 2) from None
            except BrokenPipeError:  # `retcon ... | head`: typer ends quietly
                raise
            except OSError as error:
                raise _failed(str(error), 1) from None
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":
                    raise
                reason = str(error).split(". ")[0]
                raise _failed(f"{reason}. Try a narrower --dtype (bfloat16), or --device cpu.", 1) from None


_AS_OPTIONS = (
    ("load with conflicts='drop' or 'last'", "keep one of them: --conflicts drop or last"),
    ("pass other_base=True", "add --other-base,"),
    ("case_target 'alt'", "--case-target alt"),
    (", or pass allow_bin=True", ""),
    (" (packed=True)", ""),
    (
        "ask without --chat (chat=True), or give the template as tokenizer.chat_template",
        "leave --chat out, or ask with retcon complete",
    ),
    ("(bisect=False)", "(--no-bisect)"),
    (" (moments=CorpusMoments(Corpus.from_file(PATH)))", ""),
)
"""What messages say to who works in Python, and what the command line says for it."""


def _as_options(message: Exception | str) -> str:
    """Return the message with the way out in the command line's words."""
    if isinstance(message, UnusableRow):
        return f"{message.problem}. Mend the row, or leave such rows out: --on-error skip"
    text = str(message)
    for python, option in _AS_OPTIONS:
        text = text.replace(python, option)
    return text


def _failed(message: str, code: int) -> typer.Exit:
    _say("error", "red", message)
    return typer.Exit(code)


def _say(kind: str, colour: str, message: str) -> None:
    line = " ".join(message.split("\n"))
    console(stderr=True).print(styled("[bold {}]{}:[/] [{}]{}[/]", colour, kind, colour, line), soft_wrap=True)


def _shown_once(others: Callable[..., None]) -> Callable[..., None]:
    """Return a `warnings.showwarning` that prints each of our warnings once, as one line, and leaves the rest to
    `others`."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, RetconWarning):
            others(message, category, *place, **more)
        elif str(message) not in seen:
            seen.add(str(message))
            _say("warning", "yellow", _as_options(message))

    return show


# --- models, deltas, places --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loading:
    """What the options of `loads_a_model` say."""

    revision: str | None = None
    device_map: Any = None
    trust_remote_code: bool = False
    packed: bool = False
    verify_base: bool = False


_LOADING: ContextVar[_Loading | None] = ContextVar("_LOADING", default=None)


def loads_a_model(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of how a model is loaded (--revision, --packed, ...); `load_model` hears of them."""

    @wraps(verb)
    def with_options(
        *args: Any,
        revision: str | None = None,
        device_map: str | None = None,
        packed: bool = False,
        trust_remote_code: bool = False,
        verify_base: bool = False,
        **options: Any,
    ) -> None:
        token = _LOADING.set(_Loading(revision, _device_map(device_map), trust_remote_code, packed, verify_base))
        try:
            verb(*args, **options)
        finally:
            _LOADING.reset(token)

    more = {
        "revision": Revision, "device_map": DeviceMap, "packed": Packed, "trust_remote_code": TrustRemoteCode,
        "verify_base": VerifyBase,
    }  # fmt: skip
    defaults = dict.fromkeys(more, False) | {"revision": None, "device_map": None}
    parameters = []
    for name, parameter in inspect.signature(verb).parameters.items():
        parameters.append(parameter)
        if name == "dtype":
            parameters += [parameter.replace(name=n, default=defaults[n], annotation=more[n]) for n in more]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {**verb.__annotations__, **more}  # typer reads both
    return with_options


def loading_options() -> str:
    """Return the options of `loads_a_model` as they were given, to be repeated in a command that is suggested."""
    asked = _LOADING.get() or _Loading()
    given = [f"--revision {shlex.quote(asked.revision)}"] if asked.revision else []
    if asked.device_map is not None:
        place = asked.device_map if isinstance(asked.device_map, str) else json.dumps(asked.device_map)
        given.append(f"--device-map {shlex.quote(place)}")
    given += ["--packed"] * asked.packed + ["--trust-remote-code"] * asked.trust_remote_code
    given += ["--verify-base"] * asked.verify_base
    return "".join(f" {option}" for option in given)


def _device_map(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidSetting(f"--device-map {text}: is no JSON object ({error})") from None


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> "LM":
    """`retcon.load`, with a spinner, a checked device and the options of `loads_a_model`."""
    asked = _LOADING.get() or _Loading()
    if device is not None and asked.device_map is not None:
        raise InvalidSetting("--device and --device-map both say where the model goes; give one of them")
    if asked.trust_remote_code:
        warn_of_remote_code("--trust-remote-code", name)
    with spinner(f"loading {name}"):
        import retcon

        check_model_path(name)
        _check_device(device)
        lm = retcon.load(
            name,
            device=device,
            dtype=dtype,
            device_map=asked.device_map,
            revision=asked.revision,
            trust_remote_code=asked.trust_remote_code,
            packed=asked.packed,
            verify_base=asked.verify_base,
        )
        _one_thread_for_a_small_model(lm)
        return lm


def warn_of_remote_code(asked: str, name: str) -> None:
    """Warn that code of a checkpoint is run, since `asked` says so."""
    warn(f"{asked}: code that comes with {name}, if there is any, is run with your rights")


def _one_thread_for_a_small_model(lm: "LM") -> None:
    """On a CPU, matrices this narrow gain little from threads, and waiting for each other on busy cores costs a lot.

    `OMP_NUM_THREADS`, where it is set, stands.
    """
    import torch

    width = lm.d_model
    if lm.device.type == "cpu" and width <= NARROW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check_model_path(name: str) -> None:
    """Refuse what can only be a path, and leads nowhere.

    Raises:
        UnsupportedModel: there is no such directory, and no such file.
    """
    if looks_like_path(name) and not name.startswith("demo:") and not Path(name).exists():
        raise UnsupportedModel(f"cannot load {name!r}: no such directory or file")


def check_model_exists(name: str) -> None:
    """Refuse a model that is neither here nor on the hub, before another one is loaded.

    Raises:
        UnsupportedModel: there is none, or the hub cannot be asked.
    """
    check_model_path(name)

    from retcon.lm.load import find_model

    find_model(name, (_LOADING.get() or _Loading()).revision)


def _check_device(name: str | None) -> None:
    import torch

    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidSetting(f"unknown device {name!r}; try cpu, cuda or cuda:0") from None
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise InvalidSetting(f"device {name!r} asked for, but torch sees {found or 'no'} GPU(s) on this machine")


def load_deltas(paths: Sequence[Path]) -> list["Attachment"]:
    """Deltas, or attachments of other kinds, from files, in that order.

    A store stands for those in force, `store@ENTRY` for those after an entry.

    Raises:
        InvalidSetting: one is given twice.
    """
    from retcon.attachment import load

    found: dict[str, Attachment] = {}
    for path in delta_files(paths):
        delta = load(path)
        if delta.id in found:
            raise InvalidSetting(f"{path}: the delta {delta.id} is given twice; a model takes it once")
        found[delta.id] = delta
    return list(found.values())


def delta_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of deltas, with those of a store in its place."""
    from retcon.store import Store
    from retcon.store.contents import CONFIG

    found: list[Path] = []
    for path in paths:
        folder, _, entry = str(path).rpartition("@")
        if (path / CONFIG).is_file():
            found += Store(path).paths()
        elif folder and (Path(folder) / CONFIG).is_file():
            found += Store(folder).paths(entry)
        else:
            found.append(path)
    return found


def check_can_write(path: Path) -> None:
    """Check, before hours of work, that a file can be written there.

    Raises:
        InvalidSetting: it is a directory, or it cannot be made there.
    """
    if path.is_dir():
        raise InvalidSetting(f"{path} is a directory; give the name of a file to write")
    if path.exists() and not path.is_file():
        raise InvalidSetting(f"{path} is no ordinary file (a pipe or a device); give the name of a file to write")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InvalidSetting(f"cannot write {path}: {parent} is not a directory that may be written to")


def check_can_make_folder(path: Path) -> None:
    """Check, before hours of work, that a folder of results can be there.

    Raises:
        InvalidSetting: a file is in the way, or it cannot be made there.
    """
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InvalidSetting(f"cannot write into {path}: {nearest} is not a directory that may be written to")


def check_not_an_input(path: Path, inputs: Sequence[Path]) -> None:
    """Refuse to write where something is read from.

    Raises:
        InvalidSetting: the file is one of the inputs.
    """
    for each in inputs:
        if each.exists() and path.exists() and each.samefile(path):
            raise InvalidSetting(f"{path} is an input of this command; name another file to write")


def warn(message: str) -> None:
    """Print a warning of the command line's own."""
    _say("warning", "yellow", message)
