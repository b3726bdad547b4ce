"""`retcon edit`."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import retcon
from retcon.delta import Delta, EditReport
from retcon.edits import Case, Edit, Query, write_cases
from retcon.methods.common.starting_point import FittedClamps
from retcon.workflow import Resolved, remedy
from tests.cli.conftest import EDIT, QUICK, ROWS, write_rows


def test_shows_settings_report_norms_and_file(cli: Callable[..., Any]) -> None:
    out = cli(*EDIT).stdout
    delta = Delta.load("delta.safetensors")
    assert "no preset for this model: by its shape and the edits" in out
    assert "in proportion to the key width" in out
    assert "steps = 4" in out
    assert "low = [0, 1]" in out
    assert "high_clamp = 0.25" in out
    assert out.index("steps = 4") < out.index("Danielle Darrieux")
    assert "of 2 reached" in out
    assert all(name in out for name in delta.changes)
    assert f"delta {delta.id}" in out
    assert delta.provenance["settings"]["steps"] == 4
    assert delta.provenance["settings"]["low"] == [0, 1]
    assert [r.id for r in delta.report] == ["fr", "dd"]


def test_says_how_settings_were_chosen_without_a_preset(cli: Callable[..., Any]) -> None:
    notes = json.loads(cli(*EDIT, "--json").stdout)["notes"]
    assert any(note.startswith("high = ") and "by relative depth" in note for note in notes)
    assert any("times the default, with which" in note for note in notes)


def test_json_is_one_object(cli: Callable[..., Any]) -> None:
    result = cli(*QUICK, "--json", "--evaluate")
    record = json.loads(result.stdout)
    delta = Delta.load("delta.safetensors")
    assert record["delta"]["id"] == delta.id
    assert record["base"] == delta.base
    assert record["preset"] is None
    assert record["settings"]["steps"] == 4
    assert [r["id"] for r in record["report"]] == ["fr", "dd"]
    assert record["norms"] == delta.norms()
    assert set(record["seconds"]) == {"load", "moments", "edit", "evaluate"}
    assert record["evaluation"]["n_cases"] == 2
    assert "settings" in result.stderr


def test_another_seed_gives_another_delta(cli: Callable[..., Any]) -> None:
    ids = [json.loads(cli(*QUICK, "--json", "--seed", s, "--force").stdout)["delta"]["id"] for s in ("3", "4")]
    assert ids[0] != ids[1]


def test_plain_edits_are_evaluated_on_their_own_prompts(cli: Callable[..., Any]) -> None:
    out = cli(*QUICK, "--evaluate").stdout
    assert "2 cases" in out
    assert "zsre.tok" in out  # one edit has no old answer, so none is held against one


def test_the_log_hears_of_measuring(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr("retcon.cli.progress.StageLog.advance", lambda log, stage, done, total: heard.append(stage))
    cli(*QUICK, "--evaluate")
    assert {"writing (pre)", "writing (final)"} <= set(heard)


def test_plain_edits_with_old_answers_are_held_against_them(cli: Callable[..., Any], here: Path) -> None:
    write_rows(here / "edits.jsonl", ROWS[:1])
    assert "cf.prob_mean" in cli(*QUICK, "--evaluate").stdout


def test_a_dataset_is_recognised_and_measured_by_its_queries(cli: Callable[..., Any], here: Path) -> None:
    flat = {
        "case_id": 7,
        "prompt": "The capital of France is",
        "subject": "France",
        "target_new": "Rome",
        "ground_truth": "Paris",
        "rephrase_prompt": "France has as its capital",
        "locality_prompt": "The capital of Italy is",
        "locality_ground_truth": "Rome",
    }
    write_rows(here / "edits.jsonl", [flat])
    out = cli(*QUICK, "--evaluate").stdout
    assert "counterfact-flat" in out
    assert all(f"\n{metric}  " in out for metric in ("Score", "ES", "GS", "LS"))


def test_cases_of_our_own(cli: Callable[..., Any], here: Path) -> None:
    edit = Edit("The capital of {} is", "France", "Rome")
    query = Query("rewrite/0", "rewrite", edit.text, "Rome")
    write_cases(here / "edits.jsonl", [Case("one", (edit,), (query,))])
    assert "(cases," in cli(*QUICK, "--format", "cases").stdout


def test_start_and_limit_pick_rows(cli: Callable[..., Any]) -> None:
    out = cli(*QUICK, "--start", "1", "--limit", "5").stdout
    assert "1 of 1 rows" in out
    assert [r.id for r in Delta.load("delta.safetensors").report] == ["dd"]


def test_of_many_edits_the_worst_are_shown_first(cli: Callable[..., Any], here: Path) -> None:
    rows = [{"prompt": "The capital of {} is", "subject": f"Italy {i}", "target_new": "Rome"} for i in range(15)]
    write_rows(here / "edits.jsonl", rows)
    out = cli(*QUICK, "--set", "steps=1").stdout
    worst = min(Delta.load("delta.safetensors").report, key=lambda r: r.final_probability)
    first = out.split("final  steps")[1].splitlines()[1]
    assert f"{worst.search_probability:.3f}" in first
    assert f"{worst.final_probability:.3f}" in first
    assert "12 furthest" in out


def test_says_what_became_of_the_edits(cli: Callable[..., Any]) -> None:
    out = cli(*QUICK, "--set", "low_clamp=0.001", "--set", "high_clamp=0.001").stdout
    assert "0 of 2 edits took: the edited model's own answer begins with the new one" in out
    assert "0 of 2 reached the target of the search, 2 held back by the clamp" in out


@pytest.mark.filterwarnings("ignore:.*larger than the weight")
def test_a_method_for_one_fact_writes_many_in_steps(cli: Callable[..., Any]) -> None:
    arguments = ("edit", "gptj", "edits.jsonl", "--out", "d", "--corpus", "corpus.txt", "--method", "r_rome")
    cli(*arguments, "--set", "steps=2", "--set", "layer=1")
    delta = Delta.load("d")
    assert [r.id for r in delta.report] == ["fr", "dd"]
    assert delta.provenance["batch_size"] == 1
    assert "batch_size 2: r_rome takes 1" in cli(*arguments, "--batch-size", "2", code=2).stderr


def test_editing_goes_on_where_an_earlier_delta_ended(cli: Callable[..., Any]) -> None:
    def edit(out: str, *more: str) -> Delta:
        cli(
            *("edit", "gptj", "edits.jsonl", "--out", out, "--corpus", "corpus.txt", "--method", "memit"),
            *("--set", "steps=2", "--set", "layers=[0, 1]", "--set", "cache_keys=true", *more),
        )
        return Delta.load(out)

    first = edit("one", "--limit", "1")
    second = edit("two", "--start", "1", "--delta", "one")
    whole = edit("both", "--batch-size", "1")
    assert second.parents == (first.id,)
    assert first.state is not None
    assert second.state is not None
    assert whole.state is not None
    keys = next(name for name in second.state if name.startswith("keys/"))
    assert [len(d.state[keys]) for d in (first, second, whole) if d.state] == [1, 2, 2]
    assert (second.state[keys] - whole.state[keys]).abs().max() < 1e-4


def test_contradicting_edits(cli: Callable[..., Any], here: Path) -> None:
    write_rows(here / "edits.jsonl", [ROWS[0], {**ROWS[0], "target_new": "Milan", "id": "fr2"}])
    assert "contradict each other" in cli(*QUICK, code=2).stderr
    cli(*QUICK, "--conflicts", "last")
    assert [r.id for r in Delta.load("delta.safetensors").report] == ["fr2"]


def test_repeated_rows_are_one_edit(cli: Callable[..., Any], here: Path) -> None:
    write_rows(here / "edits.jsonl", [ROWS[0], ROWS[0]])
    cli(*QUICK, "--evaluate")
    assert len(Delta.load("delta.safetensors").report) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "jep"), "Did you mean 'jeep'?"),
        (("--set", "stepps=3"), "did you mean 'steps'?"),
        (("--set", "steps=many"), "jeep: steps must be a whole number"),
        (("--set", "steps"), "expected field=value"),
        (("--set", "sites=head"), "known: mlp, release, block"),
        (("--set", "low=[0,9]"), "layer 9 asked for"),
        (("--set", "low=[2,1]"), "must ascend"),
        (("--set", "high=x"), "must be a list"),
        (("--preset", "jeep/gpt-5/world"), "no preset 'jeep/gpt-5/world'; known: jeep/gpt-j-6b/counterfact"),
        (("--preset", "jeep/gpt-j-6b/zsre", "--dataset", "zsre"), "names its dataset already"),
        (("--preset", "none", "--dataset", "zsre"), "leaves all presets aside"),
        (("--corpus", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--out", "."), "is a directory"),
        (("--out", "edits.jsonl/delta.safetensors"), "is not a directory that may be written to"),
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--device", "cuda:99"), " GPUs on this machine"),
        (("--dtype", "float3"), "unknown dtype 'float3'"),
        (("--start", "9"), "nothing to edit"),
    ],
)
def test_bad_settings(arguments: tuple[str, ...], message: str, cli: Callable[..., Any]) -> None:
    result = cli(*QUICK, *arguments, code=2)
    assert message in result.stderr.replace("\n", " ")
    assert not Path("delta.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("{", "row 1: not valid JSON"),
        ("[]", "holds no rows"),
        (
            '{"prompt": "{} is", "subject": "France"}',
            "taken for facts (edits), of which the field 'target_new' is missing",
        ),
        ('{"prompt": "{} is", "subject": "France", "target_new": " "}', "row 1: the answer to write is empty"),
        (
            '{"prompt": "It is", "subject": "France", "target_new": "x"}',
            "does not occur in its prompt 'It is'. Mend the row, or leave such rows out: --on-error skip",
        ),
        ('{"query": "?"}', "no known format; the rows have the fields query"),
    ],
)
def test_malformed_files(text: str, message: str, cli: Callable[..., Any], here: Path) -> None:
    (here / "edits.jsonl").write_text(text)
    assert message in cli(*QUICK, code=2).stderr


def test_rows_that_cannot_be_used_are_left_out_on_request(cli: Callable[..., Any], here: Path) -> None:
    write_rows(
        here / "edits.jsonl", [*ROWS, {"prompt": "It is", "subject": "Norr", "target_new": "x", "paraphrase": "y"}]
    )
    result = cli(*QUICK, "--on-error", "skip")
    assert [r.id for r in Delta.load("delta.safetensors").report] == ["fr", "dd"]
    assert "left out row 3 (its subject 'Norr' does not occur in its prompt 'It is')" in result.stderr
    assert "2 of 3 rows kept; dropped: subject_missing 1" in result.stdout


def test_the_alternative_answer_is_written_where_it_is_asked_for(cli: Callable[..., Any], here: Path) -> None:
    with_alt = {**ROWS[0], "alt": "Berlin"}
    write_rows(here / "edits.jsonl", [with_alt, ROWS[1]])
    stopped = cli(*QUICK, "--case-target", "alt", code=2).stderr
    assert "row 2: it has no alternative answer (field 'alt')" in stopped
    cli(*QUICK, "--case-target", "alt", "--on-error", "skip")
    assert [edit.target_new for edit in Delta.load("delta.safetensors").edits] == ["Berlin"]
    write_rows(here / "edits.jsonl", [{"question": "What is Norr?", "answer": "A town."}])
    refused = cli(*QUICK, "--case-target", "alt", code=2).stderr
    assert "case target 'alt': unke has no alternative answers; counterfact, zsre, edits" in refused


def test_unknown_fields_are_told_with_the_likely_ones(cli: Callable[..., Any], here: Path) -> None:
    write_rows(here / "edits.jsonl", [{**ROWS[0], "paraphrase": "y"}])
    assert "unknown field 'paraphrase' in 1 row (did you mean 'paraphrases'?)" in cli(*QUICK).stderr


PROBES = ("layers", "trace")


def test_what_the_model_cannot_read_is_left_out_by_request(cli: Callable[..., Any], here: Path) -> None:
    write_rows(here / "edits.jsonl", [{**ROWS[0], "prompt": "word " * 3000 + ROWS[0]["prompt"]}, ROWS[1]])
    commands: list[tuple[str, ...]] = [("probe", verb, "gptj", "--cases") for verb in PROBES]
    commands += [("fit", "gptj", "--method", "mend", "--out", "e"), ("tune", "gptj", "--method", "memit")]
    for command in (QUICK[:2], *commands, ("audit", "gptj", "gptj", "--facts")):
        more = ("--out", "d") if command[0] == "edit" else ()
        stopped = cli(*command, "edits.jsonl", *more, code=2).stderr
        assert "edit 'fr': 'word word" in stopped
        assert "its answer included. Mend the row, or leave such rows out: --on-error skip" in stopped
    told = cli(*QUICK, "--on-error", "skip")
    assert "left out 1 that the model cannot read: edit 'fr'" in told.stderr
    assert "too long for the model: 1" in told.stdout
    assert [edit.id for edit in Delta.load("delta.safetensors").edits] == ["dd"]
    write_rows(here / "edits.jsonl", [{**ROWS[0], "prompt": "word " * 3000 + ROWS[0]["prompt"]}])
    assert "nothing to edit: all of it is too long" in cli(*QUICK, "--on-error", "skip", "--force", code=2).stderr


CASES = Path(__file__).parents[3] / "shared" / "cases"


@pytest.mark.skipif(not CASES.exists(), reason="the example files (shared/cases beside the repository) are absent")
@pytest.mark.parametrize(
    ("name", "n_edits", "stops"),
    [
        ("knowedit_recent", 1, False),
        ("knowedit_wikibio", 1, False),
        ("knowedit_zsre", 1, True),
        ("wikibigedit", 2, False),
        ("cf_portability", 1, False),
        ("rephrase_misspelt", 1, False),
    ],
)
def test_the_example_files(name: str, n_edits: int, stops: bool, cli: Callable[..., Any]) -> None:
    path = str(CASES / f"{name}.json")
    arguments = ("edit", "gptj", path, *QUICK[3:], "--dry-run")
    if stops:
        assert "row 2: its subject 'Great River 77' does not occur" in cli(*arguments, code=2).stderr
    cli("edit", "gptj", path, *QUICK[3:], "--on-error", "skip")
    assert len(Delta.load("delta.safetensors").report) == n_edits


@pytest.mark.skipif(not CASES.exists(), reason="the example files (shared/cases beside the repository) are absent")
def test_a_fact_without_a_subject_is_refused_by_its_id(cli: Callable[..., Any]) -> None:
    path = str(CASES / "unke.json")
    said = cli("edit", "gptj", path, *QUICK[3:], code=2).stderr
    assert "edit '0' names no subject, and jeep writes at the subject's last token" in said
    assert {"ctp", "kne"} <= set(said.strip().rpartition("a method that needs none: ")[2].split(", "))
    cli("edit", "gptj", path, "--out", "d", "--method", "ctp", "--set", "epochs=1", "--set", "n_positive=2")


def test_a_missing_file_and_a_missing_model(cli: Callable[..., Any], here: Path) -> None:
    assert cli("edit", "gptj", "no.jsonl", "--out", "d", code=2).stderr == "error: no.jsonl: no such file\n"
    (here / "empty").mkdir()
    assert "cannot load 'empty'" in cli("edit", "empty", "edits.jsonl", "--out", "d", code=2).stderr
    assert "no embedded model 'gpt4'" in cli("edit", "demo:gpt4", "edits.jsonl", "--out", "d", code=2).stderr
    assert "no such directory" in cli("edit", "./nowhere", "edits.jsonl", "--out", "d", code=2).stderr


def test_a_models_name_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would turn :llama: into a picture."""
    from retcon.cli.printing import console

    console.cache_clear()
    console().print("LM(demo:llama: llama)")
    assert "demo:llama: llama" in capsys.readouterr().out
    console.cache_clear()


