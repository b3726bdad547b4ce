"""Damaged caches of every kind: `python -m tests.attacks.damaged`.

Runs are cut so that every kind of file is there: fingerprints, second moments, matrices made from them, partial sums,
plans, searched values, a search that was begun, records of the unedited model, units and deltas of a benchmark. Each
trial damages one: a bit flipped, the file cut, emptied, another one in its place, another format, another computation.
The run that reads it must give the result of an undamaged one, to the bit, and a warning that names the file, or
refuse it by name.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from retcon.bench import units
from retcon.checked import checksum
from retcon.memory import collect
from retcon.memory.values.store import BegunChunk, ValueCache
from tests.attacks.processes import BENCH, EDIT, MOMENTS, furnish, result_of_bench, result_of_edit, result_of_moments
from tests.attacks.processes import run as run_command
from tests.attacks.tally import Tally, main


class Cut(BaseException):
    """What a signal does."""


def _cutting(real: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The function, until it has been called so often."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == after:
            raise Cut
        calls += 1
        return real(*args, **kwargs)

    return call


def states(root: Path) -> dict[str, tuple[tuple[str, ...], Callable[[Path], str]]]:
    """Make folders that runs were cut in; return the command that goes on in each, and how to read its result."""
    made: list[tuple[str, tuple[str, ...], Any, str, Any]] = [
        ("searched", EDIT, ValueCache, "discard", lambda self: None),
        ("begun", EDIT, BegunChunk, "save_if_due", _cutting(BegunChunk.save_if_due, 2)),
        ("passing", MOMENTS, collect.SumOfChunk, "__call__", _cutting(collect.SumOfChunk.__call__, 1)),
        ("measured", BENCH, units.Units, "save", _cutting(units.Units.save, 1)),
    ]
    for name, command, owner, attribute, instead in made:
        real = getattr(owner, attribute)
        setattr(owner, attribute, instead)
        try:
            run_command(command, root / name)
        except Cut:
            pass
        finally:
            setattr(owner, attribute, real)
    readers = {EDIT: result_of_edit, MOMENTS: result_of_moments, BENCH: result_of_bench}
    (root / "searched" / "delta.safetensors").unlink()
    return {name: (command, readers[command]) for name, command, *_ in made}


def kind_of(path: Path) -> str:
    """What a file is."""
    if "moments" in path.parts:
        return "partial sums" if path.suffix == ".partial" else ("derived" if path.suffix == ".derived" else "moment")
    if "values" in path.parts:
        return "plan" if path.stem == "plan" else ("begun" if path.suffix == ".begun" else "values")
    return {"fingerprints": "fingerprint", "pre": "unedited", "units": "unit", "deltas": "delta"}[path.parent.name]


def checked_files(folder: Path) -> list[Path]:
    """The files of a folder that are believed after reading."""
    ends = (".safetensors", ".derived", ".partial", ".begun")
    found = [p for p in folder.rglob("*") if p.suffix in ends and p.parent != folder]
    return sorted(p for p in found if p.parent.name != "deltas" or (p.parents[1] / "units" / p.name).exists())


def _rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a file's record, its checksum made to fit."""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["retcon"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    seal = "seal" if "keys" in record else "check"
    record.pop(seal)
    change(record)
    record[seal] = checksum(record, {} if seal == "seal" else tensors)
    save_file(tensors, path, metadata={"retcon": json.dumps(record)})


def _other_format(record: dict[str, Any]) -> None:
    record["format"] = 99 if isinstance(record["format"], int) else "retcon-moments-99"


def _other_computation(record: dict[str, Any]) -> None:
    for place in (record, *record.get("keys", [])):
        place["computation"] = 99


def damage(rng: random.Random, path: Path, others: list[Path]) -> str:
    """Damage a file in a way drawn at random; return which."""
    whole = path.read_bytes()
    how = rng.choice(["flipped", "flipped", "flipped", "cut", "emptied", "swapped", "format", "computation"])
    if how == "flipped":
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        return f"flipped at {at} of {len(whole)}"
    if how == "cut":
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "swapped":
        shutil.copyfile(rng.choice(others), path)
    elif kind_of(path) != "delta":
        _rewritten(path, _other_format if how == "format" else _other_computation)
    else:
        path.write_bytes(whole[:-1])
    return how


def trial(
    root: Path, state: str, kind: str, rng: random.Random, command: tuple[str, ...], wanted: tuple[Any, str]
) -> str | None:
    """Damage one file of a kind and go on; what did not hold, or None."""
    result, digest = wanted
    folder = root / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / state, folder)
    files = checked_files(folder)
    path = rng.choice([p for p in files if kind_of(p) == kind])
    same = [p for p in files if p != path and kind_of(p) == kind and p.read_bytes() != path.read_bytes()]
    how = damage(rng, path, same or [p for p in files if p != path])
    shown = f"{kind} {how} ({path.name})"
    try:
        said = run_command(command, folder)
    except AssertionError as error:
        said = str(error)
        return None if path.name in said and "error:" in said else f"failed: {shown}: {said[-300:]!r}"
    except Exception as error:
        return f"traceback: {shown}: {type(error).__name__}: {error}"
    if result(folder) != digest:
        return f"used: {shown}"
    if path.name not in " ".join(said.split()):
        return f"no warning: {shown}: {said[-300:]!r}"
    return None


def attack(n: int, seed: int) -> Tally:
    """`n` trials, kind by kind."""
    rng, tally = random.Random(seed), Tally("damaged")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        furnish(root)
        collect.SAVE_EVERY = 0.0
        known = states(root)
        kinds = sorted({(name, kind_of(p)) for name in known for p in checked_files(root / name)})
        kinds.remove(("searched", "moment"))  # what is made from it is there, so that it is not read
        wanted = {}
        for name, (command, result) in known.items():
            shutil.copytree(root / name, root / "run")
            said = run_command(command, root / "run")
            assert "not used" not in said, said
            wanted[name] = result, result(root / "run")
            shutil.rmtree(root / "run")
        for i in range(n):
            state, kind = kinds[i % len(kinds)]
            tally.count(trial(root, state, kind, rng, known[state][0], wanted[state]))
    tally.notes["kinds"] = len({kind for _, kind in kinds})
    return tally


if __name__ == "__main__":
    main(attack, 100, __doc__)
