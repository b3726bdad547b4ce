"""`retcon demo`: facts rewritten in a small model, measured, saved, and undone bit for bit."""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from retcon.cli.models import load_model
from retcon.cli.options import Json, Seed
from retcon.cli.output_checks import check_output
from retcon.cli.printing import console, emit, plain_table, program, seconds, size, styled
from retcon.cli.progress import progress_bars, spinner
from retcon.edits import Case, Query
from retcon.errors import InvalidSetting, MalformedFile
from retcon.workflow import Resolved, resolve, write_facts

if TYPE_CHECKING:
    from retcon.attachment import Attachment
    from retcon.evaluation import CaseMean, Evaluation, Summary
    from retcon.lm.model import LM

MODELS = {"gptj": "GPT-J", "llama": "LLaMA"}
STOPS = (".", "\n")
"""Ends of an answer: every fact of the world ends in a full stop, and no object holds one."""
N_ASIDE = 3
"""Paraphrases and neighbours shown."""
N_DIGITS = 12
"""Of a fingerprint, shown."""
TOOK = 0.5
"""By how much the share of edited prompts that give the new answer must rise for the demo to count as a success."""


def demo(
    model: Annotated[Literal["gptj", "llama", "both"], typer.Option(help="Architecture of the small model.")] = "gptj",
    edits: Annotated[int, typer.Option(min=1, help="Facts to rewrite, all at once.")] = 20,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the delta, or a directory.", show_default="retcon-demo-<model>.safetensors"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rewrite facts inside a small language model with JEEP; measure, save, and undo it. Takes less than a minute."""
    from retcon import world

    chosen = list(MODELS) if model == "both" else [model]
    places = {name: _place(out, name, len(chosen)) for name in chosen}
    for place in places.values():
        check_output(place)
        _check_replaces_a_delta(place)
    cases = world.cases(edits, seed=seed)
    stories = []
    for name in chosen:
        story = _edit_and_undo(name, cases, places[name], seed)
        stories.append(story)
        _show_story(story, as_json)
    if as_json:
        emit({"ok": all(s.ok for s in stories), "models": [s.record() for s in stories]})
    else:
        _suggest(stories[-1], [m for m in MODELS if m not in chosen])
    if not all(s.ok for s in stories):
        raise typer.Exit(1)


def _place(out: Path | None, name: str, n_models: int) -> Path:
    file = f"retcon-demo-{name}.safetensors"
    if out is None:
        return Path(file)
    if out.is_dir():
        return out / file
    if n_models > 1:
        raise InvalidSetting(f"--out {out}: for several models give a directory that exists")
    return out


def _check_replaces_a_delta(place: Path) -> None:
    """Refuse to replace a file that no demo can have written."""
    if not place.exists():
        return
    from retcon.attachment import load

    try:
        load(place)
    except MalformedFile:
        raise InvalidSetting(f"{place} is there already and is no delta; name another file") from None


# --- doing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """One prompt, what the model went on with before and after, and whether that is right now."""

    prompt: str
    before: str
    wanted: str
    after: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Story:
    """All that happened to one model."""

    name: str
    lm: "LM"
    cases: Sequence[Case]
    resolved: Resolved
    said: Mapping[str, Sequence[Said]]
    """By axis: all of `rewrite`, a few of `paraphrase` and `neighborhood`."""
    evaluation: "Evaluation"
    delta: "Attachment"
    file: Path
    same_from_file: bool
    """The delta read back from the file is the one that was saved."""
    fingerprints: dict[str, str]
    """Of all weights, computed afresh each time: `before`, `edited`, `reverted`."""
    seconds: dict[str, float]

    @cached_property
    def summary(self) -> "Summary":
        return self.evaluation.summary()

    @property
    def undone(self) -> bool:
        marks = self.fingerprints
        return marks["before"] == marks["reverted"] != marks["edited"]

    @property
    def took(self) -> bool:
        """The edits are in: many more edited prompts give the new answer than before."""
        before, after = (e.value if e and e.value is not None else 0.0 for e in self.estimates("ES"))
        return after - before >= TOOK

    @property
    def ok(self) -> bool:
        return self.same_from_file and self.undone and self.took

    def estimates(self, metric: str) -> "tuple[CaseMean | None, CaseMean | None]":
        """Before and after."""
        line = self.summary.get(("Score", "score.hm") if metric == "Score" else metric)
        return (line.pre, line.post) if line else (None, None)

    def record(self) -> dict[str, Any]:
        """Return the plain values, for JSON."""
        return {
            "model": f"demo:{self.name}",
            "ok": self.ok,
            "preset": self.resolved.preset and self.resolved.preset.name,
            "said": {axis: [asdict(each) for each in said] for axis, said in self.said.items()},
            "metrics": {
                name: {when: e and asdict(e) for when, e in zip(("before", "after"), self.estimates(name), strict=True)}
                for name in _METRICS
            },
            "seconds": {**self.seconds, "per_edit": self.seconds["edit"] / len(self.cases)},
            "delta": {"id": self.delta.id, "file": str(self.file), "read_back": self.same_from_file},
            "fingerprints": self.fingerprints,
            "undone": self.undone,
        }


def _edit_and_undo(name: str, cases: Sequence[Case], file: Path, seed: int) -> Story:
    from retcon.delta import Delta
    from retcon.evaluation import evaluate
    from retcon.lm.fingerprint import fingerprint

    took: dict[str, float] = {}
    started = time.perf_counter()
    lm = load_model(f"demo:{name}")
    took["load"] = time.perf_counter() - started
    marks = {"before": fingerprint(lm.model)}
    resolved = resolve(lm, "jeep")
    with progress_bars() as advance:
        made = write_facts(lm, resolved, [e for c in cases for e in c.edits], seed=seed, progress=advance)
        delta = made.delta
        took |= made.seconds

        started = time.perf_counter()
        evaluation = evaluate(lm, cases, delta=delta, generate=False, seed=seed, progress=advance)
        took["evaluate"] = time.perf_counter() - started

    delta.save(file)
    loaded = Delta.load(file)
    asked = _queries(cases)
    flat = [query.prompt for queries in asked.values() for query in queries]
    with spinner("asking"):
        before = _answers(lm, flat)
        lm.apply(loaded)
        marks["edited"] = fingerprint(lm.model)
        after = _answers(lm, flat)
        lm.revert(loaded)
        marks["reverted"] = fingerprint(lm.model)
    pairs = iter(zip(before, after, strict=True))
    said = {axis: [_said(query, *next(pairs)) for query in queries] for axis, queries in asked.items()}
    return Story(
        name=name,
        lm=lm,
        cases=cases,
        resolved=resolved,
        said=said,
        evaluation=evaluation,
        delta=delta,
        file=file,
        same_from_file=loaded == delta,
        fingerprints=marks,
        seconds=took,
    )


def _queries(cases: Sequence[Case]) -> dict[str, list[Query]]:
    """Return all edited prompts; and a few paraphrases and neighbours, each of another case and in other words."""
    asked = {"rewrite": [q for c in cases for q in c.queries if q.axis == "rewrite"]}
    for axis in ("paraphrase", "neighborhood"):
        of_cases = [[q for q in c.queries if q.axis == axis] for c in cases]
        asked[axis] = [found[place % len(found)] for place, found in enumerate(of_cases) if found][:N_ASIDE]
    return asked


def _answers(lm: "LM", prompts: Sequence[str]) -> list[str]:
    return [text.strip() for text in lm.generate(prompts, max_new_tokens=12, stops=STOPS)]


def _said(query: Query, before: str, after: str) -> Said:
    from retcon.evaluation.metrics import gen_em

    wanted = query.target or ""
    return Said(query.prompt, before, wanted, after, gen_em(after, ((wanted,),)))


# --- telling -----------------------------------------------------------------------------------------------------

_TITLES = {
    "rewrite": "",
    "paraphrase": "the same facts in other words, which the model never read for these subjects",
    "neighborhood": "other subjects with the same old answer, which should stay as they are",
}
_METRICS = {
    "ES": "edited prompts: the new answer is likelier",
    "GS": "the same facts in held-out words",
    "LS": "other subjects with the old answer keep it",
    "Score": "harmonic mean of the three",
}


def _show_story(story: Story, as_json: bool) -> None:
    from retcon.world import load_world

    show = console(stderr=as_json)
    n_values = sum(p.numel() for p in story.lm.model.parameters())
    n_facts = len(load_world().facts)
    show.print()
    show.rule(styled("[bold]retcon demo[/] · demo:{}", story.name), style="dim", align="left")
    show.print(
        f"A small {MODELS[story.name]} with {n_values / 1e6:.1f} million weights that knows {n_facts:,} "
        f"facts. JEEP rewrites {len(story.cases)} at once."
    )
    show.print()
    for axis, title in _TITLES.items():
        if title and story.said[axis]:
            show.print(styled("[dim]{}[/]", title))
        show.print(_table(story.said[axis], header=not title))
    show.print()
    show.print(_metrics_table(story))
    show.print()
    took, n = story.seconds, len(story.cases)
    show.print(
        styled(
            "Time    [bold]{} an edit[/]  [dim]({} for {}; loading {}, moments {}, measuring {})[/]",
            seconds(took["edit"] / n),
            seconds(took["edit"]),
            n,
            seconds(took["load"]),
            seconds(took["moments"]),
            seconds(took["evaluate"]),
        )
    )
    read_back = "read back the same" if story.same_from_file else styled("[red]read back different[/]")
    show.print(
        styled(
            "Saved   [bold]{}[/]  [dim]{}, {}, delta {}[/]",
            story.file,
            size(story.file.stat().st_size),
            read_back,
            story.delta.id,
        )
    )
    marks = {when: mark[:N_DIGITS] for when, mark in story.fingerprints.items()}
    end = styled("[green]the base's, bit for bit[/]") if story.undone else styled("[bold red]NOT the base's[/]")
    undone = styled(
        "Undone  {} → edited {} → reverted {}: {}", marks["before"], marks["edited"], marks["reverted"], end
    )
    show.print(undone)
    show.print(
        styled(
            "        [dim]first digits of SHA-256 over all weights, computed afresh each time; all 64 are compared[/]"
        )
    )
    if not story.took:
        show.print(styled("[bold red]The edits did not take:[/] ES should have risen by at least 50 points."))


def _table(said: Sequence[Said], *, header: bool = False) -> Table:
    table = plain_table(padding=(0, 2, 0, 0), show_header=header)
    for head, width in (("prompt", 46), ("before", 15), ("asked", 15), ("after", 18)):
        table.add_column(head, no_wrap=True, overflow="ellipsis", width=width)
    for each in said:
        mark = styled("[green]✓[/]") if each.right else styled("[red]✗[/]")
        table.add_row(each.prompt, each.before, each.wanted, styled("{} {}", mark, each.after))
    return table


def _metrics_table(story: Story) -> Table:
    table = plain_table("x100", right=("before", "after"), padding=(0, 2, 0, 0))
    table.add_column("with 95 % intervals, over cases")
    for name, meaning in _METRICS.items():
        before, after = story.estimates(name)
        table.add_row(
            styled("[bold]{}[/]", name),
            _percent(before),
            styled("[bold]{}[/]", _percent(after)),
            styled("[dim]{}[/]", meaning),
        )
    return table


def _percent(estimate: "CaseMean | None") -> str:
    return estimate.percent() if estimate else "-"


def _suggest(story: Story, others: Sequence[str]) -> None:
    """Commands that work as they are, typed here."""
    from retcon import world

    run, model, file = program(), f"demo:{story.name}", shlex.quote(str(story.file))
    edit = story.cases[0].edits[0]
    done = {case.id for case in story.cases}
    own = next((case for case in world.cases(None, seed=1) if case.id not in done), story.cases[0]).edits[0]
    wish = {"prompt": own.prompt, "subject": own.subject, "target_new": own.target_new}
    commands = {
        "Ask the edited model": f"{run} complete {model} {shlex.quote(edit.text)} --delta {file}",
        "Make it a checkpoint for transformers": f"{run} apply {model} {file} --save edited-{story.name}",
        "Write a fact of your own": f"echo {shlex.quote(json.dumps(wish, ensure_ascii=False))} > mine.jsonl\n"
        f"{run} edit {model} mine.jsonl --out mine.safetensors",
    }
    if others:
        commands["The other architecture"] = f"{run} demo --model {others[0]}"
    show = console()
    show.print()
    show.print(styled("[bold]Try next[/]"))
    for what, lines in commands.items():
        show.print(styled("  [dim]# {}[/]", what))
        for line in lines.split("\n"):
            show.print(f"  {line}", soft_wrap=True)
