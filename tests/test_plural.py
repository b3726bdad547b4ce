"""How a number of things is written."""

from retcon.plural import plural


def test_one_and_many() -> None:
    assert [plural(n, "edit") for n in (0, 1, 1200)] == ["0 edits", "1 edit", "1,200 edits"]
    assert [plural(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
