"""`retcon probe`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retcon.cli.probe.shared import rounded
from retcon.errors import UnsupportedModel
from retcon.locate import lens
from tests.cli.conftest import write_rows

pytest.importorskip("matplotlib", reason="probes draw figures (pip install 'retcon-lm[plot]')")
Cli = Callable[..., Any]
CASES = ("--cases", "facts.jsonl")


@pytest.fixture(autouse=True)
def _facts(here: Path) -> None:
    subjects = ("France", "Italy", "Leonardo da Vinci", "Danielle Darrieux", "Łódź", "Zürich")
    rows = [
        {"prompt": "The capital of {} is", "subject": s, "target_new": "Rome", "target_true": "Paris", "id": s}
        for s in subjects
    ]
    write_rows(here / "facts.jsonl", rows)
    write_rows(here / "unsaid.jsonl", [{k: v for k, v in row.items() if k != "target_true"} for row in rows])


def written(stem: str) -> list[str]:
    return sorted(p.name for p in Path(stem).parent.glob(f"{Path(stem).name}*"))


# --- contrast ----------------------------------------------------------------------------------------------------


def test_contrast_writes_figures_and_the_numbers_behind(cli: Cli) -> None:
    out = cli("probe", "contrast", "gptj", *CASES).stdout
    assert "probed 6 facts" in out
    assert "contrast.png, contrast.svg, contrast.json" in out
    assert written("contrast") == ["contrast.json", "contrast.png", "contrast.svg"]
    record = json.loads(Path("contrast.json").read_text())
    assert (record["model"], record["n"], record["n_layers"], record["skipped"]) == ("gptj", 6, 4, {})
    assert len(record["means"]) == 2 * 2 * 2 * 3 * 5  # positions, readings, answers, quantities, states
    assert {"mean", "half_width", "n", "layer", "site", "final_norm", "set"} <= set(record["means"][0])


def test_contrast_with_modules_word_sets_and_records(cli: Cli, here: Path) -> None:
    arguments = ("--modules", "--corpus", "corpus.txt", "--records", "rows.jsonl", "--out", "deep/c", "--json")
    record = json.loads(cli("probe", "contrast", "llama", *CASES, *arguments).stdout)
    assert (here / "deep/c.json").read_text() == json.dumps(rounded(record), ensure_ascii=False) + "\n"
    assert rounded({"a": [1.23456789, 2, None, "x", True]}) == {"a": [1.23457, 2, None, "x", True]}
    assert written("deep/c") == ["c-sets.png", "c-sets.svg", "c.json", "c.png", "c.svg"]
    assert {m["site"] for m in record["means"]} == {"block", "attn", "mlp"}
    assert {m["set"] for m in record["means"]} == {
        *("original", "target", "related", "factual", "non_factual", "stopword", "left"),
    }
    rows = [json.loads(line) for line in (here / "rows.jsonl").read_text().splitlines()]
    assert {row["record_id"] for row in rows} >= {"France", "Łódź"}
    assert all(row["size"] for row in rows)


def test_contrast_takes_lists_of_words(cli: Cli, here: Path) -> None:
    write_rows(here / "sets.jsonl", [{"id": "France", "related": ["train", "home"], "factual": ["train"]}])
    (here / "stop.txt").write_text("the of\n,")
    arguments = ("--sets", "sets.jsonl", "--stopwords", "stop.txt", "--json")
    result = cli("probe", "contrast", "gptj", *CASES, *arguments)
    assert (
        "--sets sets.jsonl has no words for 5 facts: Italy, Leonardo da Vinci, Danielle Darrieux, ..." in result.stderr
    )
    record = json.loads(result.stdout)
    counts = {m["set"]: m["n"] for m in record["means"]}
    assert (counts["related"], counts["stopword"], counts["left"]) == (1, 6, 6)


def test_lists_of_words_for_other_facts_are_refused(cli: Cli, here: Path) -> None:
    write_rows(here / "sets.jsonl", [{"id": "Spain", "related": ["train"]}])
    message = cli("probe", "contrast", "gptj", *CASES, "--sets", "sets.jsonl", code=2).stderr
    assert "no id there is that of a fact; the facts' are France, Italy, Leonardo da Vinci, ..." in message


def test_answers_that_nobody_gave_are_the_models_own(cli: Cli) -> None:
    out = cli("probe", "contrast", "gptj", "--cases", "unsaid.jsonl").stdout
    assert "the model says the original answer in" in out
    assert "(6 without an original answer: the model's own next token stands in)" in out


@pytest.mark.parametrize("probe", ["contrast", "layers"])
def test_states_that_the_final_norm_cannot_read_are_read_without_it(
    probe: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise UnsupportedModel("read without the final norm")

    monkeypatch.setattr(lens, "check_reads", refuse)
    assert "read without the final norm" in cli("probe", probe, "gptj", *CASES, code=2).stderr
    record = json.loads(cli("probe", probe, "gptj", *CASES, "--no-final-norm", "--json").stdout)
    assert {row["final_norm"] for row in record["means"]} == {False}
    assert "probed 6" in cli("probe", probe, "gptj", *CASES, "--no-final-norm").stdout


def test_the_embedded_world_ends_where_its_facts_end(cli: Cli) -> None:
    """The usual number of rows after those passed over goes beyond the last one."""
    record = json.loads(cli("probe", "contrast", "demo:gptj", "--start", "2180", "--json").stdout)
    assert record["n"] == 3


# --- trace -------------------------------------------------------------------------------------------------------


def test_trace_writes_figures_and_the_numbers_behind(cli: Cli) -> None:
    arguments = (
        "--cases",
        "unsaid.jsonl",
        "--samples",
        "2",
        "--limit",
        "3",
        "--kind",
        "block",
        "--kind",
        "severed_mlp",
    )
    out = cli("probe", "trace", "llama", *arguments).stdout
    assert "traced 3 facts (3 without an original answer: the model's own next token stands in); total effect" in out
    assert written("trace") == ["trace-first.png", "trace-first.svg", "trace.json", "trace.png", "trace.svg"]
    record = json.loads(Path("trace.json").read_text())
    assert record["settings"]["kinds"] == ["block", "severed_mlp"]
    assert record["settings"]["window"] == 2  # three eighths of four layers
    assert record["n_assumed"] == 3
    first = record["facts_traced"][0]
    assert first["assumed"]
    assert len(first["scores"]["block"]) == len(first["tokens"])
    assert len(first["scores"]["block"][0]) == 4
    assert record["average_indirect_effect"]["block"]["last"]["n"] == 3


def test_trace_corrupts_as_the_options_say(cli: Cli) -> None:
    asked = ("probe", "trace", "gptj", "--cases", "unsaid.jsonl", "--limit", "1", "--kind", "mlp", "--samples", "2")

    def traced(*options: str) -> tuple[dict[str, Any], dict[str, Any]]:
        record = json.loads(cli(*asked, *options, "--json").stdout)
        return record["settings"], record["facts_traced"][0]

    line = cli(*asked).stdout.splitlines()[2]
    assert line.startswith("traced 1 fact (")
    assert "±" not in line  # of one fact there is no interval
    _, usual = traced()
    _, untouched = traced("--noise", "0")
    settings, replaced = traced("--corruption", "replace", "--window", "4")
    assert (settings["corruption"], settings["window"]) == ("replace", 4)
    assert untouched["low"] == pytest.approx(untouched["high"]) == pytest.approx(usual["high"])
    assert len({fact["low"] for fact in (usual, untouched, replaced)}) == 3
    assert "noise must be at least 0 and finite, found inf" in cli(*asked, "--noise", "inf", code=2).stderr


def test_trace_of_unknown_facts_only(cli: Cli) -> None:
    assert "nothing to trace: 6 left out" in cli("probe", "trace", "gptj", *CASES, code=2).stderr
    message = "cannot restore blocks; known: block, mlp"
    assert message in cli("probe", "trace", "gptj", *CASES, "--kind", "blocks", code=2).stderr


def test_trace_says_what_it_leaves_out(cli: Cli, here: Path) -> None:
    rows = [json.loads(line) for line in (here / "unsaid.jsonl").read_text().splitlines()[:2]]
    write_rows(
        here / "some.jsonl", [*rows, {**rows[0], "id": "other", "prompt": "The town of {} is", "target_true": "Paris"}]
    )
    out = cli("probe", "trace", "gptj", "--cases", "some.jsonl", "--kind", "block", "--samples", "1").stdout
    assert "left out: 1 (the model does not say the original answer)" in out


# --- layers ------------------------------------------------------------------------------------------------------


def test_layers_proposes_and_says_how_sure_it_is(cli: Cli) -> None:
    out = cli("probe", "layers", "gptj", *CASES, "--final-norm").stdout
    assert "jeep          low = [0, 1], high = [2]" in out
    assert "memit, ...    layers = [0, 1]" in out
    assert "the evidence is weak" in out
    assert "only 6 cases, 30 or more are wanted" in out
    assert "edit gptj facts.jsonl --layers probe" in out
    assert written("layers") == [
        *("layers-contrast.png", "layers-contrast.svg", "layers.json", "layers.png", "layers.svg"),
    ]
    record = json.loads(Path("layers.json").read_text())
    assert record["settings"] == {"jeep": {"low": [0, 1], "high": [2]}, "layers": [0, 1], "layer": 1}
    assert len(record["contrast"]["prediction"]["mean"]) == 4
    assert record["rule"]["final_norm"] is True
    bare = json.loads(cli("probe", "layers", "gptj", *CASES, "--no-final-norm", "--json").stdout)
    assert bare["rule"]["final_norm"] is False
    assert bare["contrast"] != record["contrast"]


def test_the_embedded_models_bring_their_facts(cli: Cli) -> None:
    record = json.loads(cli("probe", "layers", "demo:gptj", "--limit", "8", "--seed", "1", "--json").stdout)
    assert (record["n"], record["n_known"], record["weak"]) == (8, 8, record["weak"])
    assert record["facts"].startswith("world (world, limit=8, seed=1, sha256 ")
    as_chat = cli("probe", "layers", "demo:gptj", "--limit", "8", "--chat", code=2).stderr
    assert "the tokenizer has no chat template" in as_chat
    assert "leave the format out" in cli("probe", "layers", "demo:gptj", "--format", "zsre", code=2).stderr


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layers", "gptj"), "which facts shall gptj be probed with? Give a file of them: --cases FILE"),
        (("layers", "gptj", "--cases", "none.jsonl"), "none.jsonl: no such file"),
        (("layers", "gptj", *CASES, "--out", "here/"), "expected the files' name without its ending"),
        (("contrast", "gptj", *CASES, "--sets", "a", "--corpus", "b"), "a: no such file"),
        (("contrast", "gptj", *CASES, "--stopwords", "corpus.txt"), "--stopwords goes with --sets or --corpus"),
        (("trace", "gptj", "--cases", "facts.jsonl", "--start", "6"), "nothing to edit"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, cli: Cli) -> None:
    assert message in cli("probe", *arguments, code=2).stderr


@pytest.mark.parametrize("name", ["contrast.json", "./contrast-sets.svg"])
def test_records_and_figures_are_not_one_file(name: str, cli: Cli) -> None:
    message = cli("probe", "contrast", "gptj", *CASES, "--records", name, code=2).stderr
    assert "--out contrast writes that file, too; name another one" in message


def test_both_kinds_of_word_sets_at_once(cli: Cli) -> None:
    arguments = ("--sets", "facts.jsonl", "--corpus", "corpus.txt")
    assert "give one of them" in cli("probe", "contrast", "gptj", *CASES, *arguments, code=2).stderr


# --- from the probe to an edit -----------------------------------------------------------------------------------

EDIT = ("edit", "gptj", "facts.jsonl", "--out", "d.safetensors", "--corpus", "corpus.txt", "--limit", "2")


def test_two_commands_lead_from_a_model_without_a_preset_to_an_edit(cli: Cli) -> None:
    advised = json.loads(cli("probe", "layers", "gptj", *CASES, "--limit", "2", "--json").stdout)["settings"]["jeep"]
    result = cli(*EDIT, "--layers", "probe", "--set", "steps=3", "--json")
    record = json.loads(result.stdout)
    assert (record["settings"]["low"], record["settings"]["high"]) == (advised["low"], advised["high"]) == ([0, 1], [2])
    assert record["n_probed"] == 2
    assert "only 2 cases, 30 or more are wanted" in result.stderr
    assert "nobody has tuned" not in result.stderr  # nothing is left to guess
    assert "no preset for this model: by its shape and the edits; layers by the probe over 2 facts" in result.stderr
    assert {name.split(".")[2] for name in record["norms"]} == {"0", "1", "2"}


def test_what_holds_the_edits_back_is_said_with_what_to_set(cli: Cli) -> None:
    said = "tune   2 of 2 edits were held back by the clamp: add --set"
    held = cli(*EDIT, "--layers", "probe", "--set", "low_clamp=0.001", "--set", "high_clamp=0.0005").stdout
    assert f"{said} low_clamp=0.002 --set high_clamp=0.001" in held
    assert "2 held back by the clamp" in held


def test_facts_left_out_are_counted(cli: Cli, here: Path) -> None:
    rows = [{"prompt": "The capital of {} is", "subject": "Italy", "target_new": "Rome", "target_true": "Paris"}]
    write_rows(here / "one.jsonl", [*rows, {**rows[0], "subject": "France", "target_new": "Paris"}])
    out = cli("probe", "layers", "gptj", "--cases", "one.jsonl").stdout
    assert "probed 1 fact; the model says the original answer in 0; left out: 1 (" in out
    assert "--layers probe --out edits.safetensors" in out


def test_the_command_that_is_suggested_reads_the_facts_as_the_probe_did(cli: Cli, here: Path) -> None:
    (here / "rows_of_tests.py").write_text("def fact(row):\n    return row | {'prompt': row.pop('sentence')}")
    rows = [{"sentence": "The capital of {} is", "subject": "Italy", "target_new": "Rome", "target_true": "Paris"}]
    write_rows(here / "own.jsonl", [*rows, {"sentence": ""}])
    reading = ("--format", "rows_of_tests:fact", "--on-error", "skip")
    out = cli(
        "probe", "layers", "gptj", "--cases", "own.jsonl", *reading, "--conflicts", "last", "--verify-base"
    ).stdout
    how = "--format rows_of_tests:fact --on-error skip --conflicts last --verify-base"
    assert f"edit gptj own.jsonl {how} --layers probe --out edits.safetensors" in out


def test_what_is_set_by_name_stands_over_the_probe(cli: Cli) -> None:
    arguments = ("--layers", "probe", "--set", "steps=2", "--set", "high=[3]", "--json")
    arguments += ("--set", "low_clamp=0.5", "--set", "high_clamp=0.5")
    settings = json.loads(cli(*EDIT, *arguments).stdout)["settings"]
    assert (settings["low"], settings["high"]) == ([0, 1], [3])
