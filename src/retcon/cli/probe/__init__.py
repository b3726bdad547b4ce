"""`retcon probe`: where facts live in a model, and which layers to edit. One file per sub-verb."""

import typer

from retcon.cli.printing import add_verbs

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Where facts live in a model, and which layers to edit."
)

EXAMPLES = {
    "contrast": (
        "retcon probe contrast demo:gptj --limit 200",
        "retcon probe contrast ./my-model --cases counterfact.json --corpus text.txt --out contrast",
    ),
    "trace": (
        "retcon probe trace demo:llama --limit 1",
        "retcon probe trace ./my-model --cases edits.jsonl --limit 50 --kind block --kind severed_mlp",
    ),
    "layers": (
        "retcon probe layers demo:gptj --limit 200",
        "retcon probe layers ./my-model --cases edits.jsonl",
        "retcon edit ./my-model edits.jsonl --layers probe --out my.safetensors",
    ),
    "attribution": (
        "retcon probe attribution demo:gptj --modules down,up,q --limit 10",
        "retcon probe attribution ./my-model --cases edits.jsonl --unit column --answer new",
    ),
    "paths": (
        "retcon probe paths demo:llama --limit 50",
        "retcon probe paths ./my-model --cases edits.jsonl --score signed_sum --positive 5",
    ),
}
add_verbs(app, __name__, EXAMPLES)
