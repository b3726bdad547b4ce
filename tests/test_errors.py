"""What an error says in each interface."""

import pickle
from pathlib import Path

import pytest

from retcon.errors import EndpointFailed, InvalidSetting, RetconWarning, unusable_row
from retcon.export.write import check_place
from retcon.workflow import read_settings


def test_a_message_ends_in_the_words_of_each_interface_and_survives_pickling() -> None:
    row = unusable_row("f.csv, row 2: no answer")
    warning = RetconWarning("other text is better: ", python="moments=...", option="--corpus FILE")
    for each in (row, pickle.loads(pickle.dumps(row))):
        assert str(each) == "f.csv, row 2: no answer. Mend the row, or leave such rows out (on_error='skip')."
        assert each.on_command_line == "f.csv, row 2: no answer. Mend the row, or leave such rows out: --on-error skip"
        assert each.on_page == "f.csv, row 2: no answer. Mend the row, or take it out."
    for other in (warning, pickle.loads(pickle.dumps(warning))):
        assert str(other) == "other text is better: moments=..."
        assert other.on_command_line == "other text is better: --corpus FILE"


def test_a_folder_that_is_not_empty_is_refused_in_the_words_of_each_interface(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    with pytest.raises(InvalidSetting, match=r"give another directory, or force=True to replace it$") as caught:
        check_place(tmp_path / "out", None, force=False)
    assert caught.value.on_command_line.endswith("give another directory, or --force to replace it")
    assert caught.value.on_page.endswith("give another directory")


def test_settings_are_refused_in_words_that_every_interface_has() -> None:
    with pytest.raises(InvalidSetting) as caught:
        read_settings("rome", dataset=None, preset=None, assignments=["steps=abc"])
    assert str(caught.value).startswith("setting steps=abc: rome: steps must be")
    with pytest.raises(InvalidSetting, match=r"^setting steps: expected field=value, such as steps=25 or"):
        read_settings("rome", dataset=None, preset=None, assignments=["steps"])


def test_the_status_of_a_server_survives_pickling() -> None:
    failed = pickle.loads(pickle.dumps(EndpointFailed("no such model: HTTP 404", status=404)))
    assert (str(failed), failed.status) == ("no such model: HTTP 404", 404)
