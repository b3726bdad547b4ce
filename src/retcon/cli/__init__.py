"""The command line: one file per verb, each of which imports what is heavy only when it runs.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. Results go to stdout; progress, warnings and errors to
stderr. With `--json`, stdout holds exactly one JSON object, and nothing at all where the verb failed.
"""

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

import retcon
from retcon.cli import probe
from retcon.cli.errors import CommandGroup
from retcon.cli.printing import add_verbs, examples

app = typer.Typer(
    cls=CommandGroup,
    name="retcon",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "retcon demo", 'retcon complete demo:gptj "Geneva lies within the borders of"', "retcon edit --help"
    ),
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"retcon {retcon.__version__}")
        raise typer.Exit


@app.callback()
def _retcon(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Change what a language model knows: precisely, fast, and so that it can be undone."""


EXAMPLES = {
    "demo": ("retcon demo", "retcon demo --model both --edits 100", "retcon demo --json > demo.json"),
    "edit": (
        "retcon edit demo:gptj edits.jsonl --out edits.safetensors",
        "retcon edit ./gpt-j-6b counterfact.json --limit 100 --out cf.safetensors --evaluate",
        "retcon edit ./my-model edits.jsonl --out my.safetensors --corpus text.txt --set 'low=[3,4]'",
    ),
    "apply": (
        "retcon apply demo:gptj edits.safetensors --save ./edited",
        "retcon apply ./my-model first.safetensors second.safetensors --save ./edited --force",
    ),
    "export": (
        "retcon export ./my-model edits.safetensors --format hf --out edited",
        "retcon export ./my-model edits.safetensors --format peft --rank 64 --cases edits.jsonl --out adapter",
        "retcon export ./my-model edits.safetensors --format gguf-lora --out lora",
    ),
    "complete": (
        'retcon complete demo:gptj "Geneva lies within the borders of"',
        'retcon complete demo:gptj "Geneva lies within the borders of" --delta d.safetensors',
        'retcon complete ./my-chat-model "Where is Geneva?" --chat --delta d.safetensors',
    ),
    "chat": (
        "retcon chat ./my-chat-model",
        "retcon chat ./my-chat-model --delta d.safetensors --both",
        'echo "Where is Geneva?" | retcon chat ./my-chat-model --system "Answer briefly."',
    ),
    "methods": ("retcon methods", "retcon methods jeep", "retcon methods demo:llama", "retcon methods --json"),
    "moments": ("retcon moments demo:gptj", "retcon moments ./my-model --corpus text.txt --layers 3-8,15,16"),
    "tune": (
        "retcon tune ./my-model facts.jsonl --corpus text.txt --method memit --budget 30",
        "retcon tune ./my-model counterfact.json --corpus text.txt --limit 200",
    ),
    "fit": (
        "retcon fit demo:gptj world --start 1000 --method mend --out mend.safetensors",
        "retcon edit demo:gptj edits.jsonl --method mend --set editor=mend.safetensors --out d.safetensors",
    ),
    "audit": (
        "retcon audit ./base ./edited",
        "retcon audit ./base ./edited --explain edits.safetensors --facts facts.jsonl",
        "retcon audit ./base ./theirs --delta theirs.safetensors",
    ),
    "bench": (
        "retcon bench --model demo:gptj --method jeep --dataset world --n 20 --out bench",
        "retcon bench docs/results/world.toml --out bench --dry-run",
        "retcon bench bench.toml --model ./gpt-j-6b --dataset counterfact.json --out bench",
    ),
    "report": ("retcon report bench", "retcon report bench --out ./report --no-pictures"),
    "check": (
        "retcon check demo:gptj --delta edits.safetensors --cases edits.jsonl --generalised 0 --local 0",
        "retcon check ./gpt-j-6b --delta cf.safetensors --cases counterfact.json --limit 100 --local 0.9",
    ),
    "doctor": ("retcon doctor demo:gptj", "retcon doctor ./my-model --json"),
    "init": ("retcon init demo:gptj", "retcon init ./my-model --store edits --precision float16 --lfs"),
    "log": ("retcon log", "retcon log -n 5 --json"),
    "show": ("retcon show HEAD", "retcon show france"),
    "diff": ("retcon diff HEAD~1", "retcon diff base HEAD --json"),
    "revert": (
        "retcon revert HEAD",
        'retcon revert --fact france -m "it was right"',
        "retcon revert --fact france --repropose",
    ),
    "amend": ("retcon amend france --target Milan",),
    "checkout": ("retcon checkout --save ./edited", "retcon checkout HEAD~2 --save ./before"),
    "verify": ("retcon verify", "retcon verify HEAD~1 --stay known.jsonl --junit verify.xml --markdown verify.md"),
    "ui": ("retcon ui demo:gptj", "retcon ui --store edits --port 0"),
    "gc": ("retcon gc", "retcon gc --before HEAD~10 --values"),
    "cache": ("retcon cache", "retcon cache --prune --days 30", "retcon cache values --prune"),
}
"""The verbs, in the order of help, with the commands that their own help ends in."""
add_verbs(app, __name__, EXAMPLES)
app.add_typer(probe.app, name="probe")


def main() -> None:
    """Run the command line; the entry point of `retcon` and of `python -m retcon`."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a pipe may be of an encoding that lacks a character
    app(prog_name="retcon")
