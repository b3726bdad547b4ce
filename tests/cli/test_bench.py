"""`retcon bench` and `retcon report` on a tiny checkpoint."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from retcon.errors import NonFinite
from retcon.work import Here
from tests.cli.conftest import ROWS, write_rows

OPTIONS = (
    *("--model", "gptj", "--method", "jeep", "--dataset", "edits.jsonl", "--corpus", "corpus.txt"),
    *("--out", "out"),
)
TOML = """
name = "tiny"
[[models]]
name = "elsewhere"
label = "tiny"
[[methods]]
name = "jeep"
settings = {steps = 3, low = [0, 1], high = [2, 3]}
[[datasets]]
path = "edits.jsonl"
[measures]
max_new_tokens = 3
"""


@pytest.fixture
def file(here: Path) -> Path:
    (here / "bench.toml").write_text(TOML)
    return here / "bench.toml"


def test_a_file_that_runs_a_checkpoint_s_code_says_so(cli: Callable[..., Any], file: Path) -> None:
    file.write_text(TOML.replace('label = "tiny"', 'label = "tiny"\ntrust_remote_code = true\ndevice_map = "cpu"'))
    said = cli("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--out", "out").stderr
    assert "trust_remote_code: code that comes with gptj, if there is any, is run with your rights" in said


def test_a_file_with_its_places_elsewhere(cli: Callable[..., Any], file: Path) -> None:
    run = ("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--out", "out")
    first = json.loads(cli(*run, "--json").stdout)
    assert [(r["run"], r["found"], r["units"]) for r in first["runs"]] == [
        ("tiny_jeep_edits_batch-all_seed0", False, 1)
    ]
    assert "ES zsre.tok" in first["runs"][0]["values"]  # one of the facts names no old answer
    again = json.loads(cli(*run, "--json").stdout)
    assert again["runs"][0]["found"]
    assert again["runs"][0]["values"] == first["runs"][0]["values"]
    shown = cli(*run)
    assert "batch(all)" in shown.stdout
    assert "report out" in shown.stdout
    assert "finished before" in shown.stderr
    told = cli(*run, "--dry-run").stdout
    assert "before" in told
    assert "0 runs, about" in told
    refused = cli(*run, "--seed", "4", code=2)
    assert "spec.seeds: [0] -> [4]" in refused.stderr
    report = cli("report", "out")
    assert "| jeep |" in report.stdout
    files = json.loads(cli("report", "out", "--out", "page", "--no-pictures", "--json").stdout)["files"]
    assert {Path(f).name for f in files} >= {"index.html", "tables.md", "cost.csv", "jeep-edits.tex"}
    assert not list(Path("page").glob("*.svg"))
    assert "0 pictures in drawn" in cli("report", "out", "--out", "drawn", "--pictures").stdout  # of one run


def test_a_dry_run_only_says(cli: Callable[..., Any], file: Path) -> None:
    run = ("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--out", "out", "--dry-run")
    found = json.loads(cli(*run, "--json").stdout)
    (row,) = found["runs"]
    assert row["cases"] == 2
    assert row["seconds"] == pytest.approx(2 * (row["seconds_per_edit"] + 2 * row["seconds_per_case_measured"]))
    assert not Path("out").exists()


def test_a_dry_run_says_what_it_read(cli: Callable[..., Any], file: Path, here: Path) -> None:
    write_rows(here / "edits.jsonl", [ROWS[0], {**ROWS[0], "target_new": "Milan", "id": "b", "paraphrase": "x"}])
    run = ("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--dry-run")
    told = cli(*run).stderr
    assert "1 of 2 rows kept; dropped: conflict 1" in told
    assert "unknown field 'paraphrase' in 1 row (did you mean 'paraphrases'?)" in told
    assert "contradict each other" in cli(*run, "--conflicts", "error", code=2).stderr


def test_a_method_asked_for_by_name_and_by_label_runs_once(cli: Callable[..., Any], file: Path) -> None:
    file.write_text(
        TOML + '[[methods]]\nname = "jeep"\nlabel = "longer"\nsettings = {steps = 4, low = [0], high = [3]}\n'
    )
    run = ("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--dry-run", "--json")
    asked = json.loads(cli(*run, "--method", "jeep", "--method", "longer").stdout)
    assert [run["run"] for run in asked["runs"]] == [
        "tiny_jeep_edits_batch-all_seed0",
        "tiny_longer_edits_batch-all_seed0",
    ]
    assert len(json.loads(cli(*run, "--method", "longer").stdout)["runs"]) == 1


def test_what_is_missing_is_named(cli: Callable[..., Any], here: Path) -> None:
    assert "give a TOML file, or --method, --dataset too" in cli("bench", "--model", "gptj", code=2).stderr
    assert "not a readable TOML file" in cli("bench", "nowhere.toml", code=2).stderr
    assert "unknown protocol 'later'" in cli("bench", *OPTIONS, "--protocol", "later", code=2).stderr
    assert "no method 'jep'" in cli("bench", *OPTIONS, "--method", "jep", code=2).stderr
    assert "no such file" in cli("report", "nowhere", code=2).stderr


def test_more_cases_than_there_are(cli: Callable[..., Any], here: Path) -> None:
    write_rows(here / "edits.jsonl", [{"prompt": "{} is", "subject": "Rome", "target_new": "far"}])
    told = cli("bench", *OPTIONS, "--n", "5", code=2).stderr
    assert "asks for 5 cases, the dataset has 1" in told


def test_fewer_cases_of_a_file_leave_out_the_checkpoints_beyond_them(cli: Callable[..., Any], file: Path) -> None:
    file.write_text(TOML + '[[protocols]]\nkind = "sequential"\ncheckpoints = [1, 2, 10]\n')
    run = ("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--dry-run")
    assert "checkpoint 10 is beyond the 2 cases" in cli(*run, code=2).stderr
    found = cli(*run, "--n", "2")
    assert "sequential-2" in found.stdout
    assert "--n 2 leaves out the checkpoint 10" in found.stderr
    assert "a curve's batches are its points" in cli(*run, "--protocol", "curve", "--batch", "2", code=2).stderr


def test_a_protocol_that_is_named_is_the_files_own(cli: Callable[..., Any], file: Path) -> None:
    """With its cases and checkpoints, which `--protocol` alone once dropped."""
    file.write_text(TOML + '[[protocols]]\nn = 2\n[[protocols]]\nkind = "sequential"\nn = 1\ncheckpoints = [1]\n')
    run = ("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--dry-run", "--json")
    for kind, name in (("sequential", "sequential-1"), ("single", "single-all")):
        (found,) = json.loads(cli(*run, "--protocol", kind).stdout)["runs"]
        assert name in found["run"]


def test_protocols_that_an_option_makes_one_run_once(cli: Callable[..., Any], file: Path) -> None:
    file.write_text(TOML + "[[protocols]]\nn = 1\n[[protocols]]\nn = 2\n")
    run = ("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--dry-run", "--json")
    assert [len(json.loads(cli(*run, *more).stdout)["runs"]) for more in ((), ("--n", "2"))] == [2, 1]
    file.write_text(TOML + "[[protocols]]\nn = 2\nbatch = 2\n[[protocols]]\nn = 1\n")
    (found,) = json.loads(cli(*run, "--n", "2").stdout)["runs"]
    assert found["run"].startswith("tiny_jeep_edits_batch-2")


def test_runs_of_one_name_are_shown_each(cli: Callable[..., Any], file: Path) -> None:
    file.write_text(
        TOML + "".join(f'[[protocols]]\nkind = "sequential"\nn = 2\ncheckpoints = {c}\n' for c in ("[1]", "[]"))
    )
    run = ("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--out", "out")
    first, second = json.loads(cli(*run, "--json").stdout)["runs"]
    assert first["run"] == second["run"] == "tiny_jeep_edits_sequential-2_seed0"
    assert first["id"] != second["id"]


def test_edits_that_fail_are_counted(cli: Callable[..., Any], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise NonFinite("the loss is NaN")

    monkeypatch.setattr("retcon.bench.pieces.in_steps", failing)
    run = ("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--out", "out")
    told = cli(*run)
    assert "2 edits failed" in told.stderr
    assert "failed" in told.stdout
    (row,) = json.loads(cli(*run, "--json").stdout)["runs"]
    assert row["failed_edits"] == 2
    assert row["values"]["ES zsre.tok"] is not None


class Noting(Here):
    """This process, and how many pieces came to it."""

    n = 0

    def map(self, lm: Any, work: Any, pieces: Any, progress: Any) -> Any:
        self.n += len(pieces)
        return super().map(lm, work, pieces, progress)


def test_values_are_searched_where_it_is_asked(
    cli: Callable[..., Any], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Noting()
    monkeypatch.setattr("retcon.cli.bench.workers", lambda on: nullcontext(place))
    cli("bench", str(file), "--model", "gptj", "--corpus", "corpus.txt", "--out", "out", "--on", "processes:2")
    assert place.n > 0


@pytest.mark.parametrize("verb", [("bench",), ("tune", "gptj", "edits.jsonl")])
def test_an_unknown_place_is_refused(cli: Callable[..., Any], file: Path, verb: tuple[str, ...]) -> None:
    more = (str(file), "--model", "gptj", "--out", "out") if verb == ("bench",) else ()
    assert "work cannot be done on 'mars'" in cli(*verb, *more, "--on", "mars", code=2).stderr
