"""`retcon probe attribution` and `retcon probe paths`, and editing with KNE and CTP, from the command line."""

import json
from pathlib import Path

import pytest

from retcon.cli.probe.attribution import unconverged
from tests.conftest import everyday

pytest.importorskip("matplotlib")

ROWS = [
    {"prompt": "The capital of {} is", "subject": s, "target_new": n, "target_true": t, "relation_id": r, "id": s}
    for s, n, t, r in (
        ("France", "Rome", "Paris", "P36"),
        ("Italy", "Paris", "Rome", "P36"),
        ("Greece", "Milan", "Florence", "P99"),
    )
]


@pytest.fixture
def edits(here):
    Path("facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "facts.jsonl"


@pytest.mark.parametrize("unit", everyday("row", of=["row", "column"]))
def test_attribution_adds_up_and_is_drawn(unit, cli, edits):
    result = cli(
        *("probe", "attribution", "gptj", "--cases", edits, "--modules", "down,q", "--unit", unit, "--points", "2"),
        *("--out", "where", "--json"),
    )
    found = json.loads(result.stdout)
    written = json.loads(Path("where.json").read_text())
    assert (written.keys(), written["in_ensemble"]) == (found.keys(), found["in_ensemble"])
    assert all(Path(f"where{part}.{kind}").stat().st_size for part in ("", "-overlap") for kind in ("png", "svg"))
    assert found["chosen"] == sum(sum(counts) for counts in found["in_ensemble"].values())
    assert found["overlap"]["pairs"] == [1, 2]
    assert len(found["carried"]["down_proj"]) == len(found["carried_half_width"]["down_proj"]) == 4
    joint = json.loads(
        cli(
            "probe", "attribution", "gptj", "--cases", edits, "--points", "1", "--probability", "joint", "--json"
        ).stdout
    )
    assert 0 < joint["answers_have"] < found["answers_have"]  # answers of several tokens


def test_one_fact_has_no_interval_and_three_have_overlaps(cli, edits):
    found = json.loads(
        cli("probe", "attribution", "gptj", "--cases", edits, "--limit", "1", "--points", "1", "--json").stdout
    )
    assert found["carried_half_width"]["down_proj"] == [None] * 4
    told = cli("probe", "attribution", "gptj", "--cases", edits, "--points", "1").stdout
    assert "down_proj: carried" in told
    assert "overlap of two facts of one relation" in told
    assert "over 2 pairs" in told


def test_attribution_is_of_the_answer_and_the_path_that_are_named(cli, edits):
    asked = ("probe", "attribution", "gptj", "--cases", edits, "--points", "2", "--json")
    usual = json.loads(cli(*asked).stdout)
    other = json.loads(cli(*asked, "--answer", "new", "--path", "joint", "--budget", "0.02").stdout)
    assert (other["answer"], other["path"], other["budget"]) == ("new", "joint", 0.02)
    assert other["answers_have"] != usual["answers_have"]
    assert 0 < usual["chosen"] < other["chosen"]
    assert "shares above 0 and up to 1" in cli(*asked, "--budget", "0", code=2).stderr


def test_matrices_that_carry_more_than_there_is_are_named() -> None:
    carried = {"down_proj": [0.41, 0.02, 0.81], "up_proj": [-0.9, 0.43, 0.44]}
    assert unconverged(carried, 0.42) == ["down_proj 2"]
    assert unconverged(carried, 0.40) == ["down_proj 2", "up_proj 1", "up_proj 2"]


def test_paths_are_listed_and_drawn(cli, edits):
    result = cli("probe", "paths", "llama", "--cases", edits, "--positive", "3", "--out", "paths", "--json")
    found = json.loads(result.stdout)
    assert [(s["layer"], s["matrix"]) for s in found["slots"][:2]] == [(0, "up_proj"), (0, "down_proj")]
    assert all(len(s["nodes"]) == 3 and s["scores"] == sorted(s["scores"], reverse=True) for s in found["slots"])
    assert len(found["path_scores"]["positive"]) == 3
    assert Path("paths.png").stat().st_size
    text = cli("probe", "paths", "llama", "--cases", edits, "--positive", "3", "--out", "paths").stdout
    assert "best nodes" in text


def test_paths_are_chosen_as_the_options_say(cli, edits):
    asked = ("probe", "paths", "llama", "--cases", edits, "--positive", "2", "--json")
    usual = json.loads(cli(*asked).stdout)
    options = ("--score", "l2", "--select", "k_best", "--negative", "3", "--pool", "per_edit", "--key-matrix", "gate")
    other = json.loads(cli(*asked, *options).stdout)
    assert (other["score"], other["select"], other["pool"], other["key_matrix"]) == ("l2", "k_best", "per_edit", "gate")
    assert [slot["matrix"] for slot in other["slots"][:2]] == ["gate_proj", "down_proj"]
    assert [len(usual["path_scores"][side]) for side in ("positive", "negative")] == [2, 1]
    assert [len(other["path_scores"][side]) for side in ("positive", "negative")] == [2, 3]
    assert min(other["path_scores"]["positive"]) > max(other["path_scores"]["negative"])
    message = "key matrix 'gate': 'gptj' (gptj) has no gated MLP; take 'up'"
    assert message in cli("probe", "paths", "gptj", "--cases", edits, "--key-matrix", "gate", code=2).stderr


@pytest.mark.filterwarnings("ignore:.*no (kne|ctp) preset")
@pytest.mark.parametrize(("method", "model"), [("kne", "gptj"), ("ctp", "llama")])
def test_edits_from_the_command_line(method, model, cli, edits):
    settings = {"kne": ("--set", "budget=0.05", "--set", "n_points=2"), "ctp": ("--set", "n_positive=3")}[method]
    cli(
        *("edit", model, edits, "--method", method, "--out", "d.safetensors", "--corpus", "corpus.txt"),
        *("--set", "epochs=3", *settings),
    )
    from retcon.delta import Delta

    delta = Delta.load("d.safetensors")
    assert {change.kind for changes in delta.changes.values() for change in changes} <= {"rows", "columns", "entries"}
