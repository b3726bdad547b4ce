"""How much memory is free."""

import math
from pathlib import Path

import pytest

from retcon.lm import capacity


def test_a_containers_limit_counts_and_files_that_were_read_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(capacity, "_pages_free", lambda: 10**12)
    assert capacity._container_free() == math.inf
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 450\nactive_file 50\n")
    assert capacity._container_free() == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert capacity.free_bytes("cpu") == 850
