"""A store with many facts: how long `log`, `show` and `diff` take, what a checkout, `verify` and writing again cost.

    python -m benchmarks.store
    python -m benchmarks.store --again 400
    python -m benchmarks.store --checkout 100
    python -m benchmarks.store --verify 200

The first prints seconds of whole commands, the start of Python included, on a store of 10,000 facts in 100 entries (and
no delta files, since these commands read none): of the clock, and of the processor, which other programs on the machine
touch less. The second edits N facts of the embedded world by JEEP and by MEMIT, takes one fact out, and prints what
that took of the processor beside the whole edit; and of the lowest layer, whose keys alone do not depend on what is
written, what reading them takes and whether they are the same without the fact. The third makes so many entries and
prints what a checkout takes beside reading and applying the same deltas. The fourth edits N facts in two entries and
prints what `verify` takes beside `check` on the same facts and deltas.
"""

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

import retcon
from benchmarks.common import command_line, timed
from retcon import world
from retcon.atomic import write_atomically
from retcon.edits import Case, Edit, Query
from retcon.lm.forward import Point
from retcon.memory.contexts import Contexts
from retcon.memory.keys import KeyReader
from retcon.store import Entry
from retcon.store.index import fact_line

processor = partial(timed, clock=time.process_time)
"""A call's result and the seconds of the processor that it took."""


