"""Input that cannot be used, at every door: `python -m tests.attacks.malformed`.

Files of edits, settings, benchmark files, deltas, checkpoints and command lines, each broken in a way drawn at random.
Each must end in an error without a traceback that names what is wrong, an exit code that is not 0, no output, and
every file that was there as it was.
"""

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from retcon.checked import checksum
from retcon.cli import app
from tests.attacks.tally import Tally, main
from tests.cli.conftest import EDIT, ROWS
from tests.conftest import tiny_model, tokenizer

Broken = tuple[list[str], str]
"""Command line, and what its error has to name (a regular expression)."""

QUICK = ("--corpus", "corpus.txt", "--set", "steps=1", "--set", "low=[0, 1]", "--set", "high=[2, 3]", "--require", "0")
BENCH = """\
[[models]]
name = "gptj"
corpus = "corpus.txt"
[[methods]]
name = "jeep"
settings = {steps = 1, low = [0, 1], high = [2, 3]}
[[datasets]]
path = "edits.jsonl"
[[protocols]]
kind = "batch"
[measures]
generate = false
"""


def furnish() -> None:
    """A checkpoint, a corpus, edits, a benchmark file and a delta in the current directory."""
    tiny_model("gptj", torch.float32).save_pretrained("gptj")
    tokenizer("gpt").save_pretrained("gptj")
    text = [f"The capital of France is Paris, and {i} of {i * i} trains go home." for i in range(60)]
    Path("corpus.txt").write_text("\n\n".join(text))
    Path("edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("bench.toml").write_text(BENCH)
    made = CliRunner().invoke(app, [*EDIT, "--require", "0"])
    assert made.exit_code == 0, made.output
    Path("kept").mkdir()
    (Path("kept") / "notes.txt").write_text("mine")
    os.mkfifo("pipe")


LINE: list[int] = []
"""Where in this file the last break is written, for whoever looks for a fault."""


def _broken(rng: random.Random, kinds: list[Callable[[], Any]]) -> Any:
    kind = rng.choice(kinds)
    LINE[:] = [kind.__code__.co_firstlineno] if hasattr(kind, "__code__") else []
    return kind()


# --- edits -----------------------------------------------------------------------------------------------------------


def _row(rng: random.Random, change: Callable[[dict[str, Any]], Any]) -> bytes:
    rows = [dict(row) for row in ROWS]
    at = rng.randrange(len(rows))
    rows[at] = changed if (changed := change(rows[at])) is not None else rows[at]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {k: v for k, v in row.items() if k != name}


def _with(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {**row, name: value}


FIELDS = ("prompt", "subject", "target_new")
WRONG = (7, True, [], {}, 1.5, ["France"], [[["deep"]]])


def edits(rng: random.Random) -> Broken:
    good = Path("edits.jsonl").read_bytes()
    whole = _row(rng, lambda row: row)
    kinds: list[Callable[[], bytes]] = [
        lambda: _row(rng, _without(rng.choice(("prompt", "target_new")))),
        lambda: _row(rng, _with(rng.choice(FIELDS), rng.choice(WRONG[:-2]))),
        lambda: _row(rng, _with(rng.choice(FIELDS[:-1]), rng.choice(WRONG))),  # a list of answers is one way to say it
        lambda: _row(rng, _with(rng.choice(("prompt", "target_new")), rng.choice(("", "  ", "\n")))),
        lambda: _row(rng, _with("subject", "Atlantis and Mu")).replace(b"{}", b"it"),
        lambda: _row(rng, _with("prompt", "{} is to {} as")),
        lambda: _row(rng, lambda row: rng.choice(([], "text", 3, None, [row])) or 0),
        lambda: _row(rng, _with("target_new", "\ud800")),
        lambda: _row(rng, _with("prompt", "The capital of {} is " + "very " * 400)),
        lambda: whole[: rng.randrange(len(whole) - 40, len(whole) - 3)],
        lambda: whole.replace(b'"', b"'"),
        lambda: b"\xff\xfe" + whole.decode().encode("utf-16-le"),
        lambda: whole.replace(b"France", b"Fran\xe7ois"),
        lambda: b"[" * rng.choice((2_000, 200_000)),
        lambda: b'{"prompt": ' * 100_000,
        lambda: json.dumps(ROWS).encode().replace(b'"France"', b"1" * 9000),
        lambda: b"",
        lambda: b"\n \n",
        lambda: b"\x00" * 40,
        lambda: b"null",
        lambda: b"[]",
        lambda: b"{}",
        lambda: b'"a text"',
        lambda: whole.replace(b"}\n", b"}"),
        lambda: whole + good.replace(b"Rome", b"Oslo"),
        lambda: b"prompt,subject\nThe capital of {} is,France\n",
        lambda: b"PK\x03\x04" + rng.randbytes(200),
    ]
    data = _broken(rng, kinds)
    suffix = ".csv" if data.startswith(b"prompt,") else rng.choice((".jsonl", ".json"))
    Path(f"bad{suffix}").write_bytes(data)
    return ["edit", "gptj", f"bad{suffix}", "--out", "out.safetensors", *QUICK], rf"bad\{suffix}|'(fr|dd)'|edit"


# --- settings --------------------------------------------------------------------------------------------------------

SETTINGS = (
    *("steps=many", "steps=1.5", "steps=nan", "steps=true", "steps=0", "steps=-3", "steps=[1]", "steps="),
    *("learning_rate=inf", "learning_rate=nan", "learning_rate=fast", "learning_rate=-1", "learning_rate=true"),
    *("layers=[]", 'layers=["a"]', "layers=[99]", "layers=[-1]", "layers=[1, 1]", "layers=[2, 1]", "layers=all"),
    *("stap=3", "=3", "steps", "clamp=-1", "clamp=nan", "moment_weight=nan", "moment_weight=inf", "moment_weight=x"),
    *("layer=99", "layer=-1", "layer=x", "layer=1.5"),
)


def settings(rng: random.Random) -> Broken:
    method = rng.choice(("memit", "rome", "emmet", "pmet", "alphaedit", "jeep", "kne", "ctp", "rect", "nomethod"))
    bad = rng.choice(SETTINGS)
    if rng.random() < 0.5:
        command = ["edit", "gptj", "edits.jsonl", "--out", "out.safetensors", "--corpus", "corpus.txt"]
        named = re.escape(bad.partition("=")[0] or "=") + "|nomethod"
        return [*command, "--method", method, "--set", bad, "--require", "0"], named
    name, _, value = bad.partition("=")
    table = BENCH.replace('"jeep"', json.dumps(method))
    broken = f"{{{name} = {value}}}" if name and value else "{="
    Path("bad.toml").write_text(table.replace("{steps = 1, low = [0, 1], high = [2, 3]}", broken))
    return ["bench", "bad.toml", "--out", "out"], rf"{re.escape(name)}|bad\.toml|{method}"


def bench(rng: random.Random) -> Broken:
    changes = [
        ("[[models]]", "[[model]]"),
        ('name = "gptj"', "name = 3"),
        ('name = "gptj"', 'name = "./nowhere"'),
        ('name = "jeep"', 'name = "nomethod"'),
        ('path = "edits.jsonl"', 'path = "nowhere.json"'),
        ('path = "edits.jsonl"', "path = []"),
        ('path = "edits.jsonl"', 'path = "corpus.txt"'),
        ('path = "edits.jsonl"', 'path = "edits.jsonl"\nlimit = -1'),
        ('kind = "batch"', 'kind = "later"'),
        ('kind = "batch"', 'kind = "batch"\nn = "many"'),
        ('kind = "batch"', 'kind = "sequential"\ncheckpoints = [0]'),
        ("generate = false", "generate = 1"),
        ("generate = false", "generate = false\nnothing = 1"),
        ('corpus = "corpus.txt"', 'corpus = "nowhere.txt"'),
        ("[measures]", "[measures"),
        ("[measures]", "seeds = []\n[measures]"),
        ("[[methods]]", "[[methods]]\n[[methods]]"),
        ('name = "gptj"', 'name = "gptj"\ndtype = "float3"'),
    ]
    old, new = rng.choice(changes)
    data = BENCH.replace(old, new).encode()
    if rng.random() < 0.3:
        data = rng.choice(
            (b"", b"\xff\xfe\x00", b"a = 1", rng.randbytes(300), b"x = " + b"[" * 50_000, data[:-40] + b"[[")
        )
    Path("bad.toml").write_bytes(data)
    return ["bench", "bad.toml", "--out", "out"], r"bad\.toml|nowhere|nomethod|corpus\.txt|float3|checkpoints|limit"


# --- deltas ----------------------------------------------------------------------------------------------------------


def _rewritten(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> bytes:
    """The good delta with its tensors and record changed, the checksum right again."""
    tensors = load_file("delta.safetensors")
    with safe_open("delta.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["retcon"])
    change(tensors, record)
    record.pop("check", None)
    record["check"] = checksum(record, tensors)
    save_file(tensors, "made.safetensors", metadata={"retcon": json.dumps(record)})
    data = Path("made.safetensors").read_bytes()
    Path("made.safetensors").unlink()
    return data


def deltas(rng: random.Random) -> Broken:
    good = Path("delta.safetensors").read_bytes()
    n_header = int.from_bytes(good[:8], "little")

    def flipped() -> bytes:
        raw = bytearray(good)
        raw[rng.randrange(8 + n_header, len(raw))] ^= 1 << rng.randrange(8)
        return bytes(raw)

    def tensor(make: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
        def change(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
            name = rng.choice([n for n in tensors if n.startswith("change/")])
            tensors[name] = make(tensors[name]).contiguous()

        return _rewritten(change)

    def named(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        name = rng.choice([n for n in tensors if n.startswith("change/")])
        other = rng.choice(("change/nowhere/0/dense/full", "change/x", "change/a/b/c/d", name + "x"))
        tensors[other] = tensors.pop(name)

    def recorded(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        name = rng.choice(
            ("format", "base", "id", "parents", "report", "edits", "contexts", "provenance", "supersedes")
        )
        of_no_use: tuple[Any, ...] = (None, 7, "x" * 9, [1], ["x"], [[]])
        record[name] = rng.choice(of_no_use if name == "provenance" else (*of_no_use, {"a": 1}))

    kinds: list[Callable[[], bytes]] = [
        flipped,
        lambda: good[: rng.randrange(0, len(good) - 1)],
        lambda: (10**15).to_bytes(8, "little") + good[8:],
        lambda: rng.randbytes(500),
        lambda: b"",
        lambda: good[:8] + b"{" * n_header + good[8 + n_header :],
        lambda: tensor(lambda t: t.reshape(-1)),
        lambda: tensor(lambda t: t[:, :0] if t.dim() > 1 else t[:0]),
        lambda: tensor(lambda t: t * float("nan")),
        lambda: tensor(lambda t: t.double() * 1e300),
        lambda: tensor(lambda t: t.to(torch.float8_e4m3fn)),
        lambda: tensor(lambda t: t.to(torch.int64)),
        lambda: tensor(lambda t: torch.cat([t, t])),
        lambda: _rewritten(named),
        lambda: _rewritten(recorded),
        lambda: Path("gptj/model.safetensors").read_bytes(),
        lambda: Path("edits.jsonl").read_bytes(),
    ]
    Path("bad.safetensors").write_bytes(_broken(rng, kinds))
    command = rng.choice(
        (
            ["apply", "gptj", "bad.safetensors", "--save", "out"],
            ["complete", "gptj", "The capital of France is", "--delta", "bad.safetensors"],
            ["check", "gptj", "--delta", "bad.safetensors", "--cases", "edits.jsonl"],
            ["export", "gptj", "bad.safetensors", "--format", "peft", "--out", "out"],
        )
    )
    return command, r"bad\.safetensors|transformer\.|delta|nowhere"


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoints(rng: random.Random) -> Broken:
    shutil.copytree("gptj", "bad")
    config, weights = Path("bad/config.json"), Path("bad/model.safetensors")
    about = json.loads(config.read_text())

    def setting(name: str, value: Any) -> None:
        config.write_text(json.dumps({**about, name: value}))

    def tokenizer_text(change: Callable[[dict[str, Any]], Any]) -> None:
        path = Path("bad/tokenizer.json")
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))

    def more_tokens(table: dict[str, Any]) -> None:
        vocabulary = table["model"]["vocab"]
        for i in range(len(vocabulary), 700):
            vocabulary[f"extra{i}"] = i

    def other_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights, metadata={"format": "pt"})

    def one_lost(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(rng.choice(sorted(tensors)))

    def one_narrow(tensors: dict[str, torch.Tensor]) -> None:
        name = rng.choice([n for n, t in tensors.items() if t.dim() == 2])
        tensors[name] = tensors[name][:, :-1].contiguous()

    of_weights: list[Callable[[], Any]] = [
        lambda: weights.write_bytes(weights.read_bytes()[: rng.randrange(0, 20_000)]),
        lambda: weights.write_bytes(rng.randbytes(4000)),
        weights.unlink,
        lambda: weights.rename("bad/pytorch_model.bin"),
        lambda: other_weights(one_lost),
        lambda: other_weights(one_narrow),
        lambda: setting("n_layer", 9),
    ]
    kinds: list[Callable[[], Any]] = [
        lambda: config.write_text(config.read_text()[: rng.randrange(1, 200)]),
        lambda: config.write_text(rng.choice(("", "[]", "null", "7", "[" * 5000))),
        config.unlink,
        lambda: setting("model_type", rng.choice(("nothing", 3, None, ["gptj"]))),
        lambda: setting("n_layer", rng.choice(("four", -1, None, 2.5))),
        lambda: setting("n_embd", rng.choice(("wide", -32, 33, 0, None))),
        lambda: setting("n_head", rng.choice((0, -1, "x", 7))),
        lambda: setting("vocab_size", rng.choice((0, -5, "many", 1))),
        lambda: setting("quantization_config", {"quant_method": rng.choice(("gptq", "awq", "odd"))}),
        lambda: tokenizer_text(more_tokens),
        lambda: tokenizer_text(lambda table: table.pop("model")),
        lambda: Path("bad/tokenizer.json").write_text(rng.choice(("", "{", "[]", "null"))),
    ]
    needs_weights = rng.random() < 0.3
    _broken(rng, of_weights if needs_weights else kinds)
    needs_weights |= config.exists() and "quantization_config" in config.read_text()
    command = rng.choice(
        (
            ["complete", "bad", "The capital of France is"],
            ["edit", "bad", "edits.jsonl", "--out", "out.safetensors", *QUICK],
            ["apply", "bad", "delta.safetensors", "--save", "out"],
            ["complete", "bad", "Rome"] if needs_weights else ["methods", "bad"],  # which reads no weights
        )
    )
    return command, "bad"


# --- the command line ------------------------------------------------------------------------------------------------


def command_line(rng: random.Random) -> Broken:
    edit = ["edit", "gptj", "edits.jsonl", *QUICK]
    complete = ["complete", "gptj", "The capital of France is"]
    return rng.choice(
        [
            (["edit", "gptj", "edits.jsonl"], "--out"),
            ([*edit, "--out", "kept"], "kept"),
            ([*edit, "--out", "pipe"], "pipe"),
            ([*edit, "--out", "/dev/null"], "/dev/null"),
            ([*edit, "--out", "edits.jsonl"], "edits.jsonl"),
            ([*edit, "--out", "corpus.txt"], "corpus.txt"),
            ([*edit, "--out", "bench.toml"], "bench.toml"),
            ([*edit, "--out", "corpus.txt/out.safetensors"], "corpus.txt"),
            ([*edit, "--out", "out.safetensors", "--limit", "0"], "limit"),
            ([*edit, "--out", "out.safetensors", "--limit", "x"], "limit"),
            ([*edit, "--out", "out.safetensors", "--start", "99"], "nothing to edit|start"),
            ([*edit, "--out", "out.safetensors", "--seed", "x"], "seed"),
            ([*edit, "--out", "out.safetensors", "--device", "mps"], "mps"),
            ([*edit, "--out", "out.safetensors", "--device", "cuda:9"], "cuda:9"),
            ([*edit, "--out", "out.safetensors", "--device", "gpu"], "gpu"),
            ([*edit, "--out", "out.safetensors", "--dtype", "float3"], "float3"),
            ([*edit, "--out", "out.safetensors", "--preset", "jeep/none/none"], "jeep/none/none"),
            ([*edit, "--out", "out.safetensors", "--dataset", "nodata"], "nodata"),
            ([*edit, "--out", "out.safetensors", "--format", "odd"], "odd"),
            ([*edit, "--out", "out.safetensors", "--delta", "nowhere.safetensors"], "nowhere"),
            ([*edit, "--out", "out.safetensors", "--corpus", "nowhere.txt"], "nowhere"),
            ([*edit, "--out", "out.safetensors", "--corpus", "kept"], "kept"),
            ([*edit, "--out", "out.safetensors", "--require", "2"], "require"),
            ([*edit, "--out", "out.safetensors", "--nothing"], "nothing"),
            (["edit", "./nowhere", "edits.jsonl", "--out", "out.safetensors"], "nowhere"),
            (["edit", "gptj", "nowhere.jsonl", "--out", "out.safetensors"], "nowhere"),
            (["edit", "gptj", "kept", "--out", "out.safetensors"], "kept"),
            (["complete", "demo:nothing", "The capital"], "nothing"),
            (["complete", "gptj", ""], "empty"),
            (["complete", "gptj", "very " * 2000], "very very .*128"),
            ([*complete, "--delta", "gptj"], "gptj"),
            ([*complete, "--delta", "pipe"], "pipe"),
            (["apply", "gptj", "delta.safetensors", "--save", "kept"], "kept"),
            (["apply", "gptj", "delta.safetensors", "--save", "kept", "--force"], "kept"),
            (["apply", "gptj", "delta.safetensors", "--save", "gptj", "--force"], "gptj"),
            (["apply", "gptj", "delta.safetensors", "--save", "corpus.txt", "--force"], "corpus.txt"),
            (["apply", "gptj", "delta.safetensors", "delta.safetensors", "--save", "out"], "twice"),
            (["export", "gptj", "delta.safetensors", "--format", "odd", "--out", "out"], "odd"),
            (["report", "kept"], "kept"),
            (["report", "nowhere"], "nowhere"),
            (["bench", "nowhere.toml", "--out", "out"], "nowhere"),
            (["bench", "bench.toml", "--out", "corpus.txt"], "corpus.txt"),
            (["moments", "gptj", "--corpus", "corpus.txt", "--layers", "9"], "9"),
            (["moments", "gptj", "--corpus", "corpus.txt", "--layers", "x"], "x"),
            (["frobnicate"], "frobnicate"),
        ]
    )


DOORS = (edits, settings, bench, deltas, checkpoints, command_line)


def _files() -> dict[str, str]:
    """Hash of every file here, without the cache and the broken inputs."""
    found = [p for p in Path().rglob("*") if p.is_file() and p.parts[0] != "cache" and not p.parts[0].startswith("bad")]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def trial(rng: random.Random, door: Callable[[random.Random], Broken]) -> str | None:
    """One broken input; what did not hold, or None."""
    for left in (*Path().glob("bad*"), *Path().glob("out*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    LINE.clear()
    before = _files()
    command, named = door(rng)
    ran = CliRunner().invoke(app, command)
    shown = f"{door.__name__} {LINE}: {' '.join(command)[:200]}"
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        return f"traceback: {shown}: {type(ran.exception).__name__}: {str(ran.exception)[:300]}"
    if ran.exit_code == 0:
        return f"accepted: {shown}: {ran.output[-300:]!r}"
    errors = (re.findall("^error: .*$", ran.stderr, re.MULTILINE) or [ran.stderr])[-1]
    if not re.search(named, errors, re.DOTALL):
        return f"not named: {shown}: {errors[:300]!r}"
    if (after := _files()) != before or Path("out").exists():
        return f"output: {shown}: {sorted(set(after) ^ set(before))}"
    return None


def attack(n: int, seed: int) -> Tally:
    """`n` broken inputs, door by door."""
    rng, tally = random.Random(seed), Tally("malformed")
    warnings.simplefilter("ignore")
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["RETCON_CACHE"] = str(Path(folder) / "cache")
        try:
            furnish()
            for i in range(n):
                tally.count(trial(rng, DOORS[i % len(DOORS)]))
        finally:
            os.chdir(here)
    tally.notes["doors"] = len(DOORS)
    return tally


if __name__ == "__main__":
    main(attack, 500, __doc__)
