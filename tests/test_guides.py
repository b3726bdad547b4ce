"""The guides' examples run as they are printed."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import retcon
from retcon.cli import app
from retcon.errors import InvalidSetting, UnknownMethod

GUIDES = Path(__file__).parents[1] / "docs" / "guides"


def fenced(page: Path) -> list[tuple[str, str]]:
    """The language and text of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def blocks(guide: str, language: str) -> list[str]:
    return [text for found, text in fenced(GUIDES / guide) if found == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example method in it, and nothing else on the way there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mean_shift", raising=False)
    (tmp_path / "mean_shift.py").write_text(blocks("add-a-method.md", "python")[0], encoding="utf-8")
    return tmp_path


def test_the_example_method_edits_and_is_found_in_the_current_folder(folder: Path, capsys: Any) -> None:
    _, use, _, check = blocks("add-a-method.md", "python")
    path = list(sys.path)
    example: dict[str, Any] = {}
    with pytest.warns(retcon.errors.RetconWarning, match="no mean_shift:MeanShift preset"):
        exec(compile(use, "add-a-method.md", "exec"), example)
    assert capsys.readouterr().out.strip().startswith("Italy")
    assert sys.path == path
    exec(compile(check, "add-a-method.md", "exec"), example)
    assert example["delta"].report[0].greedy_match
    lm = example["lm"]
    with lm.edited(example["delta"]):
        assert lm.complete("The country that contains Zurich is").strip().startswith("Switzerland")


def test_a_store_writes_a_fact_of_the_example_method_again(folder: Path) -> None:
    lm = retcon.load("demo:gptj")
    own = retcon.method("mean_shift:MeanShift", layer=1, examples=("Naples", "Turin"))
    edit = retcon.Edit("The country that contains {} is", "Geneva", "Italy")
    store = retcon.Store.init(folder / "store", lm)
    store.edit(lm, [retcon.Case("geneva", (edit,), ())], own)
    with pytest.warns(retcon.errors.RetconWarning, match="mean_shift keeps none"):
        store.amend(lm, "geneva", "France")
    (line,) = store.facts()
    delta = store.delta(line.delta)
    assert delta.id == own.propose(lm, [replace(edit, target_new="France")]).id
    assert delta.provenance["class"] == "mean_shift:MeanShift"


def test_the_fact_that_the_guide_amends_is_in_its_file() -> None:
    page = (GUIDES / "add-a-method.md").read_text(encoding="utf-8")
    (amended,) = re.findall(r"retcon amend (\w+)", page)
    assert f'"id": "{amended}"' in page


@pytest.fixture
def written(folder: Path) -> tuple[retcon.LM, retcon.Store]:
    """A store with a fact of the example method, whose module is not imported any more."""
    lm = retcon.load("demo:gptj")
    own = retcon.method("mean_shift:MeanShift", layer=1, examples=("Naples", "Turin"))
    edit = retcon.Edit("The country that contains {} is", "Geneva", "Italy")
    store = retcon.Store.init(folder / "store", lm, model="demo:gptj")
    store.edit(lm, [retcon.Case("geneva", (edit,), ())], own)
    del sys.modules["mean_shift"]
    return lm, store


def test_a_store_runs_code_of_a_method_of_ones_own_only_where_it_is_named(
    written: tuple[retcon.LM, retcon.Store],
) -> None:
    lm, store = written
    before = store.log()
    with pytest.raises(
        InvalidSetting, match=r"fact 'geneva'\) was made by mean_shift:MeanShift.* --method module:Class"
    ):
        store.amend(lm, "geneva", "France")
    with pytest.raises(InvalidSetting, match=r"method memit is memit .* and mean_shift .* made delta"):
        store.amend(lm, "geneva", "France", method="memit")
    assert store.log() == before
    assert "mean_shift" not in sys.modules
    with pytest.warns(retcon.errors.RetconWarning, match="mean_shift keeps none"):
        store.amend(lm, "geneva", "France", method="mean_shift:MeanShift")


def test_the_command_line_names_a_method_of_ones_own(written: tuple[retcon.LM, retcon.Store]) -> None:
    amend = ["amend", "geneva", "--target", "France", "--store", "store"]
    refused = CliRunner().invoke(app, amend)
    assert (refused.exit_code, "mean_shift" in sys.modules) == (2, False)
    done = CliRunner().invoke(app, [*amend, "--method", "mean_shift:MeanShift"])
    assert done.exit_code == 0, done.output
    del sys.modules["mean_shift"]
    revert = ["revert", "--fact", "geneva", "--store", "store", "--method", "mean_shift:MeanShift"]
    assert CliRunner().invoke(app, revert).exit_code == 0


def test_the_example_preset_is_found(folder: Path) -> None:
    presets = folder / "retcon-presets"
    presets.mkdir()
    text = next(block for block in blocks("add-a-method.md", "toml") if "[[preset]]" in block)
    (presets / "MeanShift.toml").write_text(text, encoding="utf-8")
    lm = retcon.load("demo:gptj")
    found: Any = retcon.method("mean_shift:MeanShift", for_model=lm)
    assert (found.layer, found.examples) == (1, ("Naples", "Turin"))


def test_the_example_format_and_metric_are_used(folder: Path) -> None:
    (folder / "mine.py").write_text(blocks("add-a-method.md", "python")[2], encoding="utf-8")
    (folder / "facts.jsonl").write_text('{"sentence": "The capital of {} is", "who": "Norr", "new": "Rome"}\n', "utf-8")
    cases, _ = retcon.read_cases("facts.jsonl", "mine:wiki")
    measures = retcon.evaluation.Measures(metrics=("mine:politeness",), max_new_tokens=2)
    records = retcon.evaluate(retcon.load("demo:gptj"), cases, measures=measures).records
    assert [r.value for r in records if r.variant == "mine:politeness"] == [0.0]


def test_the_commands_of_the_guide_run(folder: Path) -> None:
    shell = next(block for block in blocks("add-a-method.md", "") if block.startswith("echo"))
    facts, edit, complete = shell.strip().splitlines()
    subprocess.run(facts, shell=True, check=True)
    for command in (edit, complete):
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
    assert "contains Geneva is Italy" in result.output


def test_commands_in_the_documentation_have_verbs_and_options_that_exist() -> None:
    root = get_command(app)
    unknown = []
    for page in sorted([*GUIDES.parent.rglob("*.md"), GUIDES.parents[1] / "README.md"]):
        text = "\n".join(code for language, code in fenced(page) if not language)
        indented = re.findall(r"^    (retcon .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        for line in [*re.findall(r"^(retcon .*)$", text, re.MULTILINE), *indented]:
            command: Any = root
            words = line.split("#")[0].split()[1:]
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            unknown += [f"{page.name}: {line}: {word}" for word in words if word[:2] == "--" and word not in known]
            if getattr(command, "commands", None) and words:
                unknown.append(f"{page.name}: {line}: no such command")
    assert not unknown


def test_a_class_that_is_not_there_leads_to_the_guide(folder: Path) -> None:
    for name in ("mean_shift:MeanShft", "no_such_module:MeanShift"):
        with pytest.raises(UnknownMethod, match=re.escape("docs/guides/add-a-method.md")):
            retcon.method(name)


def test_a_class_that_is_no_method_is_refused_with_what_it_lacks(folder: Path) -> None:
    (folder / "unlike.py").write_text(
        "from retcon.methods.common.contract import Method\n\n\nclass Unlike:\n    name = 'unlike'\n\n\n"
        "class Idle(Method):\n    name = 'idle'\n",
        encoding="utf-8",
    )
    with pytest.raises(UnknownMethod, match="lacks Method as a base class, propose, @dataclass"):
        retcon.method("unlike:Unlike")
    with pytest.raises(UnknownMethod, match="unlike:Idle is no method: it lacks propose; see"):
        retcon.method("unlike:Idle")
