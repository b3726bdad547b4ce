"""An export goes into a real server, and its answers are checked over loopback."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

import retcon
from retcon.edits import Case, Edit, Query
from retcon.evaluation.endpoint import Endpoint
from retcon.evaluation.safety import Thresholds, check_endpoint
from retcon.export import export

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("fastapi") is None or find_spec("openai") is None, reason="needs fastapi and openai"),
]
SECONDS = 300
"""Until a server answers, on a busy machine."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of `transformers serve` for a checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = shutil.which("transformers", path=str(Path(sys.executable).parent))
    assert program is not None
    command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder.parent / "hub")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + SECONDS
        try:
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    assert server.poll() is None, "the server ended"
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            yield address
        finally:
            server.terminate()


def test_a_merged_checkpoint_answers_from_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    lm = retcon.load("demo:gptj")
    edit = Edit("{} lies within the borders of", "Geneva", "Norway", id="geneva")
    case = Case("geneva", (edit,), (Query("rewrite/0", "rewrite", edit.text, "Norway", None, (("Norway",),)),))
    asked = Thresholds(took=0, generalised=0)
    export(lm, tmp_path / "base", format="hf")
    lm.apply(retcon.method("jeep", for_model=lm).propose(lm, [edit]))
    export(lm, tmp_path / "edited", format="hf")
    for name, share in (("base", 0.0), ("edited", 1.0)):
        with served(tmp_path / name) as address:
            endpoint = Endpoint(url=address, model=str(tmp_path / name), timeout=SECONDS)
            assert check_endpoint(endpoint, [case], thresholds=asked)["took"].value == share
