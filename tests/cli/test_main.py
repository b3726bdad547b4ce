"""What holds for every verb: version, help, exit codes, one line per error, and a quiet import."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import retcon
from retcon.cli import app
from retcon.cli.progress import StageLog, spinner
from retcon.errors import NonFinite, RetconWarning
from retcon.lm.generate import Written
from retcon.memory import defaults
from retcon.memory.moments import Corpus
from tests.cli.conftest import QUICK

VERBS = [
    *("demo", "edit", "apply", "export", "complete", "chat", "methods", "moments", "tune", "fit", "audit", "bench"),
    *("report", "check", "doctor", "init", "log", "show", "diff", "revert", "amend", "checkout", "verify", "ui", "gc"),
    "cache",
]


def test_version(cli: Callable[..., Any]) -> None:
    assert cli("--version").stdout == f"retcon {retcon.__version__}\n"


def test_the_verbs_are_these() -> None:
    assert [c.callback.__name__ for c in app.registered_commands if c.callback] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_in_examples(verb: str, cli: Callable[..., Any]) -> None:
    text = cli(verb, "--help").stdout
    after = text.split("Examples")[-1]
    assert "Options" not in after
    assert f"retcon {verb}" in after


@pytest.mark.parametrize("verb", ["apply", "audit", "checkout", "export"])
def test_what_writes_a_model_says_that_it_is_in_the_stored_dtype(verb: str, cli: Callable[..., Any]) -> None:
    assert "[default:(asstored)]" in re.sub(r"[\s│]", "", cli(verb, "--help").stdout)


def test_usage_errors_exit_with_2(cli: Callable[..., Any]) -> None:
    assert "frobnicate" in cli("frobnicate", code=2).stderr
    assert "--out" in cli("edit", "gptj", "edits.jsonl", code=2).stderr


def test_an_error_is_one_line_on_stderr(cli: Callable[..., Any]) -> None:
    result = cli("complete", "gptj", "  ", code=2)
    assert result.stderr == "error: the prompt is empty; give some text to go on from\n"
    assert result.stdout == ""


def test_a_seed_of_more_than_64_bits_is_refused_before_a_model_is_loaded(cli: Callable[..., Any]) -> None:
    said = cli("edit", "no/such-model", "facts.jsonl", "--out", "d.safetensors", "--seed", str(2**64), code=2).stderr
    assert "at most 64" in said
    assert "Traceback" not in said


def test_what_is_no_delta_is_said_in_the_commands_own_words(cli: Callable[..., Any], tmp_path: Path) -> None:
    said = cli("complete", "demo:gptj", "x", "--delta", str(tmp_path), code=2).stderr
    assert said == f"error: {tmp_path}: is a directory, expected a file\n"
    retcon.load("demo:llama").delta({}).save(tmp_path / "other.safetensors")
    said = cli("complete", "demo:gptj", "x", "--delta", str(tmp_path / "other.safetensors"), code=2).stderr
    assert "or add --other-base if they differ harmlessly" in said


def test_the_preset_of_another_method_says_which(cli: Callable[..., Any]) -> None:
    how = ("--preset", "memit/demo-gptj/world", "--dry-run")
    said = cli("edit", "demo:gptj", "world", "--limit", "1", *how, code=2).stderr
    assert said == "error: 'memit/demo-gptj/world' is a preset of memit, and the method is jeep; name that one\n"


def test_a_failure_exits_with_1(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NonFinite("the loss is nan [sic]\nat step 3")

    monkeypatch.setattr("retcon.lm.generate.generate", fail)
    assert cli("complete", "gptj", "I", code=1).stderr == "error: the loss is nan [sic] at step 3\n"


def test_a_full_disk_exits_with_1(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retcon.lm.generate.generate", fail)
    assert "No space left on device" in cli("complete", "gptj", "I", code=1).stderr


def test_a_bug_keeps_its_traceback(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("retcon.lm.generate.generate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("complete", "gptj", "I")


def test_no_memory_says_what_to_try(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More advice.")

    monkeypatch.setattr("retcon.lm.generate.generate", fail)
    assert cli("complete", "gptj", "I", code=1).stderr.startswith("error: CUDA out of memory. Try a narrower --dtype")


def test_a_warning_is_one_line_and_said_once(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: Any, **__: Any) -> list[Written]:
        for _ in range(2):
            warnings.warn("mind the gap [1]", RetconWarning, stacklevel=1)
        return [Written("!", 1, False)]

    monkeypatch.setattr("retcon.lm.generate.generate", warn)
    result = cli("complete", "gptj", "I")
    assert result.stderr == "warning: mind the gap [1]\n"
    assert result.stdout == "I!\n"


def test_ways_out_are_options(
    cli: Callable[..., Any], here: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pickled := here / "pickled").mkdir()
    for file in (models / "llama").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, pickled)
    (pickled / "pytorch_model.bin").touch()
    said = cli("complete", "pickled", "The capital of France is", code=2).stderr
    assert said.endswith("it holds pickled .bin weights only; convert them to safetensors\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    defaults.wikitext.cache_clear()
    monkeypatch.setattr(defaults, "shipped_text", lambda: Corpus.from_file("corpus.txt"))
    said = cli("moments", "llama", "--layers", "0").stderr
    assert "is better: --corpus FILE\n" in said


def test_interrupting_exits_with_130(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retcon.methods.jeep.Jeep.propose", interrupt)
    assert cli(*QUICK, code=130).stderr.endswith("error: interrupted\n")
    assert not Path("delta.safetensors").exists()


@pytest.mark.long  # the attack by signals does it in one process every day
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_process_that_is_interrupted_leaves_nothing(here: Path) -> None:
    """The whole way: python -m retcon, a signal while it edits, no traceback, no file."""
    rows = [{"prompt": "The capital of {} is", "subject": f"France {i}", "target_new": "Rome"} for i in range(400)]
    (here / "many.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = [sys.executable, "-m", "retcon", "edit", "gptj", "many.jsonl", "--out", "d.safetensors"]
    before = set(here.iterdir())
    process = subprocess.Popen(
        [*command, "--corpus", "corpus.txt"],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background may ignore it
    )
    try:
        assert process.stdout is not None
        while "key_average" not in (line := process.stdout.readline()):  # settings shown: now it edits
            assert line, process.communicate()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.endswith("error: interrupted\n")
    assert set(here.iterdir()) - before <= {here / "cache"}


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from retcon.cli import app\n"
        "assert CliRunner().invoke(app, ['edit', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout == "[]\n"


def test_in_a_pipe_a_stage_of_unknown_length_is_named_once_it_takes_long(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("INFO", "retcon.progress"):
        with spinner("loading a small model"):
            pass
        monkeypatch.setattr("retcon.cli.progress.LOGGED_SECONDS", 0.02)
        with spinner("loading a large model"):
            time.sleep(0.5)
    assert caplog.messages == ["loading a large model"]


def test_what_takes_long_is_logged_with_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    log = StageLog(clock=lambda: now)
    with caplog.at_level("INFO", "retcon.progress"):
        log.advance("short", 0, 2)
        now = 1.0
        log.advance("short", 2, 2)
        log.advance("long", 0, 100)
        for later, done in ((3.0, 5), (11.0, 10), (12.0, 11), (51.0, 50), (101.0, 100)):
            now = later
            log.advance("long", done, 100)
    assert caplog.messages == [
        "long: 10 of 100, 1 a second, 90 s left",
        "long: 50 of 100, 1 a second, 50 s left",
        "long: 100 done in 100 s, 1 a second",
    ]