def test_dry_run_says_what_it_would_take_and_saves_nothing(cli: Callable[..., Any], here: Path) -> None:
    without_out = tuple(a for a in QUICK if a not in ("--out", "delta.safetensors"))
    result = cli(*without_out, "--dry-run", "--json")
    record = json.loads(result.stdout)
    assert (record["method"], record["edits"], record["tried"]) == ("jeep", 2, 2)
    assert record["settings"]["steps"] == 4
    assert record["edit_seconds"] > 0
    assert record["moments_missing"] == 3  # two layers low, one high
    assert record["moments_tokens"] == 20 * 128
    assert record["model_bytes"] > 50_000 < record["peak_bytes"]
    assert 0 < record["delta_bytes"] < 200_000
    assert "The capital of France is" in result.stderr
    assert not list(here.glob("*.safetensors"))
    assert not list(here.glob("cache/moments/*")) + list(here.glob("cache/values/*"))
    quick = ("--set", "n_points=1", "--set", "n_prefixes=0", "--dry-run")
    unread = cli("edit", "gptj", "edits.jsonl", "--method", "kn", *quick).stdout
    assert "second moment" not in unread  # it has no use for them


def test_dry_run_knows_moments_that_are_there(cli: Callable[..., Any], delta: Path) -> None:
    without_out = tuple(a for a in QUICK if a not in ("--out", "delta.safetensors"))
    assert "no second moments to collect" in cli(*without_out, "--dry-run").stdout