def many(store: retcon.Store, n_entries: int, n_facts: int) -> None:
    """Fill a store with entries of facts, deltas left out."""
    lines, after = [], None
    for i in range(n_entries):
        delta, when = f"{i:016x}", "2026-01-01T00:00:00+00:00"
        entry = Entry.make("edit", f"batch {i}", time=when, after=after, sets={delta: (None, delta)})
        cases = []
        for j in range(n_facts // n_entries):
            edit = Edit("The town that subject {} lies in is", f"number {i}-{j}", f"town {j}", id=f"f{i}-{j}")
            queries = [Query(f"paraphrase/{k}", "paraphrase", f"{edit.text} ({k})", edit.target_new) for k in range(10)]
            cases.append(fact_line(Case(edit.id, (edit,), tuple(queries)), delta))
        write_atomically(store.path / "facts" / f"{entry.id}.jsonl", ("\n".join(cases) + "\n").encode())
        lines.append(entry.line)
        after = entry.id
    write_atomically(store.path / "log.jsonl", ("\n".join(lines) + "\n").encode())


def commands(n_entries: int = 100, n_facts: int = 10_000) -> None:
    """Time the commands that read no delta."""
    lm = retcon.load("demo:gptj")
    with TemporaryDirectory() as folder:
        store = retcon.Store.init(Path(folder) / "edits", lm)
        many(store, n_entries, n_facts)
        place = ("--store", str(store.path))
        runs = {
            "the first command, which makes the index": ("log", "-n", "1", *place),
            "log": ("log", *place),
            "show an entry": ("show", "HEAD", *place),
            "show a fact": ("show", "f50-50", *place),
            "diff HEAD~10": ("diff", "HEAD~10", *place),
            "diff base": ("diff", "base", *place),
            "retcon --version (Python and imports)": ("--version",),
        }
        for name, arguments in runs.items():
            best = min(command_seconds(arguments) for _ in range(1 if "first" in name else 3))
            print(f"{name:45} {best[0]:6.2f} s, processor {best[1]:.2f} s", flush=True)
        readers: dict[str, Callable[[retcon.Store], object]] = {"log": retcon.Store.log, "facts": retcon.Store.facts}
        for name, call in readers.items():
            _, took = timed(partial(call, retcon.Store(store.path)))
            print(f"{name + ', in a process that runs':45} {took:6.2f} s", flush=True)


def command_seconds(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Return the seconds of one whole command, by the clock and of the processor."""
    started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as installed
    subprocess.run([sys.executable, "-m", "retcon", *arguments], check=True, stdout=subprocess.DEVNULL, env=kept)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime - used.ru_utime + after.ru_stime - used.ru_stime


def rewriting(n: int) -> None:
    """Time an edit of `n` facts, and the same batch written again without one."""
    lm = retcon.load("demo:gptj")
    cases = world.cases(n, seed=0)
    for name in ("jeep", "memit"):
        with TemporaryDirectory() as folder:
            store = retcon.Store.init(Path(folder) / "edits", lm)
            _, edited = processor(partial(store.edit, lm, cases, retcon.method(name, for_model=lm)))
            entry, again = processor(partial(store.revert_fact, lm, cases[0].id))
            what = f"{again:.1f} s of it ({again / edited:.0%}), {entry.about['searched']} values searched"
            print(
                f"{name}: edit of {n} facts {edited:.1f} s of the processor; written again without one {what}",
                flush=True,
            )
            made = store.deltas()[0]
            lowest = min(map(int, re.findall(r"\.(\d+)\.", " ".join(made.changes))))
            with_it, seconds = keys_at(lm, [e for case in cases for e in case.edits], made.contexts, lowest)
            without, _ = keys_at(lm, list(made.edits), made.contexts, lowest)
            same = int((with_it[-len(without) :] == without).all(1).sum())
            print(
                f"{name}: the keys of layer {lowest}, the lowest that is written, are read in {seconds:.1f} s; "
                f"{same} of {len(without)} are the same to the bit without the fact",
                flush=True,
            )


def keys_at(lm: retcon.LM, edits: list[Edit], prefixes: Sequence[str], layer: int) -> tuple[Tensor, float]:
    """Return the edits' keys at a layer, and seconds of the processor that reading them takes."""
    contexts, key, mlp = Contexts(tuple(prefixes)), Point(layer, "key"), Point(layer, "mlp")
    return processor(lambda: KeyReader(lm, edits, contexts).read(key, "subject_last", mlp)[0])


def checking_out(n: int) -> None:
    """Time checkouts of a store of `n` entries, and reading and applying the same deltas."""
    lm = retcon.load("demo:gptj")
    method = retcon.method("memit", for_model=lm, steps=1)
    with TemporaryDirectory() as folder:
        store = retcon.Store.init(Path(folder) / "edits", lm)
        for case in world.cases(n, seed=0):
            store.edit(lm, [case], method)
        for name, at in {"the last entry": "HEAD", "the entry in the middle": f"HEAD~{n // 2}"}.items():
            files = store.paths(at)
            seconds: dict[str, float] = {}
            for _ in range(3):
                deltas, reading = processor(partial(list[retcon.Delta], map(retcon.Delta.load, files)))
                _, applying = processor(partial(list, map(lm.apply, deltas)))
                lm.revert_all()
                _, checkout = processor(partial(store.checkout, lm, at))
                lm.revert_all()
                for what, took in {"reading": reading, "applying": applying, "checkout": checkout}.items():
                    seconds[what] = min(took, seconds.get(what, took))
            print(
                f"{name}, {len(files)} deltas: checkout {seconds['checkout']:.2f} s of the processor; reading the same "
                f"files {seconds['reading']:.2f} s, applying them {seconds['applying']:.2f} s",
                flush=True,
            )
        store.checkout(lm, "HEAD")
        _, took = processor(lambda: store.checkout(lm, "HEAD~1"))
        print(f"one entry back: {took:.2f} s", flush=True)


def verifying(n: int) -> None:
    """Time `verify` on a store of `n` facts in two entries, and `check` on the same facts and deltas."""
    from retcon.evaluation.safety import check
    from retcon.store.verify import verify

    lm = retcon.load("demo:gptj")
    cases = world.cases(n, seed=0)
    with TemporaryDirectory() as folder:
        store = retcon.Store.init(Path(folder) / "edits", lm)
        for part in (cases[: n // 2], cases[n // 2 :]):
            store.edit(lm, part, retcon.method("memit", for_model=lm))
        deltas = store.deltas()
        runs = {
            "check": lambda: check(lm, cases, deltas),
            "verify": lambda: verify(store, lm),
            "verify, without the search for who broke what": lambda: verify(store, lm, bisect=False),
        }
        for name, run in runs.items():
            print(f"{name}: {n} facts, {processor(run)[1]:.1f} s of the processor", flush=True)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--again", type=int, metavar="N", help="facts edited, of which one is taken out")
    parser.add_argument("--checkout", type=int, metavar="N", help="entries of the store that is checked out")
    parser.add_argument("--verify", type=int, metavar="N", help="facts that are verified, and checked")
    asked = parser.parse_args()
    if asked.again:
        rewriting(asked.again)
    elif asked.checkout:
        checking_out(asked.checkout)
    elif asked.verify:
        verifying(asked.verify)
    else:
        commands()
