"""What a verb writes never takes the place of what it read, or of what it could not have made."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retcon.errors import InvalidSetting
from retcon.export.write import check_place

PROBES = ("layers", "trace", "contrast", "paths", "attribution")


def test_nothing_is_written_over_an_input(cli: Callable[..., Any], here: Path) -> None:
    os.rename("edits.jsonl", "facts.json")
    before = Path("facts.json").read_bytes()
    commands = [
        ("edit", "gptj", "facts.json", "--out", "facts.json"),
        ("check", "gptj", "--delta", "d.safetensors", "--cases", "facts.json", "--report", "facts.md"),
        *(("probe", probe, "gptj", "--cases", "facts.json", "--out", "facts") for probe in PROBES),
        ("probe", "contrast", "gptj", "--cases", "facts.json", "--out", "stem", "--records", "facts.json"),
    ]
    os.link("facts.json", "facts.md")  # another name of the same file
    for command in commands:
        assert "is an input of this command" in cli(*command, code=2).stderr, command
    for special in ("gptj", "pipe", "/dev/null"):
        if special == "pipe":
            os.mkfifo("pipe")
        assert special in cli("edit", "gptj", "facts.json", "--out", special, code=2).stderr
    assert Path("facts.json").read_bytes() == before


def test_force_replaces_a_folder_of_a_checkpoints_files_and_no_other(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    check_place(place, None, False)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "retcon.json", "README.md", "LICENSE.txt"):
        (place / name).write_text("{}")
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "tools.jinja").write_text("")
    check_place(place, None, True)
    with pytest.raises(InvalidSetting, match="not empty"):
        check_place(place, None, False)
    for foreign in ("notes.txt", "thesis.json", "runs/model.safetensors", ".git/config"):
        path = place / foreign
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(InvalidSetting, match="no file of a checkpoint"):
            check_place(place, None, True)
        path.unlink()
        if path.parent != place:
            path.parent.rmdir()
    check_place(place, None, True)
