"""How a number of things is written."""


def plural(n: int, one: str, many: str = "") -> str:
    """Return a number of things for reading: "1 edit", "1,200 edits", and with `many` "3 entries"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
