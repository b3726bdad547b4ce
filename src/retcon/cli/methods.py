"""`retcon methods`: what there is to edit with."""

import re
import sys
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retcon.cli.options import Json
from retcon.cli.printing import console, emit, styled
from retcon.cli.progress import spinner
from retcon.cli.tables import settings_table
from retcon.errors import InvalidSetting, RetconError, UnsupportedModel
from retcon.workflow.settings import as_toml, resolve

if TYPE_CHECKING:
    from retcon.lm.model import LM
    from retcon.methods.common.contract import Method


def methods(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Also say which preset this model gets; only its config is read. A method here is as --method.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="Only this one, or module:Class, with every setting and what it means."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the editing methods: what they do, where they come from, and for which models they have settings."""
    with spinner("reading"):
        from retcon.methods.common.registry import registered_classes

        if method is None and model is not None and _names_method(model):
            model, method = None, model
        lm = _without_weights(model) if model else None
        found = [_described(name, lm) for name in ([method] if method else registered_classes())]
    from retcon.lm.layouts import LAYOUTS

    if as_json:
        emit({"model": model, "architectures": sorted(LAYOUTS), "methods": found})
        return
    out = console()
    for entry in found:
        out.print(styled("[bold]{}[/]  {}", entry["name"], entry["description"]))
        out.print(f"  paper    {entry['paper'] or '-'}")
        out.print(f"  facts    {entry['facts']}")
        out.print(f"  keeps    {entry['keeps'] or 'nothing'} between batches", soft_wrap=True)
        out.print(f"  presets  {', '.join(entry['presets']) or 'none'}", soft_wrap=True)
        if method is not None:
            for setting, meaning in entry["meanings"].items():
                default = f"  (default {entry['defaults'][setting]})" if setting in entry["defaults"] else ""
                out.print(styled("  [bold]{}[/][dim]{}[/]  {}", setting, default, meaning), soft_wrap=True)
        if "problem" in entry:
            out.print(styled("  [yellow]{}[/]: {}", model, entry["problem"]), soft_wrap=True)
        elif lm is not None:
            resolved = resolve(lm, entry["name"])
            out.print(styled("  [green]{}[/]: {}", lm.name, resolved.source))
            for note in resolved.notes:
                out.print(f"  {note}", soft_wrap=True)
            out.print(settings_table(resolved))
    if model is None and method is None:
        out.print(styled("[dim]on {}[/]", ", ".join(sorted(LAYOUTS))), soft_wrap=True)


def _names_method(name: str) -> bool:
    """Return whether what is given where a model can be is a method: a name much like one, or module:Class."""
    from retcon.lm.load import DEMO
    from retcon.methods.common.registry import list_methods

    if Path(name).exists():
        return False
    named = get_close_matches(name, list_methods(), n=1, cutoff=0.75)  # a slip in it is reported by that name
    return bool(named) or (":" in name and not name.startswith(DEMO))


def _described(name: str, lm: "LM | None") -> dict[str, Any]:
    from retcon.methods.common import registry
    from retcon.methods.common.presets import presets
    from retcon.methods.common.settings import descriptions

    chosen = registry.method_class(name)
    about = _about(sys.modules[chosen.__module__].__doc__ or "")
    record: dict[str, Any] = {
        "name": name,
        "description": about.description,
        "paper": about.paper,
        "facts": _facts(chosen),
        "keeps": chosen.state_description or "",
        "presets": [p.name for p in presets(name)],
        "meanings": descriptions(chosen),
        "defaults": {f.name: as_toml(default) for f in fields(chosen) if (default := _default(f)) is not MISSING},
    }
    if lm is not None:
        try:
            resolved = resolve(lm, name)
            record |= {"preset": resolved.preset and resolved.preset.name, "settings": resolved.settings}
        except InvalidSetting as error:  # one that nothing gives
            record |= {"preset": None, "settings": None, "problem": error.on_command_line}
    return record


def _default(setting: "Field[Any]") -> Any:
    """Return a setting's value where none is given; `MISSING` where one must be."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _facts(chosen: "type[Method]") -> str:
    """Return what a method class says of how many facts it takes; a filter leaves that to its base method."""
    from retcon.methods.common.wrappers import Filter

    if issubclass(chosen, Filter):
        return "as its base method"
    return "many at once" if chosen.supports_batches else "one; many in steps, one on top of the other"


@dataclass(frozen=True)
class _About:
    description: str
    paper: str | None


def _about(docstring: str) -> _About:
    """Return what the first line of a method's module says it does, and the paper that its docstring names."""
    first = docstring.strip().split("\n")[0]
    paper = re.search(r"^(.*arXiv:[\w.]+|.+ et al\.[^;\n]+)", docstring, re.MULTILINE)
    return _About(first.partition(": ")[2].rstrip(".") or first, paper[1].rstrip(".") if paper else None)


def _without_weights(name: str) -> "LM":
    """Return the model's shape and tokenizer, no weights read or downloaded: all that a preset is chosen by."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from retcon.lm.load import damage, find_model
    from retcon.lm.model import LM

    place = find_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        config = AutoConfig.from_pretrained(place)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        lm = LM(model, tokenizer, name=name)
        widths = {"n_layers": lm.n_layers, "d_model": lm.d_model, "d_ff": lm.d_ff}
    except RetconError:
        raise
    except Exception as error:  # whatever the parsers make of a damaged config or tokenizer
        raise UnsupportedModel(f"cannot read {name!r}: {damage(error)}") from error
    if nothing := [what for what, width in widths.items() if width < 1]:
        raise UnsupportedModel(f"cannot read {name!r}: its config gives 0 for {', '.join(nothing)}; it is damaged")
    return lm
