"""The examples run as they are, and print what they are there to show."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWS = {"one_fact": "edited:  Norway", "store": "retcon verify", "compare": "memit"}


def test_every_script_is_known_and_fits_a_screen() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert [path.stem for path in scripts] == sorted(SHOWS)
    assert all(len(path.read_text().splitlines()) <= 30 for path in scripts)


@pytest.mark.long
@pytest.mark.parametrize("name", SHOWS)
def test_the_script_runs(name: str, tmp_path: Path) -> None:
    script = EXAMPLES / f"{name}.py"
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert SHOWS[name] in ran.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    book = nbformat.read(EXAMPLES / "first_edit.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in book.cells), "the notebook is kept without outputs"
    client.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = ["".join(o.get("text", "") for o in cell.get("outputs", ())) for cell in book.cells]
    assert any("Norway" in text for text in texts)
    assert any("the same" in text for text in texts)
