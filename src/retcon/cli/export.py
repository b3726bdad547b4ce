"""`retcon export`: an edited model in the format that a server, a hub or llama.cpp loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from retcon.cli.facts import reads_facts
from retcon.cli.models import delta_files, load_deltas, load_model, loads_as_stored
from retcon.cli.options import AppliedDeltas, Json, Model, OtherBase
from retcon.cli.printing import console, emit, plain_table, size, styled
from retcon.cli.progress import spinner
from retcon.errors import InvalidSetting
from retcon.workflow.facts import Reading, read_facts

if TYPE_CHECKING:
    from retcon.edits import Case
    from retcon.evaluation import Evaluation
    from retcon.export import Exported
    from retcon.lm.model import LM


@loads_as_stored
@reads_facts("--cases", format_option="--cases-format")
def export(
    model: Model,
    delta: AppliedDeltas,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder that the export goes to.")],
    format_: Annotated[
        Literal["hf", "peft", "diff", "gguf-lora", "gguf"],
        typer.Option(
            "--format",
            help="hf: merged checkpoint. peft: LoRA adapter. diff: the changed tensors. gguf-lora, gguf: the two for "
            "llama.cpp.",
        ),
    ] = "hf",
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="R|max",
            help="Of adapters: one rank for all matrices, at most R (what is lost is said); max: the largest needed.",
        ),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How the adapter and the card call the base, such as its hub id.",
            show_default="the model's name",
        ),
    ] = None,
    gguf_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"], typer.Option("--type", help="Type of a GGUF model's matrices.")
    ] = "f16",
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Size of a merged checkpoint's files at most.")
    ] = "5GB",
    cases: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Cases to measure: their scores go on the card, and a smaller rank is measured beside the exact one.",
        ),
    ] = None,
    *,
    reading: Reading,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the export to this repository of the hub as well.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository of --push a public one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the export that is in DIR.")] = False,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Write an edited model in a format that others load, with a model card that says what was changed.

    With --format hf and diff, weights are saved in the dtype that transformers loads the model in (one for all, such as
    bfloat16), or in --dtype. DIR appears complete or not at all.
    """
    for option, given, there, needed in (
        ("--public", public, push is not None, "--push"),
        ("--type", gguf_type != "f16", format_ == "gguf", "--format gguf"),
        ("--max-shard-size", max_shard_size != "5GB", format_ == "hf", "--format hf"),
    ):
        if given and not there:
            raise InvalidSetting(f"{option} goes with {needed}; leave it out, or give that")
    if cases is None and reading != Reading(conflicts="drop"):
        raise InvalidSetting("how facts are read (--start, --chat, ...) goes with --cases; leave it out, or give that")

    from retcon.delta import only_deltas
    from retcon.export import export as write
    from retcon.export import push as upload
    from retcon.export.write import check_content, check_form, check_place, check_repository

    wanted = _rank(rank)
    check_form(format_, rank=wanted, gguf_type=gguf_type, max_shard_size=max_shard_size)
    if push is not None:
        check_repository(push)
    inputs = [Path(model), *delta_files(delta), *([cases] if cases else [])]
    check_place(out, Path(model) if Path(model).is_dir() else None, force, inputs)
    asked: Sequence[Case] = read_facts(cases, reading).cases if cases is not None else ()
    deltas = load_deltas(delta)
    lm = load_model(model)
    for each in deltas:
        lm.apply(each, other_base=other_base)
    check_content(lm, only_deltas(lm.applied, f"format {format_}"), format_)
    scores = _all_scores(lm, asked, wanted) if asked else {}
    with spinner(f"saving {out}"):
        made = write(
            lm,
            out,
            format=format_,
            rank=wanted,
            base_name=base_name,
            gguf_type=gguf_type,
            max_shard_size=max_shard_size,
            scores=scores,
            files=[f.name for f in delta_files(delta)],
            force=force,
        )
    address = None
    if push is not None:
        with spinner(f"uploading to {push}"):
            address = upload(out, push, private=not public)
    if as_json:
        emit(
            {"saved": str(out), "bytes": made.n_bytes, "losses": made.losses, "scores": scores, "pushed": address}
            | dict(made.record)
        )
        return
    _show(made, scores, address, _how_to_load(made, lm, base_name))