def test_without_a_file_to_save_to_there_is_no_run(cli: Callable[..., Any]) -> None:
    assert "--out DELTA is missing" in cli("edit", "gptj", "edits.jsonl", code=2).stderr


def test_a_killed_run_goes_on_when_the_command_is_given_again(
    cli: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = json.loads(cli(*QUICK, "--json").stdout)["delta"]["id"]
    with monkeypatch.context() as patch:
        patch.setattr("retcon.methods.common.proposal.write", _killed)  # all values are found by then
        cli(*QUICK, code=130)
    assert list(here.glob("cache/values/*/*.safetensors"))
    result = cli(*QUICK, "--json")
    assert "values of 2 edits were there" in result.stderr
    assert json.loads(result.stdout)["delta"]["id"] == wanted
    assert not list(here.glob("cache/values/*"))


def _killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_edits_lost_in_the_write_want_less_weight_on_old_keys() -> None:
    untuned = Resolved("jeep", retcon.method("jeep", low=(0, 1), high=(2,)), None, frozenset())
    report = [EditReport(str(i), 0.9, 5, "reached", final_probability=0.1, greedy_match=i > 0) for i in range(4)]
    said = remedy(untuned, cast(Delta, SimpleNamespace(report=report[:3])))
    assert said is not None
    assert said.endswith("add --set low_moment_weight=250 --set high_moment_weight=100")
    assert remedy(untuned, cast(Delta, SimpleNamespace(report=report))) is None


def _said(report: list[EditReport], name: str = "memit", **settings: Any) -> str | None:
    untuned = Resolved(name, retcon.method(name, layers=(1, 2), **settings), None, frozenset())
    return remedy(untuned, cast(Delta, SimpleNamespace(report=report)))


def test_no_wider_clamp_is_advised_where_none_helped() -> None:
    clamped = [EditReport(str(i), 0.1, 25, "clamped", final_probability=0.1, greedy_match=False) for i in range(3)]
    assert (said := _said(clamped)) is not None
    assert "add --set clamp=1.5" in said
    fitted = FittedClamps(1.0, 0, 3, {"clamp": 0.75})
    tried = Resolved("memit", retcon.method("memit", layers=(1, 2)), None, frozenset(), notes=(str(fitted),))
    said = remedy(tried, cast(Delta, SimpleNamespace(report=clamped)))
    assert said is not None
    assert said.endswith("wider ones did not help: try other layers (--layers probe), or --method ft")


def test_lost_in_the_write_is_asked_before_clamped_and_the_direction_is_right() -> None:
    """A weight ten times too large: searches end on their clamps at 0.85, and the weights keep nothing of it."""
    lost = [EditReport(str(i), 0.85, 25, "clamped", final_probability=0.01, greedy_match=False) for i in range(4)]
    assert {r.outcome for r in lost} == {"conflict"}
    assert _said(lost) == "4 of 4 edits were lost in the write: add --set moment_weight=1500"
    held = [EditReport(str(i), 0.02, 25, "clamped", final_probability=0.02, greedy_match=False) for i in range(4)]
    assert {r.outcome for r in held} == {"clamped"}
    assert _said(held) == "4 of 4 edits were held back by the clamp: add --set clamp=1.5"


def test_both_kinds_are_added_up_and_all_settings_named_at_once() -> None:
    lost = EditReport("a", 0.85, 25, "clamped", final_probability=0.01, greedy_match=False)
    held = EditReport("b", 0.02, 25, "clamped", final_probability=0.02, greedy_match=False)
    fine = [EditReport(str(i), 0.9, 9, "reached", final_probability=0.9, greedy_match=True) for i in range(4)]
    assert _said([lost, held, *fine]) == (
        "1 of 6 edits were lost in the write and 1 held back by the clamp: add --set moment_weight=1500 --set clamp=1.5"
    )
    assert _said([lost, *fine]) is None
    alpha = _said([lost, held], "alphaedit")
    assert alpha is not None
    assert alpha.endswith("add --set ridge=1 --set clamp=1.5")


def test_a_run_in_which_too_few_edits_took_saves_its_delta_and_exits_with_1(
    cli: Callable[..., Any], here: Path
) -> None:
    result = cli(*QUICK, "--require", "1", code=1)
    assert "fewer than asked for (--require 1)" in result.stderr
    assert Delta.load("delta.safetensors").report


def test_another_delta_an_input_or_a_pipe_is_never_replaced(cli: Callable[..., Any], here: Path) -> None:
    cli(*QUICK)
    before = Path("delta.safetensors").read_bytes()
    cli(*QUICK)  # the same run again is welcome
    assert Path("delta.safetensors").read_bytes() == before
    write_rows(here / "edits.jsonl", ROWS[:1])
    refused = cli(*QUICK, code=2).stderr
    assert "holds another delta" in refused
    assert "--force" in refused
    assert Path("delta.safetensors").read_bytes() == before
    cli(*QUICK, "--force")
    Path("delta.safetensors").write_text("my notes")
    assert "exists and is no delta" in cli(*QUICK, code=2).stderr
    assert Path("delta.safetensors").read_text() == "my notes"
    into_its_input = tuple("edits.jsonl" if a == "delta.safetensors" else a for a in EDIT)
    assert "is an input of this command" in cli(*into_its_input, "--force", code=2).stderr
    os.mkfifo("pipe")
    into_a_pipe = tuple("pipe" if a == "delta.safetensors" else a for a in EDIT)
    assert "no ordinary file" in cli(*into_a_pipe, code=2).stderr


def test_the_end_of_a_turn_is_asked_for_from_a_method_that_trains_it(cli: Callable[..., Any], here: Path) -> None:
    shutil.copytree("gptj", "chatty")
    (here / "chatty/chat_template.jinja").write_text("{{ messages[0].content }}")
    asked = ("edit", "chatty", "edits.jsonl", "--out", "delta.safetensors", "--method", "kn")
    assert "cannot train the end of a turn, which edit 'fr' asks for" in cli(*asked, "--train-end", code=2).stderr
