"""What cannot be is refused before torch is imported, so in a moment: facts, settings, benchmark files, options."""

import json
import subprocess
import sys
from pathlib import Path

from retcon.methods.common.registry import METHODS, method_class, parents_of, setting_types
from retcon.methods.common.settings import types_of

EDIT = ["edit", "demo:gptj", "good.jsonl", "--out", "out.safetensors"]
BENCH = """\
[[models]]
name = "demo:gptj"
[[methods]]
name = "memit"
settings = {steps = 3}
[[datasets]]
path = "good.jsonl"
[[protocols]]
kind = "batch"
n = 1
"""
PROBED = ("demo:gptj", "--cases", "good.jsonl", "--out", "stem")
REFUSED = [
    (["edit", "demo:gptj", "bad.jsonl", "--out", "out.safetensors"], "bad.jsonl"),
    (["edit", "demo:gptj", "deep.json", "--out", "out.safetensors"], "deep.json"),
    (["edit", "demo:gptj", "nowhere.jsonl", "--out", "out.safetensors"], "nowhere.jsonl"),
    (["check", "demo:gptj", "--delta", "d.safetensors", "--cases", "bad.jsonl"], "bad.jsonl"),
    (["tune", "demo:gptj", "bad.jsonl"], "bad.jsonl"),
    (["tune", "demo:gptj", "good.jsonl", "--set", "steps=1.5"], "whole number"),
    (["probe", "layers", "demo:gptj", "--cases", "bad.jsonl", "--out", "stem"], "bad.jsonl"),
    ([*EDIT, "--set", "steps=many"], "whole number"),
    ([*EDIT, "--set", "steps=true"], "whole number"),
    ([*EDIT, "--set", "learning_rate=inf"], "finite"),
    ([*EDIT, "--set", f"learning_rate=1{'0' * 400}"], "finite"),
    ([*EDIT, "--set", "learning_rate=-1"], "must not be negative"),
    ([*EDIT, "--set", "steps=0"], "must be at least 1"),
    ([*EDIT, "--set", "low=[2, 1]"], "must ascend"),
    ([*EDIT, "--method", "memit", "--set", "layers=[]"], "nothing to edit"),
    ([*EDIT, "--method", "pmet", "--set", "clamp=-0.5"], "must not be negative"),
    ([*EDIT, "--method", "ctp", "--set", "n_positive=0"], "must be at least 1"),
    ([*EDIT, "--method", "kne", "--set", "layers=[3, 3]"], "must ascend"),
    ([*EDIT, "--method", "emmet", "--set", "moment_weight=0"], "must be positive"),
    ([*EDIT, "--method", "ft", "--set", "box=-1"], "must not be negative"),
    ([*EDIT, "--method", "kn", "--set", "n_prefixes=-1"], "must not be negative"),
    ([*EDIT, "--method", "lora", "--set", "rank=0"], "must be at least 1"),
    ([*EDIT, "--method", "malmen", "--set", "clip=-1"], "must be positive"),
    ([*EDIT, "--set", "stepps=3"], "did you mean 'steps'"),
    ([*EDIT, "--method", "memit", "--set", 'layers=["a"]'], "whole number"),
    ([*EDIT, "--method", "rect", "--set", "base_method=rom"], "no method 'rom'"),
    ([*EDIT, "--preset", "jeep/none/none"], "jeep/none/none"),
    ([*EDIT, "--corpus", "nowhere.txt"], "nowhere.txt"),
    ([*EDIT, "--out", "good.jsonl"], "good.jsonl is an input"),
    (["bench", "broken.toml"], "broken.toml"),
    (["bench", "setting.toml"], "steps must be a whole number"),
    (["bench", "method.toml"], "no method 'memot'"),
    (["bench", "path.toml"], "nowhere.jsonl"),
    (["bench", "many.toml"], "asks for 999 cases"),
    (["bench", "latin.toml"], "latin.txt: not UTF-8 text (byte 3); save it as UTF-8"),
    (
        ["check", "demo:gptj", "--delta", "d.safetensors", "--cases", "good.jsonl", "--text", "latin.txt"],
        "latin.txt: not",
    ),
    (["probe", "contrast", *PROBED, "--corpus", "good.jsonl", "--stopwords", "latin.txt"], "latin.txt: not"),
]

RUN = """
import io, json, sys
from contextlib import redirect_stderr
from retcon.cli import app

answers = []
for command in json.loads(sys.argv[1]):
    said, code = io.StringIO(), 0
    sys.stderr = said
    try:
        app(command, prog_name="retcon", standalone_mode=True)
    except SystemExit as end:
        code = end.code
    sys.stderr = sys.__stderr__
    answers.append((code, said.getvalue(), sorted({"torch", "transformers", "numpy"} & set(sys.modules))))
print(json.dumps(answers))
"""


def test_what_cannot_be_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    good = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
    (tmp_path / "good.jsonl").write_text(json.dumps(good))
    (tmp_path / "bad.jsonl").write_text(json.dumps({**good, "target_new": 7}))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    bench = {
        "broken": BENCH[:-20] + "[[",
        "setting": BENCH.replace("= 3", "= 1.5"),
        "method": BENCH.replace("memit", "memot"),
        "path": BENCH.replace("good", "nowhere"),
        "many": BENCH.replace("n = 1", "n = 999"),
        "latin": f'text = "latin.txt"\n{BENCH}',
    }
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name, text in bench.items():
        (tmp_path / f"{name}.toml").write_text(text)
    before = sorted(tmp_path.iterdir())
    commands = json.dumps([command for command, _ in REFUSED])
    ran = subprocess.run(
        [sys.executable, "-c", RUN, commands], capture_output=True, text=True, cwd=tmp_path, timeout=100, check=True
    )
    for (command, named), (code, said, heavy) in zip(REFUSED, json.loads(ran.stdout), strict=True):
        assert code == 2, (command, said)
        assert named in said.replace("\n", " "), (command, said)
        assert heavy == [], command
    assert sorted(tmp_path.iterdir()) == before


def test_settings_are_read_from_the_source_as_python_has_them() -> None:
    for name in METHODS:
        chosen = method_class(name)
        assert list(setting_types(name).items()) == list(types_of(chosen).items()), name
        own = {method_class(other): other for other in METHODS}
        assert parents_of(name) == tuple(own[base] for base in chosen.__mro__[1:] if base in own)