def _rank(text: str | None) -> int | Literal["max"] | None:
    if text is None or text == "max":
        return text  # type: ignore[return-value]
    if not text.isdecimal() or int(text) < 1:
        raise InvalidSetting(f"--rank {text}: expected a whole number from 1, or max")
    return int(text)


def _all_scores(lm: "LM", cases: "Sequence[Case]", rank: "int | str | None") -> dict[str, float]:
    """Return the scores of the edited model, and where a rank was asked for those of the changes cut to it."""
    from retcon.evaluation import evaluate

    with spinner("measuring the unedited model"), lm.without_deltas():
        before = evaluate(lm, cases)
    scores = _scores(lm, cases, before)
    if isinstance(rank, int):
        scores |= {f"{name} at rank {rank}": v for name, v in _scores_at(lm, cases, before, rank).items()}
    return scores


def _scores(lm: "LM", cases: "Sequence[Case]", before: "Evaluation") -> dict[str, float]:
    """Return the score, efficacy, generalisation and locality of the model as it is now, times 100.

    Args:
        before: the unedited model's, with which locality of some datasets is the agreement.
    """
    from retcon.evaluation import evaluate

    with spinner("measuring"):
        lines = evaluate(lm, cases, pre=before).summary(n_resamples=100).lines
    found: dict[str, float] = {}
    for line in lines:
        if line.metric in ("Score", "ES", "GS", "LS") and line.post is not None and line.post.value is not None:
            found.setdefault(line.metric, 100 * line.post.value)
    return found


def _scores_at(lm: "LM", cases: "Sequence[Case]", before: "Evaluation", rank: int) -> dict[str, float]:
    """Return the same with the changes cut to that rank."""
    from retcon.delta import only_deltas
    from retcon.export.factors import compressed, factors_of

    deltas = only_deltas(lm.applied, "an adapter")
    small = compressed(lm, factors_of(lm, deltas, rank=rank), deltas)
    lm.revert_all()
    try:
        with lm.edited(small, other_base=True):
            return _scores(lm, cases, before)
    finally:
        for delta in deltas:
            lm.apply(delta, other_base=True)


def _show(made: "Exported", scores: dict[str, float], address: str | None, loads: str) -> None:
    show = console()
    if made.losses:
        table = plain_table(("parameter", None), right=("rank", "of", "lost"))
        for name, loss in made.losses.items():
            lost = f"{100 * loss['error']:.2f} %" if loss["error"] else "-"
            table.add_row(name, str(loss["rank"]), str(loss["exact_rank"]), lost)
        show.print(table)
        show.print(styled("[dim]lost: Frobenius norm of what the rank leaves out, over that of the change[/]\n"))
    if scores:
        show.print("scores   " + ", ".join(f"{name} {value:.1f}" for name, value in scores.items()))
    show.print(styled("saved    {}  [dim]{}, {}[/]", made.place, made.format, size(made.n_bytes)))
    if address:
        show.print(f"pushed   {address}")
    show.print(styled("[dim]{}[/]", loads), soft_wrap=True)


def _how_to_load(made: "Exported", lm: "LM", base_name: str | None) -> str:
    from retcon.export.write import base_gguf, base_place, base_revision
    from retcon.lm.load import causal_class_reads, class_that_reads, how_to_load

    place = str(made.place)
    if made.format == "hf":
        return f"load it with {how_to_load(place)}"
    base = str(lm.model.config._name_or_path)
    reader = class_that_reads(lm.model.config).__name__
    # a path that the adapter leaves out, or a base that AutoPeftModelForCausalLM does not load
    by_hand = not causal_class_reads(lm.model) or base_gguf(lm) or (base_name is None and base != base_place(lm))
    if made.format == "peft" and by_hand:
        options = {"gguf_file": file.name if (file := base_gguf(lm)) else None, "revision": base_revision(lm)}
        given = "".join(f", {option}={value!r}" for option, value in options.items() if value)
        return f"load it with PeftModel.from_pretrained({reader}.from_pretrained({base!r}{given}), {place!r})"
    return {
        "peft": f"load it with AutoPeftModelForCausalLM.from_pretrained({place!r})",
        "diff": f"load it with retcon.export.write.load_changed(model, {place + '/changed.safetensors'!r})",
        "gguf-lora": f"load it with llama-cli -m BASE.gguf --lora {place}/adapter.gguf",
        "gguf": f"load it with llama-cli -m {place}/model-*.gguf",
    }[made.format]
