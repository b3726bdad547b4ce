"""Command lines that repeat what was done on the page."""

from pathlib import Path

from retcon.web.commands import assignments, command_line


def test_words_are_quoted_and_options_without_a_value_left_out() -> None:
    found = command_line("edit", "a model", None, method="jeep", set=["low=[2]", "steps=3"], store=Path("it's"))
    assert found == """retcon edit 'a model' --method jeep --set 'low=[2]' --set steps=3 --store 'it'"'"'s'"""
    assert command_line("complete", "m", "", chat=True) == "retcon complete m '' --chat"
    assert command_line("revert", fact="x", repropose=False, editor=None) == "retcon revert --fact x"


def test_a_word_that_looks_like_an_option_is_none() -> None:
    found = command_line("complete", "m", "-x y", chat=True, delta="-d", how=" --packed")
    assert found == "retcon complete --chat --delta -d --packed -- m '-x y'"
    assert command_line("amend", "a", target="-x", how=" --packed") == "retcon amend a --target -x --packed"


def test_settings_are_written_as_they_are_set() -> None:
    assert assignments({"low": (2,), "threshold": None, "stop": "loss"}) == ["low=[2]", "threshold=none", "stop=loss"]
