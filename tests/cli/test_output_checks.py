"""What a verb writes never takes the place of what it read, or of what it could not have made."""

import os
import shutil
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


def test_a_model_that_was_read_is_not_written_over(cli: Callable[..., Any], here: Path) -> None:
    shutil.copytree(here / "llama", "mine")
    Path("x.gguf").touch()
    weights = Path("mine/model.safetensors")
    before = weights.read_bytes()
    for command in (
        ("audit", "llama", "mine", "--delta", str(weights)),
        ("audit", "mine", "llama", "--delta", str(weights)),
        ("audit", "x.gguf", "llama", "--delta", "x.gguf"),
        ("audit", "llama", "mine", "--delta", "mine/tokenizer.json"),
        ("edit", "mine", "edits.jsonl", "--out", str(weights)),
        ("fit", "mine", "edits.jsonl", "--method", "mend", "--out", str(weights)),
    ):
        assert "is an input of this command" in cli(*command, "--force", code=2).stderr, command
    assert weights.read_bytes() == before


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
    shards = ("model-00001-of-00002.safetensors", "changed.safetensors", "adapter_model.safetensors", "model-q8_0.gguf")
    for own in (*shards, "adapter.gguf", "special_tokens_map.json"):
        (place / own).touch()
    check_place(place, None, True)
    deltas = ("mine.safetensors", "model-france.safetensors", "model-00001-of-2.safetensors", "moments.safetensors")
    for foreign in (
        *("notes.txt", "thesis.json", "runs/model.safetensors", ".git/config", "base.gguf", "pytorch_model.bin"),
        *("license keys.txt", "notices_of_my_own.md", "copying_to_do.csv", "my_use_policy_draft.docx"),
        *deltas,
    ):
        path = place / foreign
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(InvalidSetting, match="no file of a checkpoint"):
            check_place(place, None, True)
        path.unlink()
        if path.parent != place:
            path.parent.rmdir()
    check_place(place, None, True)
    (place / "mine.safetensors").touch()
    for index in ("", "[]", '{"weight_map": 3}', '{"weight_map": {"w": "other.safetensors"}}'):
        (place / "model.safetensors.index.json").write_text(index)
        with pytest.raises(InvalidSetting, match=r"holds mine\.safetensors"):
            check_place(place, None, True)
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"w": "mine.safetensors"}}')
    check_place(place, None, True)  # a shard by another's naming


def test_force_removes_no_input(cli: Callable[..., Any], delta: Path, here: Path) -> None:
    cli("apply", "gptj", str(delta), "--save", "edited")
    os.rename(delta, "edited/changed.safetensors")  # a name that exports have
    os.symlink("edited/changed.safetensors", "link.safetensors")
    os.symlink("edited", "elsewhere")
    for path in ("edited/changed.safetensors", "link.safetensors", "elsewhere/changed.safetensors"):
        for command in (("apply", "gptj", path, "--save", "edited"), ("export", "gptj", path, "--out", "edited")):
            told = cli(*command, "--force", code=2).stderr
            assert f"{path} is an input of this command, and replacing edited would remove it" in told
    Path("edited/changed.safetensors").rename("kept.safetensors")
    Path("edited/changed.safetensors").symlink_to(here / "kept.safetensors")
    told = cli("apply", "gptj", "edited/changed.safetensors", "--save", "edited", "--force", code=2).stderr
    assert "is an input" in told  # the link would go
    os.unlink("edited/changed.safetensors")
    os.rename("kept.safetensors", "edited/mine.safetensors")
    told = cli("export", "gptj", "edited/mine.safetensors", "--out", "edited", "--format", "diff", "--force", code=2)
    assert "is an input" in told.stderr
    told = cli("apply", "edited", "edited/mine.safetensors", "--save", "edited", "--force", code=2)
    assert "is the model itself" in told.stderr
    assert Path("edited/mine.safetensors").is_file()


def test_checkout_replaces_no_folder_with_somebodys_delta(cli: Callable[..., Any], here: Path) -> None:
    cli("init", "gptj")
    cli("checkout", "base", "--save", "was")
    assert "not empty" in cli("checkout", "base", "--save", "was", code=2).stderr
    cli("checkout", "base", "--save", "was", "--force")
    Path("was/mine.safetensors").touch()
    told = cli("checkout", "base", "--save", "was", "--force", code=2).stderr
    assert "holds mine.safetensors, which is no file of a checkpoint" in told
    assert "is the model itself" in cli("checkout", "base", "--save", "gptj", "--force", code=2).stderr
    os.unlink("was/mine.safetensors")
    os.rename(".retcon", "was/.retcon")
    told = cli("checkout", "base", "--save", "was", "--force", "--store", "was/.retcon", code=2).stderr
    assert "was/.retcon is an input of this command" in told
